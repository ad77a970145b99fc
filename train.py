"""Train a vision-language model with GRPO to search when it must: `python train.py --help`.

On several devices: `torchrun --nproc-per-node 8 train.py …`. Every process runs this same loop on its own share of each
step's questions; `ranks` has what they must know of each other.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from contextlib import contextmanager
from typing import Any, Mapping, Sequence

import torch
from tqdm import tqdm

from mmsr import evaluate, grpo
from mmsr.assemble import Setup, assemble, launch
from mmsr.config import Config
from mmsr.data.sampler import Sampler
from mmsr.episode import TOOL_ERROR, Episode, Example
from mmsr.report import alarms
from mmsr.report.checkpoints import Checkpoints
from mmsr.report.html import shape_name
from mmsr.report.output import Output
from mmsr.rollout import Script
from mmsr.system.errors import UserError
from mmsr.system.interrupt import Interrupts
from mmsr.system.parallel import Ranks
from mmsr.toy.world import World
from mmsr.update import MasterWeights, Trainer, split


def train(config: Config, ranks: Ranks, world: World | None = None) -> None:
    """`world`: a toy world of one's own instead of the one that `config.toy` names."""
    with ranks.sync_errors():
        out = Output(config, ranks)
    with out:
        run(config, ranks, world, out)


def run(config: Config, ranks: Ranks, world: World | None, out: Output) -> None:
    """The steps of `train`, in a folder that is held against other runs."""
    setup = assemble(config, ranks, world)
    with ranks.sync_errors():
        out.check(setup, __file__)
    trainer = make_trainer(setup)
    sampler = Sampler(len(setup.questions), config.seed)
    saved = Checkpoints(setup, trainer, sampler, out)
    done = saved.resume()
    with ranks.sync_errors():
        out.begin(done)
        lines = out.steps()
    lines = ranks.all_gather(lines)[0]
    steps = range(done + 1, config.steps + 1)
    bar = tqdm(steps, "train", config.steps, initial=done, unit="step", disable=not ranks.main)
    with Interrupts() as stop, bar:
        for step in bar:
            if step == 1 or config.eval_every and (step - 1) % config.eval_every == 0:
                out.line(evaluation(step - 1, setup, stop))
            clock = Clock()
            with clock("rollout"):
                episodes, counts = roll_out(step, setup, sampler, stop)
            if episodes is None:
                break  # interrupted: the last step is whole, this one is not there
            with clock("reward"), ranks.sync_errors():
                setup.score(episodes)
                zero_std = assign_advantages(episodes, config)
            with clock("update"):
                update = trainer.step(mini_batches(episodes, config), learning_rate(config, step))
            metrics = step_metrics(step, setup, episodes, counts, update, zero_std, clock.seconds)
            said = raise_alarms(metrics, lines, setup)
            out.step(step, metrics, episodes, setup.chat.pieces if config.log_tokens else None)
            warn(ranks, *(f"step {step}: {sentence}" for sentence in said))
            saved.finished(step)
            stop_if_stalled(lines, config)
            out.report()
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", search=f"{metrics['search_ratio']:.2f}")
        else:
            out.line(evaluation(config.steps, setup, stop))
        bar.close()
        if status := int(ranks.max(stop.status)):
            saved.leave()
        out.finish(setup, summary=not status)
    if alarms.never_trained(lines):
        warn(ranks, f"WARNING: no step trained a token: {out.folder / 'model'} has the weights that the run began with")
    if status:
        raise SystemExit(status)


def roll_out(step: int, setup: Setup, sampler: Sampler, stop: Interrupts) -> tuple[list[Episode] | None, Mapping]:
    """This rank's episodes of a step, not scored yet, and all ranks' counts of tokens and images. None: interrupted."""
    c = setup.config
    setup.begin_step(f"step {step}")
    examples = [setup.questions[i] for i in sampler.take(c.questions)]
    with progress("rollouts", c.questions * c.group_size, setup.ranks) as on_done:
        rollouts = setup.roll_out(
            examples, c.group_size, (c.seed, step), c.temperature, stretch=c.mini_batch, scripts=setup.scripts,
            on_done=on_done, attempt=stop.breakable,
        )  # fmt: skip
    return rollouts or (None, {})


