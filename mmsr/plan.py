"""The memory plan: what a run holds on each device at its worst, computed from sizes alone before a weight is read.

    python -m mmsr.plan --model Qwen2.5-VL-7B --gpus 8 --gpu-gb 80 [options of train.py]

A step has three moments: rollouts are generated, a micro-batch is in its backward pass, the optimizer steps. A row of
the plan says what something takes in each of them; the worst sum has to fit. Weights, gradients, optimizer and cache
are exact. Activations count the tensors that the backward pass keeps. tests/test_plan.py compares both with the real
ones. The constants below are assumed. Host memory is an estimate, mostly of assumed constants; disk is in disk.py.

In the comments of this module P is the number of parameters, T of packed tokens, d, I the widths of the decoder and of
its MLP, V of the vocabulary, and `item` the bytes of a number in the type of the computation.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from mmsr.config import FVQA_SEARCH, Config, parse
from mmsr.disk import disk_needed, downloads, save_bytes
from mmsr.engine import prefix_rows, slot_layout
from mmsr.model import ModelConfig
from mmsr.pretrained.config_json import read_config
from mmsr.pretrained.hub import fetched, repository
from mmsr.pretrained.published import SHORT_NAMES, SIZES
from mmsr.pretrained.save import SHARD_BYTES
from mmsr.shapes import Trained, sizes, trained
from mmsr.system.checkpoint import FILE_BYTES
from mmsr.system.chunked_log_probs import CHUNK_BYTES
from mmsr.system.errors import UserError
from mmsr.system.optimizer import PIECE
from mmsr.system.options import Parser, kebab
from mmsr.vision import MERGE

GIB = 2**30
USABLE = 0.92  # of a device's memory: the rest goes to its context, to NCCL's buffers and to gaps
FILLED = 0.85  # of a device's memory: up to there blocks keep what they computed
PROMPT_TEXT = 512  # tokens of a prompt beside its picture, at most
RESPONSE = 512  # tokens of a rollout behind its prompt; says only how often keys are repeated in a pack
THUMBNAILS = 5  # pictures that an image search brings back
THUMBNAIL_PIXELS = 224 * 224
LOOKS = 4  # of a rollout with the tool `zoom`, at most
SCORE_BYTES = 24  # per slot and word while sampling: fp32 scores and log-probabilities, two fp64 sums
LOGIT_BYTES = 20  # per logit in the head's backward pass: fp32 logits and their gradients
STEP_BYTES = 32  # per weight of the piece that the optimizer has in fp32
PROCESS = 4 * GIB  # of host memory: a process with Python, torch and the libraries of CUDA
RECORDED = 3 * GIB  # of host memory: FVQA's published searches in a process
# Advice does not go below: fewer slots read all weights for little, and shorter or smaller leaves no room to work.
LEAST = {"slots": 16, "slot_tokens": 1024, "max_tokens": 4096, "max_pixels": 448 * 448}

# Options that change memory and time, but neither what is sampled nor what is learned.
SAME_RESULT = ("--recompute", "--keep-blocks", "--shard", "--slots", "--slot-tokens", "--micro-tokens")
SHARDED = {
    "none": "each device holds all weights",
    "node": "the devices of a machine share one copy of the weights",
    "all": "all devices share one copy of the weights",
}
RANK = 64  # of the adapters that are advised where all weights do not fit


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
class Parameters:
    """Numbers of parameters, as one device has them."""

    whole: int  # of the model, without adapters
    mine: int  # of them, those stored on this device: of a shard, or of all
    stored: int  # bytes of each
    trained: int  # of those stored on this device
    adapters: int  # of all adapters, which every device has
    stacked: int  # of what sampling makes of them
    low_bits: int = 0  # bf16 weights whose fp32 master has its lower 16 bits in the optimizer
    # Where weights are sharded, of FSDP's units: a decoder block, and the root with all that is in no block.
    block: int = 0
    root: int = 0
    trained_block: int = 0  # of them, those that get a gradient
    trained_root: int = 0

    @classmethod
    @lru_cache
    def of(cls, model: ModelConfig, run: Trained, shard: str, ranks: int, node: int, item: int) -> Parameters:
        """`shard`: as --shard has it; "auto" is "none" with adapters, otherwise "node"."""
        size = sizes(model)
        whole = size.count()
        with_adapters = bool(run.adapters)
        trained = size.count(among=run.weights)
        beside = dict(adapters=run.numbers(), stacked=run.stacked())
        if ranks == 1 or with_adapters and shard in ("auto", "none"):
            low_bits = trained if item < 4 else 0
            return cls(whole=whole, mine=whole, stored=item, trained=trained, low_bits=low_bits, **beside)

        node = min(node, ranks)
        parts = ranks if shard == "all" or node == 1 else node  # devices that hold one copy together
        blocks = [f"model.layers.{i}." for i in range(model.num_hidden_layers)]
        block = size.count(inside=blocks[0])
        trained_blocks = [size.count(inside=name, among=run.weights) for name in blocks]
        in_tower = size.count(inside="visual.blocks.", among=run.weights)
        return cls(
            whole=whole,
            mine=size.count(parts),
            stored=item if with_adapters else 4,  # shards that are trained are fp32
            trained=size.count(parts, among=run.weights),
            block=block,
            root=whole - len(blocks) * block - size.count(inside="visual.blocks."),
            trained_block=max(trained_blocks),
            trained_root=trained - sum(trained_blocks) - in_tower,
            **beside,
        )


def _of_parameters(parameters: Parameters, config: Config, sharded: bool, item: int) -> dict[str, Moments]:
    """Rows of what grows with the number of parameters."""
    weights = parameters.stored * parameters.mine
    rest = 2 * parameters.low_bits  # the lower 16 bits of each master
    # Adapters are fp32, and rounded where they are used: by sampling once, by training in every pass.
    adapters = 4 * parameters.adapters
    rounded = item * parameters.stacked
    # Two moments: fp32, or bf16 where the weights are.
    adam = 8 * (parameters.trained + parameters.adapters) - 4 * parameters.low_bits
    reference = 0
    if has_reference(config):
        if not config.trains_adapters:
            reference = item * parameters.mine
        elif config.adapter:
            reference = 4 * parameters.adapters  # as they were at the start
    gradients = 4 * (parameters.trained + parameters.adapters)  # fp32
    # Sharded weights are gathered before they are used: all of them to generate. In an update two root units and three
    # blocks at most are there at once, with the fp32 gradients of a block.
    gathered = item * parameters.whole if sharded else 0
    gathered_in_update = 2 * item * parameters.root + 3 * item * parameters.block + 4 * parameters.trained_block
    return {
        "weights": Moments(weights, weights, weights),
        "rest of the masters": Moments(rest, rest, rest),
        "adapters": Moments(adapters + rounded, adapters, adapters),
        "optimizer moments": Moments(adam, adam, adam),
        "KL reference": Moments(reference, reference, reference),
        "gradients": Moments(0, gradients, gradients),
        "whole weights": Moments(gathered, gathered_in_update, 0),
    }


def has_reference(config: Config) -> bool:
    """Whether the loss has a KL term. With adapters its reference is the model itself, with its adapters off."""
    return config.kl > 0 and config.algorithm == "grpo"


# ---- the plan


def plan(model: ModelConfig, config: Config, ranks: int = 1, node: int = 8, item: int = 2) -> Plan:
    """What `config` takes on each of `ranks` devices, `node` on a machine, computing in numbers of `item` bytes.

    A --shard that is not decided (`decided`) counts as "none" with adapters, otherwise as "node".
    """
    parameters = Parameters.of(model, trained(model, config), config.shard, ranks, node, item)
    rows = _of_parameters(parameters, config, parameters.block > 0, item)
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

    features = item * model.vision.feature_size  # bytes of a merged token
    features_of_rollouts = features * kept.pictures(max(groups, tests))
    if kept.trained.tower:
        pictures = kept.pictures(update)
        features_of_update = 3 * features * pictures  # in bf16, and their fp32 gradients
        if has_reference(config):
            features_of_update += features * pictures  # those that the reference sees
        features_of_step = 0
    else:  # those of the rollouts serve the whole step
        pictures = 0
        features_of_update = features_of_step = features * kept.pictures(groups)

    tokens = max(min(config.micro_tokens, update * config.group_size * config.max_tokens), config.max_tokens)
    root_gradient = 4 * parameters.trained_root
    backward = max(kept.block(tokens), kept.vision_block(pictures), kept.head(tokens), root_gradient)  # one at a time
    generate = max(kept.prefill(), item * parameters.root) + kept.sampling()
    averaged = 4 * parameters.adapters if ranks > 1 else 0  # the adapters' gradients as one tensor
    step = max(averaged, STEP_BYTES * min(PIECE, parameters.low_bits))
    return {
        "KV cache": Moments(cache, 0, 0),
        "features of pictures": Moments(features_of_rollouts, features_of_update, features_of_step),
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
    def trained(self) -> Trained:
        return trained(self.model, self.config)

    @property
    def longest(self) -> int:
        """Tokens of a prompt at most."""
        return min(self._merged(self.config.max_pixels) + PROMPT_TEXT, self.config.max_tokens)

    def _merged(self, pixels: int) -> int:
        """Merged tokens of a picture of so many pixels, at least one."""
        return max(1, pixels // self.model.vision.processor.side**2)

    def cache(self, groups: int, group_size: int) -> int:
        """Prefix rows and suffix slots of `groups` as `Engine._allocate` sizes them."""
        slots = min(self.config.slots, groups * group_size)
        rows = prefix_rows(groups, slots, group_size)
        longest = self.config.max_tokens - self._merged(self.config.min_pixels) + 1  # behind the shortest prompt
        room, long_slots = slot_layout(slots, self.config.slot_tokens, longest)
        tokens = rows * self.longest + max(slots * room, long_slots * longest)
        model = self.model
        return tokens * 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * self.item

    def pictures(self, questions: int) -> int:
        """Merged tokens of all distinct pictures of `questions`, with what image searches and closer looks bring."""
        thumbnails = 0
        if self.config.max_images and self.config.back_ends["image"] != "none":
            thumbnails = THUMBNAILS * self._merged(THUMBNAIL_PIXELS)
        looks = 0  # no two rollouts look at the same part
        if "zoom" in self.config.tool_names:
            looks = self.config.group_size * min(LOOKS, self.config.max_turns - 1)
        return questions * ((1 + looks) * self._merged(self.config.max_pixels) + thumbnails)

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
        if model.head_norms:
            heads += model.num_attention_heads + model.num_key_value_heads
        widths = 4 * model.hidden_size + model.head_dim * heads + 3 * model.intermediate_size
        return int(tokens * self.item * widths) + self._kept_by_adapters("model.layers.0.", tokens)

    def _kept_by_adapters(self, block: str, rows: int) -> int:
        """Of a block's adapters: A x, as wide as their ranks, and A and B as they are used."""
        return self.item * (rows * self.trained.ranks(block) + self.trained.numbers(block))

    def decoder(self, tokens: int) -> int:
        """All blocks, and three rows (T, d) at the two ends."""
        blocks = self.model.num_hidden_layers
        kept = blocks  # blocks that keep everything; the others keep their input
        if self.config.recompute:
            kept = min(blocks, max(0, self.config.keep_blocks))
        row = tokens * self.item * self.model.hidden_size  # (T, d)
        return (blocks - kept) * row + kept * self._kept_by_block(tokens) + 3 * row

    def head(self, tokens: int) -> int:
        """The backward pass of the head: a tile of logits (T, V), and its gradient where it has one."""
        tile = min(CHUNK_BYTES, LOGIT_BYTES * tokens * self.model.vocab_size)
        name = "model.embed_tokens.weight" if self.model.tie_word_embeddings else "lm_head.weight"
        if name not in self.trained.weights:
            return tile
        return tile + (4 + self.item) * self.model.vocab_size * self.model.hidden_size  # twice (V, d), once in fp32

    # The vision tower: MERGE² patches make a merged token.

    def vision_block(self, merged: int) -> int:
        """A block of the tower in its backward pass."""
        if not merged:
            return 0
        vision = self.model.vision
        gradients = vision.mlp_rows * vision.intermediate_size + 2 * vision.hidden_size  # a patch
        return self._kept_by_vision_block(merged) + merged * MERGE**2 * self.item * gradients

    def _kept_by_vision_block(self, merged: int) -> int:
        vision = self.model.vision
        patches = merged * MERGE**2
        widths = 9 * vision.hidden_size + vision.mlp_rows * vision.intermediate_size  # a patch
        return patches * self.item * widths + self._kept_by_adapters("visual.blocks.0.", patches)

    def tower(self, merged: int) -> int:
        """All blocks, the patches, and the mergers. Nothing without pictures: the tower is not trained."""
        if not merged:
            return 0
        vision = self.model.vision
        patches = merged * MERGE**2
        if self.config.recompute:
            block = patches * self.item * vision.hidden_size  # its input
        else:
            block = self._kept_by_vision_block(merged)
        mergers = vision.feature_size // vision.out_hidden_size
        ends = patches * self.item * (vision.processor.patch_values + (1 + 4 * mergers) * vision.hidden_size)
        return vision.depth * block + ends

    # Generation.

    def prefill(self) -> int:
        """One pass over new prompts and their pictures, without gradient."""
        model, vision = self.model, self.model.vision
        tokens = max(self.config.micro_tokens, self.longest)
        if self.config.slot_tokens:  # a conversation that outgrew its slot is prefilled again, all of it at once
            tokens = max(tokens, self.config.max_tokens)
        decoder = 4 * model.hidden_size + 3 * model.intermediate_size  # a token
        tower = MERGE**2 * (5 * vision.hidden_size + vision.mlp_rows * vision.intermediate_size)  # a merged token
        patches = tokens * MERGE**2 * vision.processor.patch_values * 4  # fp32
        return tokens * self.item * max(decoder, tower) + patches

    def sampling(self) -> int:
        """What sampling makes of the scores: once in plain passes, and once in the memory that captured graphs own."""
        return 2 * SCORE_BYTES * self.config.slots * self.model.vocab_size


