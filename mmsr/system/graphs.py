"""Decode steps replayed from CUDA graphs: one launch instead of a thousand, so that the device does not wait.

A graph repeats the kernels of the pass that was captured, on the same addresses and with the same Python numbers. So a
pass that is given to `Graphs`

- reads and writes tensors that stay where they are,
- depends on no Python number but those in its `shape`,
- and never waits for the device.

The plain form is the loop of `sample_turn` in examples/plain_grpo.py, where the host launches every kernel of every
token's pass by itself.

Every shape has its own graph, and its capture takes as long as a pass. So there should be few shapes: what varies from
step to step is rounded up (`bucket`).
"""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import suppress
from typing import Any, Callable, Hashable

import torch
from torch import Tensor

from mmsr.system.errors import first_line

WARM_UPS = 1  # plain passes of a shape before it is captured: they load kernels, which a capture must not do


class Graphs:
    """Runs passes, or replays them. With `on` false it only runs them, as on a CPU."""

    def __init__(self, on: bool):
        self.on = on
        self.seen: Counter[Hashable] = Counter()  # passes of each shape until it was captured
        self.captured: dict[Hashable, tuple[Any, Tensor]] = {}  # of each shape: its graph, and the result it writes to
        self.replayed = 0  # passes of all shapes
        # The memory pool that all graphs of this object share, because only one result is in use at a time. It is not
        # shared with other objects: torch's allocator refuses a pool that had graphs and has none any more.
        self.pool: Any = None
        self.stream: Any = None  # the CUDA stream that captures are made on

    def bucket(self, length: int, most: int, least: int = 8) -> int:
        """`length` rounded up to a power of two, at least `least` and at most `most`, so that there are few shapes.

        `length` itself if nothing is captured.
        """
        if not self.on:
            return length
        power_of_two = 1 << (length - 1).bit_length()
        return min(most, max(least, power_of_two))

    def __call__(self, shape: Hashable, run: Callable[[], Tensor]) -> Tensor:
        """What `run` returns, computed or replayed. It is valid until the next call."""
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
        """Capture a shape. If that fails, warn and never capture again."""
        try:
            self.captured[shape] = self._capture(run)
        except RuntimeError as error:  # a kernel that cannot be captured, or no memory: plain passes give the same
            self.on = False
            self.captured.clear()
            message = f"decode steps are not captured ({first_line(error)}); they run one by one"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _capture(self, run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        """The graph, and the tensor that each replay writes its result to. A capture computes nothing.

        Not by `with torch.cuda.graph(…)`: after a capture that failed, its stream would stay the current one.
        """
        if self.stream is None:
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            # thread_local: what tools do in other threads meanwhile is no error.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                self._end(graph)
        return graph, result

    def _end(self, graph: Any) -> None:
        """End a capture. Raises RuntimeError if it failed."""
        try:
            graph.capture_end()
        except RuntimeError:  # torch does not tell its allocator then that the capture is over
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            raise
