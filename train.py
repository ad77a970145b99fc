"""Train a vision-language model with GRPO to search when it must: `python train.py --help`.

On several devices: `torchrun --nproc-per-node 8 train.py …`. Every process runs this same loop on its own share of each
step's questions; `ranks` has what they must know of each other.
"""

from __future__ import annotations

import sys

from mmsr.config import Config, check_command_line

if __name__ == "__main__":  # torch takes seconds to import: --help and mistakes do not wait for it
    check_command_line(sys.argv[1:], Config, "train.py")

import math
import time
from contextlib import contextmanager
from typing import Any, Iterator, Mapping, Sequence

import torch

from mmsr import evaluate, lora
from mmsr.assemble import Setup, launch, open_imitation, open_judge
from mmsr.batch import Batch, assign_advantages, before_failing, penalise_overlong, zero_std_groups
from mmsr.data.sampler import Sampler
from mmsr.episode import Episode, Example
from mmsr.report import alarms
from mmsr.report.checkpoints import Checkpoints
from mmsr.report.html import mode_name
from mmsr.report.metrics import note_alarms, step_metrics
from mmsr.report.output import Output, results
from mmsr.rollout import Script
from mmsr.setup.policy import open_policy, open_reference
from mmsr.setup.preflight import preflight
from mmsr.setup.questions import open_questions, open_world
from mmsr.setup.search import open_search
from mmsr.system.interrupt import Interrupts
from mmsr.system.parallel import SINGLE, Ranks
from mmsr.system.progress import progress
from mmsr.toy.world import World
from mmsr.update import MasterWeights, Trainer, split


def train(config: Config, ranks: Ranks, world: World | None = None) -> None:
    """Open the parts of a run, take its steps, and write its files. `world`: as `open_setup` has it."""
    with ranks.sync_errors():
        output = Output(config, ranks)
    with output:  # its folder is held against other runs
        setup = open_setup(config, ranks, world)
        with ranks.sync_errors():
            output.check(setup, __file__)
        trainer = make_trainer(setup)

        sampler = Sampler(len(setup.questions), config.seed)
        checkpoints = Checkpoints(setup, trainer, sampler, output)
        done = checkpoints.resume()
        with ranks.sync_errors():
            output.begin(done)
            history = output.steps()
        history = ranks.all_gather(history)[0]  # the metrics of the steps that are done

        with Interrupts(ranks.main) as stop:
            take_steps(setup, sampler, trainer, checkpoints, output, history, stop)
            status = int(ranks.max(stop.status))
            if status:
                checkpoints.leave()
            output.finish(setup, summary=not status)
        if history and alarms.never_trained(history):
            weights = f"{output.folder / results(config)[0]} has the weights that the run began with"
            output.warn([f"WARNING: no step trained a token: {weights}"])
        if status:
            raise SystemExit(status)


def open_setup(config: Config, ranks: Ranks = SINGLE, world: World | None = None) -> Setup:
    """Open the parts of a run, each from those before it. Raises UserError where something is missing or wrong.

    `world`: the toy world to train in, instead of the one that `config.toy` names.
    """
    preflight(config, ranks)
    world = world or open_world(config)
    questions = open_questions(config, world, ranks)
    search = open_search(config, world, questions, ranks)
    policy = open_policy(config, search.tools, questions, world, ranks)
    setup = Setup(config, ranks, world, questions, search, policy)
    open_imitation(setup)
    open_judge(setup)
    return setup


def take_steps(
    setup: Setup,
    sampler: Sampler,
    trainer: Trainer,
    checkpoints: Checkpoints,
    output: Output,
    history: list[dict],
    stop: Interrupts,
) -> None:
    """GRPO: roll out a group per question, reward, compare within each group, update. `history`: metrics by step."""
    config = setup.config
    for step in range(checkpoints.done + 1, config.steps + 1):
        if step == 1 or config.eval_every and (step - 1) % config.eval_every == 0:
            output.line(evaluation(step - 1, setup, output, stop))
        clock = Clock()
        batch = sample_batch(step, setup, sampler, checkpoints, stop, clock)
        if batch is None:
            return  # interrupted: the last step is whole, this one is not there
        with clock("update"):
            lr = learning_rate(config, step)
            update = update_model(step, batch.episodes, trainer, lr, setup)
        metrics = step_metrics(step, setup, batch, update, lr, clock.seconds)
        warnings = note_alarms(metrics, history, setup)
        history.append(metrics)
        output.step(step, metrics, batch.all, setup.chat.pieces if config.log_tokens else None)
        output.warn([f"step {step}: {sentence}" for sentence in warnings])
        checkpoints.finished(step)
        alarms.stop_if_stalled(history, config.max_skipped)
        output.report()
    output.line(evaluation(config.steps, setup, output, stop))


