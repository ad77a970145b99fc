"""The files of the experiment: questions about fresh shots of flags, the web that knows them, conversations to imitate.

A question's category says what a model without training knows of it:

    known        the flag was learned, and what is asked is known (or is the name)    no search
    new_fact     the flag was learned, the fact is not known                          a text search
    new_flag     the flag was not learned, what is asked is known (or is the name)    an image search
    new_both     neither                                                              an image, then a text search
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.flags.countries import (
    FACTS,
    KINDS,
    NAME,
    QUESTIONS,
    Country,
    Split,
    answer_turn,
    flag_seen,
    image_turn,
    page,
    query,
    results_say,
    statement,
    text_turn,
)
from examples.flags.knowledge import Known
from examples.flags.pictures import flag, png, shots

KNOWN_FROM = 0.5  # a fact counts as known where at least this share of the sampled answers is right
TAUGHT_FROM = 0.25  # a demonstration states a fact only where the model gave it itself so often
ON_THE_WEB = 3  # shots of each flag that the image search knows, besides the flag itself
PER_FACT = 8  # shots that the imitation shows of what it demonstrates
FROM_MEMORY = 0.15  # share of them that ask for an answer from memory, as evaluation without searches does
ASK_MEMORY = " Answer from memory."  # prompts/direct.txt


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")


# ---- the web


def write_web(folder: Path, everything: Sequence[Country], seed: int) -> None:
    """What `search.py index` takes: pictures/, titles.jsonl and pages.jsonl."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    flags = [flag(country) for country in everything]
    titles = []
    for version in range(ON_THE_WEB):
        for place, shot in enumerate(shots(flags, seed * 1000 + version)):
            name = f"{place}-{version}.png"
            (pictures / name).write_bytes(png(shot))
            titles.append({"file": name, "title": f"Flag of {everything[place].name}"})
    for place, country in enumerate(everything):
        (pictures / f"{place}.png").write_bytes(country.picture.read_bytes())
        titles.append({"file": f"{place}.png", "title": f"Flag of {country.name}"})
    write_lines(folder / "titles.jsonl", titles)
    pages = []
    for country in everything:
        for kind in FACTS:
            title = query(country.name, kind)
            text = page(country, kind)
            pages.append({"url": f"web/{title}", "title": title[0].upper() + title[1:], "text": text})
    write_lines(folder / "pages.jsonl", pages)


# ---- questions


class Questions:
    """Rows of a data set, and the pictures that they show."""

    def __init__(self, folder: Path, known: Sequence[Known], learned: Sequence[Country], seed: int):
        self.folder = folder
        self.known = {(each.country, each.kind): each for each in known}
        self.learned = {country.name for country in learned}
        self.seed = seed
        (folder / "shots").mkdir(parents=True, exist_ok=True)

    def category(self, country: Country, kind: str) -> str:
        new_flag = country.name not in self.learned
        new_fact = kind != NAME and self.known[country.name, kind].sampled < KNOWN_FROM
        if new_flag:
            return "new_both" if new_fact else "new_flag"
        return "new_fact" if new_fact else "known"

    def rows(self, name: str, asked: Sequence[tuple[Country, str]]) -> list[dict[str, Any]]:
        """A question about a fresh shot for each country and kind."""
        rng = random.Random(f"{name} {self.seed}")
        found = []
        for begin in range(0, len(asked), 64):
            batch = asked[begin : begin + 64]
            pictures = shots([flag(country) for country, _ in batch], seed=rng.randrange(2**40))
            for place, ((country, kind), shot) in enumerate(zip(batch, pictures), begin):
                picture = f"shots/{name}-{place}.png"
                (self.folder / picture).write_bytes(png(shot))
                row = {
                    "id": f"{name}-{place}",
                    "image": picture,
                    "question": QUESTIONS[kind],
                    "answers": list(country.answers(kind)),
                    "category": self.category(country, kind),
                    "country": country.name,
                    "kind": kind,
                }
                found.append(row)
        return found


def every_question(about: Sequence[Country]) -> list[tuple[Country, str]]:
    return [(country, kind) for country in about for kind in KINDS]


# ---- conversations to imitate


def gave_itself(known: Known | None) -> bool:
    """Whether the model gave a fact itself before it was trained, so that a demonstration may state it."""
    return known is not None and known.sampled >= TAUGHT_FROM


def to_imitate(countries: Split, known: Sequence[Known], seed: int) -> list[tuple[Country, str]]:
    """What is demonstrated: the names of flags, and the facts that the model gave itself; each several times."""
    by_fact = {(each.country, each.kind): each for each in known}
    asked = []
    for country in countries.train:
        for kind in KINDS:
            if kind == NAME or gave_itself(by_fact.get((country.name, kind))):
                asked += [(country, kind)] * PER_FACT
    random.Random(f"imitation {seed}").shuffle(asked)
    return asked


def conversations(country: Country, kind: str) -> list[list[str]]:
    """The model's turns of each of the ways to a right answer: from memory, by text, by image, by both."""
    name = country.name
    seen = flag_seen(name)
    found = results_say(name)
    by_image = [[seen], [image_turn(), found]]  # two ways to know whose flag it is
    if kind == NAME:
        return [[answer_turn(seen, name)], [image_turn(), answer_turn(found, name)]]
    answer = country.facts[kind][0]
    ways = []
    for *searched, sentence in by_image:
        ways.append([*searched, answer_turn(f"{sentence} {statement(name, kind, answer)}", answer)])
        ways.append([*searched, text_turn(sentence, name, kind), answer_turn(results_say(answer), answer)])
    return ways


def demonstrations(rows: list[dict[str, Any]], asked: Sequence[tuple[Country, str]], seed: int) -> list[dict]:
    """One conversation about each question, its way drawn by chance, as `train.py --demonstrations` reads it.

    Some questions are changed so that they ask for an answer from memory, and get one.
    """
    rng = random.Random(f"ways {seed}")
    found = []
    for row, (country, kind) in zip(rows, asked):
        ways = conversations(country, kind)
        from_memory = rng.random() < FROM_MEMORY
        if from_memory:
            row["question"] += ASK_MEMORY
        turns = ways[0] if from_memory else rng.choice(ways)
        found.append({"data_id": row["id"], "turns": [{"response": turn} for turn in turns]})
    return found


def shuffled(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    found = list(rows)
    random.Random(f"order {seed}").shuffle(found)
    return found
