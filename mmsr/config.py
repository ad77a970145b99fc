"""Flat dataclasses: the defaults, the command line, and the `config.json` of a run. Imports no torch: a program reads
its command line before that, so that a mistake is told at once.

`Options` is what train.py and eval.py have in common; `Config` adds training, `EvalConfig` evaluation. A recipe is a
dictionary of defaults, of which each takes what it has; the toy recipe differs a little between the toy worlds. The
command line wins over the recipe, and the recipe over the dataclass. An unknown or ill-typed option is one line on
standard error and exit status 2. `--help` shows the options in groups: a comment `# ---- GROUP` begins one.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Mapping, Sequence, TypeVar

from mmsr.reward import RewardRule
from mmsr.system.credentials import hidden, refuse_credentials, server_address
from mmsr.system.errors import UserError
from mmsr.system.files import LOCK, write_whole
from mmsr.system.options import Parser, add_options, default_notes, kebab

CONFIG = "config.json"
FVQA_SEARCH = "replay:fvqa"  # the recorded searches that are published with FactualVQA

_PAPER: dict[str, Any] = {
    "data": "lmms-lab/FVQA",
    "search": FVQA_SEARCH,
    "prompts": "real",
    "reward": "paper",
    # The algorithm.
    "questions": 512,
    "mini_batch": 128,
    "steps": 50,
    "lr": 2e-6,
    "lr_schedule": "constant",
    "adam_beta2": 0.999,
    "kl": 0.001,
    "loss_norm": "token",
    "group_eps": 1e-6,
    "zero_std": "keep",
    # Limits of a rollout.
    "max_turns": 3,
    "max_images": 1,
    "max_texts": 2,
    "min_pixels": 512 * 512,
    "max_pixels": 672 * 672 * 2,
    "max_tokens": 8192,
    "turn_tokens": 2048,
    # The machine.
    "micro_tokens": 16384,
    "slots": 64,
    "slot_tokens": 2048,
    "recompute": True,
    "deterministic": False,
    "eval_every": 0,
    "save_every": 10,
}

RECIPES: dict[str, dict[str, Any]] = {
    "toy": {
        "data": "toy",
        "search": "toy",
        "prompts": "toy",
        "reward": "paper",
        "questions": 32,
        "mini_batch": 32,
        "group_size": 8,
        "steps": 80,
        "lr": 3e-4,
        "lr_schedule": "half-decay",
        "adam_beta2": 0.99,
        "kl": 0.001,
        "loss_norm": "sequence",
        "group_eps": 0.05,
        "zero_std": "drop",
        "max_turns": 3,
        "max_images": 1,
        "max_texts": 1,
        "min_pixels": 56 * 56,
        "max_pixels": 64 * 64,
        "max_tokens": 192,
        "turn_tokens": 32,
        "micro_tokens": 32768,
        "slots": 256,
        "slot_tokens": 0,
        "deterministic": True,
        "eval_every": 0,
    },
    "blog": {
        **_PAPER,
        "group_size": 32,
        "max_turns": 2,
        "max_texts": 0,
        "reward": "blog",
        "image_results": "summary",
        "steps": 100,
        "micro_tokens": 24576,  # so that a group of 32 fits into one
    },
    "paper": {
        **_PAPER,
        "group_size": 8,
        "loss_norm": "sequence",
    },
    "released": {
        **_PAPER,
        "questions": 32,
        "mini_batch": 32,
        "group_size": 4,
        "lr_schedule": "sigmoid",
        "warmup": 45,
        "steps": 4690,  # 30 epochs of 5,000 questions
    },
}

# What the toy recipe sets differently in the other toy worlds.
TOY: dict[str, dict[str, Any]] = {
    "full": {},
    "basic": {"max_turns": 2, "max_texts": 0, "max_tokens": 128, "steps": 100},
}

# Adapters want a larger learning rate than weights, ten times as large by "LoRA Without Regret" (Thinking Machines,
# 2025), where that was best for every rank, model and task tried, with α = 32.
LORA_LR = 10

# What a loss sets besides, where the command line does not: what makes it that of its paper. So dr_grpo is only this:
# beside these it is grpo.
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "none-std", "loss_norm": "constant"},
    "gspo": {"loss_norm": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"loss_norm": "token", "clip_low": 1.0, "clip_high": 4.0},  # no lower bound; 5 by ScaleRL, 2510.13786
}

# What means nothing to --algorithm sft, and is refused there.
OF_GRPO = (
    "loss",
    "advantage",
    "resample",
    "mask_truncated",
    "overlong_buffer",
    "fatal_errors",
    "importance_cap",
    "importance_bound",
)

# What a resumed run may change in addition where equal bits are not promised.
RESUME_UNDETERMINED = {"device", "slots", "slot_tokens", "micro_tokens", "shard"}

# Those that say how a search engine is opened: search.py has them too.
SEARCH_OPTIONS = ("search", "results", "image_results", "on_miss", "search_cache", "budget")

# The environment's variables for the keys of what an option names.
KEYS = {
    "teacher": "OPENAI_API_KEY",
    "judge": "JUDGE_API_KEY",
    "reward_judge": "JUDGE_API_KEY",
    "model": "HF_TOKEN",
    "data": "HF_TOKEN",
    "eval_data": "HF_TOKEN",
}

_MANY = 10**12


@dataclass
class Options:
    """What every run needs: model, data, search, limits, machine."""

    # ---- model and data
    recipe: Literal["toy", "blog", "paper", "released"] = "toy"
    """Defaults to start from: toy without --model or with --data toy, otherwise blog."""
    model: str = ""
    """Qwen2.5-VL-3B, Qwen2.5-VL-7B, Qwen3-VL-2B, …, a hub id, or a folder. Empty: the toy base model."""
    adapter: str = ""
    """LoRA adapter of --model in PEFT's form, a folder or a hub id: it is used, and in training trained further."""
    data: str = "toy"
    """toy, a .parquet, .jsonl, .json or .csv file of questions about pictures, or OWNER/NAME[:FILE] on the hub."""
    format: str = ""
    """Layout: fvqa, infoseek, mmsearch, simplevqa, livevqa, civqa, verl, trl, openai, sharegpt, plain; empty: look."""
    columns: str = ""
    """Columns by other names, id=…,question=…,answers=…,image=…,category=…; a.b.c is inside a; id= numbers the rows."""
    images: str = ""
    """Folder of the picture files that the data names; empty: the data file's own."""
    toy: Literal["full", "basic"] = "full"
    """Toy world. full: towns take a text search, and searches may mislead; basic: image search tells all, at once."""
    toy_model: Literal["qwen2_5", "qwen3"] = "qwen2_5"
    """Architecture of the toy base model, which is trained where --model is not given: Qwen2.5-VL's or Qwen3-VL's."""

    # ---- search
    search: str = "toy"
    """Back-end: toy, local:FILE, live, replay:FILE (recorded searches), replay:fvqa, remote:URL or none; or one for
    each search: image=A,text=B."""
    results: int = 5
    """Results per search at most."""
    image_results: Literal["thumbnails", "summary"] = "thumbnails"
    """A live image search gives the matches' titles and thumbnails, or what their pages say about the question."""
    on_miss: Literal["empty", "nearest", "error"] = "empty"
    """A search that a recording lacks: finds nothing, finds the nearest recorded pages (text), or fails."""
    search_cache: str = ""
    """File in which live, remote and local searches are recorded; empty: search.sqlite in ~/.cache/mmsr."""
    budget: int = 0
    """Paid calls that the whole run may make; --search live and a judge in the reward with a key want it."""
    step_budget: int = 0
    """Paid calls that a step may make; 0: as many as --budget has left."""

    # ---- reward
    reward: Literal["blog", "paper", "strict"] = "paper"
    """Reward rule; see mmsr/reward.py."""
    penalty: float = 0.1
    """What a search takes off the reward of a right answer (blog: of any answer), as a share."""
    penalty_per_call: bool = False
    """Every search takes the penalty off, not only a rollout's first."""
    match: Literal["exact", "substring"] = "exact"
    """The answer that is rewarded equals an accepted one, or contains one (blog, paper)."""
    shapes: Literal["listed", "any"] = "listed"
    """Turns that earn format: the listed orders of searches (the paper's four), or any calls and then an answer."""

    # ---- rollout
    max_turns: int = 3
    """Model turns per rollout: searches in all are at most one less."""
    max_images: int = 1
    """Image searches per rollout."""
    max_texts: int = 1
    """Text searches per rollout."""
    tools: str = ""
    """More tools than the two searches, with commas between: zoom, visit, crop, or MODULE:FUNCTION of your own: given
    the search engine, it returns a list of Tool."""
    on_tool_error: Literal["tell", "drop"] = "tell"
    """A tool's infrastructure failed: tell the model and go on, or end the rollout (training leaves it out)."""
    tool_timeout: int = 600
    """Seconds after which a call is given up as failed; with --deterministic tools run inline and are waited for."""
    turn_tokens: int = 32
    """Tokens sampled per turn at most."""
    max_tokens: int = 192
    """Tokens of a conversation at most, prompt and images included."""
    max_pixels: int = 64 * 64
    """Larger pictures are shrunk to this many pixels."""
    min_pixels: int = 56 * 56
    """Smaller pictures are enlarged to this many pixels."""
    prompts: str = "toy"
    """Prompt set: toy, real, hermes (the default with that grammar), or a folder of your own."""
    grammar: Literal["tags", "hermes"] = "tags"
    """How tools are called. tags: <search>, <text_search>; hermes: in JSON, as Qwen3-VL's chat template has it."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether each turn begins with thoughts, <think> to </think>; auto: where the chat template begins them."""

    # ---- machine
    slots: int = 256
    """Conversations decoded at once; what does not fit waits for a free slot."""
    slot_tokens: int = 0
    """Tokens after the prompt that a slot has room for, 0: the most of --max-tokens. Longer ones are finished last."""
    micro_tokens: int = 32768
    """Packed tokens per forward and backward pass; halved where memory runs out."""
    device: str = ""
    """cpu, cuda, …; empty: cuda where there is one. Under torchrun each process takes the one of its local rank."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Compute type; empty: bfloat16 on CUDA, float32 elsewhere. The optimizer keeps fp32 master weights."""
    shard: Literal["auto", "none", "node", "all"] = "auto"
    """Devices of a machine share one copy of the weights (node), all devices do (all), or each has its own (none: only
    with --lora). auto: none with --lora where that fits, otherwise node."""
    timeout: int = 1800
    """Seconds that a process waits for another before the run is given up."""
    deterministic: bool = True
    """Equal seeds give equal bits on the CPU: tools run inline. Fp32 attention is summed in fp64 there."""
    seed: int = 0
    """Seeds the data order, the sampling and the toy world."""

    # ---- files
    out: str = ""
    """Folder of the run; empty: runs/RECIPE, for eval.py runs/eval-MODE. One with files of another run is refused."""
    log_tokens: bool = True
    """Write sampled tokens' text and probability into the lines, of 1,024 rollouts a step; report.html colours them."""

    # The numbers that make sense, both ends included; options outside them are refused.
    BOUNDS: ClassVar[Mapping[str, tuple[float, float]]] = {
        "max_turns": (1, _MANY),
        "turn_tokens": (1, _MANY),
        "slots": (1, _MANY),
        "slot_tokens": (0, _MANY),
        "micro_tokens": (1, _MANY),
        "timeout": (1, _MANY),
        "tool_timeout": (1, _MANY),
        "seed": (0, _MANY),
        "max_images": (0, _MANY),
        "max_texts": (0, _MANY),
        "budget": (0, _MANY),
        "step_budget": (0, _MANY),
        "min_pixels": (28 * 28, _MANY),
        "max_pixels": (28 * 28, _MANY),
        "max_tokens": (2, _MANY),
        "results": (1, 100),
        "penalty": (0, 1),
    }
    # What a resumed run may change. The rest changes what comes out of it, or the files that say so.
    RESUME_FREELY: ClassVar[set[str]] = {"out", "timeout", "search_cache", "budget", "step_budget", "log_tokens"}

    def __post_init__(self) -> None:
        for name, (low, high) in self.BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise UserError(f"--{kebab(name)} {value}: give a number from {low:g} to {high:g}")
        if self.grammar == "hermes" and (not self.model or "toy" in self.datasets):
            raise UserError("--grammar hermes: the toy world speaks in tags; give --model and --data, or leave it out")
        if (self.prompts == "hermes") != (self.grammar == "hermes") and self.prompts in ("toy", "real", "hermes"):
            raise UserError(f"--prompts {self.prompts} speaks another grammar than --grammar {self.grammar}: give one")
        if self.min_pixels > self.max_pixels:
            raise UserError(f"--min-pixels {self.min_pixels} is more than --max-pixels {self.max_pixels}")
        _ = self.reward_rule  # raises now, and not after the first rollouts
        self._check_addresses()
        for back_end in self.back_ends.values():
            kind, _, where = back_end.partition(":")
            if kind == "remote" and where:
                server_address(where, "--search remote:")

    def _check_addresses(self) -> None:
        """Refuse passwords and keys: options are written to config.json, checkpoints, the report and trackers."""
        for name, value in vars(self).items():
            texts = value if isinstance(value, tuple) else [value]
            if name == "search":
                texts = self.back_ends.values()
            for text in texts:
                if not isinstance(text, str):
                    continue
                address = text.removeprefix("remote:")
                if "://" in text or name in ("teacher", "judge", "reward_judge") or address != text:
                    refuse_credentials(f"--{kebab(name)}", address, KEYS.get(name, ""))

    @property
    def back_ends(self) -> dict[str, str]:
        """What --search names for "image" and for "text". Raises UserError where it names one of them only."""
        return back_ends(self.search)

    @property
    def tool_names(self) -> list[str]:
        """What --tools names."""
        return [name.strip() for name in self.tools.split(",") if name.strip()]

    @property
    def reward_rule(self) -> RewardRule:
        """Raises UserError where the options do not go together."""
        substring = self.match == "substring"
        any_shape = self.shapes == "any"
        calls = self.penalty_per_call
        return RewardRule(self.reward, self.penalty, per_call=calls, substring=substring, any_shape=any_shape)

    @property
    def datasets(self) -> tuple[str, ...]:
        """What --data names: several data sets for an evaluation, one for training."""
        if isinstance(self.data, str):
            return (self.data,)
        return self.data

    @classmethod
    def defaults(cls, recipe: str, toy: str) -> dict[str, Any]:
        """What a recipe sets of these options, in a toy world."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = RECIPES[recipe]
        if recipe == "toy":
            values = values | TOY[toy]
        return {name: value for name, value in values.items() if name in names}

    def save(self, folder: Path) -> None:
        """Write `folder`/config.json, whole or not at all."""
        write_whole(folder / CONFIG, [json.dumps(dataclasses.asdict(self), indent=2).encode() + b"\n"])

    def check_resumes(self, folder: Path) -> None:
        """Raises UserError unless this configuration continues the run in `folder`: what comes out is the same."""
        try:
            before = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            before.keys()
        except FileNotFoundError:
            raise UserError(f"--out {folder} is not empty and holds no {CONFIG} of a run: name another") from None
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / CONFIG} cannot be read ({error}): name another --out") from None
        free = self.RESUME_FREELY
        if not self.deterministic:
            free = free | RESUME_UNDETERMINED
        now = json.loads(json.dumps(dataclasses.asdict(self)))  # as it reads in the file: lists for tuples
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        changed = []
        for name, value in now.items():
            was = before.get(name, usual[name])  # a run from before there was this option
            if name not in free and was != value:
                changed.append(f"--{kebab(name)} (was {was!r}, is {value!r})")
        if changed:
            advice = "give the same, or another --out"
            toy = " --data toy" if self.data == "toy" else ""  # a --model alone means recipe blog
            if (folder / "adapter").is_dir():
                advice += f" (and --adapter {folder}/adapter to start from what it learnt)"
            elif (folder / "model").is_dir():
                advice += f" (and --model {folder}/model{toy} to start from what it learnt)"
            raise UserError(f"--out {folder}: the run in it differs in {hidden(', '.join(changed))}: {advice}")


@dataclass
class Config(Options):
    """Options of train.py."""

    # ---- training
    algorithm: Literal["grpo", "sft"] = "grpo"
    """sft: maximise the likelihood of what answered rightly, the model's own rollouts unless one of these is given."""
    demonstrations: tuple[str, ...] = ()
    """Conversations to imitate: rollouts/*.jsonl of a run, or recorded ones; their searches are run again."""
    teacher: str = ""
    """OpenAI-compatible server whose model shows what to imitate, http://HOST (/v1 is added) or with its own path."""
    teacher_model: str = ""
    """The teaching model, as that server calls it; its key: OPENAI_API_KEY."""
    reward_judge: str = ""
    """OpenAI-compatible server whose model is asked about the answers of a step that exact match rejects."""
    judge_model: str = ""
    """The judging model, as that server calls it; its key: JUDGE_API_KEY or OPENAI_API_KEY, which want --budget N."""

    steps: int = 80
    """Training steps; a step is one batch of rollouts."""
    questions: int = 32
    """Questions per step."""
    mini_batch: int = 32
    """Questions per optimizer update; a divisor of --questions."""
    group_size: int = 8
    """Rollouts per question."""

    # ---- LoRA and frozen parts
    lora: int = 0
    """Train adapters of this rank beside frozen weights, which write OUT/adapter; 0: train the weights themselves."""
    lora_alpha: float = 32.0
    """α of the adapters: what they add is multiplied by α over the rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers with adapters: decoder, vision, q_proj, vision.qkv, beginnings of names; empty: decoder, all of it."""
    freeze: tuple[str, ...] = ()
    """Parts that are not trained: vision, merger, decoder, embedding, head, or beginnings of weights' names."""
    merge: bool = False
    """Write OUT/model too, with the adapters merged into the weights: for programs that know nothing of adapters."""

    # ---- optimizer
    lr: float = 3e-4
    """Peak learning rate; ten times a recipe's with --lora or --adapter."""
    lr_schedule: Literal["constant", "half-decay", "sigmoid"] = "constant"
    """half-decay: linear to a tenth over the second half. sigmoid: smooth decay to a tenth."""
    warmup: int = 0
    """Steps of linear warm-up of the learning rate."""
    adam_beta2: float = 0.999
    """Second-moment decay of AdamW (the first is .9)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    max_skipped: int = 5
    """Stop after so many updates in a row with a value that is not finite, or steps in a row with nothing to train."""

    # ---- GRPO
    loss: Literal["grpo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """grpo: a clipped ratio for each token. dr_grpo: the same, not divided by deviation and length.
    gspo: one ratio for each rollout. cispo: the clipped ratio weighs log π.
    docs/algorithm.md has the defaults that they change."""
    advantage: Literal["group", "batch", "group-batch", "none-std"] = "group"
    """R − mean(R) is divided by the standard deviation of the group's rewards, of the batch's rewards, by the group's
    and then by that of the batch's advantages, or by nothing (none-std)."""
    kl: float = 0.001
    """β of the k3 KL term. 0: no reference model is loaded."""
    clip_low: float = 0.2
    """ε below 1 in the clipped surrogate."""
    clip_high: float = 0.2
    """ε above 1 in the clipped surrogate."""
    loss_norm: Literal["sequence", "token", "constant"] = "sequence"
    """sequence: mean of per-rollout means. token: mean over all trained tokens. constant: mean of per-rollout sums,
    divided by --max-tokens. All over the whole update."""
    group_eps: float = 0.05
    """Added to the standard deviation. .05 was tuned in the toy world; the official code has 1e-6."""
    zero_std: Literal["drop", "keep"] = "drop"
    """Groups whose rewards are all equal: leave them out of the update, or keep them for KL and denominator."""
    resample: int = 0
    """Dynamic sampling: replace groups whose rewards are all equal by new questions, so many times a step at most."""
    mask_truncated: bool = False
    """Do not train rollouts that ran out of tokens; their rewards still count in their group's mean."""
    overlong_buffer: int = 0
    """Soft overlong penalty: over the last so many tokens before --max-tokens a rollout's reward falls linearly, by
    --overlong-penalty in all; 0: it does not."""
    overlong_penalty: float = 1.0
    """What --overlong-buffer takes off the reward of a rollout of --max-tokens."""
    fatal_errors: int = 0
    """After so many failed tool calls in a row, train only the turns before them, with max(A, 0); 0: train all."""
    importance_cap: float = 0.0
    """Cap of the truncated importance weight π_old/π_sampled of a token; 0 turns it off."""
    importance_bound: float = 0.0
    """Leave out the policy term of rollouts whose π_old/π_sampled, over all tokens, is outside [1/BOUND, BOUND]; 0: of
    none."""

    # ---- rollout
    force_searches: bool = False
    """Replay recorded turns (with --search replay:FILE) in half of each group."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""

    # ---- machine
    recompute: bool = False
    """Keep only the inputs of the model's blocks and run them again in the backward pass: time for memory."""
    keep_blocks: int = -1
    """With --recompute, decoder blocks that keep everything all the same; -1: as many as fit the memory plan."""

    # ---- evaluation
    eval_data: str = ""
    """Evaluation questions, a file as for --data; empty: fresh toy pictures, or the first rows of --data."""
    eval_size: int = 200
    """Questions per evaluation; with the toy world, per category."""
    eval_every: int = 0
    """Evaluate every so many steps, besides before the first and after the last."""

    # ---- files
    save_every: int = 0
    """Save a checkpoint every so many steps, besides after the last and when interrupted."""
    keep: int = 2
    """Keep this many checkpoints, the newest; at least 2, in case one is damaged."""
    track: Literal["", "tensorboard", "wandb"] = ""
    """Send the metrics to a tracker too; its package must be installed."""
    resume: bool = False
    """Go on from the newest sound checkpoint in --out, with the same data, model and prompts; afresh if none."""

    BOUNDS: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Options.BOUNDS,
        "steps": (1, _MANY),
        "questions": (1, _MANY),
        "mini_batch": (1, _MANY),
        "group_size": (1, _MANY),
        "eval_size": (1, _MANY),
        "lora": (0, 4096),
        "lora_alpha": (1e-3, 1e6),
        "max_skipped": (1, _MANY),
        "warmup": (0, _MANY),
        "eval_every": (0, _MANY),
        "save_every": (0, _MANY),
        "keep_blocks": (-1, _MANY),
        "keep": (2, _MANY),
        "lr": (0, 1),
        "adam_beta2": (0, 0.999999),
        "max_grad_norm": (1e-12, 1e12),
        "kl": (0, 1e6),
        "clip_low": (0, 1),
        "clip_high": (0, 1e6),
        "group_eps": (0, 1e6),
        "importance_cap": (0, 1e6),
        "importance_bound": (0, 1e6),
        "resample": (0, 1000),
        "overlong_buffer": (0, _MANY),
        "overlong_penalty": (0, 1e6),
        "fatal_errors": (0, _MANY),
        "temperature": (0.01, 100),
    }
    RESUME_FREELY: ClassVar[set[str]] = {
        *Options.RESUME_FREELY,
        "save_every",
        "keep",
        "resume",
        "max_skipped",
        "track",
        "teacher",
        "reward_judge",
        "keep_blocks",
        "merge",
    }

    def __post_init__(self) -> None:
        self.out = self.out or f"runs/{self.recipe}"
        self.demonstrations = tuple(self.demonstrations)
        self.lora_targets = () if [*self.lora_targets] == ["decoder"] else tuple(self.lora_targets)
        self.freeze = tuple(self.freeze)
        super().__post_init__()
        self._check_imitation()
        self._check_adapters()
        self._check_loss()
        if self.algorithm == "grpo" and self.group_size < 2:
            raise UserError("--group-size 1: GRPO compares the rollouts of a question; give at least 2")
        if self.questions % self.mini_batch:
            raise UserError(f"--mini-batch {self.mini_batch} must divide --questions {self.questions}: give both")
        if bool(self.reward_judge) != bool(self.judge_model):
            both = "give the address and the model's name there"
            raise UserError(f"--reward-judge and --judge-model go together: {both}")
        if self.reward_judge:
            server_address(self.reward_judge, "--reward-judge ")
        if self.force_searches and not any(name.startswith("replay:") for name in self.back_ends.values()):
            raise UserError("--force-searches replays recorded turns: give --search replay:FILE with them")
        if self.force_searches and self.grammar != "tags":
            raise UserError("--force-searches replays turns that are written in tags: leave --grammar out")

    def _check_loss(self) -> None:
        if self.algorithm == "sft":
            for name in OF_GRPO:
                if getattr(self, name) != getattr(Config, name):
                    of = f"--{kebab(name)} is of GRPO"
                    raise UserError(f"{of}, and --algorithm sft trains what is right and nothing else: leave one out")
        if self.overlong_buffer > self.max_tokens:
            raise UserError(
                f"--overlong-buffer {self.overlong_buffer} is more than --max-tokens {self.max_tokens}: give less"
            )
        if 0 < self.importance_bound < 1:
            raise UserError(f"--importance-bound {self.importance_bound}: give 1 or more, or 0 to turn it off")
        if self.fatal_errors and self.on_tool_error == "drop":
            raise UserError(
                "--fatal-errors and --on-tool-error drop: a rollout ends at its first failure; leave one out"
            )

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are trained, and the weights are not."""
        return bool(self.lora or self.adapter)

    def _check_adapters(self) -> None:
        if self.lora and self.adapter:
            raise UserError("--lora and --adapter: the adapter has its own rank; leave --lora out")
        if self.adapter and self.freeze:
            raise UserError("--adapter and --freeze: the adapter is trained, all of it; leave --freeze out")
        if self.shard == "none" and not self.trains_adapters:
            raise UserError("--shard none: weights that are trained are sharded; leave it out, or train --lora R")
        for name, usual in (("lora_alpha", 32.0), ("lora_targets", ()), ("merge", False)):
            needs = self.trains_adapters if name == "merge" else self.lora
            if getattr(self, name) != usual and not needs:
                advice = "leave it out" if self.adapter else "give --lora R too, or leave it out"
                raise UserError(f"--{kebab(name)} is an option of adapters: {advice}")

    @property
    def imitates(self) -> bool:
        """Whether turns of others are trained, and none of the model's own."""
        return bool(self.demonstrations or self.teacher)

    def _check_imitation(self) -> None:
        if bool(self.teacher) != bool(self.teacher_model):
            raise UserError("--teacher and --teacher-model go together: give the address and the model's name there")
        if self.teacher:
            server_address(self.teacher, "--teacher ")
        if self.demonstrations and self.teacher:
            raise UserError("--demonstrations and --teacher: imitate one of them, leave the other out")
        if self.imitates and (self.algorithm != "sft" or self.force_searches):
            given = "--teacher" if self.teacher else "--demonstrations"
            raise UserError(f"{given} is what --algorithm sft imitates: give that, and no --force-searches")
        if self.teacher and self.group_size > 1:
            raise UserError(f"--group-size {self.group_size}: a teacher answers a question once; give 1")


