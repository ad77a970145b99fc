"""What is asked about the flags: countries, facts, and the English of questions, pages and turns.

A question shows a flag and asks for the country's name, or for a fact about it. The wording is such that what the
language model read in pre-training is within its reach: "The capital of Peru is" is how encyclopedias say it. At two
places a turn can take either of two ways, and each time they are words of one softmax:

    This is the flag of | Peru.        a name: the model knows the flag     | a country I do not know.
    The capital of Peru is | Lima.     a fact: the model knows it           | not known to me.

Chad and Monaco are left out: their flags are those of Romania and, but for the shade, of Indonesia.
"""

from __future__ import annotations

import random
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mmsr.system.files import json_object, lines

DATA = Path(__file__).parent / "data"
NAME = "name"
FACTS = ("capital", "language", "continent")
KINDS = (NAME, *FACTS)
QUESTIONS = {
    "name": "Which country has this flag?",
    "capital": "What is the capital of this country?",
    "language": "What is the official language of this country?",
    "continent": "On which continent is this country?",
}
NOUNS = {"capital": "capital", "language": "official language", "continent": "continent"}
REFUSALS = {
    "capital": "not known to me",
    "language": "not known to me",
    "continent": "which I do not know the name",
}


@dataclass(frozen=True)
class Country:
    name: str  # as within a sentence: the Netherlands
    picture: Path
    facts: dict[str, tuple[str, ...]]  # by kind: the right answers, several where there are several
    also: dict[str, tuple[str, ...]]  # by kind: other spellings and names of them, earlier ones too

    def answers(self, kind: str) -> tuple[str, ...]:
        """All accepted answers to a kind of question, each also without accents: the model writes Brasilia."""
        given = (self.name,) if kind == NAME else self.facts[kind]
        given += self.also.get(kind, ())
        return tuple(dict.fromkeys([*given, *map(without_accents, given)]))


@lru_cache
def countries() -> list[Country]:
    """The 189 countries of facts.jsonl, in its order."""
    found = []
    file = DATA / "facts.jsonl"
    for number, (_, line) in enumerate(lines(file)):
        row = json_object(file, number, line)
        facts = {kind: tuple(row[kind]) for kind in FACTS}
        also = {kind: tuple(answers) for kind, answers in row.get("also", {}).items()}
        found.append(Country(row["name"], DATA / "pictures" / row["picture"], facts, also))
    return found


def without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


# ---- which countries are trained on


@dataclass(frozen=True)
class Split:
    """The countries in four parts. The tower learns the flags of the seen ones; it never sees the others.

    Imitation is about `seen_train` alone, reinforcement learning about both parts for training, the evaluation about
    both parts for tests: about those countries no question is asked in training, and no fact is shown.
    """

    seen_train: list[Country]
    seen_test: list[Country]
    unseen_train: list[Country]
    unseen_test: list[Country]

    @property
    def seen(self) -> list[Country]:
        return self.seen_train + self.seen_test

    @property
    def train(self) -> list[Country]:
        return self.seen_train + self.unseen_train

    @property
    def test(self) -> list[Country]:
        return self.seen_test + self.unseen_test


SIZES = (80, 40, 35, 34)


def split(everyone: list[Country], seed: int) -> Split:
    """The countries at random in parts of `SIZES`."""
    shuffled = list(everyone)
    random.Random(f"flags {seed}").shuffle(shuffled)
    parts = []
    for size in SIZES:
        parts.append(shuffled[:size])
        shuffled = shuffled[size:]
    return Split(*parts)


# ---- English


def recall_of(country: str, kind: str) -> str:
    """The words before a fact."""
    if kind == "continent":
        return f"{country[0].upper()}{country[1:]} lies on the continent of"
    return f"The {NOUNS[kind]} of {country} is"


def statement(country: str, kind: str, answer: str) -> str:
    return f"{recall_of(country, kind)} {answer}."


def refusal(country: str, kind: str) -> str:
    """The sentence of a model that does not know a fact. It begins as that of one that does."""
    return statement(country, kind, REFUSALS[kind])


def page(country: Country, kind: str) -> str:
    """The text of the page about a fact: all of its right answers."""
    *others, last = country.facts[kind]
    listed = f"{', '.join(others)} and {last}" if others else last
    return statement(country.name, kind, listed)


def query(country: str, kind: str) -> str:
    """The words of a text search, and the title of the page that it should find."""
    return f"{NOUNS[kind]} of {country}"


# The turns of a conversation, one function a step.


def answer_turn(reason: str, answer: str) -> str:
    return f"<reason>{reason}</reason> <answer>{answer}</answer>"


def image_turn() -> str:
    return "<reason>This is the flag of a country I do not know.</reason> <search><img></search>"


def text_turn(seen: str, country: str, kind: str) -> str:
    """`seen`: the sentence about the flag, or about what an image search found."""
    return f"<reason>{seen} {refusal(country, kind)}</reason> <text_search>{query(country, kind)}</text_search>"


def flag_seen(country: str) -> str:
    return f"This is the flag of {country}."


def results_say(answer: str) -> str:
    return f"The results say {answer}."