# ---- what fits


class Advice(NamedTuple):
    """What would make a run fit that does not."""

    savings: dict[str, float]  # bytes that an option saves alone
    options: str  # that together make it fit; empty where none do
    with_options: float  # bytes then
    processes: int  # so many make it fit without other options; 0 where none do
    with_processes: float  # bytes then
    lora: str  # options with which adapters instead of all weights fit; empty where none do, or adapters are trained
    with_lora: float  # bytes then


def check(model: ModelConfig, config: Config, capacity: float, ranks: int = 1, node: int = 8, item: int = 2) -> Plan:
    """The plan, if it fits into `capacity` bytes on each device. Else UserError, with what each option would save.

    As many blocks are kept as there is room for; whether it fits depends on the least.
    """
    room = USABLE * capacity
    chosen = kept_as_fits(model, config, capacity, ranks, node, item)
    found = plan(model, chosen, ranks, node, item)
    if found.peak <= room:
        return found
    advice = advise(model, config, capacity, ranks, node, item)
    said = [f"{option} saves {saved / GIB:.1f}" for option, saved in advice.savings.items()]
    if advice.options:
        said.append(f"{advice.options} would do ({advice.with_options / GIB:.1f})")
    if advice.processes:
        said.append(f"{advice.processes} processes would do ({advice.with_processes / GIB:.1f} each)")
    if advice.lora:
        said.append(f"LoRA would do: {advice.lora} needs {advice.with_lora / GIB:.1f}")
    raise UserError(
        f"the run needs {found.peak / GIB:.1f} GiB on each device, where {room / GIB:.1f} of {capacity / GIB:.1f} are "
        f"usable: {', '.join(said) or 'take a smaller model'}; python -m mmsr.plan shows more"
    )


