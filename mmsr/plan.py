"""The memory plan: what a run holds on each device at its worst, computed from sizes alone before a weight is read.

    python -m mmsr.plan --model Qwen2.5-VL-7B --gpus 8 --gpu-gb 80 [options of train.py]

A step has three moments: rollouts are generated, a micro-batch is in its backward pass, the optimizer steps. A row of
the plan says what something takes in each of them; the worst sum has to fit. Weights, gradients, optimizer and cache
are exact. Activations count the tensors that the backward pass keeps. tests/test_plan.py compares both with the real
ones. The constants below are assumed.

In the comments of this module P is the number of parameters, T of packed tokens, d, I the widths of the decoder and of
its MLP, V of the vocabulary, and `item` the bytes of a number in the type of the computation.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import torch

from mmsr.config import Config, parse
from mmsr.engine import prefix_rows
from mmsr.model import ModelConfig, Qwen2_5_VL
from mmsr.pretrained.config_json import read_config
from mmsr.system.chunked_log_probs import CHUNK_BYTES
from mmsr.system.errors import UserError
from mmsr.system.optimizer import PIECE
from mmsr.system.options import kebab
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


class Moments(NamedTuple):
    """Bytes on one device in the three moments of a step."""

    generate: float
    update: float
    step: float


@dataclass(frozen=True)
class Plan:
    """What a run holds on one device, row by row."""

    rows: dict[str, Moments]

    @property
    def moments(self) -> Moments:
        """All rows together."""
        return Moments(*map(sum, zip(*self.rows.values())))

    @property
    def peak(self) -> float:
        """Bytes in the worst moment."""
        return max(self.moments)

    def table(self) -> str:
        """The rows that are not 0, in GiB."""
        rows = {name: row for name, row in self.rows.items() if any(row)}
        rows["together"] = self.moments
        lines = [f"{'memory, GiB on each device':34}{'generate':>10}{'update':>10}{'step':>10}"]
        for name, row in rows.items():
            cells = [f"{value / GIB:10.2f}" for value in row]
            lines.append(f"{name:34}" + "".join(cells))
        return "\n".join(lines)


# ---- parameters


@dataclass(frozen=True)
class Sizes:
    """The shapes of a model's parameters, by name."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def count(self, parts: int = 1, inside: str = "") -> int:
        """Parameters whose name begins with `inside`, on the rank with most of `parts`: cut along the first axis."""
        total = 0
        for name, shape in self.shapes:
            if name.startswith(inside):
                total += math.ceil(shape[0] / parts) * math.prod(shape[1:])
        return total


