"""Decode steps replayed from CUDA graphs: one launch instead of a thousand, so that the device does not wait.

A graph repeats kernels on the addresses of the pass that was captured. So a pass that is given here reads and writes
tensors that stay where they are, depends on no number of the host's but those in its `shape`, and never waits for the
device. Every shape is captured by itself, which takes as long as a pass, so shapes should be few: what varies from step
to step is rounded up (`bucket`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import suppress
from typing import Any, Callable, Hashable

import torch
from torch import Tensor

from mmsr.system.errors import first_line

WARM_UPS = 1  # plain passes of a shape before it is captured: libraries load kernels then, which a capture must not do


class Graphs:
    """Runs passes, or replays them. With `on` false it only runs them, as on a CPU."""

    def __init__(self, on: bool):
        self.on = on
        self.seen: Counter[Hashable] = Counter()
        self.captured: dict[Hashable, tuple[Any, Tensor]] = {}
        self.replayed = 0  # passes
        # Memory that all graphs share, as one result is alive at a time. It belongs to these graphs: torch's allocator
        # refuses a pool that had graphs and has none any more.
        self.pool: Any = None
        self.stream: Any = None

    def bucket(self, length: int, most: int, least: int = 8) -> int:
        """A length that many steps have in common: the next power of two, from `least` on, but `most` at most."""
        if not self.on:
            return length
        return min(most, max(least, 1 << (length - 1).bit_length()))

    def __call__(self, shape: Hashable, run: Callable[[], Tensor]) -> Tensor:
        """What `run` returns. It holds until the next call."""
        if self.on and shape not in self.captured:
            self.seen[shape] += 1
            if self.seen[shape] > WARM_UPS:
                self._try(shape, run)
        if shape not in self.captured:
            return run()
        graph, result = self.captured[shape]
        graph.replay()
        self.replayed += 1
        return result

    def _try(self, shape: Hashable, run: Callable[[], Tensor]) -> None:
        try:
            self.captured[shape] = self._capture(run)
        except RuntimeError as error:  # a kernel that cannot be captured, or no memory: slower, and as right
            self.on = False
            self.captured.clear()
            why = f"decode steps are not captured ({first_line(error)}); they run one by one"
            warnings.warn(why, RuntimeWarning, stacklevel=2)

    def _capture(self, run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        """The graph, and the tensor that each replay leaves its result in. Nothing is computed yet.

        Not `with torch.cuda.graph(…)`, which after a capture that failed leaves its stream the current one.
        """
        if self.stream is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")  # tools may run in other threads
            try:
                result = run()
            finally:
                self._end(graph)
        return graph, result

    def _end(self, graph: Any) -> None:
        try:
            graph.capture_end()
        except RuntimeError:  # the capture was spoilt; the allocator does not hear of its end in that case
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            raise
