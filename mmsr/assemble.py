"""From a configuration to what a run needs: device, model, conversation format, tools, questions.

Everything that a user can get wrong is opened here, before a run writes its first file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

from . import attention, parallel, toy
from . import model as modeling
from .backends import open_backend
from .cache import Replayed, import_transcripts
from .chat import PROMPTS, Chat
from .config import Config
from .data import read_examples, recorded_turns
from .engine import Engine
from .episode import Episode, Example, UserError
from .parallel import SINGLE, Ranks
from .reward import RewardRule, score
from .rollout import Limits, Rollout
from .store import Store
from .tools import NoSearch, Toolbox, search_tools
from .vision import check_image, image_tokens


@dataclass
class Setup:
    """The parts of a run, opened and checked."""

    config: Config
    ranks: Ranks
    dtype: torch.dtype  # of the computation; sharded weights are kept in fp32
    folder: Path  # the checkpoint that training starts from
    model: modeling.Qwen2_5_VL  # sharded over the ranks
    chat: Chat
    toolbox: Toolbox
    questions: Sequence[Example]
    eval_questions: Sequence[Example]
    scripts: Callable[[Example, int], list[str]] | None  # model turns to force in training

    @cached_property
    def banned(self) -> torch.Tensor:
        return self.chat.banned(self.model.config.vocab_size).to(self.ranks.device)

    def reference(self) -> modeling.Qwen2_5_VL:
        """A frozen copy of the model as it was in the beginning."""
        return load_model(self.folder, self.dtype, self.dtype, self.ranks, self.config.shard).requires_grad_(False)

    def rollout(self, temperature: float, direct: bool = False) -> Rollout:
        """A fresh rollout of the present weights."""
        c = self.config
        engine = Engine(
            self.model, self.chat.stop_id, self.banned, slots=c.slots, max_tokens=c.max_tokens,
            turn_tokens=c.turn_tokens, temperature=temperature, prefill_tokens=c.micro_tokens,
        )  # fmt: skip
        limits = Limits(c.max_turns, c.min_pixels, c.max_pixels, stop_on_tool_error=c.on_tool_error == "drop")
        return Rollout(engine, self.chat, self.toolbox, limits, direct)

    def roll_out(
        self,
        examples: Sequence[Example],
        group_size: int,
        seed: tuple,
        temperature: float,
        *,
        stretch: int | None = None,
        direct: bool = False,
        scripts: Callable[[Example, int], list[str]] | None = None,
        on_done: Callable[[Episode], None] = lambda episode: None,
        attempt: Callable = lambda work, *args: work(*args),
    ) -> tuple[list[Episode], Mapping[str, int]] | None:
        """This rank's share of the examples' groups, rolled out by the present weights, and all ranks' `counts`.

        Group ids are places in `examples`. Each `stretch` of them is dealt by itself: what an update needs. The rollout
        is run by `attempt`; where that breaks it off and gives None on one rank, all get None.
        """
        mine = self._mine(examples, stretch or len(examples))
        rollout = self.rollout(temperature, direct)
        with parallel.generation(self.model), self.ranks.alone():
            episodes = attempt(rollout, [examples[i] for i in mine], group_size, seed, scripts, on_done, mine)
        if self.ranks.max(episodes is None):
            return None
        return episodes, self.ranks.sum(rollout.counts)

    def _mine(self, examples: Sequence[Example], stretch: int) -> list[int]:
        """The examples that are this rank's. Prompts are known to balance by, answers are not."""
        c, ranks = self.config, self.ranks
        if ranks.size == 1:
            return list(range(len(examples)))
        loads = [image_tokens(e.image, c.min_pixels, c.max_pixels) + len(e.question) / 4 for e in examples]
        starts = range(0, len(examples), stretch)
        hands = [parallel.deal(loads[start : start + stretch], ranks.size)[ranks.rank] for start in starts]
        return [start + i for start, hand in zip(starts, hands) for i in hand]

    def score(self, episodes: Sequence[Episode]) -> None:
        score(episodes, RewardRule(self.config.reward), self.chat.well_formed)