def decided(
    model: ModelConfig, config: Config, capacity: float, ranks: int = 1, node: int = 8, item: int = 2
) -> Config:
    """`config` with --shard decided, where it is "auto". Equal arguments give equal decisions on all ranks.

    Weights that are trained are sharded over a machine. Beside adapters each device has its own, where that fits;
    otherwise they are sharded over a machine, or over all devices if only that fits.
    """
    if config.shard != "auto":
        return config
    if not config.trains_adapters:
        return replace(config, shard="node")
    choices = [replace(config, shard=shard) for shard in ("none", "node", "all")]
    peaks = [plan(model, choice, ranks, node, item).peak for choice in choices]
    for choice, peak in zip(choices, peaks):
        if peak <= USABLE * capacity:
            return choice
    return choices[peaks.index(min(peaks))]


def kept_as_fits(
    model: ModelConfig, config: Config, capacity: float, ranks: int = 1, node: int = 8, item: int = 2
) -> Config:
    """`config` with --shard decided, and with a number for `keep_blocks`: its own, or as many as stay below FILLED."""
    config = decided(model, config, capacity, ranks, node, item)
    if config.keep_blocks >= 0:
        return config
    for n in range(model.num_hidden_layers, 0, -1):
        kept = replace(config, keep_blocks=n)
        if plan(model, kept, ranks, node, item).peak <= FILLED * capacity:
            return kept
    return replace(config, keep_blocks=0)


