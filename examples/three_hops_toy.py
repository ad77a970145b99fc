"""Eight turns and five tools, learned in half an hour: `python -m examples.three_hops_toy` (options are train.py's).

The picture shows two emblems, too small to be recognised, and the question is which town the left or the right one
belongs to. Two roads lead to the answer:

- zoom to the emblem, and say the town from memory, if the model knows this emblem (a look costs nothing);
- search by the crop (its name), search for the name (the address of its page), open the page (the town): three hops.

A search of the whole picture finds nothing. A short warm start on top of the toy base model teaches the markup of every
tool and how to copy what comes back, but its traces take sides, tools, and when to guess, at random. Reinforcement
learning finds the order, and for whom the long road is worth its price: docs/results.md has the numbers.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from examples.crop_and_search_toy import LEFT_RIGHT, HalfTraces, beside, check, look_at, warm_start
from mmsr.assemble import launch
from mmsr.chat import PROMPTS, Chat
from mmsr.config import Config
from mmsr.episode import Episode, Example, Hit, Observation
from mmsr.more_tools.crop import CROP_SEARCH
from mmsr.more_tools.zoom import ZOOM
from mmsr.system.parallel import Ranks
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, VISIT, more_tools, search_tools
from mmsr.toy.base import base_model, copied, recalled
from mmsr.toy.world import (
    FULL,
    LOOK_IT_UP,
    SIZE,
    TOWN,
    Category,
    Concept,
    Web,
    World,
    draw_emblems,
    look_up,
    made_up,
    png,
    render,
)
from mmsr.vision import load_image
from train import train

PIXELS = SIZE * SIZE  # of a picture, at most: an emblem of a pair gets a quarter of what it has in a closer look
TOOLS = ["zoom", "visit", "crop"]
CATEGORIES = (
    Category("known", ("known",), (TOWN,), train=160, weight=0.5),
    Category("unknown", ("unfamiliar",), (TOWN,), train=160, weight=0.25),
    Category("held_out", ("held_out",), (TOWN,), weight=0.25),
)
OPTIONS = (
    "--toy=full",
    f"--max-pixels={PIXELS}",
    f"--tools={','.join(TOOLS)}",
    "--shapes=any",
    "--max-turns=8",
    "--max-texts=2",
    "--penalty-per-call",
    "--steps=120",
    "--turn-tokens=48",
    "--max-tokens=640",
    "--out=runs/three-hops",
)


def question(side: str) -> str:
    return f"which town is {side} ?"


def zoom_to(side: str) -> str:
    return f"<reason> let me look closer . </reason> <{ZOOM}> {LEFT_RIGHT[side]} </{ZOOM}>"


def open_page(address: str) -> str:
    return f"<reason> the page of it . </reason> <{VISIT}> {address} </{VISIT}>"


def address_of(name: str) -> str:
    """Where the page about a name is: a made-up word that the name does not tell."""
    digest = hashlib.sha256(name.encode()).digest()
    return made_up(np.random.default_rng(list(digest)), 1, 4)[0]


class PagesWeb(Web):
    """A web on which no result tells the town, but the page does whose address a text search finds."""

    def __init__(self, concepts: list[Concept], seed: int):
        super().__init__(concepts, FULL, seed)
        self.pages = {address_of(concept.name): concept for concept in concepts}

    def hits(self, tool: str, about, rng: np.random.Generator) -> tuple[Hit, ...]:
        if tool != TEXT_SEARCH:
            return super().hits(IMAGE_SEARCH, about, rng)  # titles that tell the name alone
        addresses = [address_of(concept.name) for concept in about]
        # The toy prompts show no address of a result, so it is in the title, too.
        return tuple(Hit(f"{concept.name} {url}", url) for concept, url in zip(about, addresses))

    def read_page(self, address: str) -> Observation:
        concept = self.pages.get(address)
        return Observation((Hit(text=page_of(concept)),) if concept else (), source="toy")


def page_of(concept: Concept) -> str:
    return f"{concept.name} of {concept.town}"


class HopsWorld(World):
    """The full toy world, with questions about one of two small emblems. Its web knows the halves, not the whole."""

    def __init__(self, seed: int):
        super().__init__(seed, replace(FULL, categories=CATEGORIES))
        self.web = PagesWeb(self.concepts, seed)

    def questions(self, category: str | Category, n: int, tag: str) -> list[Example]:
        asked = super().questions(category, n, tag)
        name = category if isinstance(category, str) else category.name
        others = super().questions(Category("other", ("known", "unfamiliar")), n, f"{tag} beside {name}")
        examples = []
        for number, (example, other) in enumerate(zip(asked, others)):
            side = list(LEFT_RIGHT)[number % 2]
            pair = (example, other) if side == "left" else (other, example)
            image = beside(pair[0].image, pair[1].image)
            examples.append(replace(example, image=image, question=question(side)))
        return examples

    def always_search(self, example: Example, texts: bool = True) -> list[str]:
        """The long road, whether or not the emblem is known."""
        side = example.question.split()[3]
        name = next(concept.name for concept in self.concepts if concept.town == example.answers[0])
        return [look_at(side), look_up(name), open_page(address_of(name))]


class HopsTraces(HalfTraces):
    """No action depends on the side or on what is known."""

    def pair(self, group_id: int) -> Episode:
        pair = dict(zip(LEFT_RIGHT, (self._concept(), self._concept())))
        halves = render(np.stack([concept.emblem for concept in pair.values()]), self.rng)  # (2, SIZE, SIZE, 3)
        pictures = dict(zip(LEFT_RIGHT, map(png, halves)))
        side = str(self.rng.choice(list(LEFT_RIGHT)))
        image = load_image(beside(*pictures.values()), PIXELS, PIXELS)
        episode = self.asked(group_id, question(side), image)
        self.act(episode, pair, pictures)
        return episode

    def _concept(self) -> Concept:
        """A taught one, or a new one."""
        if self.rng.random() < 0.5:
            return self._as_known(self.taught[self.rng.choice(len(self.taught), p=self.chances)])
        (emblem,) = draw_emblems(self.rng, 1, unlike=self.world.taught)
        return Concept(emblem, made_up(self.rng, 1, 3)[0], town=made_up(self.rng, 1, 2)[0], pool="novel")

    def act(self, episode: Episode, pair: dict[str, Concept], pictures: dict[str, bytes]) -> None:
        """Perhaps a look, perhaps hops, and then the answer: as far as it was seen, else a guess."""
        side = str(self.rng.choice(list(LEFT_RIGHT)))
        seen = self._guess()  # the pair is too small for more
        if self.rng.random() < 0.5:
            self._say(episode, zoom_to(side))
            shown = load_image(pictures[side], PIXELS, PIXELS)
            self._show(episode, ZOOM, Observation((Hit(image=pictures[side]),)), [shown])
            seen = pair[side]
        if self.rng.random() < 0.4:
            self._say(episode, recalled(seen, TOWN))
            return
        if self.rng.random() < 0.15:
            self._say(episode, LOOK_IT_UP)
            self._show(episode, IMAGE_SEARCH, Observation(), [])
        side = str(self.rng.choice(list(LEFT_RIGHT)))
        self._say(episode, look_at(side))
        found = self._read(episode, CROP_SEARCH, pair[side])
        if self.rng.random() < 0.25:
            self._say(episode, recalled(replace(self._guess(), name=found.name), TOWN))
            return
        self._say(episode, look_up(found.name))
        found = self._read(episode, TEXT_SEARCH, found)
        self._say(episode, open_page(address_of(found.name)))
        self._show(episode, VISIT, Observation((Hit(text=page_of(found)),)), [None])
        self._say(episode, copied(found.town))

    def _guess(self) -> Concept:
        return Concept(np.empty(0), made_up(self.rng, 1, 3)[0], town=made_up(self.rng, 1, 2)[0], pool="novel")

    def _show(self, episode: Episode, tool: str, observation: Observation, images: list) -> None:
        self._append(episode, self.chat.observation(tool, observation, images, episode.example.question), 0)


def run(config: Config, ranks: Ranks) -> None:
    world = HopsWorld(config.seed)
    folder = Path(f"{config.out}-base")
    if not (folder / "config.json").is_file():
        check(config, ranks, world)
        base = base_model(world)
        chat = Chat(base, PROMPTS / "toy", search_tools(world.web, 1, 2) + more_tools(TOOLS, world.web))
        warm_start(HopsTraces(world, chat, world.seed + 1), base, folder, steps=500, batch=48)
    train(replace(config, model=str(folder)), ranks, world)


def main(argv: list[str]) -> None:
    launch([*OPTIONS, *argv], Config, "python -m examples.three_hops_toy", run)


if __name__ == "__main__":
    main(sys.argv[1:])
