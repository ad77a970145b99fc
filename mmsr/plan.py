"""The memory plan: what a run holds on each device at its worst, computed from sizes alone before a weight is read.

    python -m mmsr.plan --model Qwen2.5-VL-7B --gpus 8 --gpu-gb 80 [options of train.py]

A step has three moments: rollouts are generated, a micro-batch is in its backward pass, the optimizer steps. A row of
the plan says what something takes in each of them; the worst sum has to fit. Weights, gradients, optimizer and cache
are exact, activations count the tensors that the backward pass keeps (tests/test_plan.py holds both against the real
ones). Assumed are the constants below.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch

from mmsr.config import Config, parse
from mmsr.engine import prefix_rows
from mmsr.model import ModelConfig, Qwen2_5_VL
from mmsr.pretrained.config_json import read_config
from mmsr.system.chunked_log_probs import CHUNK_BYTES
from mmsr.system.errors import UserError
from mmsr.system.optimizer import PIECE
from mmsr.vision import MERGE, PATCH_VALUES, SIDE, VisionConfig

GIB = 2**30
USABLE = 0.92  # of a device's memory: the rest goes to its context, to NCCL's buffers and to gaps
FILLED = 0.85  # of a device's memory: up to there blocks keep what they computed
PROMPT_TEXT = 512  # tokens of a prompt beside its picture, at most
RESPONSE = 512  # tokens of a rollout behind its prompt; says only how often keys are repeated in a pack
THUMBNAILS = 5  # pictures that an image search brings back, 224 x 224
THUMBNAIL_TOKENS = 64
SCORE_BYTES = 24  # per slot and word while sampling: fp32 scores and log-probabilities, two fp64 sums
LOGIT_BYTES = 20  # per logit in the head's backward pass: fp32 logits and their gradients
STEP_BYTES = 32  # per weight of the piece that the optimizer has in fp32

_small = VisionConfig(out_hidden_size=2048)
PUBLISHED = {
    "Qwen2.5-VL-3B": ModelConfig(151936, 2048, 11008, 36, 16, 2, 1e-6, tie_word_embeddings=True, vision=_small),
    "Qwen2.5-VL-7B": ModelConfig(152064, 3584, 18944, 28, 28, 4, 1e-6),
}


@dataclass(frozen=True)
class Plan:
    """Bytes on one device: by row, while generating, in an update, and as the optimizer steps."""

    rows: dict[str, tuple[float, float, float]]

    @property
    def moments(self) -> tuple[float, ...]:
        return tuple(map(sum, zip(*self.rows.values())))

    @property
    def peak(self) -> float:
        return max(self.moments)

    def table(self) -> str:
        lines = [f"{'memory, GiB on each device':34}{'generate':>10}{'update':>10}{'step':>10}"]
        rows = {**{name: row for name, row in self.rows.items() if any(row)}, "together": self.moments}
        return "\n".join(
            lines + [f"{name:34}" + "".join(f"{v / GIB:10.2f}" for v in row) for name, row in rows.items()]
        )


@dataclass(frozen=True)
class Sizes:
    """A model's parameters and what its blocks keep, as numbers."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def count(self, parts: int = 1, inside: str = "") -> int:
        """Parameters (below the prefix `inside`) on the rank that has most of `parts`: cut along the first axis."""
        chosen = [shape for name, shape in self.shapes if name.startswith(inside)]
        return sum(math.ceil(shape[0] / parts) * math.prod(shape[1:]) for shape in chosen)


@lru_cache
def sizes(model: ModelConfig) -> Sizes:
    with torch.device("meta"):
        return Sizes(tuple((name, tuple(p.shape)) for name, p in Qwen2_5_VL(model).named_parameters()))


def plan(model: ModelConfig, c: Config, ranks: int = 1, node: int = 8, item: int = 2) -> Plan:
    """What `c` takes on each of `ranks` devices, `node` on a machine, computing in `item` bytes."""
    size, kept = sizes(model), Activations(model, c, item)
    node = min(node, ranks)
    parts = 1 if ranks == 1 else ranks if c.shard == "all" or node == 1 else node
    stored = item if ranks == 1 else 4
    mine, whole = size.count(parts), size.count()
    halves = mine if stored < 4 else 0  # weights that are the upper half of a master
    reference = item * mine if c.kl and c.algorithm == "grpo" else 0
    block, root = _units(model, size) if ranks > 1 else (0, 0)
    groups, update = math.ceil(c.questions / ranks), math.ceil(c.mini_batch / ranks)
    tests = math.ceil(c.eval_size / ranks)
    cache = max(kept.cache(groups, c.group_size), kept.cache(tests, 1))
    tokens = max(min(c.micro_tokens, update * c.group_size * c.max_tokens), c.max_tokens)
    pictures = kept.pictures(update)
    features = item * model.hidden_size
    head = kept.head(tokens) + (4 + item) * model.vocab_size * model.hidden_size
    step = STEP_BYTES * min(PIECE, halves)
    at_work = max(kept.block(tokens), kept.vision_block(pictures), head, 4 * root)
    return Plan(
        {
            "weights": (stored * mine,) * 3,
            "rest of the masters": (2 * halves,) * 3,
            "optimizer moments": (8 * mine - 4 * halves,) * 3,
            "KL reference": (reference,) * 3,
            "gradients": (0, 4 * mine, 4 * mine),
            "whole weights": (item * whole if ranks > 1 else 0, 2 * item * root + (3 * item + 4) * block, 0),
            "KV cache": (cache, 0, 0),
            "features of pictures": (features * kept.pictures(max(groups, tests)), 3 * features * pictures, 0),
            "kept of the pictures": (0, kept.tower(pictures), 0),
            "kept of a micro-batch": (0, kept.decoder(tokens), 0),
            "passes and scores": (max(kept.prefill(), item * root) + kept.sampling(), at_work, step),
        }
    )