def advise(model: ModelConfig, config: Config, capacity: float, ranks: int = 1, node: int = 8, item: int = 2) -> Advice:
    """For a run that does not fit into `capacity` bytes on each device."""

    def peak(changed: Config, ranks: int = ranks) -> float:
        return plan(model, decided(model, changed, capacity, ranks, node, item), ranks, node, item).peak

    room = USABLE * capacity
    now = peak(config)
    savings = {option: now - peak(changed) for option, changed in _smaller(config)}
    if not (config.trains_adapters or config.freeze):
        savings["--freeze vision"] = now - peak(replace(config, freeze=("vision",)))
    worthwhile = {option: saved for option, saved in savings.items() if saved > 0.005 * now}
    options, with_options = _that_fit(room, config, peak)
    processes, with_processes = 0, 0.0
    for count in [ranks * 2**k for k in range(1, 11)]:
        if count > config.mini_batch:  # groups stay whole: more have nothing to do
            break
        if peak(config, count) <= room:
            processes, with_processes = count, peak(config, count)
            break
    lora, with_lora = _lora_that_fits(room, config, peak)
    return Advice(worthwhile, options or "", with_options, processes, with_processes, lora, with_lora)


def _lora_that_fits(room: float, config: Config, peak: Callable[[Config], float]) -> tuple[str, float]:
    """Options that train adapters within `room`, and bytes then. "" where none do, or adapters are trained anyway."""
    if config.trains_adapters:
        return "", 0
    others, least = _that_fit(room, replace(config, lora=RANK), peak)
    if others is None:
        return "", 0
    return f"--lora {RANK} {others}".strip(), least


