"""The files of the experiment: the web, questions about fresh shots of flags, conversations to imitate.

A question's category says what it takes for a model that knows what the untrained one knew; the names are those of the
toy world:

    familiar          the flag was seen, and what is asked is known (or is the name)        no search
    known_new_fact    the flag was seen, the fact is not known                              a text search
    unfamiliar        the flag was not seen, what is asked is known (or is the name)        an image search
    unfamiliar_fact   neither                                                               an image, then a text search
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
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
from mmsr.search.index import Local
from mmsr.system.files import json_object, lines, write_whole

KNOWN_FROM = 0.5  # a fact counts as known where at least this share of the sampled answers is right
TAUGHT_FROM = 0.25  # a conversation states a fact only where the model gave that very answer so often
ON_THE_WEB = 3  # shots of each flag that the image search knows, besides the flag itself
PER_FACT = 8  # shots that the imitation shows of what it is about
FROM_MEMORY = 0.15  # share of them that ask for an answer from memory, as evaluation without searches does
ASK_MEMORY = " Answer from memory."  # prompts/direct.txt

Row = dict[str, Any]
Asked = tuple[Country, str]  # a country and a kind of question


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """JSON lines. Raises UserError where they cannot be written."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(file, [text.encode()])


def read_rows(file: Path) -> list[Row]:
    """Raises UserError for a file that is missing or damaged."""
    return [json_object(file, number, line) for number, (_, line) in enumerate(lines(file))]


def write_known(file: Path, known: Iterable[Known]) -> None:
    write_rows(file, map(asdict, known))


def read_known(file: Path) -> list[Known]:
    return [Known(**row) for row in read_rows(file)]


# ---- the web


def write_web(folder: Path, about: Sequence[Country], seed: int) -> None:
    """What `search.py index` takes: pictures/, titles.jsonl and pages.jsonl."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    flags = [flag(country) for country in about]
    titles = []
    for version in range(ON_THE_WEB):
        for place, shot in enumerate(shots(flags, seed * 1000 + version)):
            name = f"{place}-{version}.png"
            write_whole(pictures / name, [png(shot)])
            titles.append({"file": name, "title": title_of(about[place])})
    for place, country in enumerate(about):
        name = f"{place}.png"
        write_whole(pictures / name, [country.picture.read_bytes()])
        titles.append({"file": name, "title": title_of(country)})
    write_rows(folder / "titles.jsonl", titles)
    pages = []
    for country in about:
        for kind in FACTS:
            title = query(country.name, kind)
            text = page(country, kind)
            pages.append({"url": f"web/{title}", "title": title[0].upper() + title[1:], "text": text})
    write_rows(folder / "pages.jsonl", pages)


def title_of(country: Country) -> str:
    """The title of a picture that shows its flag."""
    return f"Flag of {country.name}"


# ---- questions


class Questions:
    """Writes questions about fresh shots of flags into a folder that has the web's index."""

    def __init__(self, folder: Path, known: Sequence[Known], seen: Sequence[Country], seed: int):
        self.folder = folder
        self.known = {(each.country, each.kind): each for each in known}
        self.seen = {country.name for country in seen}
        self.seed = seed
        self.web = Local(folder / "web.index", 1)
        (folder / "shots").mkdir(parents=True, exist_ok=True)

    def category(self, country: Country, kind: str) -> str:
        new_fact = kind != NAME and self.known[country.name, kind].sampled < KNOWN_FROM
        if country.name in self.seen:
            return "known_new_fact" if new_fact else "familiar"
        return "unfamiliar_fact" if new_fact else "unfamiliar"

    def rows(self, name: str, asked: Sequence[Asked]) -> list[Row]:
        """A question about a fresh shot for each country and kind. `found`: whether an image search finds the flag."""
        rng = random.Random(f"{name} {self.seed}")
        made = []
        for begin in range(0, len(asked), 64):
            batch = asked[begin : begin + 64]
            pictures = shots([flag(country) for country, _ in batch], seed=rng.randrange(2**40))
            for place, ((country, kind), shot) in enumerate(zip(batch, pictures), begin):
                made.append(self._row(f"{name}-{place}", country, kind, png(shot)))
        return made

    def _row(self, question_id: str, country: Country, kind: str, picture: bytes) -> Row:
        file = f"shots/{question_id}.png"
        write_whole(self.folder / file, [picture])
        hits = self.web.image_search(picture).hits
        return {
            "id": question_id,
            "image": file,
            "question": QUESTIONS[kind],
            "answers": list(country.answers(kind)),
            "category": self.category(country, kind),
            "country": country.name,
            "kind": kind,
            "found": bool(hits) and hits[0].title == title_of(country),
        }


