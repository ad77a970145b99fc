"""From a configuration to what a run needs: device, model, conversation format, tools, questions.

Everything that a user can get wrong is opened here, before a run writes its first file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Callable, Sequence

import torch
from tqdm import tqdm

from . import model as modeling
from . import toy
from .chat import PROMPTS, Chat
from .config import Config
from .data import Replay, read_examples, recorded_turns
from .engine import Engine
from .episode import Episode, Example, UserError
from .reward import RewardRule, score
from .rollout import Limits, Rollout
from .tools import NoSearch, Toolbox, search_tools
from .vision import check_image


@dataclass
class Setup:
    """The parts of a run, opened and checked."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    folder: Path  # the checkpoint that training starts from
    model: modeling.Qwen2_5_VL
    chat: Chat
    toolbox: Toolbox
    questions: Sequence[Example]
    eval_questions: Sequence[Example]
    scripts: Callable[[Example, int], list[str]] | None  # model turns to force in training

    @cached_property
    def banned(self) -> torch.Tensor:
        return self.chat.banned(self.model.config.vocab_size).to(self.device)

    def rollout(self, temperature: float, direct: bool = False) -> Rollout:
        """A fresh rollout of the present weights."""
        c = self.config
        engine = Engine(
            self.model, self.chat.stop_id, self.banned, slots=c.slots, max_tokens=c.max_tokens,
            turn_tokens=c.turn_tokens, temperature=temperature, prefill_tokens=c.micro_tokens,
        )  # fmt: skip
        limits = Limits(c.max_turns, c.min_pixels, c.max_pixels, stop_on_tool_error=c.on_tool_error == "drop")
        return Rollout(engine, self.chat, self.toolbox, limits, direct)

    def score(self, episodes: Sequence[Episode]) -> None:
        score(episodes, RewardRule(self.config.reward), self.chat.well_formed)


def assemble(config: Config) -> Setup:
    """Open everything that `config` names. Raises UserError where something is missing or wrong."""
    device = _device(config.device)
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    world = toy.World(config.seed) if "toy" in (config.data, config.search) or not config.model else None
    questions = _questions(config.data, world)
    evaluation = _eval_questions(config, world, questions)
    backend, scripts = _backend(config, world, [questions, evaluation])
    tools = search_tools(backend, config.max_images, config.max_texts)
    prompts = PROMPTS / config.prompts if config.prompts in ("toy", "real") else Path(config.prompts)
    folder = modeling.resolve(config.model) if config.model else toy.base_model(world)
    chat = Chat(folder, prompts, tools)
    model = modeling.load(folder, dtype, device)
    chat.banned(model.config.vocab_size)  # a tokenizer of another model is refused here
    model.checkpoint_blocks = model.visual.checkpoint_blocks = config.recompute
    toolbox = Toolbox(tools, inline=config.deterministic)
    return Setup(config, device, dtype, folder, model, chat, toolbox, questions, evaluation, scripts)


def _device(name: str) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); leave it out to take what there is") from None


def _questions(name: str, world: toy.World | None) -> Sequence[Example]:
    """The toy world's training questions, or those of a file, every picture of which can be opened."""
    if name == "toy":
        return world.train
    questions = read_examples(name)
    if not len(questions):
        raise UserError(f"{name}: there is no question in it; give a file with at least one")
    for row in tqdm(range(len(questions)), desc="checking pictures", unit="picture", leave=False, disable=None):
        try:
            check_image(questions[row].image)
        except ValueError as error:
            raise UserError(f"{name}: row {row}: {error}; mend or remove this row") from None
    return questions


def _backend(config: Config, world: toy.World | None, known: Sequence[Sequence[Example]]):
    """The search back-end, and the recorded turns to force. `known`: questions whose pictures a recording may name."""
    kind, _, file = config.search.partition(":")
    if kind == "toy" and not file:
        if config.data != "toy":
            raise UserError("--search toy knows the toy world's pictures only: give --search none or replay:FILE")
        return world.web, None
    if kind == "none" and not file:
        return NoSearch(), None
    if kind == "replay" and file == "fvqa":
        raise UserError("--search replay:fvqa is not there yet: give --search replay:FILE with recorded conversations")
    if kind == "replay" and file:
        recorded = recorded_turns(file)
        scripts = partial(_recorded_script, recorded, config.group_size) if config.force_searches else None
        return Replay(recorded, chain(*known)), scripts
    raise UserError(f"--search {config.search}: unknown back-end; give toy, none or replay:FILE")


def _recorded_script(recorded: dict, group_size: int, example: Example, sample: int) -> list[str]:
    """The recorded searches of an example, for the first half of its group; the other half is free."""
    if sample >= group_size // 2:
        return []
    return [turn.response for turn in recorded.get(example.id, ()) if turn.observation is not None]


def _eval_questions(config: Config, world: toy.World | None, questions: Sequence[Example]) -> list[Example]:
    if config.eval_data and config.eval_data != "toy":
        questions = _questions(config.eval_data, world)
    elif world and "toy" in (config.data, config.eval_data):
        pools = [world.questions(category, config.eval_size, "eval") for category in toy.CATEGORIES]
        return [example for pool in pools for example in pool]
    return [questions[i] for i in range(min(config.eval_size, len(questions)))]
