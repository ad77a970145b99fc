"""Crop-and-search learned in minutes: `python -m examples.crop_and_search_toy` (options are train.py's).

The toy world gets a second kind of picture: two emblems side by side, with a question about the left or the right one.
No search of such a picture finds anything; one of the right half does, one of the wrong half finds the other emblem.
A short warm start on top of the toy base model teaches the markup of a crop and to copy what it finds, but names boxes,
searches and guesses at random. What to call for which question is left to reinforcement learning.
"""

import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tqdm import trange

from examples.crop_and_search import CROP_SEARCH, tools
from mmsr.chat import PROMPTS, Chat
from mmsr.config import parse
from mmsr.episode import Episode, Example, Observation
from mmsr.pretrained.load import load
from mmsr.pretrained.save import save
from mmsr.system.parallel import SINGLE
from mmsr.tools import IMAGE_SEARCH, search_tools
from mmsr.toy import base as toy_base
from mmsr.toy import world as toy
from mmsr.update import MasterWeights, Trainer
from mmsr.vision import Image, patchify
from train import train

LEFT_RIGHT = {"left": "0 0 500 1000", "right": "500 0 1000 1000"}
SINGLES = tuple(toy.Category(name, (name,), (toy.NAME,), train=80, weight=0.25) for name in ("familiar", "unfamiliar"))
PAIRS = tuple(toy.Category(side, ("unfamiliar",), (toy.NAME,), train=160, weight=0.25) for side in LEFT_RIGHT)
OPTIONS = (
    *("--toy", "basic", "--tools", "examples.crop_and_search:tools", "--steps", "60", "--out", "runs/crop"),
    *("--max-pixels", str(2 * toy.SIZE**2), "--turn-tokens", "48", "--max-tokens", "160"),
)


def question(side: str) -> str:
    return f"what is {side} ?"


def look_at(side: str) -> str:
    return toy.LOOK_IT_UP.replace("<search><img></search>", f"<{CROP_SEARCH}> {LEFT_RIGHT[side]} </{CROP_SEARCH}>")


class PairWorld(toy.World):
    """The basic toy world with questions about one of two emblems. Its web knows the halves, not the whole."""

    def __init__(self, seed: int):
        super().__init__(seed, replace(toy.BASIC, categories=SINGLES + PAIRS))

    def questions(self, category: str | toy.Category, n: int, tag: str) -> list[Example]:
        if isinstance(category, str) or category not in PAIRS:
            return super().questions(category, n, tag)
        singles, asked = super().questions(category, 2 * n, tag), list(LEFT_RIGHT).index(category.name)
        return [
            replace(pair[asked], image=beside(pair[0].image, pair[1].image), question=question(category.name))
            for pair in zip(singles[::2], singles[1::2])
        ]

    def always_search(self, example: Example, texts: bool = True) -> list[str]:
        return [look_at(example.category)] if example.category in LEFT_RIGHT else super().always_search(example, texts)


def beside(*pictures: bytes) -> bytes:
    return toy.png(np.concatenate([np.asarray(PIL.Image.open(io.BytesIO(picture))) for picture in pictures], 1))


class PairTraces(toy_base.Traces):
    """Half of a batch as for the base model, half about pairs of one-off emblems, whatever side is asked for."""

    def batch(self, n: int) -> list[Episode]:
        return super().batch(n // 2) + [self.pair(group_id) for group_id in range(n // 2, n)]

    def pair(self, group_id: int) -> Episode:
        rng = self.rng
        emblems = toy.draw_emblems(rng, 2, unlike=self.world.taught)
        pair = [toy.Concept(emblem, toy.made_up(rng, 1, 3)[0], "", "novel") for emblem in emblems]
        guess = toy.Concept(emblems[0], toy.made_up(rng, 1, 3)[0], "", "novel")
        self.made += 1
        picture = np.concatenate(list(toy.render(emblems, rng)), axis=1)
        image = Image(patchify(picture), (toy.SIZE // 14, 2 * toy.SIZE // 14), f"pair {self.made}")
        asked = question(str(rng.choice(list(LEFT_RIGHT))))
        prompt = self.chat.prompt(asked, image)
        episode = Episode(
            Example("", b"", asked, (), "pair"), group_id, 0, prompt_length=len(prompt.ids), advantage=1.0
        )
        self._append(episode, prompt, 0)
        self.act(episode, pair, guess, str(rng.choice([*LEFT_RIGHT, IMAGE_SEARCH, "guess"])))
        return episode

    def act(self, episode: Episode, pair: list[toy.Concept], guess: toy.Concept, action: str) -> None:
        if action in LEFT_RIGHT:
            self._say(episode, look_at(action))
            seen = self._read(episode, CROP_SEARCH, self._as_known(pair[list(LEFT_RIGHT).index(action)]))
            return self._say(episode, toy_base.copied(seen.name))
        if action == IMAGE_SEARCH:
            self._say(episode, toy.LOOK_IT_UP)
            nothing = self.chat.observation(IMAGE_SEARCH, Observation(), [], episode.example.question)
            self._append(episode, nothing, 0)
        self._say(episode, toy_base.recalled(guess, toy.NAME))


def warm_start(world: PairWorld, folder: Path, steps: int = 300, batch: int = 32, lr: float = 7e-4) -> None:
    """Make `folder`: the toy base model, having seen traces of pairs too."""
    base = toy_base.base_model(world)
    model = load(base, torch.float32, torch.device("cpu"))
    chat = Chat(base, PROMPTS / "toy", search_tools(world.web, 1, 0) + tools(world.web))
    optimizer = MasterWeights(model, betas=(0.9, 0.98))
    trainer = Trainer(model, optimizer, chat.suppressed_tokens(model.config.vocab_size), loss_norm="token", sft=True)
    traces = PairTraces(world, chat, world.seed + 1)
    for step in trange(steps, desc="warm start on pairs"):
        trainer.step([traces.batch(batch)], lr * min(1, (step + 1) / 20, (steps - step) / (steps / 2)))
    folder.mkdir(parents=True)
    save(model, folder, base)


def main(argv: list[str]) -> None:
    config = parse([*OPTIONS, *argv])
    world, folder = PairWorld(config.seed), Path(f"{config.out}-base")
    if not (folder / "config.json").is_file():
        warm_start(world, folder)
    train(replace(config, model=str(folder)), SINGLE, world)


if __name__ == "__main__":
    main(sys.argv[1:])