@lru_cache
def sizes(model: ModelConfig) -> Sizes:
    with torch.device("meta"):
        parameters = Qwen2_5_VL(model).named_parameters()
        return Sizes(tuple((name, tuple(parameter.shape)) for name, parameter in parameters))


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, as one device has them."""

    whole: int  # of the model
    mine: int  # stored on this device: of a shard, or of all
    stored: int  # bytes of each
    low_bits: int  # bf16 weights whose fp32 master has its lower 16 bits in the optimizer
    block: int  # of a decoder block: 0 where nothing is sharded
    root: int  # of FSDP's root unit, which has all that is in no block: 0 where nothing is sharded

    @classmethod
    def of(cls, model: ModelConfig, shard: str, ranks: int, node: int, item: int) -> Parameters:
        """`shard`: as --shard has it."""
        size = sizes(model)
        whole = size.count()
        if ranks == 1:
            return cls(whole, whole, stored=item, low_bits=whole if item < 4 else 0, block=0, root=0)
        node = min(node, ranks)
        parts = ranks if shard == "all" or node == 1 else node  # devices that hold one copy together
        block = size.count(inside="model.layers.0.")
        root = whole - model.num_hidden_layers * block - size.count(inside="visual.blocks.")
        return cls(whole, size.count(parts), stored=4, low_bits=0, block=block, root=root)  # shards are fp32


def _of_parameters(parameters: Parameters, has_reference: bool, ranks: int, item: int) -> dict[str, Moments]:
    """Rows of what grows with the number of parameters."""
    weights = parameters.stored * parameters.mine
    rest = 2 * parameters.low_bits  # the lower 16 bits of each master
    adam = 8 * parameters.mine - 4 * parameters.low_bits  # two moments: fp32, or bf16 where the weights are
    reference = item * parameters.mine if has_reference else 0
    gradients = 4 * parameters.mine  # fp32
    # Sharded weights are gathered before they are used: all of them to generate. In an update two root units and three
    # blocks at most are there at once, with the fp32 gradients of a block.
    gathered = item * parameters.whole if ranks > 1 else 0
    gathered_in_update = 2 * item * parameters.root + (3 * item + 4) * parameters.block
    return {
        "weights": Moments(weights, weights, weights),
        "rest of the masters": Moments(rest, rest, rest),
        "optimizer moments": Moments(adam, adam, adam),
        "KL reference": Moments(reference, reference, reference),
        "gradients": Moments(0, gradients, gradients),
        "whole weights": Moments(gathered, gathered_in_update, 0),
    }


# ---- the plan


def plan(model: ModelConfig, config: Config, ranks: int = 1, node: int = 8, item: int = 2) -> Plan:
    """What `config` takes on each of `ranks` devices, `node` on a machine, computing in numbers of `item` bytes."""
    parameters = Parameters.of(model, config.shard, ranks, node, item)
    has_reference = config.kl > 0 and config.algorithm == "grpo"
    rows = _of_parameters(parameters, has_reference, ranks, item)
    rows |= _of_activations(parameters, model, config, ranks, item)
    return Plan(rows)


def _of_activations(
    parameters: Parameters, model: ModelConfig, config: Config, ranks: int, item: int
) -> dict[str, Moments]:
    """Rows of what grows with the tokens and pictures in work."""
    kept = Activations(model, config, item)
    groups = math.ceil(config.questions / ranks)  # of a step, on this device
    update = math.ceil(config.mini_batch / ranks)  # groups of an update
    tests = math.ceil(config.eval_size / ranks)  # questions of an evaluation

    cache = max(kept.cache(groups, config.group_size), kept.cache(tests, 1))
    features = item * model.hidden_size  # bytes of a merged token: (d,)
    features_of_rollouts = features * kept.pictures(max(groups, tests))
    pictures = kept.pictures(update)
    features_of_update = 3 * features * pictures  # in bf16, and their fp32 gradients

    tokens = max(min(config.micro_tokens, update * config.group_size * config.max_tokens), config.max_tokens)
    head_weights = (4 + item) * model.vocab_size * model.hidden_size  # twice (V, d), once in fp32
    head = kept.head(tokens) + head_weights
    root_gradient = 4 * parameters.root
    backward = max(kept.block(tokens), kept.vision_block(pictures), head, root_gradient)  # one of them at a time
    generate = max(kept.prefill(), item * parameters.root) + kept.sampling()
    step = STEP_BYTES * min(PIECE, parameters.low_bits)
    return {
        "KV cache": Moments(cache, 0, 0),
        "features of pictures": Moments(features_of_rollouts, features_of_update, 0),
        "kept of the pictures": Moments(0, kept.tower(pictures), 0),
        "kept of a micro-batch": Moments(0, kept.decoder(tokens), 0),
        "passes and scores": Moments(generate, backward, step),
    }


@dataclass(frozen=True)
class Activations:
    """Bytes of what is not a parameter. Tokens T are packed ones; pictures are counted in merged tokens."""

    model: ModelConfig
    config: Config
    item: int

    @property
    def longest(self) -> int:
        """Tokens of a prompt at most."""
        return min(self.config.max_pixels // SIDE**2 + PROMPT_TEXT, self.config.max_tokens)

    def cache(self, groups: int, group_size: int) -> int:
        """Prefix rows and suffix slots of `groups` as `Engine._allocate` sizes them."""
        slots = min(self.config.slots, groups * group_size)
        rows = prefix_rows(groups, slots, group_size)
        room = self.config.max_tokens - self.config.min_pixels // SIDE**2 + 1
        return cache_bytes(self.model, rows, self.longest, slots, room, self.item)

    def pictures(self, questions: int) -> int:
        """Merged tokens of all distinct pictures of `questions`, with what their image searches bring."""
        thumbnails = 0
        if self.config.max_images and self.config.search != "none":
            thumbnails = THUMBNAILS * THUMBNAIL_TOKENS
        return questions * (self.config.max_pixels // SIDE**2 + thumbnails)

    # The decoder.

    def block(self, tokens: int) -> int:
        """A decoder block in its backward pass: what it kept, and gradients as wide as its MLP."""
        gradients = 3 * self.model.intermediate_size + 2 * self.model.hidden_size  # (3 I + 2 d) a token
        return self._kept_by_block(tokens) + tokens * self.item * gradients

    def _kept_by_block(self, tokens: int) -> int:
        """Inputs of the norms, of the linear layers and of attention, its keys repeated for every member of a group."""
        model = self.model
        prompt = self.longest
        members = self.config.group_size
        response = min(RESPONSE, self.config.max_tokens - prompt + 1)
        repeated = 1 + members * prompt / (prompt + members * response)  # keys of attention for a key of the pack
        heads = 3 * model.num_attention_heads + (2 + 2 * repeated) * model.num_key_value_heads
        widths = 4 * model.hidden_size + model.head_dim * heads + 3 * model.intermediate_size
        return int(tokens * self.item * widths)

    def decoder(self, tokens: int) -> int:
        """All blocks, and three rows (T, d) at the two ends."""
        blocks = self.model.num_hidden_layers
        kept = blocks  # blocks that keep everything; the others keep their input
        if self.config.recompute:
            kept = min(blocks, max(0, self.config.keep_blocks))
        row = tokens * self.item * self.model.hidden_size  # (T, d)
        return (blocks - kept) * row + kept * self._kept_by_block(tokens) + 3 * row

    def head(self, tokens: int) -> int:
        """A tile of logits (T, V) in the backward pass of the head."""
        return min(CHUNK_BYTES, LOGIT_BYTES * tokens * self.model.vocab_size)

    # The vision tower: MERGE² patches make a merged token.

    def vision_block(self, merged: int) -> int:
        """A block of the tower in its backward pass."""
        vision = self.model.vision
        gradients = 3 * vision.intermediate_size + 2 * vision.hidden_size  # a patch
        return self._kept_by_vision_block(merged) + merged * MERGE**2 * self.item * gradients

    def _kept_by_vision_block(self, merged: int) -> int:
        vision = self.model.vision
        widths = 9 * vision.hidden_size + 3 * vision.intermediate_size  # a patch
        return merged * MERGE**2 * self.item * widths

    def tower(self, merged: int) -> int:
        """All blocks, the patches, and the merger."""
        vision = self.model.vision
        patches = merged * MERGE**2
        if self.config.recompute:
            block = patches * self.item * vision.hidden_size  # its input
        else:
            block = self._kept_by_vision_block(merged)
        ends = patches * self.item * (PATCH_VALUES + 5 * vision.hidden_size)
        return vision.depth * block + ends

    # Generation.

    def prefill(self) -> int:
        """One pass over new prompts and their pictures, without gradient."""
        model, vision = self.model, self.model.vision
        tokens = max(self.config.micro_tokens, self.longest)
        decoder = 4 * model.hidden_size + 3 * model.intermediate_size  # a token
        tower = MERGE**2 * (5 * vision.hidden_size + 3 * vision.intermediate_size)  # a merged token
        patches = tokens * MERGE**2 * PATCH_VALUES * 4  # fp32
        return tokens * self.item * max(decoder, tower) + patches

    def sampling(self) -> int:
        """What sampling makes of the scores: once in plain passes, and once in the memory that captured graphs own."""
        return 2 * SCORE_BYTES * self.config.slots * self.model.vocab_size


def cache_bytes(model: ModelConfig, rows: int, prompt: int, slots: int, room: int, item: int) -> int:
    """Of an engine.Cache: `rows` prefixes of `prompt` tokens, `slots` suffixes of `room`."""
    token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * item  # its keys and values
    return token * (rows * prompt + slots * room)


# ---- what fits


def check(model: ModelConfig, config: Config, capacity: float, ranks: int = 1, node: int = 8, item: int = 2) -> Plan:
    """The plan, if it fits into `capacity` bytes on each device. Else UserError, with what each option would save.

    As many blocks are kept as there is room for; whether it fits depends on the least.
    """

    def peak(changed: Config, ranks: int = ranks) -> float:
        return plan(model, changed, ranks, node, item).peak

    room = USABLE * capacity
    now = peak(config)
    if now <= room:
        return plan(model, kept_as_fits(model, config, capacity, ranks, node, item), ranks, node, item)
    advice = []
    for option, changed in _smaller(config):
        saved = now - peak(changed)
        if saved > 0.005 * now:
            advice.append(f"{option} saves {saved / GIB:.1f}")
    chosen, least = _until(room, config, peak)
    if least <= room:
        advice.append(f"{' '.join(chosen.values())} would do ({least / GIB:.1f})")
    for enough in [ranks * 2**k for k in range(1, 11)]:
        if peak(config, enough) <= room:
            advice.append(f"{enough} processes would do ({peak(config, enough) / GIB:.1f} each)")
            break
    raise UserError(
        f"the run needs {now / GIB:.1f} GiB on each device, of which {room / GIB:.1f} of {capacity / GIB:.1f} are "
        f"usable: {', '.join(advice) or 'take a smaller model'}; python -m mmsr.plan shows more"
    )


def kept_as_fits(
    model: ModelConfig, config: Config, capacity: float, ranks: int = 1, node: int = 8, item: int = 2
) -> Config:
    """`config` with a number for `keep_blocks`: its own, or as many as stay below FILLED of `capacity`."""
    if config.keep_blocks >= 0:
        return config
    for n in range(model.num_hidden_layers, 0, -1):
        kept = replace(config, keep_blocks=n)
        if plan(model, kept, ranks, node, item).peak <= FILLED * capacity:
            return kept
    return replace(config, keep_blocks=0)


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """(option, the configuration with it) for each option that may save memory."""
    steps: list[tuple[str, dict[str, Any]]] = [
        ("--recompute", {"recompute": True}),
        ("--keep-blocks 0", {"keep_blocks": 0}),
        ("--kl 0", {"kl": 0.0}),
        ("--shard all", {"shard": "all"}),
    ]
    for name in ("mini_batch", "slots", "micro_tokens", "max_tokens", "max_pixels"):
        half = getattr(config, name) // 2
        changes = {name: half}
        if name == "max_pixels":
            changes["min_pixels"] = min(config.min_pixels, half)
        steps.append((f"--{kebab(name)} {half}", changes))
    for option, changes in steps:
        try:
            yield option, replace(config, **changes)
        except UserError:  # e.g. a mini-batch that divides nothing
            continue


def _until(room: float, config: Config, peak: Callable[[Config], float]) -> tuple[dict[str, str], float]:
    """Options taken one after another, always the one that saves most, until it fits or none helps; bytes then."""
    chosen: dict[str, str] = {}
    now = peak(config)
    while now > room:
        candidates = [(peak(changed), option, changed) for option, changed in _smaller(config)]
        least, option, config = min(candidates, key=lambda candidate: candidate[0])
        if least >= now:
            break
        chosen[option.split()[0]] = option
        now = least
    return chosen, now


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m mmsr.plan", description="The memory plan of a run of train.py.")
    parser.add_argument("--gpus", type=int, default=1, help="processes, one device each")
    parser.add_argument("--node-gpus", type=int, default=8, help="of them on one machine")
    parser.add_argument("--gpu-gb", type=float, default=80, help="memory of a device, GiB")
    given, rest = parser.parse_known_args(argv)
    try:
        config = parse(["--model", "Qwen2.5-VL-7B", *rest])
        model = PUBLISHED.get(config.model) or read_config(Path(config.model))
        capacity = given.gpu_gb * GIB
        place = (given.gpus, given.node_gpus, 4 if config.dtype == "float32" else 2)
        print(plan(model, kept_as_fits(model, config, capacity, *place), *place).table())
        check(model, config, capacity, *place)
    except UserError as error:
        print(f"mmsr.plan: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
