"""Crop-and-search learned in minutes: `python -m examples.crop_and_search_toy` (options are train.py's).

The toy world gets a second kind of picture: two emblems side by side, with a question about the left or the right one.
A search of the whole picture finds nothing. A search of the right half finds the answer, one of the wrong half finds
the other emblem. A short warm start on top of the toy base model teaches the markup of a crop and how to copy what it
finds, but its traces choose boxes, searches and guesses at random. Reinforcement learning finds out what to call for
which question.
"""

import io
import sys
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from mmsr.assemble import launch
from mmsr.chat import PROMPTS, Chat
from mmsr.config import Config
from mmsr.episode import Episode, Example, Observation
from mmsr.more_tools.crop import CROP_SEARCH, tools
from mmsr.pretrained.load import load
from mmsr.pretrained.save import save
from mmsr.report.output import Output
from mmsr.setup.preflight import preflight
from mmsr.system.parallel import Ranks
from mmsr.system.progress import progress
from mmsr.tools import IMAGE_SEARCH, more_tools, search_tools
from mmsr.toy.base import Traces, base_model, copied, recalled
from mmsr.toy.world import (
    BASIC,
    LOOK_IT_UP,
    NAME,
    SIZE,
    Category,
    Concept,
    World,
    draw_emblems,
    made_up,
    png,
    render,
)
from mmsr.update import MasterWeights, Trainer
from mmsr.vision import Image, to_image
from train import train

LEFT_RIGHT = {"left": "0 0 500 1000", "right": "500 0 1000 1000"}
SINGLES = (
    Category("familiar", ("familiar",), (NAME,), train=80, weight=0.25),
    Category("unfamiliar", ("unfamiliar",), (NAME,), train=80, weight=0.25),
)
PAIRS = (
    Category("left", ("unfamiliar",), (NAME,), train=160, weight=0.25),
    Category("right", ("unfamiliar",), (NAME,), train=160, weight=0.25),
)
OPTIONS = (
    "--toy=basic",
    "--tools=crop",
    "--steps=60",
    "--out=runs/crop",
    f"--max-pixels={2 * SIZE**2}",
    "--turn-tokens=48",
    "--max-tokens=160",
)


def question(side: str) -> str:
    return f"what is {side} ?"


def look_at(side: str) -> str:
    return LOOK_IT_UP.replace("<search><img></search>", f"<{CROP_SEARCH}> {LEFT_RIGHT[side]} </{CROP_SEARCH}>")


class PairWorld(World):
    """The basic toy world with questions about one of two emblems. Its web knows the halves, not the whole."""

    def __init__(self, seed: int):
        super().__init__(seed, replace(BASIC, categories=SINGLES + PAIRS))

    def questions(self, category: str | Category, n: int, tag: str) -> list[Example]:
        if isinstance(category, str) or category not in PAIRS:
            return super().questions(category, n, tag)
        singles = super().questions(category, 2 * n, tag)
        examples = []
        for left, right in zip(singles[::2], singles[1::2]):
            asked = left if category.name == "left" else right
            both = beside(left.image, right.image)
            examples.append(replace(asked, image=both, question=question(category.name)))
        return examples

    def always_search(self, example: Example, texts: bool = True) -> list[str]:
        if example.category in LEFT_RIGHT:
            return [look_at(example.category)]
        return super().always_search(example, texts)


def beside(left: bytes, right: bytes) -> bytes:
    """Two pictures as one."""
    pictures = [np.asarray(PIL.Image.open(io.BytesIO(data))) for data in (left, right)]  # (SIZE, SIZE, 3) each
    return png(np.concatenate(pictures, axis=1))  # (SIZE, 2 SIZE, 3)