def assemble(config: Config, ranks: Ranks = SINGLE) -> Setup:
    """Open everything that `config` names. Raises UserError where something is missing or wrong."""
    dtype = getattr(torch, config.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    world = toy.World(config.seed) if "toy" in (config.data, config.search) or not config.model else None
    with ranks.alone():
        questions = _questions(config.data, world, ranks)
        evaluation = _eval_questions(config, world, questions, ranks)
        backend, scripts = _backend(config, world, [questions, evaluation])
    tools = search_tools(backend, config.max_images, config.max_texts)
    prompts = PROMPTS / config.prompts if config.prompts in ("toy", "real") else Path(config.prompts)
    find = partial(modeling.resolve, config.model) if config.model else partial(toy.base_model, world)
    folder = ranks.first("model folder", find)
    with ranks.alone():
        chat = Chat(folder, prompts, tools)
    model = load_model(folder, dtype, torch.float32 if ranks.size > 1 else dtype, ranks, config.shard)
    chat.banned(model.config.vocab_size)  # a tokenizer of another model is refused here
    model.checkpoint_blocks = model.visual.checkpoint_blocks = config.recompute
    toolbox = Toolbox(tools, inline=config.deterministic)
    attention.sum_widely(config.deterministic)
    return Setup(config, ranks, dtype, folder, model, chat, toolbox, questions, evaluation, scripts)


def load_model(
    folder: Path, compute: torch.dtype, stored: torch.dtype, ranks: Ranks, across: str
) -> modeling.Qwen2_5_VL:
    """The model of a folder, its weights kept as `stored` and used as `compute`; sharded where there are ranks."""
    if ranks.size == 1:
        return modeling.load(folder, stored, ranks.device)
    model = parallel.shard(modeling.skeleton(folder).to(stored), ranks, compute, across)
    return parallel.fill(model, modeling.stored_weights(folder, model), ranks)


def _questions(name: str, world: toy.World | None, ranks: Ranks) -> Sequence[Example]:
    """The toy world's training questions, or those of a file, every picture of which some rank has opened."""
    if name == "toy":
        return world.train
    questions = read_examples(name)
    if not len(questions):
        raise UserError(f"{name}: there is no question in it; give a file with at least one")
    rows, hidden = range(ranks.rank, len(questions), ranks.size), None if ranks.main else True
    for row in tqdm(rows, desc="checking pictures", unit="picture", leave=False, disable=hidden):
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
        return _replay(config, file, known)
    if kind == "local":
        return open_backend(config.search), None
    raise UserError(f"--search {config.search}: unknown back-end; give toy, none, local:FILE or replay:FILE")


def _replay(config: Config, file: str, known: Sequence[Sequence[Example]]):
    """`_backend` from a file of recorded conversations, or from one of recorded searches."""
    scripts = None
    if file.endswith(".jsonl"):
        store = Store(None)
        import_transcripts(store, file, chain(*known))
        if config.force_searches:
            scripts = partial(_recorded_script, recorded_turns(file), config.group_size)
    elif config.force_searches:
        raise UserError(f"--force-searches: {file} holds searches without conversations: replay a transcripts .jsonl")
    else:
        store = Store(file, readonly=True)
    return Replayed(store, miss="empty"), scripts


def _recorded_script(recorded: dict, group_size: int, example: Example, sample: int) -> list[str]:
    """The recorded searches of an example, for the first half of its group; the other half is free."""
    if sample >= group_size // 2:
        return []
    return [turn.response for turn in recorded.get(example.id, ()) if turn.observation is not None]


def _eval_questions(
    config: Config, world: toy.World | None, questions: Sequence[Example], ranks: Ranks
) -> list[Example]:
    if config.eval_data and config.eval_data != "toy":
        questions = _questions(config.eval_data, world, ranks)
    elif world and "toy" in (config.data, config.eval_data):
        pools = [world.questions(category, config.eval_size, "eval") for category in toy.CATEGORIES]
        return [example for pool in pools for example in pool]
    return [questions[i] for i in range(min(config.eval_size, len(questions)))]