@dataclass
class EvalConfig(Options):
    """Options of eval.py."""

    # ---- model and data
    data: tuple[str, ...] = ("toy",)  # type: ignore[assignment]  # several data sets where training has one
    """toy, or .parquet, .jsonl, .json or .csv files of questions about pictures; several are evaluated one by one."""

    # ---- evaluation
    mode: Literal["search", "direct", "rag"] = "search"
    """search: as the model likes. direct: asked without tools. rag: searches forced, the words of queries its own."""
    limit: int = 0
    """Only the first so many questions of each data set, of each category of the toy world; 0: all, there 200."""
    judge: str = ""
    """OpenAI-compatible server whose model judges the answers too, http://HOST (/v1 is added) or with its own path."""
    judge_model: str = ""
    """The judging model, as that server calls it; its key: JUDGE_API_KEY or OPENAI_API_KEY."""

    # ---- rollout
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy, as in the paper."""

    BOUNDS: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Options.BOUNDS,
        "limit": (0, _MANY),
        "temperature": (0, 100),
    }
    RESUME_FREELY: ClassVar[set[str]] = Options.RESUME_FREELY | {"judge", "judge_model"}

    def __post_init__(self) -> None:
        self.data = tuple(self.data)
        self.out = self.out or f"runs/eval-{self.mode}"
        super().__post_init__()
        if not self.data:
            raise UserError("--data is missing: name the files to evaluate on, or toy")
        if len(set(self.data)) < len(self.data):
            raise UserError(f"--data {' '.join(self.data)}: name each file once")
        if bool(self.judge) != bool(self.judge_model):
            raise UserError("--judge and --judge-model go together: give the address and the model's name there")
        if self.judge:
            server_address(self.judge, "--judge ")

    @classmethod
    def defaults(cls, recipe: str, toy: str) -> dict[str, Any]:
        """A recipe's data is for training, and so is its temperature."""
        data = ("toy",) if RECIPES[recipe]["data"] == "toy" else ()
        return {**super().defaults(recipe, toy), "data": data, "temperature": 0.0}


