"""Shared by the benchmarks: the description of a machine, medians, tables, and a tiny random model."""

from __future__ import annotations

import io
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable, Sequence, TypeVar

import numpy as np
import PIL.Image
import torch

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmsr.model import ModelConfig  # noqa: E402
from mmsr.rollout import Rollout  # noqa: E402
from mmsr.toy.base import model_config  # noqa: E402
from mmsr.vision import VisionConfig  # noqa: E402


def machine(device: torch.device | str = "cpu", packages: Sequence[str] = ()) -> str:
    """One line: hardware, threads, versions."""
    device = torch.device(device)
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    named = [f"{name} {_version(name)}" for name in ("torch", "transformers", *packages)]
    return f"{hardware}; Python {platform.python_version()}, {', '.join(named)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def timed(work: Callable[[], T], device: torch.device | str = "cpu") -> tuple[float, T]:
    """The seconds of one call, with the device's work, and its value."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    value = work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, value


def spread(values: Sequence[float]) -> str:
    """The median, and the range of more than one value."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}–{max(values):.2f})"


def tiny_config(tokenizer) -> ModelConfig:
    """Qwen2.5-VL's architecture with about 6 million parameters, for the toy tokenizer's ids."""
    vision = VisionConfig(
        depth=4, hidden_size=160, num_heads=4, intermediate_size=416, out_hidden_size=256, fullatt_block_indexes=(3,)
    )
    sizes = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, mrope_section=(8, 12, 12))
    return replace(model_config(tokenizer), vocab_size=4096, vision=vision, **sizes)


def picture(side: int, seed: int) -> bytes:
    """An encoded picture of noise, `side` pixels square."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class ForcedSearch(Rollout):
    """Searches in turn 1 and answers in turn 2, whatever the model says."""

    def _turn_ended(self, conversation):
        conversation.sequence.stopped = True
        super()._turn_ended(conversation)

    def _record_turn(self, conversation, *args, **options):
        turn = super()._record_turn(conversation, *args, **options)
        turn.action = "image_search" if conversation.model_turns == 1 else "answer"
        turn.query = ""
        return turn