def sample_batch(
    step: int, setup: Setup, sampler: Sampler, checkpoints: Checkpoints, stop: Interrupts, clock: Clock
) -> Batch | None:
    """A group of scored rollouts for each question, with advantages. None: interrupted.

    Dynamic sampling (DAPO), with --resample: a group whose rewards are all equal teaches nothing, so another question
    takes its place. A group's id is its place in the batch, so the new group belongs to the same update.
    """
    config, ranks = setup.config, setup.ranks
    setup.begin_step(f"step {step}")
    batch = Batch()
    budget = setup.spending.left if setup.spending else math.inf  # paid calls
    places = list(range(config.questions))
    for draw in range(1 + config.resample):
        if draw:
            if not affordable(len(places), batch.asked, budget, setup):
                batch.short_of_budget = True
                break
            batch.remove(places)
            setup.keep_features(batch.episodes)
        examples = [setup.questions[i] for i in sampler.take(len(places))]
        with clock("rollout"):
            rollouts = roll_out(step, draw, examples, places, setup, stop)
        if rollouts is None:
            return None
        episodes, counts = rollouts
        with clock("reward"):
            if not reward_episodes(episodes, batch, setup, stop, checkpoints):
                return None
        batch.add(episodes, counts, len(places))
        if draw == config.resample:
            break  # the last draw; without --resample the only one
        equal = ranks.all_gather(zero_std_groups(episodes, config))  # of the new groups, a set for each rank
        places = sorted(set.union(*equal))
        batch.zero_std_first = batch.zero_std_first if draw else len(places)
        if not places:
            break
    batch.assigned = assign_advantages(batch.episodes, config, ranks)
    return batch


def affordable(wanted: int, asked: int, budget: float, setup: Setup) -> bool:
    """Whether the paid calls that are left will do for so many more questions, by what those of this step have cost.

    `budget`: what was left when the step began; `asked`: its questions so far. Collective.
    """
    if not setup.spending:
        return True
    left = setup.spending.left
    cost = (budget - left) / asked  # paid calls a question
    return not setup.ranks.max(left <= 0 or cost * wanted > left)


def roll_out(
    step: int, draw: int, examples: Sequence[Example], places: Sequence[int], setup: Setup, stop: Interrupts
) -> tuple[list[Episode], Mapping] | None:
    """A group of episodes for each of the examples that are this rank's, and all ranks' counts of tokens and images.

    No episode is scored yet. `places` in the batch are the groups' ids. `draw` counts the times that the step has asked
    questions before. None: interrupted.
    """
    config = setup.config
    name = f"step {step}, rollouts" + (f" for {len(places)} other questions" if draw else "")
    with rollout_progress(name, len(examples) * config.group_size, setup.ranks) as bar:
        return setup.roll_out(
            examples,
            config.group_size,
            (config.seed, step, f"draw {draw}") if draw else (config.seed, step),
            config.temperature,
            stretch=len(examples) if draw else config.mini_batch,
            group_ids=places,
            scripts=setup.scripts,
            on_done=lambda episode: bar.update(),
            stop=stop,
        )


def reward_episodes(
    episodes: Sequence[Episode], batch: Batch, setup: Setup, stop: Interrupts, checkpoints: Checkpoints
) -> bool:
    """Set the rewards of this rank's new episodes. False: interrupted, on all ranks."""
    if setup.judge:
        if not judge_answers(episodes, setup, stop, checkpoints):
            return False
        batch.judge_error = batch.judge_error or setup.judge.failure
    with setup.ranks.sync_errors():
        setup.score(episodes)
        penalise_overlong(episodes, setup.config)
    return True


def judge_answers(episodes: Sequence[Episode], setup: Setup, stop: Interrupts, checkpoints: Checkpoints) -> bool:
    """Let the judge in the reward look at this rank's answers. False: interrupted, on all ranks.

    Raises UserError where no verdict can come any more (a refused key), after the finished steps are saved.
    """
    try:
        with setup.ranks.sync_errors():
            asked = stop.breakable(setup.judge, episodes)
    except Exception:  # on all ranks
        checkpoints.save()
        raise
    return not setup.ranks.max(asked is None)


