"""Train a vision-language model with GRPO to search when it must: `python train.py --help`."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Sequence

import torch
from tqdm import tqdm

from mmsr import evaluate, grpo
from mmsr import model as modeling
from mmsr.assemble import Setup, assemble
from mmsr.config import Config, parse
from mmsr.data import Sampler
from mmsr.episode import TOOL_ERROR, Episode, UserError
from mmsr.toy import LOOK_IT_UP, MIX
from mmsr.update import MasterWeights, Trainer, split


def train(config: Config) -> None:
    setup = assemble(config)
    out = Output(config)
    trainer = make_trainer(setup)
    sampler = Sampler(len(setup.questions), config.seed)
    table = {"before": out.evaluation(0, setup)}
    bar = tqdm(range(1, config.steps + 1), desc="train", unit="step")
    try:
        for step in bar:
            clock = Clock()
            with clock("rollout"):
                examples = [setup.questions[i] for i in sampler.take(config.questions)]
                rollout = setup.rollout(config.temperature)
                with progress("rollouts", config.questions * config.group_size) as on_done:
                    episodes = rollout(examples, config.group_size, (config.seed, step), setup.scripts, on_done)
            with clock("reward"):
                setup.score(episodes)
                trained, zero_std = assign_advantages(episodes, config)
            with clock("update"):
                batches = split(episodes, config.questions // config.mini_batch)
                chosen = [[e for e in batch if id(e) in trained] for batch in batches]
                update = trainer.step(chosen, learning_rate(config, step))
            metrics = step_metrics(step, config, episodes, rollout.counts, update, zero_std, clock.seconds)
            out.step(step, metrics, episodes)
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", search=f"{metrics['search_ratio']:.2f}")
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                out.evaluation(step, setup)
        table["after"] = out.evaluation(step, setup)
    except KeyboardInterrupt:
        bar.close()
        print(f"Interrupted: keeping what {out.steps} finished steps made.")
    out.finish(setup, table)
    if "after" not in table:
        raise SystemExit(130)


def make_trainer(setup: Setup) -> Trainer:
    c = setup.config
    reference = None
    if c.kl and c.algorithm == "grpo":
        reference = modeling.load(setup.folder, setup.dtype, setup.device).requires_grad_(False)

    def adam(params) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=c.lr, betas=(0.9, c.adam_beta2), weight_decay=0.0, fused=True)

    return Trainer(
        setup.model, MasterWeights(setup.model, adam), setup.banned, reference=reference, kl=c.kl,
        clip_low=c.clip_low, clip_high=c.clip_high, loss_norm=c.loss_norm, importance_cap=c.importance_cap,
        temperature=c.temperature, micro_tokens=c.micro_tokens, max_grad_norm=c.max_grad_norm, sft=c.algorithm == "sft",
    )  # fmt: skip


def assign_advantages(episodes: Sequence[Episode], config: Config) -> tuple[set[int], int]:
    """Set every episode's advantage. Returns the `id`s of those to train on, and how many groups are all alike."""
    sound = [e.status != TOOL_ERROR for e in episodes]
    if config.algorithm == "sft":  # rejection sampling: imitate what was right
        for episode in episodes:
            episode.advantage = 1.0
        return {id(e) for e, ok in zip(episodes, sound) if ok and e.reward_parts["accuracy"] == 1}, 0
    rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    group_ids = torch.tensor([e.group_id for e in episodes])
    advantages, varied = grpo.group_advantages(rewards, group_ids, config.group_eps, torch.tensor(sound))
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
    step: int, config: Config, episodes: Sequence[Episode], counts: dict, update: dict, zero_std: int, seconds: dict
) -> dict:
    """One line of metrics.jsonl."""
    whole = evaluate.summary(episodes)
    whole.pop("n")
    loss = ("loss", "kl", "entropy", "clip_fraction", "logp_gap", "logp_gap_max", "grad_norm", "skipped_updates")
    return {
        "step": step,
        **whole,
        "format": sum(e.reward_parts["format"] for e in episodes) / len(episodes),
        "tool_failures": evaluate.tool_failures(episodes),
        "response_tokens": sum(sum(e.loss_mask) for e in episodes) / len(episodes),
        "zero_std_groups": zero_std,
        **{key: update[key] for key in loss},
        "lr": learning_rate(config, step),
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "tokens": {
            **{key: counts[key] for key in ("prefilled", "prefilled_unique", "sampled")},
            **{key: update[key] for key in ("trained", "trained_unique")},
        },
        "images": {"distinct": counts["images_distinct"], "encoded": counts["images_encoded"] + update["encoded"]},
    }


class Output:
    """The files of a run. The folder is made when everything has been opened; one that is not empty is refused."""

    def __init__(self, config: Config):
        self.folder, self.steps = Path(config.out), 0
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--out {self.folder} is not empty: name another folder, or remove it")
        (self.folder / "rollouts").mkdir(parents=True, exist_ok=True)
        config.save(self.folder)

    def _line(self, record: dict) -> None:
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def step(self, step: int, metrics: dict, episodes: Sequence[Episode]) -> None:
        lines = "".join(json.dumps(e.record(), ensure_ascii=False) + "\n" for e in episodes)
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
            with progress(name.replace("_", " "), len(setup.eval_questions)) as on_done:
                rollout = setup.rollout(temperature, direct)
                episodes = rollout(setup.eval_questions, 1, (setup.config.seed, name), scripts, on_done)
            setup.score(episodes)
            found[name] = evaluate.by_category(episodes)
        self._line({"step": step, **found})
        return found

    def finish(self, setup: Setup, table: dict[str, dict]) -> None:
        modeling.save(setup.model, self.folder / "model", tokenizer_files_from=setup.folder)
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
def progress(name: str, total: int):
    """A progress bar that is gone when its work is done; yields what to call per finished episode."""
    with tqdm(total=total, desc=name, unit="rollout", leave=False, position=1) as bar:
        yield lambda episode: bar.update()


def main(argv: Sequence[str]) -> None:
    try:
        train(parse(argv))
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