def _units(model: ModelConfig, size: Sizes) -> tuple[int, int]:
    """Parameters of a decoder block, and of FSDP's root unit, which has all that is in no block."""
    block, layers = size.count(inside="model.layers.0."), model.num_hidden_layers
    return block, size.count() - layers * block - size.count(inside="visual.blocks.")


@dataclass(frozen=True)
class Activations:
    """Bytes of what is not a parameter. Tokens T are packed ones, pictures are counted in merged tokens."""

    model: ModelConfig
    c: Config
    item: int

    @property
    def longest(self) -> int:
        """Tokens of a prompt at most."""
        return min(self.c.max_pixels // SIDE**2 + PROMPT_TEXT, self.c.max_tokens)

    def cache(self, groups: int, group_size: int) -> int:
        """Prefix rows and suffix slots of `groups` as `Engine._make_room` sizes them."""
        slots = min(self.c.slots, groups * group_size)
        rows = prefix_rows(groups, slots, group_size)
        room = self.c.max_tokens - self.c.min_pixels // SIDE**2 + 1
        return cache_bytes(self.model, rows, self.longest, slots, room, self.item)

    def pictures(self, questions: int) -> int:
        """Merged tokens of all distinct pictures of `questions`, with what their image searches bring."""
        thumbnails = THUMBNAILS * THUMBNAIL_TOKENS if self.c.max_images and self.c.search != "none" else 0
        return questions * (self.c.max_pixels // SIDE**2 + thumbnails)

    def block(self, tokens: int) -> int:
        """A decoder block in its backward pass: what it kept, and gradients as wide as its MLP."""
        m = self.model
        return self._inside(tokens) + tokens * self.item * (3 * m.intermediate_size + 2 * m.hidden_size)

    def _inside(self, tokens: int) -> int:
        """Inputs of the norms, of the linear layers and of attention, its keys repeated for every member."""
        m = self.model
        prompt, members = self.longest, self.c.group_size
        repeated = 1 + members * prompt / (prompt + members * min(RESPONSE, self.c.max_tokens - prompt + 1))
        heads = m.head_dim * (3 * m.num_attention_heads + (2 + 2 * repeated) * m.num_key_value_heads)
        return int(tokens * self.item * (4 * m.hidden_size + heads + 3 * m.intermediate_size))

    def decoder(self, tokens: int) -> int:
        """All blocks, and the two ends."""
        m = self.model
        kept = min(m.num_hidden_layers, max(0, self.c.keep_blocks)) if self.c.recompute else m.num_hidden_layers
        inputs = (m.num_hidden_layers - kept) * tokens * self.item * m.hidden_size
        return inputs + kept * self._inside(tokens) + 3 * tokens * self.item * m.hidden_size

    def vision_block(self, merged: int) -> int:
        v = self.model.vision
        return self._vision_inside(merged) + merged * MERGE**2 * self.item * (
            3 * v.intermediate_size + 2 * v.hidden_size
        )

    def _vision_inside(self, merged: int) -> int:
        v = self.model.vision
        return merged * MERGE**2 * self.item * (9 * v.hidden_size + 3 * v.intermediate_size)

    def tower(self, merged: int) -> int:
        """All blocks, the patches, and the merger."""
        v, patches = self.model.vision, merged * MERGE**2
        each = patches * self.item * v.hidden_size if self.c.recompute else self._vision_inside(merged)
        return v.depth * each + patches * self.item * (PATCH_VALUES + 5 * v.hidden_size)

    def head(self, tokens: int) -> int:
        return min(CHUNK_BYTES, LOGIT_BYTES * tokens * self.model.vocab_size)

    def prefill(self) -> int:
        """One pass over new prompts and their pictures, without gradient."""
        m, v = self.model, self.model.vision
        tokens = max(self.c.micro_tokens, self.longest)
        wide = 4 * m.hidden_size + 3 * m.intermediate_size, MERGE**2 * (5 * v.hidden_size + 3 * v.intermediate_size)
        return tokens * self.item * max(wide) + tokens * MERGE**2 * PATCH_VALUES * 4

    def sampling(self) -> int:
        """What sampling makes of the scores: once in plain passes, and once in the memory that captured graphs own."""
        return 2 * SCORE_BYTES * self.c.slots * self.model.vocab_size


def cache_bytes(model: ModelConfig, rows: int, prompt: int, slots: int, room: int, item: int) -> int:
    """Of an engine.Cache."""
    token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * item
    return token * (rows * prompt + slots * room)


# ---- what fits


def check(model: ModelConfig, c: Config, capacity: float, ranks: int = 1, node: int = 8, item: int = 2) -> Plan:
    """The plan, if it fits into `capacity` bytes on each device. Else UserError, with what each option would save.

    As many blocks are kept as there is room for; that it fits is said of the least.
    """

    def peak(config: Config, ranks: int = ranks) -> float:
        return plan(model, config, ranks, node, item).peak

    now, room = plan(model, c, ranks, node, item), USABLE * capacity
    if now.peak <= room:
        return plan(model, kept_as_fits(model, c, capacity, ranks, node, item), ranks, node, item)
    saved = {option: now.peak - peak(changed) for option, changed in _smaller(c)}
    found = [f"{option} saves {gain / GIB:.1f}" for option, gain in saved.items() if gain > 0.005 * now.peak]
    chosen, least = _until(room, c, peak)
    if least <= room:
        found.append(f"{' '.join(chosen.values())} would do ({least / GIB:.1f})")
    enough = next((n for n in (ranks * 2**k for k in range(1, 11)) if peak(c, n) <= room), None)
    if enough:
        found.append(f"{enough} processes would do ({peak(c, enough) / GIB:.1f} each)")
    raise UserError(
        f"the run needs {now.peak / GIB:.1f} GiB on each device, of which {room / GIB:.1f} of {capacity / GIB:.1f} are "
        f"usable: {', '.join(found) or 'take a smaller model'}; python -m mmsr.plan shows more"
    )


def kept_as_fits(
    model: ModelConfig, c: Config, capacity: float, ranks: int = 1, node: int = 8, item: int = 2
) -> Config:
    """`c` with a number for `keep_blocks`: its own, or as many as stay below FILLED of `capacity`."""
    if c.keep_blocks >= 0:
        return c
    for n in range(model.num_hidden_layers, 0, -1):
        kept = replace(c, keep_blocks=n)
        if plan(model, kept, ranks, node, item).peak <= FILLED * capacity:
            return kept
    return replace(c, keep_blocks=0)


def _smaller(c: Config) -> Iterator[tuple[str, Config]]:
    """(option, the configuration with it) for each option that may save memory."""
    steps: list[tuple[str, dict[str, Any]]] = [
        ("--recompute", dict(recompute=True)),
        ("--keep-blocks 0", dict(keep_blocks=0)),
        ("--kl 0", dict(kl=0.0)),
        ("--shard all", dict(shard="all")),
    ]
    for name in ("mini_batch", "slots", "micro_tokens", "max_tokens", "max_pixels"):
        half = getattr(c, name) // 2
        also = {"min_pixels": min(c.min_pixels, half)} if name == "max_pixels" else {}
        steps.append((f"--{name.replace('_', '-')} {half}", {name: half, **also}))
    for option, changes in steps:
        try:
            yield option, replace(c, **changes)
        except UserError:  # e.g. a mini-batch that divides nothing
            continue


def _until(room: float, c: Config, peak: Callable[[Config], float]) -> tuple[dict[str, str], float]:
    """Options taken one after another, always the one that saves most, until it fits or none helps; bytes then."""
    chosen, now = {}, peak(c)
    while now > room:
        option, c, least = min(((o, config, peak(config)) for o, config in _smaller(c)), key=lambda found: found[2])
        if least >= now:
            break
        chosen[option.split()[0]], now = option, least
    return chosen, now


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m mmsr.plan", description="The memory plan of a run of train.py.")
    parser.add_argument("--gpus", type=int, default=1, help="processes, one device each")
    parser.add_argument("--node-gpus", type=int, default=8, help="of them on one machine")
    parser.add_argument("--gpu-gb", type=float, default=80, help="memory of a device, GiB")
    here, rest = parser.parse_known_args(argv)
    try:
        config = parse(["--model", "Qwen2.5-VL-7B", *rest])
        model = PUBLISHED.get(config.model) or read_config(Path(config.model))
        place = (here.gpus, here.node_gpus, 4 if config.dtype == "float32" else 2)
        print(plan(model, kept_as_fits(model, config, here.gpu_gb * GIB, *place), *place).table())
        check(model, config, here.gpu_gb * GIB, *place)
    except UserError as error:
        print(f"mmsr.plan: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