class HalfTraces(Traces, ABC):
    """Half of a batch is as for the base model, half about pairs."""

    def batch(self, n: int) -> list[Episode]:
        episodes = super().batch(n // 2)
        for group_id in range(n // 2, n):
            episodes.append(self.pair(group_id))
        return episodes

    @abstractmethod
    def pair(self, group_id: int) -> Episode:
        """A trace about a picture of two emblems."""

    def asked(self, group_id: int, words: str, image: Image) -> Episode:
        """The beginning of a trace: a picture of two, and the question."""
        prompt = self.chat.prompt(words, image)
        example = Example(id="", image=b"", question=words, answers=(), category="pair")
        episode = Episode(example, group_id, 0, prompt_length=len(prompt.ids), advantage=1.0)
        self._append(episode, prompt, 0)
        return episode


class PairTraces(HalfTraces):
    """The pairs are of new emblems. Actions do not depend on the side."""

    def pair(self, group_id: int) -> Episode:
        emblems = draw_emblems(self.rng, 2, unlike=self.world.taught)  # (2, 8)
        left = self._novel(emblems[0])
        right = self._novel(emblems[1])
        guess = self._novel(emblems[0])
        self.made += 1
        picture = np.concatenate(list(render(emblems, self.rng)), axis=1)  # (SIZE, 2 SIZE, 3)
        image = to_image(picture, f"pair {self.made}")
        side = str(self.rng.choice(list(LEFT_RIGHT)))
        episode = self.asked(group_id, question(side), image)
        action = str(self.rng.choice(["left", "right", IMAGE_SEARCH, "guess"]))
        self.act(episode, {"left": left, "right": right}, guess, action)
        return episode

    def _novel(self, emblem: np.ndarray) -> Concept:
        return Concept(emblem, made_up(self.rng, 1, 3)[0], town="", pool="novel")

    def act(self, episode: Episode, pair: dict[str, Concept], guess: Concept, action: str) -> None:
        if action in pair:
            self._say(episode, look_at(action))
            seen = self._read(episode, CROP_SEARCH, self._as_known(pair[action]))
            self._say(episode, copied(seen.name))
            return
        if action == IMAGE_SEARCH:
            self._say(episode, LOOK_IT_UP)
            nothing = self.chat.observation(IMAGE_SEARCH, Observation(), [], episode.example.question)
            self._append(episode, nothing, 0)
        self._say(episode, recalled(guess, NAME))


def warm_start(traces: Traces, base: Path, folder: Path, steps: int = 300, batch: int = 32, lr: float = 7e-4) -> None:
    """Make `folder`: the model in `base` after some more training, with `traces`."""
    model = load(base, torch.float32, torch.device("cpu"))
    optimizer = MasterWeights(model, betas=(0.9, 0.98))
    suppressed = traces.chat.suppressed_tokens(model.config.vocab_size)
    trainer = Trainer(model, optimizer, suppressed, loss_norm="token", sft=True)
    with progress("warm start on pairs", steps, "step") as bar:
        for step in range(steps):
            rising = (step + 1) / 20
            falling = (steps - step) / (steps / 2)
            trainer.step([traces.batch(batch)], lr * min(1, rising, falling))
            bar.update()
    folder.mkdir(parents=True)
    save(model, folder, base)


def check(config: Config, ranks: Ranks, world: World) -> None:
    """Refuse what the run would refuse, before the minutes of a warm start. Raises UserError."""
    with Output(config, ranks):
        preflight(config, ranks)
    more_tools(config.tool_names, world.web)


def run(config: Config, ranks: Ranks) -> None:
    world = PairWorld(config.seed)
    folder = Path(f"{config.out}-base")
    if not (folder / "config.json").is_file():
        check(config, ranks, world)
        base = base_model(world)
        chat = Chat(base, PROMPTS / "toy", search_tools(world.web, 1, 0) + tools(world.web))
        warm_start(PairTraces(world, chat, world.seed + 1), base, folder)
    train(replace(config, model=str(folder)), ranks, world)


def main(argv: list[str]) -> None:
    launch([*OPTIONS, *argv], Config, "python -m examples.crop_and_search_toy", run)


if __name__ == "__main__":
    main(sys.argv[1:])
