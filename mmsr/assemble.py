"""From a configuration to what a run needs: device, model, conversation format, tools, questions.

Everything that a user can get wrong is opened here, before a run writes its first file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Sequence

import torch

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

    @property
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
    questions = world.train if config.data == "toy" else read_examples(config.data)
    backend, scripts = _backend(config, world, questions)
    tools = search_tools(backend, config.max_images, config.max_texts)
    prompts = PROMPTS / config.prompts if config.prompts in ("toy", "real") else Path(config.prompts)
    folder = modeling.resolve(config.model) if config.model else toy.base_model(world)
    chat = Chat(folder, prompts, tools)
    model = modeling.load(folder, dtype, device)
    chat.banned(model.config.vocab_size)  # a tokenizer of another model is refused here
    toolbox = Toolbox(tools, inline=config.deterministic)
    evaluation = _eval_questions(config, world, questions)
    return Setup(config, device, dtype, folder, model, chat, toolbox, questions, evaluation, scripts)


def _device(name: str) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); leave it out to take what there is") from None


def _backend(config: Config, world: toy.World | None, questions: Sequence[Example]):
    """The search back-end, and the recorded turns to force where that is asked for."""
    kind, _, file = config.search.partition(":")
    if kind == "toy" and not file:
        return world.web, None
    if kind == "none" and not file:
        return NoSearch(), None
    if kind == "replay" and file:
        recorded = recorded_turns(file)
        scripts = partial(_recorded_script, recorded, config.group_size) if config.force_searches else None
        return Replay(recorded, questions), scripts
    raise UserError(f"--search {config.search}: unknown back-end; give toy, none or replay:FILE")


def _recorded_script(recorded: dict, group_size: int, example: Example, sample: int) -> list[str]:
    """The recorded searches of an example, for the first half of its group; the other half is free."""
    if sample >= group_size // 2:
        return []
    return [turn.response for turn in recorded.get(example.id, ()) if turn.observation is not None]


def _eval_questions(config: Config, world: toy.World | None, questions: Sequence[Example]) -> list[Example]:
    if config.eval_data:
        questions = read_examples(config.eval_data)
    elif config.data == "toy":
        pools = [world.questions(category, config.eval_size, "eval") for category in toy.CATEGORIES]
        return [example for pool in pools for example in pool]
    return [questions[i] for i in range(min(config.eval_size, len(questions)))]