def make_trainer(setup: Setup) -> Trainer:
    c = setup.config
    reference = setup.reference() if c.kl and c.algorithm == "grpo" else None

    def adam(params) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=c.lr, betas=(0.9, c.adam_beta2), weight_decay=0.0, fused=True)

    return Trainer(
        setup.model, MasterWeights(setup.model, adam), setup.suppressed, reference=reference, kl=c.kl,
        clip_low=c.clip_low, clip_high=c.clip_high, loss_norm=c.loss_norm, importance_cap=c.importance_cap,
        temperature=c.temperature, micro_tokens=c.micro_tokens, max_grad_norm=c.max_grad_norm,
        max_skipped=c.max_skipped, sft=c.algorithm == "sft", ranks=setup.ranks,
    )  # fmt: skip


def assign_advantages(episodes: Sequence[Episode], config: Config) -> int:
    """Set every episode's `advantage` and whether it is `trained`. Returns how many groups have all rewards equal."""
    sound = [e.status != TOOL_ERROR for e in episodes]
    if config.algorithm == "sft":  # imitate what was right: demonstrations, or the model's own
        for episode, ok in zip(episodes, sound):
            if config.imitates:
                episode.imitate()
            episode.advantage, episode.trained = 1.0, ok and episode.reward_parts["accuracy"] == 1
        return 0
    rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    group_ids = torch.tensor([e.group_id for e in episodes], dtype=torch.long)
    keep = torch.tensor(sound, dtype=torch.bool)
    advantages, varied = grpo.group_advantages(rewards, group_ids, config.group_eps, keep)
    chosen = varied.tolist() if config.zero_std == "drop" else sound
    for episode, advantage, trained in zip(episodes, advantages.tolist(), chosen):
        episode.advantage, episode.trained = advantage, trained
    return len(group_ids.unique()) - len(group_ids[varied].unique())


