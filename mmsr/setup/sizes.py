"""Whether a run fits the machine, from sizes alone: its memory, its disk, and devices that would do nothing."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mmsr import disk, plan
from mmsr.config import Config, Options
from mmsr.model import ModelConfig
from mmsr.pretrained.hub import hub_cache
from mmsr.shapes import sizes, trained
from mmsr.system.errors import UserError
from mmsr.system.number_types import time_ratio
from mmsr.system.parallel import Ranks

LITTLE = 10**9  # bytes of disk that are not worth a line
SLOW = 1.5  # times as long as in float32: for more, halving the memory is not worth it


def check_sizes(config: Options, model: ModelConfig, ranks: Ranks, download: int = 0) -> None:
    """Say what a run needs of memory and disk, and which devices are idle. Raises UserError where it does not fit.

    `download`: bytes that the hub's cache will take. For the main rank.
    """
    if isinstance(config, Config):
        _say_trained(config, model)
        _say_memory(config, model, check_memory(config, model, ranks), ranks)
        if ranks.size > config.mini_batch:  # groups stay whole
            few = f"an update has {config.mini_batch} questions for {ranks.size} processes, so some do nothing"
            print(f"WARNING: {few}: raise --mini-batch, or start {config.mini_batch} processes", file=sys.stderr)
    check_disk(config, model, ranks, download)
    here = visible_devices(config, ranks)
    if config.model and here > ranks.node_size:
        used = f"the run uses {ranks.node_size} of this machine's {here} devices"
        print(f"WARNING: {used}; to use all: {line_for_all(here, ranks)}", file=sys.stderr)


def compute_dtype(config: Options, ranks: Ranks) -> torch.dtype:
    """The number type that the model computes in."""
    return getattr(torch, config.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))


def warn_of_slow_products(dtype: torch.dtype, device: torch.device) -> None:
    """Old GPUs, and processors without AVX512-BF16, convert every bfloat16 number."""
    ratio = 1.0 if dtype == torch.float32 else time_ratio(dtype, device)
    if ratio > SLOW:
        here = f"a product in {str(dtype).removeprefix('torch.')} takes {ratio:.1f} times as long as in float32"
        print(f"WARNING: here {here}: give --dtype float32", file=sys.stderr)


def check_memory(config: Config, model: ModelConfig, ranks: Ranks) -> int:
    """How many decoder blocks may keep everything for their backward pass.

    Raises UserError where the memory plan does not fit, with what would help: devices that are idle come first.
    """
    machine = _this_machine(ranks, compute_dtype(config, ranks))
    try:
        plan.check(model, config, *machine)
    except UserError as error:
        if ranks.device.type == "cpu" and not config.device:
            raise UserError(f"torch sees no GPU, so this is the memory of the host: {error}") from None
        here = visible_devices(config, ranks)
        if here <= ranks.node_size:
            raise
        raise UserError(_all_devices(config, model, machine, here, str(error), ranks)) from None
    return plan.kept_as_fits(model, config, *machine).keep_blocks


def sharding(config: Options, model: ModelConfig, ranks: Ranks) -> str:
    """How the weights lie on the devices: --shard, where "auto" is decided, by the smallest device. Collective."""
    if config.shard != "auto":
        return config.shard
    if not isinstance(config, Config) or not config.trains_adapters:
        return "node"
    capacity, *place = _this_machine(ranks, compute_dtype(config, ranks))
    smallest = -ranks.max(-capacity)
    chosen = plan.decided(model, config, smallest, *place).shard
    if chosen != "none":
        ranks.print(f"A device is too small for all weights: {plan.SHARDED[chosen]} (--shard {chosen}).")
    return chosen


def _say_trained(config: Config, model: ModelConfig) -> None:
    """What is trained, where that is not all of the model."""
    run, size = trained(model, config), sizes(model)
    numbers = run.numbers() + size.count(among=run.weights)
    if run.adapters:
        print(f"Trained: {numbers:,} numbers of adapters, in {len(run.adapters)} layers.")
    elif config.freeze:
        print(f"Trained: {numbers:,} of {size.count():,} weights.")
        if model.tie_word_embeddings and "model.embed_tokens.weight" not in run.weights:
            print("--freeze: the head of this model is its embedding, and is frozen with it.")


def _say_memory(config: Config, model: ModelConfig, kept: int, ranks: Ranks) -> None:
    """`kept`: as `check_memory` gives it."""
    capacity, size, node, item = _this_machine(ranks, compute_dtype(config, ranks))
    chosen = plan.decided(model, config, capacity, size, node, item)
    found = plan.plan(model, replace(chosen, keep_blocks=kept), size, node, item)
    if ranks.device.type == "cuda":
        ranks.print(found.table())
    ranks.print(f"Memory plan: at most {found.peak / plan.GIB:.1f} of {capacity / plan.GIB:.1f} GiB on each device")
    if config.recompute:
        blocks = model.num_hidden_layers
        recomputed = max(0, blocks - kept)
        ranks.print(f"The backward pass recomputes {recomputed} of the decoder's {blocks} blocks.")


def _this_machine(ranks: Ranks, dtype: torch.dtype) -> tuple[float, int, int, int]:
    """What the memory plan asks of a machine: bytes of a device, processes, those on one machine, bytes of a number."""
    if ranks.device.type == "cuda":
        capacity = torch.cuda.get_device_properties(ranks.device).total_memory
    else:
        capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks.node_size
    return capacity, ranks.size, ranks.node_size, dtype.itemsize


def visible_devices(config: Options, ranks: Ranks) -> int:
    """Devices of this machine that processes could have. Where --device names one by its number, that is meant."""
    if ranks.device.type != "cuda" or ":" in config.device:
        return ranks.node_size
    return torch.cuda.device_count()


def line_for_all(here: int, ranks: Ranks) -> str:
    """The command line that starts a process on each of the `here` devices of this machine."""
    if ranks.size > ranks.node_size:
        return f"torchrun --nproc-per-node {here} on each machine"
    return f"torchrun --nproc-per-node {here} {shlex.join(sys.argv)}"


def _all_devices(
    config: Config, model: ModelConfig, machine: tuple[float, int, int, int], here: int, refusal: str, ranks: Ranks
) -> str:
    """What to say of a run that does not fit the devices that it has, where others are idle."""
    capacity, size, node, item = machine
    line = line_for_all(here, ranks)
    all_here = (size // node * here, here, item)
    need = _peak(model, config, machine)
    shared = _peak(model, config, (capacity, *all_here))
    room = capacity / plan.GIB
    if shared > plan.USABLE * room:
        said = f"{refusal}; {line} would use all {here} devices of this machine, but needs {shared:.1f} GiB on each"
        advice = plan.advise(model, config, capacity, *all_here)
        return f"{said}, and {advice.with_lora / plan.GIB:.1f} with {advice.lora}" if advice.lora else said
    few = f"the run needs {need:.1f} GiB on a device of {room:.1f}, and uses {node} of this machine's {here}"
    said = f"{few}: on all {here} it needs {shared:.1f} each; type {line}"
    advice = plan.advise(model, config, capacity, size, node, item)
    if not advice.lora:
        return said
    start = "python" if ranks.size == 1 else f"torchrun --nproc-per-node {node}"
    return f"{said}; or, by LoRA, {start} {shlex.join(sys.argv)} {advice.lora} needs {advice.with_lora / plan.GIB:.1f}"


def _peak(model: ModelConfig, config: Config, machine: tuple[float, int, int, int]) -> float:
    """GiB on each device at least."""
    return plan.plan(model, plan.decided(model, config, *machine), *machine[1:]).peak / plan.GIB


def check_disk(config: Options, model: ModelConfig, ranks: Ranks, download: int = 0) -> None:
    """Say what a run needs of the disk, where that is more than LITTLE. Raises UserError where the download or the
    first save does not fit; where a later one may not, there is a warning. `download`: bytes for the hub's cache."""
    cache = hub_cache()
    if download > free_disk(cache):
        need = f"{_gb(download)} have to be downloaded, {_gb(free_disk(cache))} are free"
        raise UserError(f"{cache}: {need}: make room, or export HF_HOME=FOLDER on a larger disk")
    if not isinstance(config, Config) or (Path(config.out) / f"checkpoints/step-{config.steps:06d}").exists():
        return
    out = Path(config.out)
    free = free_disk(out) - (download if same_disk(out, cache) else 0)
    item = compute_dtype(config, ranks).itemsize
    parts = disk.disk_needed(config, model, ranks.size, item)
    save = disk.save_bytes(config, model, ranks.size, item)
    saves = disk.saves_at_once(config)
    need = max(0, sum(parts.values()) - used_disk(out))  # a resumed run has a part of it already
    others = ", ".join(f"{part} {_gb(parts[part])}" for part in ("model", "rollouts"))
    of = f"{saves} checkpoint{'s' * (saves > 1)} of {_gb(save)}, {others}"
    said = f"--out {out}: the run needs about {_gb(need)} of disk ({of}), {_gb(free)} are free"
    if save > free:
        raise UserError(f"{said}: not even one checkpoint fits; make room, or name another --out")
    if need > free:
        fewer = ", or save less often (--save-every 0: only at the end)" if saves > 1 else ""
        print(f"WARNING: {said}: make room before it is full, or name another --out{fewer}", file=sys.stderr)
    elif need > LITTLE:
        print(f"{said}.")


def _gb(count: float) -> str:
    return f"{count / 1e9:.0f} GB" if count >= 10e9 else f"{count / 1e9:.1f} GB"


def used_disk(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is, or will be made."""
    return shutil.disk_usage(_nearest(folder)).free


def same_disk(one: Path, other: Path) -> bool:
    """Whether two folders are, or will be, on one file system."""
    return _nearest(one).stat().st_dev == _nearest(other).stat().st_dev


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
