"""Train a vision-language model with GRPO to search when it must: `python train.py --help`.

On several devices: `torchrun --nproc-per-node 8 train.py …`. Every process runs this same loop on its own share of each
step's questions; `ranks` has what they must know of each other.
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Mapping, Sequence

import torch
from tqdm import tqdm

from mmsr import evaluate, grpo
from mmsr import model as modeling
from mmsr.assemble import Setup, assemble
from mmsr.config import Config, parse
from mmsr.data import Sampler
from mmsr.episode import TOOL_ERROR, Episode, UserError
from mmsr.parallel import Ranks, gathered, start
from mmsr.toy import LOOK_IT_UP, MIX
from mmsr.update import MasterWeights, Trainer, split


def train(config: Config, ranks: Ranks) -> None:
    setup = assemble(config, ranks)
    with ranks.alone():
        out = Output(config, ranks)
    trainer = make_trainer(setup)
    sampler = Sampler(len(setup.questions), config.seed)
    table = {"before": out.evaluation(0, setup)}
    bar = tqdm(range(1, config.steps + 1), desc="train", unit="step", disable=not ranks.main)
    try:
        for step in bar:
            clock = Clock()
            with clock("rollout"):
                episodes, counts = roll_out(step, setup, sampler)
            with clock("reward"), ranks.alone():
                setup.score(episodes)
                trained, zero_std = assign_advantages(episodes, config)
            with clock("update"):
                batches = split(episodes, config.questions // config.mini_batch, config.questions)
                chosen = [[e for e in batch if id(e) in trained] for batch in batches]
                update = trainer.step(chosen, learning_rate(config, step))
            metrics = step_metrics(step, setup, episodes, counts, update, zero_std, clock.seconds)
            out.step(step, metrics, episodes)
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", search=f"{metrics['search_ratio']:.2f}")
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                out.evaluation(step, setup)
        table["after"] = out.evaluation(step, setup)
    except KeyboardInterrupt:
        if ranks.size > 1:  # they were interrupted in different places, and cannot finish together
            raise
        bar.close()
        print(f"Interrupted: keeping what {out.steps} finished steps made.")
    out.finish(setup, table)
    if "after" not in table:
        raise SystemExit(130)


def roll_out(step: int, setup: Setup, sampler: Sampler) -> tuple[list[Episode], Mapping[str, int]]:
    """This rank's episodes of a step, not scored yet, and the counts of all ranks' tokens and images."""
    c = setup.config
    examples = [setup.questions[i] for i in sampler.take(c.questions)]
    with progress("rollouts", c.questions * c.group_size, setup.ranks) as on_done:
        return setup.roll_out(
            examples, c.group_size, (c.seed, step), c.temperature, stretch=c.mini_batch, scripts=setup.scripts,
            on_done=on_done,
        )  # fmt: skip


def make_trainer(setup: Setup) -> Trainer:
    c = setup.config
    reference = setup.reference() if c.kl and c.algorithm == "grpo" else None

    def adam(params) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=c.lr, betas=(0.9, c.adam_beta2), weight_decay=0.0, fused=True)

    return Trainer(
        setup.model, MasterWeights(setup.model, adam), setup.banned, reference=reference, kl=c.kl,
        clip_low=c.clip_low, clip_high=c.clip_high, loss_norm=c.loss_norm, importance_cap=c.importance_cap,
        temperature=c.temperature, micro_tokens=c.micro_tokens, max_grad_norm=c.max_grad_norm,
        max_skipped=c.max_skipped, sft=c.algorithm == "sft", ranks=setup.ranks,
    )  # fmt: skip


def assign_advantages(episodes: Sequence[Episode], config: Config) -> tuple[set[int], int]:
    """Set every episode's advantage. Returns the `id`s of those to train on, and how many groups are all alike."""
    sound = [e.status != TOOL_ERROR for e in episodes]
    if config.algorithm == "sft":  # rejection sampling: imitate what was right
        for episode in episodes:
            episode.advantage = 1.0
        return {id(e) for e, ok in zip(episodes, sound) if ok and e.reward_parts["accuracy"] == 1}, 0
    rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    group_ids = torch.tensor([e.group_id for e in episodes], dtype=torch.long)
    keep = torch.tensor(sound, dtype=torch.bool)
    advantages, varied = grpo.group_advantages(rewards, group_ids, config.group_eps, keep)
    for episode, advantage in zip(episodes, advantages.tolist()):
        episode.advantage = advantage
    groups = len(group_ids.unique())
    chosen = varied.tolist() if config.zero_std == "drop" else sound
    return {id(e) for e, keep in zip(episodes, chosen) if keep}, groups - len(group_ids[varied].unique())


