"""When one rank runs out of memory in the middle of a pass, all ranks come through it and try smaller pieces."""

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
_gather_shards = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_shards = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class RankOutOfMemory(Exception):
    """Some rank ran out of memory, and all know. `indivisible`: in something that cannot be cut into smaller pieces."""

    def __init__(self, rank: int, what: str, indivisible: bool):
        super().__init__(f"rank {rank} ran out of memory in its {what}")
        self.indivisible = indivisible


@dataclass(frozen=True)
class _Collective:
    """One collective that FSDP issued: elements in and out, where, and how a reduction adds up (None: a gathering)."""

    size_in: int
    size_out: int
    dtype: torch.dtype
    group: Any
    op: Any

    def issue_on_zeros(self, device: torch.device, replicas: Any) -> None:
        """The same collective on values that nobody will use."""
        source = torch.zeros(self.size_in, dtype=self.dtype, device=device)
        target = torch.zeros(self.size_out, dtype=self.dtype, device=device)
        _issue(target, source, self.group, self.op)
        if self.op is not None and replicas is not None:
            dist.all_reduce(target, self.op, replicas)  # FSDP's next step, with nothing in between that could fail


def _issue(target: Tensor, source: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
    if op is None:
        return _gather_shards(target, source, group=group, async_op=async_op)
    return _reduce_shards(target, source, op, group=group, async_op=async_op)


class _RecordingComm:
    """Issues FSDP's collectives for it, and writes them down."""

    def __init__(self, calls: list[_Collective]):
        self.calls = calls

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False, op: Any = None):
        work = _issue(output_tensor, input_tensor, group, op, async_op)
        self.calls.append(_Collective(input_tensor.numel(), output_tensor.numel(), input_tensor.dtype, group, op))
        return work


class Lockstep:
    """Lets one rank run out of memory in the middle of a pass without leaving the others waiting for ever.

    A pass is a fixed row of collectives. The rank that fails after some of them issues the rest on dummy values, so
    that the others come through; then all know, throw the pass away, and may try smaller pieces. A row is learnt from
    the pass's first success: run an empty one.
    """

    def __init__(self, ranks: Ranks, models: Sequence[nn.Module]):
        self.ranks, self.models = ranks, [model for model in models if isinstance(model, FSDPModule)]
        self.calls: list[_Collective] = []
        self.recorded: dict[str, list[_Collective]] = {}
        recorder = _RecordingComm(self.calls)
        for unit in (unit for model in self.models for unit in fsdp_units(model)):
            unit.set_custom_all_gather(recorder)
            unit.set_custom_reduce_scatter(recorder)

    @contextmanager
    def guard(self, name: str, indivisible: bool = True) -> Iterator[None]:
        """One pass. Raises RankOutOfMemory on all ranks when one of them ran out of memory in it."""
        self.calls.clear()
        failure = 0
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.models and not (name in self.recorded and hasattr(self.models[0], "reset_iter_state")):
                raise  # too early, or torch before 2.13: the others cannot be helped, this rank's end is theirs
            failure = 2 if indivisible else 1
            traceback.clear_frames(error.__traceback__)  # their variables hold the activations
        if failure:
            self._finish(name)
        else:
            self.recorded.setdefault(name, list(self.calls))
        if self.ranks.max(failure):
            self.reset()
            failures = self.ranks.all_gather(failure)
            raise RankOutOfMemory(failures.index(max(failures)), name, max(failures) == 2) from None

    def _finish(self, name: str) -> None:
        rest = self.recorded[name][len(self.calls) :] if self.models else []
        self.reset()
        for call in rest:
            call.issue_on_zeros(self.ranks.device, self._replicas)

    @property
    def _replicas(self) -> Any:
        mesh = next(self.models[0].parameters()).device_mesh
        return mesh.get_group("replicate") if mesh.ndim == 2 else None

    def reset(self) -> None:
        """Throw away gradients, whole weights and cached memory."""
        for model in self.models:
            model.zero_grad(set_to_none=True)  # of whole weights: nothing else would ever clear those
            model.reset_iter_state()  # back to shards, whatever FSDP was in the middle of
            model.zero_grad(set_to_none=True)  # of shards
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