def _that_fit(room: float, config: Config, peak: Callable[[Config], float]) -> tuple[str | None, float]:
    """Options that make `config` fit, "" where it does as it is, None where none do; and bytes with them.

    Options that change what is learned are taken only where the others do not suffice.
    """
    chosen, least = _until(room, config, peak, SAME_RESULT)
    if least > room:
        chosen, least = _until(room, config, peak)
    return (" ".join(chosen.values()) if least <= room else None), least


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """(option, the configuration with it) for each option that may save memory."""
    steps: list[tuple[str, dict[str, Any]]] = [
        ("--recompute", {"recompute": True}),
        ("--keep-blocks 0", {"keep_blocks": 0}),
        ("--kl 0", {"kl": 0.0}),
        ("--shard all", {"shard": "all"}),
    ]
    for name in ("mini_batch", "slots", "slot_tokens", "micro_tokens", "max_tokens", "max_pixels"):
        half = getattr(config, name) // 2
        if name == "slot_tokens" and not half:
            half = config.max_tokens // 2  # as long as the longest
        if half < LEAST.get(name, 1):
            continue
        changes = {name: half}
        option = f"--{kebab(name)} {half}"
        if name == "max_pixels" and half < config.min_pixels:
            changes["min_pixels"] = half
            option += f" --min-pixels {half}"
        steps.append((option, changes))
    for option, changes in steps:
        try:
            yield option, replace(config, **changes)
        except UserError:  # e.g. a mini-batch that divides nothing
            continue


