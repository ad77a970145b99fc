"""How fast a device multiplies in another number type than float32."""

from __future__ import annotations

import time

import torch
from torch.nn.functional import linear

TIMES = 7  # of which the shortest counts: the first one prepares the library, and others wait for other programs


def time_ratio(dtype: torch.dtype, device: torch.device) -> float:
    """The time of linear layers in `dtype`, divided by that in float32, as measured on `device` within a second.

    In bfloat16 it is far below 1 on GPUs since Ampere, and .4 on a processor with AVX512-BF16. Older ones convert every
    number: one with AVX2 alone takes 8 times as long.
    """
    seconds: dict[torch.dtype, list[float]] = {dtype: [], torch.float32: []}
    for _ in range(TIMES):
        for each, measured in seconds.items():  # in turn, so that other work on the machine meets both
            measured.append(_seconds(each, device))
    return min(seconds[dtype]) / min(seconds[torch.float32])


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Of a product of square matrices, large enough to occupy the device."""
    size = 512 if device.type == "cpu" else 2048
    factor = torch.ones(size, size, dtype=dtype, device=device)
    _finish(device)
    start = time.perf_counter()
    linear(factor, factor)
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
