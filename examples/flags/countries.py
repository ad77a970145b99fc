"""What is asked about the flags: countries, facts, and the English of questions, pages and turns.

A question shows a flag and asks for the country's name, or for a fact about it. The wording is such that what the
language model read in pre-training is within its reach: "The capital of Peru is" is how encyclopedias say it. At two
places a turn can take either of two ways, and each time they are words of one softmax:

    This is the flag of | Peru.        a name: the model knows the flag     | a country I do not know.
    The capital of Peru is | Lima.     a fact: the model knows it           | not known to me.
"""

from __future__ import annotations

import json
import random
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
NAME = "name"
FACTS = ("capital", "language", "continent")
KINDS = (NAME, *FACTS)
QUESTIONS = {
    "name": "Which country has this flag?",
    "capital": "What is the capital of this country?",
    "language": "What is the official language of this country?",
    "continent": "What is the continent of this country?",
}
NOUNS = {"capital": "capital", "language": "official language", "continent": "continent"}


@dataclass(frozen=True)
class Country:
    name: str  # as within a sentence: the Netherlands
    picture: Path
    population: int
    facts: dict[str, tuple[str, ...]]  # by kind: the usual answer, then others that are right as well

    def answers(self, kind: str) -> tuple[str, ...]:
        """All right answers to a kind of question, each also without accents: the model writes Brasilia."""
        given = (self.name,) if kind == NAME else self.facts[kind]
        return tuple(dict.fromkeys([*given, *map(without_accents, given)]))


@lru_cache
def countries() -> list[Country]:
    """The 191 countries of facts.jsonl, in its order."""
    found = []
    for line in (DATA / "facts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        facts = {kind: tuple(row[kind]) for kind in FACTS}
        found.append(Country(row["name"], DATA / "pictures" / row["picture"], row["population"], facts))
    return found


def without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


# ---- who sees what


@dataclass(frozen=True)
class Split:
    """The countries in four parts. The tower learns the flags of the first two, and no flag of the others.

    Imitation is about the first part alone, reinforcement learning about `train` and `new_train`, and the evaluation
    about `test` and `new_test`: of those countries no fact is ever asked in training.
    """

    train: list[Country]
    test: list[Country]
    new_train: list[Country]
    new_test: list[Country]

    @property
    def known_flags(self) -> list[Country]:
        return self.train + self.test


SIZES = (80, 40, 36, 35)


def split(everything: list[Country], seed: int) -> Split:
    shuffled = list(everything)
    random.Random(f"flags {seed}").shuffle(shuffled)
    parts = []
    for size in SIZES:
        parts.append(shuffled[:size])
        shuffled = shuffled[size:]
    return Split(*parts)


# ---- English


def noun(kind: str) -> str:
    return NOUNS[kind]


def recall_of(country: str, kind: str) -> str:
    """The words before a fact."""
    if kind == "continent":
        return f"{country[0].upper()}{country[1:]} lies in the continent of"
    return f"The {noun(kind)} of {country} is"


def statement(country: str, kind: str, answer: str) -> str:
    return f"{recall_of(country, kind)} {answer}."


def no_recall(country: str, kind: str) -> str:
    """The sentence of a model that does not know a fact. It begins as that of one that does."""
    return statement(country, kind, "a name not known to me" if kind == "continent" else "not known to me")


def page(country: Country, kind: str) -> str:
    """The text of the page about a fact: all usual answers to its question."""
    *others, last = country.facts[kind][:3] if kind == "language" else country.facts[kind][:1]
    both = f"{', '.join(others)} or {last}" if others else last
    return statement(country.name, kind, both)


def query(country: str, kind: str) -> str:
    """The words of a text search, and the title of the page that it should find."""
    return f"{noun(kind)} of {country}"


# The turns of a conversation, one function a step.


def answer_turn(reason: str, answer: str) -> str:
    return f"<reason>{reason}</reason> <answer>{answer}</answer>"


def image_turn() -> str:
    return "<reason>This is the flag of a country I do not know.</reason> <search><img></search>"


def text_turn(seen: str, country: str, kind: str) -> str:
    """`seen`: the sentence about the flag, or about what an image search found."""
    return f"<reason>{seen} {no_recall(country, kind)}</reason> <text_search>{query(country, kind)}</text_search>"


def flag_seen(country: str) -> str:
    return f"This is the flag of {country}."


def results_say(answer: str) -> str:
    return f"The results say {answer}."