def _until(
    room: float, config: Config, peak: Callable[[Config], float], among: Sequence[str] = ()
) -> tuple[dict[str, str], float]:
    """Options taken one after another, always the one that saves most, until it fits or none helps; bytes then.

    `among`: only these are taken, unless it is empty.
    """
    chosen: dict[str, str] = {}
    now = peak(config)
    while now > room:
        candidates = [(now, "", config)]
        for option, changed in _smaller(config):
            if not among or option.split()[0] in among:
                candidates.append((peak(changed), option, changed))
        least, option, config = min(candidates, key=lambda candidate: candidate[0])
        if least >= now:
            break
        chosen[option.split()[0]] = option
        now = least
    return chosen, now


# ---- the command


def known_sizes(name: str) -> ModelConfig | None:
    """The sizes of the model that --model names, where no download is needed to know them; None for others."""
    if Path(name).is_dir():
        return read_config(Path(name))
    for short, full in SHORT_NAMES.items():
        if name in (short, full):
            return SIZES[short]
    return None


def model_sizes(name: str) -> ModelConfig:
    """The sizes of what --model names. Of an unknown hub model only config.json is fetched. Raises UserError."""
    if known := known_sizes(name):
        return known
    what = f"model {name!r} is not a folder, and config.json of {name!r}"
    advice = f"give a folder, a hub id, or one of {', '.join(SHORT_NAMES)}"
    where = {"repo_id": repository(name), "filename": "config.json"}
    return read_config(fetched("hf_hub_download", what, advice, **where).parent)


def host_memory(model: ModelConfig, config: Config, ranks: int = 1, node: int = 8, item: int = 2) -> dict[str, float]:
    """Bytes of a machine's memory, by part, for its `node` processes. An estimate: PROCESS and RECORDED are assumed.

    A save builds a file of each process in memory, in two copies. At the end the main rank has the whole model, or a
    single process one of its files.
    """
    processes = min(ranks, node)
    kept = Activations(model, config, item)
    questions = math.ceil(max(config.questions, config.eval_size) * processes / ranks)
    recorded = RECORDED if FVQA_SEARCH in config.back_ends.values() else 0
    save = processes * min(2 * FILE_BYTES, 2 * save_bytes(config, model, ranks, item) / ranks)
    whole = item * sizes(model).count()
    if config.merge:
        at_the_end = whole  # merged here, whatever the device has
    elif config.trains_adapters:
        at_the_end = 4 * trained(model, config).numbers()
    else:
        at_the_end = whole if ranks > 1 else min(whole, SHARD_BYTES)
    return {
        "programs": processes * PROCESS,
        "pictures": kept.pictures(questions) * MERGE**2 * model.vision.processor.patch_values * 4,  # fp32 patches
        "recorded searches": processes * recorded,
        "a save": max(save, at_the_end),
    }