AnyOptions = TypeVar("AnyOptions", bound=Options)


def parse(
    argv: Sequence[str],
    kind: type[AnyOptions] = Config,  # type: ignore[assignment]  # mypy has no defaults of generic arguments
    program: str = "train.py",
) -> AnyOptions:
    """The configuration of a command line. Exits with status 2 and one line where it is wrong; --help exits with 0."""
    parser = Parser(program, usage=f"{program} [--option value …]", allow_abbrev=False)
    names = [field.name for field in dataclasses.fields(kind)]
    recipes = {recipe: kind.defaults(recipe, kind.toy) for recipe in RECIPES}
    add_options(parser, kind, names, default_notes(kind, recipes))
    given = vars(parser.parse_args(argv))
    is_toy = not given.get("model") or given.get("data") in ("toy", ["toy"])
    recipe = given.get("recipe") or ("toy" if is_toy else "blog")
    values = kind.defaults(recipe, given.get("toy", kind.toy))
    if given.get("grammar") == "hermes":
        values["prompts"] = "hermes"
    if given.get("demonstrations") or given.get("teacher"):
        values["group_size"] = 1
    if "loss" in names:
        values |= LOSSES[given.get("loss", "grpo")]
    if "lr" in values and (given.get("lora") or given.get("adapter")):
        values["lr"] = float(f"{values['lr'] * LORA_LR:g}")  # not 0.0029999999999999996
    if "search" not in given:
        values["search"] = usual_search(values | given)
    return kind(**{**values, **given, "recipe": recipe})


