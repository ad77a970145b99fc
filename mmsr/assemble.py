"""The opened parts of a run together, and how train.py and eval.py roll out with them.

`mmsr/setup/` opens the parts. Everything that a user can get wrong is refused there, before a run writes a file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import torch

from mmsr import lora
from mmsr import model as modeling
from mmsr.config import AnyOptions, parse
from mmsr.engine import Engine
from mmsr.episode import Episode, Example
from mmsr.reward import score
from mmsr.rollout import Rollout, Scripts
from mmsr.search.store import Budget
from mmsr.setup.imitation import open_demonstrations, open_teacher
from mmsr.setup.judging import open_reward_judge
from mmsr.setup.policy import Policy
from mmsr.setup.questions import Questions
from mmsr.setup.search import Search, rollout_limits
from mmsr.system import parallel
from mmsr.system.errors import UserError
from mmsr.system.interrupt import Interrupts, clear_line
from mmsr.system.parallel import Ranks, distributed, exit_process
from mmsr.tools import Toolbox
from mmsr.toy import world as toy
from mmsr.vision import image_tokens

if TYPE_CHECKING:
    from mmsr.data.reward_judge import RewardJudge
    from mmsr.data.teacher import Teacher


def launch(argv: Sequence[str], kind: type[AnyOptions], program: str, run: Callable[[AnyOptions, Ranks], None]) -> None:
    """`run` a command line on every rank. What a user can mend is one line and exit status 2, an early Ctrl-C 130."""
    try:
        config = parse(argv, kind, program)
        with distributed(config.device, config.timeout) as ranks:
            processes = f"{ranks.size} processes on " if ranks.size > 1 else ""
            ranks.print(f"{program}: recipe {config.recipe}, {processes}{ranks.device.type}, --out {config.out}")
            run(config, ranks)
        exit_process(ranks)
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # before anything is finished: there is nothing to keep
        print(f"{clear_line()}Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None


class Setup(Generic[AnyOptions]):
    """The parts of a run, and its rollouts: `roll_out` generates episodes, `score` rewards them."""

    def __init__(
        self,
        config: AnyOptions,
        ranks: Ranks,
        world: toy.World | None,
        questions: Questions,
        search: Search,
        policy: Policy,
    ):
        self.config = config
        self.ranks = ranks
        self.world = world  # None where nothing of the run is the toy world's
        self.questions = questions.train
        self.eval_questions = questions.evaluation
        self.toolbox = Toolbox(search.tools, inline=config.deterministic)
        self.spending = search.spending  # None where searches cost nothing
        self.scripts: Scripts | None = search.scripts  # model turns to force in training
        self.teacher: Teacher | None = None  # the model that writes them, if there is one
        self.judge: RewardJudge | None = None  # in training, the model that corrects exact match, if there is one
        self.folder = policy.folder  # the checkpoint that the run starts from
        self.chat = policy.chat
        self.dtype = policy.dtype
        self.model = policy.model
        # Of pictures, by their keys, while a step lasts. None where the tower is trained: features then change.
        self.features: dict[str, torch.Tensor] | None = None if lora.trains_tower(self.model) else {}

    @cached_property
    def suppressed(self) -> torch.Tensor:
        """(V,) bool: the tokens that are never sampled."""
        return self.chat.suppressed_tokens(self.model.config.vocab_size).to(self.ranks.device)

    def begin_step(self, name: str) -> None:
        """Forget other steps' features of pictures. What is spent on searches from now on counts under this name."""
        if self.features is not None:
            self.features.clear()
        if self.spending:
            self.spending.begin_step(name)

    def keep_features(self, episodes: Sequence[Episode]) -> None:
        """Forget the features of pictures that none of these episodes has."""
        if self.features is None:
            return
        kept = {image.key for episode in episodes for _, image in episode.images}
        for key in self.features.keys() - kept:
            del self.features[key]

    def new_rollout(self, model: modeling.VLModel, temperature: float, direct: bool = False) -> Rollout:
        """A fresh rollout of `model`, whose weights are whole."""
        config = self.config
        engine = Engine(
            model,
            self.chat.stop_id,
            self.suppressed,
            slots=config.slots,
            slot_tokens=config.slot_tokens,
            max_tokens=config.max_tokens,
            turn_tokens=config.turn_tokens,
            temperature=temperature,
            prefill_tokens=config.micro_tokens,
            features=self.features,
        )
        return Rollout(engine, self.chat, self.toolbox, rollout_limits(config, model.config.vision.processor), direct)

    def roll_out(
        self,
        examples: Sequence[Example],
        group_size: int,
        seed: tuple,
        temperature: float,
        *,
        stretch: int | None = None,
        group_ids: Sequence[int] | None = None,
        direct: bool = False,
        scripts: Scripts | None = None,
        on_done: Callable[[Episode], None] = lambda episode: None,
        stop: Interrupts | None = None,
    ) -> tuple[list[Episode], Mapping[str, float]] | None:
        """This rank's share of the examples' groups, rolled out by the present weights, and all ranks' `counts`.

        Group ids are places in `examples`, unless `group_ids` are given. The ranks share each `stretch` of examples
        evenly: those of one update. A signal that `stop` notes ends the rollout: on all ranks it is None then.
        """
        stop = stop or Interrupts()  # which notes no signal until it is entered
        mine = self._my_places(examples, stretch or len(examples))
        ids = mine if group_ids is None else [group_ids[i] for i in mine]
        my_examples = [examples[i] for i in mine]
        with parallel.unsharded(self.model) as whole, self.ranks.sync_errors():
            sampler = lora.for_sampling(whole, self.model, self.dtype)
            rollout = self.new_rollout(sampler, temperature, direct)
            episodes = stop.breakable(rollout, my_examples, group_size, seed, scripts, on_done, ids)
            counts = {} if episodes is None else rollout.counts
            del rollout, sampler, whole  # with cache and graphs, which know where the weights are
        if self.ranks.max(episodes is None):
            return None
        return episodes, self.ranks.sum(counts)

    def answers(self, examples: Sequence[Example], seed: tuple, temperature: float, **how: Any) -> list[Episode] | None:
        """One scored rollout of each example of this rank's share; `how` and None as `roll_out` has them."""
        rollouts = self.roll_out(examples, 1, seed, temperature, **how)
        if rollouts is None:
            return None
        episodes, _ = rollouts
        with self.ranks.sync_errors():
            self.score(episodes)
        return episodes

    def _my_places(self, examples: Sequence[Example], stretch: int) -> list[int]:
        """The places of this rank's examples. Prompts are balanced, for their lengths are known; answers are not."""
        config, ranks = self.config, self.ranks
        if ranks.size == 1:
            return list(range(len(examples)))
        loads = []
        processor = self.model.config.vision.processor
        for example in examples:
            tokens = image_tokens(example.image, config.min_pixels, config.max_pixels, processor)
            loads.append(tokens + len(example.question) / 4)
        mine = []
        for begin in range(0, len(examples), stretch):
            shares = parallel.balanced_partition(loads[begin : begin + stretch], ranks.size)
            mine += [begin + i for i in shares[ranks.rank]]
        return mine

    def score(self, episodes: Sequence[Episode]) -> None:
        """Set every episode's reward, by the rule of the run."""
        score(episodes, self.config.reward_rule, self.chat.well_formed)

    def drop(self) -> None:
        """Give up the calls that tools and teacher have not started."""
        self.toolbox.drop()
        if self.teacher:
            self.teacher.drop()


def open_imitation(setup: Setup) -> None:
    """Where turns are imitated: have them played, and leave only questions that demonstrations answer rightly."""
    config = setup.config
    with setup.ranks.sync_errors():
        if config.demonstrations:
            setup.questions, setup.scripts = open_demonstrations(
                config.demonstrations, setup.questions, setup.chat, config.reward_rule, setup.ranks
            )
        if config.teacher:
            kept = Path(config.out) / "teacher.jsonl"
            limits = rollout_limits(config, setup.model.config.vision.processor)
            setup.teacher = open_teacher(config.teacher, config.teacher_model, kept, setup.chat, setup.toolbox, limits)
            setup.scripts = setup.teacher


def open_judge(setup: Setup) -> None:
    """The judge in the reward, if --reward-judge names one. Its paid calls count with those of searches."""
    config, ranks = setup.config, setup.ranks
    if not config.reward_judge:
        return
    with ranks.sync_errors():
        if config.budget and not setup.spending:
            setup.spending = Budget(Path(config.out) / "spent.sqlite", "run", config.budget, config.step_budget)
        spend = setup.spending.spend if setup.spending else None
        setup.judge = open_reward_judge(config, spend, shown=ranks.main)
