"""One flat dataclass: the defaults, the command line, and the `config.json` of a run.

A recipe is a dictionary of defaults. What stands on the command line wins over the recipe, and the recipe over the
dataclass. An unknown or ill-typed option is one line on standard error and exit status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Sequence

from .episode import UserError

CONFIG, CONFIG_SIDE = "config.json", ".config.json.tmp"

_PAPER = dict(
    data="lmms-lab/FVQA", search="replay:fvqa", questions=512, mini_batch=128, lr=2e-6, kl=0.001, loss_norm="token",
    group_eps=1e-6, reward="paper", prompts="real", zero_std="keep", steps=50, deterministic=False,
    max_turns=3, max_images=1, max_texts=2, adam_beta2=0.999, min_pixels=512 * 512, max_pixels=672 * 672 * 2,
    max_tokens=8192, turn_tokens=2048, micro_tokens=16384, slots=64, lr_schedule="constant", eval_every=0,
    save_every=10, recompute=True,
)  # fmt: skip

RECIPES: dict[str, dict] = {
    "toy": dict(
        data="toy", search="toy", questions=32, mini_batch=32, group_size=8, lr=3e-4, kl=0.001, loss_norm="sequence",
        group_eps=0.05, max_turns=2, max_images=1, max_texts=0, reward="paper", prompts="toy", zero_std="drop",
        steps=100, lr_schedule="half-decay", adam_beta2=0.99, min_pixels=56 * 56, max_pixels=56 * 56, max_tokens=128,
        turn_tokens=32, micro_tokens=32768, slots=256, deterministic=True, eval_every=0,
    ),
    "blog": {**_PAPER, "group_size": 32, "max_turns": 2, "max_texts": 0, "reward": "blog", "steps": 100},
    "paper": {**_PAPER, "group_size": 8, "loss_norm": "sequence"},
    "released": {
        **_PAPER, "questions": 32, "mini_batch": 32, "group_size": 4, "lr_schedule": "sigmoid", "warmup": 45,
        "steps": 4690,  # 30 epochs of 5,000 questions
    },
}  # fmt: skip


# What a resumed run may change. The rest changes what comes out of it, or the files that say so.
RESUME_FREELY = {"out", "save_every", "keep", "resume", "timeout", "max_skipped", "log_tokens", "track"}
RESUME_UNDETERMINED = {"device", "slots", "micro_tokens", "shard"}  # where equal bits are not promised


# The numbers that make sense, both ends included; a Config outside them is refused.
_MANY = 10**12
_BOUNDS = {
    **dict.fromkeys(("steps", "questions", "mini_batch", "group_size", "max_turns", "turn_tokens"), (1, _MANY)),
    **dict.fromkeys(("slots", "micro_tokens", "eval_size", "max_skipped", "timeout"), (1, _MANY)),
    **dict.fromkeys(("seed", "warmup", "max_images", "max_texts", "eval_every", "save_every"), (0, _MANY)),
    **dict.fromkeys(("min_pixels", "max_pixels"), (28 * 28, _MANY)),
    "max_tokens": (2, _MANY), "keep": (2, _MANY), "lr": (0, 1), "adam_beta2": (0, 0.999999),
    "max_grad_norm": (1e-12, 1e12), "kl": (0, 1e6), "clip_low": (0, 1), "clip_high": (0, 1e6),
    "group_eps": (0, 1e6), "importance_cap": (0, 1e6), "temperature": (0.01, 100),
}  # fmt: skip


@dataclass
class Config:
    recipe: Literal["toy", "blog", "paper", "released"] = "toy"
    """Defaults to start from: toy without --model, blog with it."""
    model: str = ""
    """Qwen2.5-VL-3B, Qwen2.5-VL-7B, a hub id, or a folder. Empty: the toy base model."""
    data: str = "toy"
    """toy, a .parquet in FVQA's schema, or a .jsonl with its images beside it."""
    search: str = "toy"
    """Back-end: toy, none, local:FILE (an index that search.py made), or replay:FILE (recorded searches)."""
    out: str = ""
    """Folder of the run; empty: runs/RECIPE. One that is not empty is refused without --resume."""
    seed: int = 0
    """Seeds the data order, the sampling and the toy world."""
    algorithm: Literal["grpo", "sft"] = "grpo"
    """sft: maximise the likelihood of rollouts whose answer is right (rejection sampling), same trainer."""

    steps: int = 100
    """Training steps; a step is one batch of rollouts."""
    questions: int = 32
    """Questions per step."""
    mini_batch: int = 32
    """Questions per optimizer update; a divisor of --questions."""
    group_size: int = 8
    """Rollouts per question."""
    lr: float = 3e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "half-decay", "sigmoid"] = "constant"
    """half-decay: linear to a tenth over the second half. sigmoid: smooth decay to a tenth."""
    warmup: int = 0
    """Steps of linear warm-up of the learning rate."""
    adam_beta2: float = 0.999
    """Second-moment decay of AdamW (the first is .9)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    max_skipped: int = 5
    """Stop after so many updates in a row that a value which is not finite made void."""
    kl: float = 0.001
    """β of the k3 KL term. 0: no reference model is loaded."""
    clip_low: float = 0.2
    """ε below 1 in the clipped surrogate."""
    clip_high: float = 0.2
    """ε above 1 in the clipped surrogate."""
    loss_norm: Literal["sequence", "token"] = "sequence"
    """sequence: mean of per-rollout means. token: mean over all trained tokens. Both over the whole update."""
    group_eps: float = 0.05
    """Added to the group's standard deviation. .05 was tuned in the toy world; the official code has 1e-6."""
    zero_std: Literal["drop", "keep"] = "drop"
    """Groups whose rewards are all equal: leave them out of the update, or keep them for KL and denominator."""
    importance_cap: float = 0.0
    """Cap of the truncated importance weight π_old/π_sampled; 0 turns it off."""
    reward: Literal["blog", "paper", "strict"] = "paper"
    """Reward rule; see reward.py."""

    max_turns: int = 2
    """Model turns per rollout: searches in all are at most one less."""
    max_images: int = 1
    """Image searches per rollout."""
    max_texts: int = 0
    """Text searches per rollout."""
    on_tool_error: Literal["tell", "drop"] = "tell"
    """A tool's infrastructure failed: tell the model and go on, or end the rollout and leave it out of the update."""
    force_searches: bool = False
    """Replay recorded turns (with --search replay:FILE) in half of each group."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""
    turn_tokens: int = 32
    """Tokens sampled per turn at most."""
    max_tokens: int = 128
    """Tokens of a conversation at most, prompt and images included."""
    max_pixels: int = 56 * 56
    """Larger pictures are shrunk to this many pixels."""
    min_pixels: int = 56 * 56
    """Smaller pictures are enlarged to this many pixels."""
    prompts: str = "toy"
    """Prompt set: toy, real, or a folder of your own."""

    slots: int = 256
    """Conversations decoded at once; what does not fit waits for a free slot."""
    micro_tokens: int = 32768
    """Packed tokens per forward and backward pass; halved where memory runs out."""
    recompute: bool = False
    """Keep only the inputs of the model's blocks and run them again in the backward pass: time for memory."""
    device: str = ""
    """cpu, cuda, …; empty: cuda where there is one. Under torchrun each process takes the one of its local rank."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Compute type; empty: bfloat16 on CUDA, float32 elsewhere. The optimizer keeps fp32 master weights."""
    shard: Literal["node", "all"] = "node"
    """Several machines: each holds a whole copy of the weights, sharded over its devices, or all hold one together."""
    timeout: int = 1800
    """Seconds that a process waits for another before the run is given up."""
    deterministic: bool = True
    """Equal seeds give equal bits on the CPU: tools run inline. Fp32 attention is summed in fp64 there."""
    eval_data: str = ""
    """Evaluation questions, a file as for --data; empty: fresh toy pictures, or the first rows of --data."""
    eval_size: int = 200
    """Questions per evaluation; with the toy world, per category."""
    eval_every: int = 0
    """Evaluate every so many steps, besides before the first and after the last."""
    save_every: int = 0
    """Save a checkpoint every so many steps, besides after the last and when interrupted."""
    keep: int = 2
    """Keep this many checkpoints, the newest; at least 2, in case one is damaged."""
    log_tokens: bool = True
    """Write every sampled token's text and probability into the rollout lines; report.html colours them."""
    track: Literal["", "tensorboard", "wandb"] = ""
    """Send the metrics to a tracker too; its package must be installed."""
    resume: bool = False
    """Go on from the newest sound checkpoint in --out, or start afresh where there is none."""
    toy: Literal["basic"] = "basic"
    """Which toy world."""

    def __post_init__(self) -> None:
        self.out = self.out or f"runs/{self.recipe}"
        for name, (low, high) in _BOUNDS.items():
            if not low <= getattr(self, name) <= high:  # also refuses NaN
                raise UserError(f"--{_kebab(name)} {getattr(self, name)}: give a number from {low:g} to {high:g}")
        if self.algorithm == "grpo" and self.group_size < 2:
            raise UserError("--group-size 1: GRPO compares the rollouts of a question; give at least 2")
        if self.questions % self.mini_batch:
            raise UserError(f"--mini-batch {self.mini_batch} must divide --questions {self.questions}")
        if self.group_size > self.slots:
            raise UserError(f"--slots {self.slots} is less than --group-size {self.group_size}: raise --slots")
        if self.min_pixels > self.max_pixels:
            raise UserError(f"--min-pixels {self.min_pixels} is more than --max-pixels {self.max_pixels}")
        if self.force_searches and not self.search.startswith("replay:"):
            raise UserError("--force-searches replays recorded turns: give --search replay:FILE with them")

    def save(self, folder: Path) -> None:
        """Write `folder`/config.json, whole or not at all."""
        side = folder / CONFIG_SIDE
        side.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        side.replace(folder / CONFIG)

    def check_resumes(self, folder: Path) -> None:
        """Raises UserError unless this configuration continues the run in `folder`: what comes out is the same."""
        try:
            before = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            before.keys()
        except FileNotFoundError:
            raise UserError(f"--out {folder} is not empty and holds no {CONFIG} of a run: name another") from None
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / CONFIG} cannot be read ({error}): name another --out") from None
        free = RESUME_FREELY if self.deterministic else RESUME_FREELY | RESUME_UNDETERMINED
        now = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        changed = [name for name, value in now.items() if before.get(name) != value]
        if changed:
            listed = ", ".join(f"--{_kebab(name)} (was {before.get(name)!r}, is {now[name]!r})" for name in changed)
            raise UserError(f"--resume: the run in {folder} differs in {listed}: give the same, or another --out")


def parse(argv: Sequence[str]) -> Config:
    """The configuration of a command line. Exits with status 2 and one line where it is wrong; --help exits with 0."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    recipe = given.get("recipe") or ("blog" if given.get("model") else "toy")
    return Config(**{**RECIPES[recipe], **given, "recipe": recipe})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        print(f"{self.prog}: {message}; --help lists the options", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("train.py", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    types, docs = typing.get_type_hints(Config), _field_docs()
    for field in dataclasses.fields(Config):
        kind, name = types[field.name], f"--{_kebab(field.name)}"
        text = docs.get(field.name, "").replace("%", "%%")
        if typing.get_origin(kind) is Literal:
            parser.add_argument(name, choices=[c for c in typing.get_args(kind) if c], help=text)
        elif kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(name, type=kind, metavar=kind.__name__.upper(), help=text)
    return parser


def _field_docs() -> dict[str, str]:
    """The string under each field of Config: the help text stands where the field does."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(Config)).body[0].body
    return {
        field.target.id: text.value.value.strip()
        for field, text in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _kebab(name: str) -> str:
    return name.replace("_", "-")