def learning_rate(config: Config, step: int) -> float:
    """The rate of a step counted from 1: linear warm-up, then the schedule, to a tenth at the end."""
    share = (step - 1) / max(config.steps - 1, 1)
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
    whole = evaluate.summary(episodes, setup.ranks)
    n = whole.pop("n")
    sums = {
        "format": sum(e.reward_parts["format"] for e in episodes),
        "tool_failures": evaluate.tool_failures(episodes),
        "response_tokens": sum(sum(e.loss_mask) for e in episodes),
        "zero_std_groups": zero_std,
    }
    sums = setup.ranks.sum(sums)
    loss = ("loss", "kl", "entropy", "clip_fraction", "logp_gap", "logp_gap_max", "grad_norm", "skipped_updates")
    return {
        "step": step,
        **whole,
        "format": sums["format"] / n,
        "tool_failures": sums["tool_failures"],
        "response_tokens": sums["response_tokens"] / n,
        "zero_std_groups": sums["zero_std_groups"],
        **{key: update[key] for key in loss},
        "lr": learning_rate(setup.config, step),
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "tokens": {
            **{key: counts[key] for key in ("prefilled", "prefilled_unique", "sampled")},
            **{key: update[key] for key in ("trained", "trained_unique")},
        },
        "images": {"distinct": counts["images_distinct"], "encoded": counts["images_encoded"] + update["encoded"]},
    }


class Output:
    """The files of a run. The folder is made when everything has been opened; one that is not empty is refused.

    Every rank has one and calls it, but the main one alone writes and prints.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.folder, self.steps, self.ranks = Path(config.out), 0, ranks
        if not ranks.main:
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--out {self.folder} is not empty: name another folder, or remove it")
        (self.folder / "rollouts").mkdir(parents=True, exist_ok=True)
        config.save(self.folder)

    def _line(self, record: dict) -> None:
        if not self.ranks.main:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def step(self, step: int, metrics: dict, episodes: Sequence[Episode]) -> None:
        lines = [(e.group_id, e.sample, json.dumps(e.record(), ensure_ascii=False) + "\n") for e in episodes]
        lines = "".join(line for _, _, line in sorted(self.ranks.gather(lines)))
        if self.ranks.main:
            (self.folder / "rollouts" / f"step-{step:06d}.jsonl").write_text(lines, encoding="utf-8")
        self._line(metrics)
        self.steps = step

    def evaluation(self, step: int, setup: Setup) -> dict[str, dict]:
        """Greedy and sampled evaluation; before training the two fixed policies too, where the toy world has them."""
        modes = {"eval": (0.0, None, False), "eval_sampled": (1.0, None, False)}
        if step == 0 and setup.config.data == "toy":
            modes["always_search"] = (1.0, lambda example, sample: [LOOK_IT_UP], False)
            modes["never_search"] = (1.0, None, True)
        found = {}
        for name, (temperature, scripts, direct) in modes.items():
            with progress(name.replace("_", " "), len(setup.eval_questions), setup.ranks) as on_done:
                episodes, _ = setup.roll_out(
                    setup.eval_questions, 1, (setup.config.seed, name), temperature, direct=direct, scripts=scripts,
                    on_done=on_done,
                )  # fmt: skip
            with setup.ranks.alone():
                setup.score(episodes)
            found[name] = evaluate.by_category(episodes, setup.ranks)
        self._line({"step": step, **found})
        return found

    def finish(self, setup: Setup, table: dict[str, dict]) -> None:
        weights = gathered(setup.model, setup.ranks, setup.dtype)
        if not self.ranks.main:
            return
        modeling.save_weights(setup.model.config, weights, self.folder / "model", setup.folder)
        names = {"eval": "greedy", "eval_sampled": "T = 1"}
        rows = {
            f"{when}, {names.get(mode, mode.replace('_', ' '))}": row
            for when, found in table.items()
            for mode, row in found.items()
        }
        mix = MIX if setup.config.data == "toy" and not setup.config.eval_data else None
        print(f"\n{evaluate.table(rows, mix)}\n\n{self.folder}: model/, metrics.jsonl, rollouts/")


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

    The main rank's own is taken for all: it counts its share of `total`.
    """
    total = math.ceil(total / ranks.size)
    with tqdm(total=total, desc=name, unit="rollout", leave=False, position=1, disable=not ranks.main) as bar:
        yield lambda episode: bar.update()


def main(argv: Sequence[str]) -> None:
    try:
        config = parse(argv)
        with start(config.device, config.timeout) as ranks:
            train(config, ranks)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