def check_command_line(argv: Sequence[str], kind: type[Options], program: str) -> None:
    """What `parse` refuses is one line and exit status 2; --help is printed. For a program, before it imports torch."""
    try:
        parse(argv, kind, program)
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def back_ends(search: str) -> dict[str, str]:
    """The back-ends of image and text searches: "image=A,text=B" names two, anything else is that of both.

    Raises UserError where one is named and the other is not.
    """
    for pattern in ("image=(?P<image>.+?),text=(?P<text>.+)", "text=(?P<text>.+?),image=(?P<image>.+)"):
        if found := re.fullmatch(pattern, search):
            return found.groupdict()
    if search.startswith(("image=", "text=")):
        raise UserError(f"--search {hidden(search)}: give both, image=A,text=B (the back-end none finds nothing)")
    return {"image": search, "text": search}


def usual_search(values: Mapping[str, Any]) -> str:
    """--search where it is not given: the recipe's. Raises UserError where that is the searches recorded for FVQA's
    training questions, and the data are others: every search would find nothing."""
    search = values["search"]
    if values.get("mode") == "direct":
        return "none"
    data = [values["data"]] if isinstance(values["data"], str) else values["data"]
    recorded = re.compile("toy|(?!.*test).*fvqa.*", re.IGNORECASE)  # FVQA's training questions, by their name
    others = [name for name in data if not recorded.fullmatch(name)]
    if search != FVQA_SEARCH or not others:
        return search
    advice = "give --search local:FILE (python search.py index makes one of your own pictures and pages), live or none"
    raise UserError(
        f"--search is missing: the recipe's, {FVQA_SEARCH}, knows no picture of {hidden(others[0])}; {advice}"
    )


def in_use(folder: Path) -> bool:
    """Whether a folder holds anything but a lock and a first config.json that a crash cut short."""
    if not folder.is_dir():
        return folder.exists()
    names = [entry.name for entry in folder.iterdir()]
    return any(name != LOCK and not name.startswith(f".{CONFIG}.") for name in names)