def main(argv: Sequence[str]) -> None:
    """Print the plan of a command line and a verdict. Exit status 0: it fits, 1: it does not, 2: a mistake."""
    parser = Parser(
        "python -m mmsr.plan",
        description="What a run of train.py needs: memory of devices and host, disk, downloads; and whether it fits.",
        epilog="All options of train.py are understood too, with their defaults (--model: Qwen2.5-VL-7B, --recipe: "
        "blog): python train.py --help lists them. The verdict is on the last line; exit status 0 if the run fits, "
        "1 if it does not, 2 for a mistake.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=_count, default=1, metavar="N", help="processes, one device each (1)")
    parser.add_argument("--node-gpus", type=_count, default=8, metavar="N", help="of them on one machine (8)")
    parser.add_argument("--gpu-gb", type=_gibibytes, default=80, metavar="GIB", help="memory of a device, GiB (80)")
    given, rest = parser.parse_known_args(argv)
    if not any(word.split("=")[0] == "--model" for word in rest):
        rest = ["--model", "Qwen2.5-VL-7B", *rest]
    try:
        config = parse(rest, program=parser.prog)
        _check_machines(given.gpus, given.node_gpus)
        model = model_sizes(config.model)
        trained(model, config)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    place = (given.gpus, given.node_gpus, 4 if config.dtype == "float32" else 2)
    chosen = kept_as_fits(model, config, given.gpu_gb * GIB, *place)
    print(plan(model, chosen, *place).table())
    if config.trains_adapters and given.gpus > 1:
        print(f"\n{SHARDED[chosen.shard]} (--shard {chosen.shard})")
    print(f"\n{_other_needs(model, config, *place)}")
    fits, said = verdict(model, config, given.gpu_gb * GIB, rest, *place)
    print(f"\nVERDICT: {said}")
    if not fits:
        raise SystemExit(1)


def _other_needs(model: ModelConfig, config: Config, ranks: int, node: int, item: int) -> str:
    """Host memory, disk and downloads, a line each."""
    lines = [
        _sum("host memory of a machine", "GiB", GIB, host_memory(model, config, ranks, node, item)),
        _sum("disk under --out", "GB", 1e9, disk_needed(config, model, ranks, item)),
        _sum("downloads", "GB", 1e9, downloads(config, model)),
    ]
    return "\n".join(lines)


def _sum(name: str, symbol: str, unit: float, parts: Mapping[str, float]) -> str:
    """A line with the sum of bytes, and the parts that matter."""
    listed = ", ".join(f"{part} {size / unit:.1f}" for part, size in parts.items() if size > unit / 20)
    return f"{name}, {symbol}: {sum(parts.values()) / unit:.1f} ({listed or 'nothing'})"


def verdict(
    model: ModelConfig, config: Config, capacity: float, options: Sequence[str], ranks: int, node: int, item: int
) -> tuple[bool, str]:
    """Whether it fits, and that in a line, with the command to type. `options`: those of train.py."""
    kept = kept_as_fits(model, config, capacity, ranks, node, item)
    need = plan(model, kept, ranks, node, item).peak
    size = f"{need / GIB:.1f} GiB on each device, {USABLE * capacity / GIB:.1f} of {capacity / GIB:.1f} usable"
    if need <= USABLE * capacity:
        return True, f"fits ({size}): {launch(ranks, node)} {shlex.join(options)}"
    advice = advise(model, config, capacity, ranks, node, item)
    line = f"{launch(ranks, node)} {shlex.join(options)}"
    ways = []
    if advice.options:
        changing = [word for word in advice.options.split() if word.startswith("--") and word not in SAME_RESULT]
        note = f" ({', '.join(changing)}: changes what is learned)" if changing else ""
        ways.append(f"{line} {advice.options}{note}")
    if advice.processes:
        ways.append(f"{launch(advice.processes, node)} {shlex.join(options)}")
    if advice.lora:
        least = f"{advice.with_lora / GIB:.1f} GiB at least"
        ways.append(f"{line} {advice.lora} (adapters instead of all weights: {least})")
    if not ways:
        return False, f"does not fit ({size}); take a smaller model or larger devices"
    return False, f"does not fit ({size}); this would: {', or '.join(ways)}"


def launch(ranks: int, node: int = 8) -> str:
    """The beginning of a command line that starts train.py on so many devices, `node` of them on a machine."""
    if ranks == 1:
        return "python train.py"
    machines = f"--nnodes {math.ceil(ranks / node)} " if ranks > node else ""
    return f"torchrun {machines}--nproc-per-node {min(ranks, node)} train.py"


def _check_machines(ranks: int, node: int) -> None:
    """Raises UserError for devices that are not whole machines: torchrun starts equally many processes on each."""
    if ranks > node and ranks % node:
        raise UserError(f"--gpus {ranks} are no whole machines of {node}: give a multiple of {node}, or --node-gpus N")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of devices, 1 or more")
    return int(text)


def _gibibytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0
    if not 1 <= size <= 1000:  # MiB, which nvidia-smi shows, are no GiB
        raise argparse.ArgumentTypeError(f"{text!r}: give the memory of a device in GiB, such as 80")
    return size


if __name__ == "__main__":
    main(sys.argv[1:])