def every_question(about: Sequence[Country]) -> list[Asked]:
    return [(country, kind) for country in about for kind in KINDS]


def repeated(about: Sequence[Country], count: int, seed: int) -> list[Asked]:
    """`count` questions about some countries, in shuffled epochs of all of them."""
    rng = random.Random(f"repeated {seed}")
    asked: list[Asked] = []
    while len(asked) < count:
        epoch = every_question(about)
        rng.shuffle(epoch)
        asked += epoch
    return asked[:count]


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    mixed = list(rows)
    random.Random(f"order {seed}").shuffle(mixed)
    return mixed


# ---- conversations to imitate


def gave_itself(known: Known) -> bool:
    """Whether the model gave an answer before it was trained, so that a conversation may state that answer."""
    return known.answer_share >= TAUGHT_FROM


def to_imitate(countries: Split, known: Sequence[Known], seed: int) -> list[Asked]:
    """What is imitated: the names of flags, and the facts that the model gave itself; each several times."""
    by_fact = {(each.country, each.kind): each for each in known}
    asked: list[Asked] = []
    for country in countries.seen_train:
        for kind in KINDS:
            if kind == NAME or gave_itself(by_fact[country.name, kind]):
                asked += [(country, kind)] * PER_FACT
    random.Random(f"imitation {seed}").shuffle(asked)
    return asked


def conversations(country: Country, kind: str, remembered: str) -> dict[str, list[str]]:
    """The model's turns of each way to a right answer, by the category for which it is the right way.

    `remembered`: what the model answers from memory. After a search it answers what the page says first.
    """
    name = country.name
    seen = flag_seen(name)
    found = results_say(name)
    if kind == NAME:
        return {
            "familiar": [answer_turn(seen, name)],
            "unfamiliar": [image_turn(), answer_turn(found, name)],
        }
    recalled = statement(name, kind, remembered)
    read = country.facts[kind][0]
    from_page = answer_turn(results_say(read), read)
    return {
        "familiar": [answer_turn(f"{seen} {recalled}", remembered)],
        "known_new_fact": [text_turn(seen, name, kind), from_page],
        "unfamiliar": [image_turn(), answer_turn(f"{found} {recalled}", remembered)],
        "unfamiliar_fact": [image_turn(), text_turn(found, name, kind), from_page],
    }


class Teacher:
    """Shows conversations. It never says that results say what they do not, and recalls what the model gave itself."""

    def __init__(self, known: Sequence[Known], seed: int):
        self.known = {(each.country, each.kind): each for each in known}
        self.rng = random.Random(f"ways {seed}")

    def ways(self, row: Row, country: Country, kind: str) -> dict[str, list[str]]:
        """The conversations that are possible about a question."""
        remembered = "" if kind == NAME else self.known[country.name, kind].answer
        ways = conversations(country, kind, remembered)
        if not row["found"]:  # an image search finds another flag first
            ways = {name: turns for name, turns in ways.items() if not name.startswith("unfamiliar")}
        if kind != NAME and not gave_itself(self.known[country.name, kind]):
            ways = {name: turns for name, turns in ways.items() if name.endswith("_fact")}
        return ways

    def by_chance(self, rows: Sequence[Row], asked: Sequence[Asked]) -> tuple[list[Row], list[Row]]:
        """Questions and a conversation about each, its way drawn by chance: it says nothing about when to search.

        Some of the questions ask for an answer from memory, and get one.
        """
        shown, told = [], []
        for row, (country, kind) in zip(rows, asked):
            ways = self.ways(row, country, kind)
            if self.rng.random() < FROM_MEMORY:
                row = {**row, "question": row["question"] + ASK_MEMORY}
                ways = {"familiar": ways["familiar"]}
            shown.append(row)
            told.append(conversation(row, self.rng.choice(list(ways.values()))))
        return shown, told

    def by_knowledge(self, rows: Sequence[Row], asked: Sequence[Asked]) -> tuple[list[Row], list[Row]]:
        """Questions and the conversation about each that searches for what is not known, and for nothing else.

        Questions without such a conversation are left out: those whose image search finds another flag.
        """
        shown, told = [], []
        for row, (country, kind) in zip(rows, asked):
            ways = self.ways(row, country, kind)
            if row["category"] in ways:
                shown.append(row)
                told.append(conversation(row, ways[row["category"]]))
        return shown, told


def conversation(row: Row, turns: Sequence[str]) -> Row:
    """As `train.py --demonstrations` reads it."""
    return {"data_id": row["id"], "turns": [{"response": turn} for turn in turns]}