def update_model(
    step: int, episodes: Sequence[Episode], trainer: Trainer, lr: float, setup: Setup
) -> Mapping[str, float]:
    """The step's updates, one per mini-batch. Returns the trainer's metrics."""
    batches = mini_batches(episodes, setup.config)
    passes = 2 * sum(map(len, batches)) - len(batches[0])  # all mini-batches but the first need π_old before
    with progress(f"step {step}, update", passes, "rollout", shown=setup.ranks.main) as bar:
        trainer.on_episodes = bar.update
        return trainer.step(batches, lr)


def mini_batches(episodes: Sequence[Episode], config: Config) -> list[list[Episode]]:
    """This rank's episodes of each of a step's updates, those that take part in it."""
    trained = [before_failing(episode, config.fatal_errors) for episode in episodes if episode.trained]
    return split(trained, config.questions // config.mini_batch, config.questions)


def learning_rate(config: Config, step: int) -> float:
    """The rate of a step counted from 1: linear warm-up, then the schedule: constant, or down to a tenth."""
    done = step - config.warmup - 1  # steps since the warm-up
    share = max(0.0, done / max(config.steps - config.warmup - 1, 1))
    if config.lr_schedule == "constant":
        decay = 1.0
    elif config.lr_schedule == "half-decay":  # constant for half of the steps, then linear
        decay = 1 - 0.9 * max(0.0, 2 * share - 1)
    else:  # sigmoid
        decay = 0.1 + 0.9 * float(torch.sigmoid(torch.tensor(6 - 12 * share)))
    warmup = min(1.0, step / max(config.warmup, 1))
    return config.lr * decay * warmup


def make_trainer(setup: Setup) -> Trainer:
    """What updates the model: AdamW on fp32 masters, and the KL reference: the model as it is before training.

    That is a frozen copy, or the model itself where only its adapters are trained (`lora.as_reference`).
    """
    config, ranks = setup.config, setup.ranks
    reference = None
    if config.kl and config.algorithm == "grpo":
        if config.trains_adapters:
            reference = setup.model
            if config.adapter:
                lora.keep_as_reference(setup.model)
        else:
            ranks.print("Opening the reference of the KL term, a frozen copy of the model.")
            reference = open_reference(config, setup.folder, setup.dtype, ranks)

    optimizer = MasterWeights(setup.model, betas=(0.9, config.adam_beta2), weight_decay=0.0)
    return Trainer(
        setup.model,
        optimizer,
        setup.suppressed,
        reference=reference,
        features=setup.features,
        loss=config.loss,
        kl=config.kl,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        loss_norm=config.loss_norm,
        token_limit=config.max_tokens,
        importance_cap=config.importance_cap,
        importance_bound=config.importance_bound,
        temperature=config.temperature,
        micro_tokens=config.micro_tokens,
        max_grad_norm=config.max_grad_norm,
        max_skipped=config.max_skipped,
        sft=config.algorithm == "sft",
        ranks=ranks,
    )


def evaluation(step: int, setup: Setup, output: Output, stop: Interrupts) -> dict | None:
    """A line of metrics.jsonl: the policy greedy and sampled, all ranks' episodes together. None: interrupted.

    Before training the two fixed policies too, where the toy world has them.
    """
    config = setup.config
    setup.begin_step(f"evaluation {step}")

    def always_search(example: Example, sample: int) -> Script:
        return Script(setup.world.always_search(example, config.max_texts > 0))

    modes: dict[str, dict[str, Any]] = {"eval": dict(temperature=0.0), "eval_sampled": dict(temperature=1.0)}
    if step == 0 and config.data == "toy":
        modes["always_search"] = dict(temperature=1.0, scripts=always_search)
        modes["never_search"] = dict(temperature=1.0, direct=True)
    line: dict[str, Any] = {"step": step}
    for name, mode in modes.items():
        clock = Clock()
        doing = f"evaluation {step}, {mode_name(name)}"
        with clock(name), rollout_progress(doing, len(setup.eval_questions), setup.ranks) as bar:
            seed = (config.seed, name)
            episodes = setup.answers(
                setup.eval_questions, seed, on_done=lambda episode, bar=bar: bar.update(), stop=stop, **mode
            )
        if episodes is None:
            return None
        line[name] = evaluate.by_category(episodes, setup.ranks)
        output.evaluated(step, name, line[name], clock.seconds[name])
    return line


class Clock:
    """Seconds by phase. One that comes again adds up."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def rollout_progress(name: str, total: int, ranks: Ranks) -> Any:
    """How many rollouts are finished on this rank. The main rank shows its own share of the `total`."""
    return progress(name, math.ceil(total / ranks.size), "rollout", shown=ranks.main)


def main(argv: Sequence[str]) -> None:
    launch(argv, Config, "train.py", train)


if __name__ == "__main__":
    main(sys.argv[1:])