def mini_batches(episodes: Sequence[Episode], config: Config) -> list[list[Episode]]:
    """This rank's episodes of each of a step's updates, those that take part in it."""
    trained = [episode for episode in episodes if episode.trained]
    return split(trained, config.questions // config.mini_batch, config.questions)


def learning_rate(config: Config, step: int) -> float:
    """The rate of a step counted from 1: linear warm-up, then the schedule: constant, or down to a tenth."""
    share = max(0.0, (step - config.warmup - 1) / max(config.steps - config.warmup - 1, 1))
    decay = {
        "constant": 1.0,
        "half-decay": 1 - 0.9 * max(0.0, 2 * share - 1),
        "sigmoid": 0.1 + 0.9 * float(torch.sigmoid(torch.tensor(6 - 12 * share))),
    }[config.lr_schedule]
    return config.lr * decay * min(1.0, step / max(config.warmup, 1))


def step_metrics(
    step: int, setup: Setup, episodes: Sequence[Episode], counts: Mapping, update: dict, zero_std: int, seconds: dict
) -> dict:
    """One line of metrics.jsonl. `episodes` and `zero_std` are this rank's, the other numbers those of all."""
    c, ranks = setup.config, setup.ranks
    means = evaluate.summary(episodes, ranks)
    n = means.pop("n")
    sums = {
        "format": sum(e.reward_parts["format"] for e in episodes),
        "tool_calls": sum(e.searches() for e in episodes),
        "response_tokens": sum(sum(e.loss_mask) for e in episodes),
        "zero_std_groups": zero_std,
    }
    sums = ranks.sum(sums)
    errors = Counter(ranks.sum(evaluate.tool_errors(episodes)))
    loss = ("loss", "kl", "entropy", "clip_fraction", "logp_gap", "logp_gap_max", "grad_norm", "skipped_updates")
    unknown = {"logp_gap": math.nan, "logp_gap_max": math.nan} if c.imitates else {}  # nobody sampled these tokens
    return {
        "step": step,
        **means,
        "format": sums["format"] / n,
        "tool_calls": sums["tool_calls"],
        "tool_failures": errors.total(),
        "tool_errors": dict(errors.most_common(3)),
        "response_tokens": sums["response_tokens"] / n,
        "zero_std_groups": sums["zero_std_groups"],
        **{key: update[key] for key in loss} | unknown,
        "status": ranks.sum(dict(Counter(e.status for e in episodes))),
        "shapes": ranks.sum(dict(Counter(_shape(e) for e in episodes))),
        "by_category": {
            category: {key: found[key] for key in ("n", "search_ratio")}
            for category, found in evaluate.by_category(episodes, ranks).items()
        },
        "lr": learning_rate(c, step),
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "tokens": {
            **{key: counts[key] for key in ("prefilled", "prefilled_unique", "sampled")},
            **{key: update[key] for key in ("trained", "trained_unique")},
        },
        **({"spent": setup.spending.spent} if setup.spending else {}),
        "images": {"distinct": counts["images_distinct"], "encoded": counts["images_encoded"] + update["encoded"]},
    }


def raise_alarms(metrics: dict, lines: list[dict], setup: Setup) -> list[str]:
    """Add a step's metrics to the `lines` of those before, with the words of its alarms. Returns what is to be said."""
    c = setup.config
    offered = c.max_turns > 1 and any(tool.limit for tool in setup.toolbox.tools.values())
    found = alarms.alarms([*lines, metrics], str(setup.dtype).removeprefix("torch."), offered and not c.imitates)
    if found:
        metrics["alarms"] = list(found)
    said = alarms.to_say(found, lines)
    lines.append(metrics)
    return said


def stop_if_stalled(lines: Sequence[dict], config: Config) -> None:
    """Raises UserError after too many steps that trained nothing: the weights will not change any more."""
    if (n := alarms.stalled(lines)) >= config.max_skipped:
        why = alarms.untrained(lines[-1])
        raise UserError(f"{n} steps in a row trained nothing; in the last, {why}; mend that, or raise --max-skipped")


def warn(ranks: Ranks, *sentences: str) -> None:
    """One line each on standard error, once, above the progress bar."""
    for sentence in sentences if ranks.main else ():
        tqdm.write(sentence, file=sys.stderr)


def _shape(episode: Episode) -> str:
    return shape_name([turn.action for turn in episode.turns if turn.role == "assistant"], episode.status)


def evaluation(step: int, setup: Setup, stop: Interrupts) -> dict | None:
    """One line of metrics.jsonl: the policy greedy and sampled, all ranks' episodes together. None: interrupted.

    Before training the two fixed policies too, where the toy world has them.
    """
    c = setup.config
    setup.begin_step(f"evaluation {step}")

    def always_search(example: Example, sample: int) -> Script:
        return Script(setup.world.always_search(example, c.max_texts > 0))

    modes: dict[str, tuple] = {"eval": (0.0, None, False), "eval_sampled": (1.0, None, False)}
    if step == 0 and c.data == "toy":
        modes["always_search"] = (1.0, always_search, False)
        modes["never_search"] = (1.0, None, True)
    line: dict[str, Any] = {"step": step}
    for name, (temperature, scripts, direct) in modes.items():
        with progress(name.replace("_", " "), len(setup.eval_questions), setup.ranks) as on_done:
            episodes = setup.answers(
                setup.eval_questions, (c.seed, name), temperature, direct=direct, scripts=scripts,
                on_done=on_done, attempt=stop.breakable,
            )  # fmt: skip
        if episodes is None:
            return None
        line[name] = evaluate.by_category(episodes, setup.ranks)
    return line


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


@contextmanager
def progress(name: str, total: int, ranks: Ranks):
    """A progress bar that is gone when its work is done; yields what to call per episode finished on this rank.

    The main rank shows its own share of `total`.
    """
    total, hidden = math.ceil(total / ranks.size), None if ranks.main else True
    with tqdm(total=total, desc=name, unit="rollout", leave=False, position=1, disable=hidden) as bar:
        yield lambda episode: bar.update()


def main(argv: Sequence[str]) -> None:
    launch(argv, Config, "train.py", train)


if __name__ == "__main__":
    main(sys.argv[1:])
