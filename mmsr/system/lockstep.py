"""When one rank runs out of memory in a pass over sharded weights, all ranks give the pass up together.

A pass over a sharded model consists of computations and collectives: all ranks gather a block's weights before they
compute it, and reduce its gradients after. A collective waits until every rank has issued it. So a rank that fails
between two collectives, and issues no more of them, leaves the other ranks waiting for ever.

What helps is that every pass of one kind issues the same collectives in the same order. A rank that fails issues the
rest of them on zeros. Two ranks, a pass of three collectives, and rank 1 fails after the first:

                  rank 0                     rank 1
    gather A      issued                     issued
    compute A     done                       out of memory
    gather B      issued                     issued on zeros
    compute B     done, on wrong weights     -
    reduce B      issued                     issued on zeros
    end           ranks compare: rank 1 failed. Both throw the pass away and raise RankOutOfMemory

The trainer may then try the same with smaller micro-batches. Which collectives a pass consists of is recorded from the
first pass of its kind that succeeds, so it begins with an empty one.
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmsr.system.parallel import Ranks, fsdp_units

# Their names since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# What a rank tells the others at the end of a pass: the largest of all ranks' values counts.
SUCCESS = 0
OUT_OF_MEMORY = 1
OUT_OF_MEMORY_INDIVISIBLE = 2


class RankOutOfMemory(Exception):
    """Some rank ran out of memory; raised on all ranks. `indivisible`: there are no smaller pieces to try."""

    def __init__(self, rank: int, what: str, indivisible: bool):
        super().__init__(f"rank {rank} ran out of memory in its {what}")
        self.indivisible = indivisible


@dataclass(frozen=True)
class _Collective:
    """An all-gather or reduce-scatter that FSDP issued."""

    input_size: int  # elements
    output_size: int
    dtype: torch.dtype
    group: Any  # of ranks
    op: Any  # how a reduce-scatter reduces; None for an all-gather

    def issue_on_zeros(self, device: torch.device, replicas: Any) -> None:
        """Take part in the same collective. Its result is not used."""
        source = torch.zeros(self.input_size, dtype=self.dtype, device=device)
        target = torch.zeros(self.output_size, dtype=self.dtype, device=device)
        _issue(target, source, self.group, self.op)
        if self.op is not None and replicas is not None:
            # With copies of the shards on other machines FSDP all-reduces next. It is not recorded by itself because
            # nothing in between can fail.
            dist.all_reduce(target, self.op, replicas)


def _issue(target: Tensor, source: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
    if op is None:
        return _all_gather(target, source, group=group, async_op=async_op)
    return _reduce_scatter(target, source, op, group=group, async_op=async_op)


class _RecordingComm:
    """Issues FSDP's collectives, and appends each to `calls`. The interface is that of FSDP's custom communications."""

    def __init__(self, calls: list[_Collective]):
        self.calls = calls

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False, op: Any = None):
        work = _issue(output_tensor, input_tensor, group, op, async_op)
        call = _Collective(input_tensor.numel(), output_tensor.numel(), input_tensor.dtype, group, op)
        self.calls.append(call)
        return work


class Lockstep:
    """Guards passes over `models` against running out of memory on one rank only.

    Models that are None or not sharded issue no collectives, and need none in their place.
    """

    def __init__(self, ranks: Ranks, models: Sequence[nn.Module | None]):
        self.ranks = ranks
        self.models = [model for model in models if isinstance(model, FSDPModule)]
        self.calls: list[_Collective] = []  # in the present pass, so far
        self.recorded: dict[str, list[_Collective]] = {}  # those of a whole pass, by its name
        recorder = _RecordingComm(self.calls)
        for model in self.models:
            for unit in fsdp_units(model):
                unit.set_custom_all_gather(recorder)
                unit.set_custom_reduce_scatter(recorder)

    @contextmanager
    def guard(self, name: str, indivisible: bool = True) -> Iterator[None]:
        """For one pass of the kind `name`. Raises RankOutOfMemory on all ranks if one of them runs out of memory.

        `indivisible`: on this rank the pass cannot be cut into smaller pieces.
        """
        self.calls.clear()
        outcome = SUCCESS
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.models and not self._can_finish(name):
                raise  # this process ends, and the others with it
            outcome = OUT_OF_MEMORY_INDIVISIBLE if indivisible else OUT_OF_MEMORY
            traceback.clear_frames(error.__traceback__)  # their variables hold the activations
        if outcome == SUCCESS:
            self.recorded.setdefault(name, list(self.calls))
        else:
            self._finish(name)
        if self.ranks.max(outcome) == SUCCESS:
            return
        self.reset()
        outcomes = self.ranks.all_gather(outcome)
        worst = max(outcomes)
        raise RankOutOfMemory(outcomes.index(worst), name, worst == OUT_OF_MEMORY_INDIVISIBLE) from None

    def _can_finish(self, name: str) -> bool:
        """Whether a pass of this kind has been recorded, by a torch (2.13 or later) that can reset FSDP's state."""
        return name in self.recorded and hasattr(self.models[0], "reset_iter_state")

    def _finish(self, name: str) -> None:
        """Issue the collectives of the pass that this rank has not issued."""
        rest: list[_Collective] = []
        if self.models:
            rest = self.recorded[name][len(self.calls) :]
        self.reset()  # first: it makes room for the zeros
        for call in rest:
            call.issue_on_zeros(self.ranks.device, self._replicas)

    @property
    def _replicas(self) -> Any:
        """The group of ranks that hold copies of this rank's shards; None if there are no copies."""
        mesh = next(self.models[0].parameters()).device_mesh
        return mesh.get_group("replicate") if mesh.ndim == 2 else None

    def reset(self) -> None:
        """Free gradients, gathered weights and cached memory."""
        for model in self.models:
            model.zero_grad(set_to_none=True)  # of gathered weights: nothing later would clear those
            model.reset_iter_state()  # back to shards, at whatever point of the pass FSDP is
            model.zero_grad(set_to_none=True)  # of shards
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
