"""Several processes: which they are, what they agree on, and models whose weights are sharded over them (FSDP2).

torchrun starts every process ("rank") with the same program, on its own part of each step's questions. Ranks work
alone while they roll out and score, and meet to update: FSDP gathers a block's weights just before they are used and
reduces the ranks' gradients just after. In a single process nothing here does anything, and no process group exists.

Nothing else imports torch.distributed but lockstep.py, which watches FSDP's collectives, and checkpoint.py, whose
storage is torch's. The rules here, each learnt from a failure:
- Embedding, head and norms belong to the root unit: FSDP refuses tied weights in two units.
- Inputs are not cast: rotary angles would arrive in bfloat16.
- Every unit reshards its weights after each forward pass, the root too. Each forward and backward pass is then the same
  sequence of collectives, which `Lockstep` relies on.
- FSDP averages gradients and gloo refuses another divisor, so a trainer that wants the sum multiplies its loss by
  `size`.
- Small facts (flags, sums, names) travel over gloo even where the weights travel over NCCL: they wait for no kernel.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NoReturn, Sequence, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from mmsr.system.errors import UserError, first_line
from mmsr.system.progress import say

T = TypeVar("T")
AnyModule = TypeVar("AnyModule", bound=nn.Module)


# ---- ranks


class OtherRankFailed(Exception):
    """Another rank failed, and this one stops with it. `status` is the exit status that they share."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Ranks:
    """This process among `size` of them.

    Every method but `main` and `print` is collective: call it on all ranks or on none.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    node_size: int = 1  # ranks on one machine
    timeout: float = 1800  # seconds that a rank waits for another
    store: Any = field(default=None, repr=False, compare=False)  # keys and values that any rank can set or wait for

    @property
    def main(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def print(self, text: str) -> None:
        """Print on the main rank only."""
        if self.main:
            say(text)

    def all_gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, items: list[T]) -> list[T]:
        """The main rank gets all ranks' items in one list, ordered by rank; the others get an empty list."""
        if self.size == 1:
            return items
        parts: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(items, parts)
        return [item for part in parts or () for item in part]

    def sum(self, values: Mapping[Any, float]) -> Mapping[Any, float]:
        """Sums over the ranks, by key. A rank may lack a key."""
        if self.size == 1:
            return values
        total: dict[Any, float] = {}
        for part in self.all_gather(dict(values)):
            for key, value in part.items():
                total[key] = total.get(key, 0) + value
        return total

    def max(self, value: float) -> float:
        """The largest value of any rank."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def raise_together(self, error: Exception | None) -> None:
        """Return only if no rank has an error. Else the first rank with one raises it, the others OtherRankFailed."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        mine = None
        if error is not None:
            mine = (f"{type(error).__name__}: {error}", _exit_status(error))
        for rank, failure in enumerate(self.all_gather(mine)):
            if failure is None:
                continue
            if rank == self.rank:
                raise error
            message, status = failure
            raise OtherRankFailed(f"rank {rank} failed: {message}", status)

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """For work without collectives inside: at its end, ranks tell each other errors (`raise_together`)."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        self.raise_together(failure)

    def main_process_first(self, name: str, work: Callable[[], T]) -> T:
        """work() on the main rank, then work() on the others, which find on disk what the main rank wrote.

        The others wait without a time-out, in steps: a wait inside the store would not hear a Ctrl-C. Each `name` may
        be used once.
        """
        if self.size == 1:
            return work()
        while not (self.main or self.store.check([name])):
            time.sleep(0.2)
        result = work()
        if self.main:
            self.store.set(name, "done")
        return result


SINGLE = Ranks()


def balanced_partition(loads: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of `loads` in `parts` ascending lists whose lengths differ by at most one and whose loads balance.

    Greedy: the heaviest first, each to the part with the smallest load among those that may grow.
    """
    partition: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    length, longer_parts = divmod(len(loads), parts)  # every part has `length` items, `longer_parts` have one more
    heaviest_first = sorted(range(len(loads)), key=lambda i: (-loads[i], i))
    for index in heaviest_first:
        longer = sum(len(part) > length for part in partition)
        limit = length + 1 if longer < longer_parts else length
        may_grow = [i for i in range(parts) if len(partition[i]) < limit]
        lightest = min(may_grow, key=lambda i: totals[i])
        partition[lightest].append(index)
        totals[lightest] += loads[index]
    for part in partition:
        part.sort()
    return partition


# ---- the beginning of a process


@contextmanager
def distributed(device: str, timeout: float = 1800) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun, be the only one.

    `timeout`: seconds that a rank waits for another. With several ranks, an exception in the block ends this process
    at once, and one rank prints what happened; with one rank it is raised. SystemExit is no failure: let all ranks
    raise it together. UserError for a device that does not exist. After the block call `exit_process`.
    """
    ranks = _init_ranks(device, timeout)
    if ranks.size == 1:
        yield ranks
        return
    processes = ranks.all_gather(_identity(os.getpid()))
    try:
        yield ranks
    except SystemExit as stop:
        dist.destroy_process_group()
        exit_process(ranks, stop.code or 0)
    except BaseException as error:
        _report_and_exit(ranks, error, processes)
    dist.destroy_process_group()


def _init_ranks(device: str, timeout: float) -> Ranks:
    """Read torchrun's environment variables and make the process group."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's old name
        # The cache is freed before every update and allocated again for every rollout: without expandable segments
        # that would fragment the memory. torch reads the variable at the first allocation.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    place = _device(device, local_rank if size > 1 else None)
    cuda = place.type == "cuda"
    if cuda:
        torch.cuda.set_device(place)  # graphs are captured on the current device
    if size == 1:
        return Ranks(device=place)

    limit = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    # torchrun's store outlives the processes that it restarts. A prefix per restart keeps these from reading the
    # addresses of the dead ones.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"start {restarts}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=place if cuda else None,
    )
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return Ranks(rank, size, place, node_size, timeout, dist.PrefixStore("mmsr", store))


def _device(name: str, local_rank: int | None) -> torch.device:
    """The device of that name with its number; the best there is for "". `local_rank` None: a single process."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if local_rank is not None and ":" in name:
        raise UserError(f"--device {name}: with several processes each takes its own; leave the number out")
    if local_rank is not None and name != "cpu":
        name = f"{name}:{local_rank}"
    try:
        return torch.empty(1, device=name).device  # with its number
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"--device {name}: not usable here ({reason}); leave it out to take what there is") from None


# ---- the end of a process


def exit_process(ranks: Ranks, status: int = 0) -> None:
    """End this process with `status` if it is one of several ranks. In a single process, return.

    An ordinary exit takes the interpreter apart while gloo's threads still release tensors, and sometimes aborts.
    """
    if ranks.size > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _exit_status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, OtherRankFailed):
        return error.status
    if isinstance(error, UserError):
        return 2
    return 1


def _report_and_exit(ranks: Ranks, error: BaseException, processes: Sequence[tuple]) -> NoReturn:
    """Print the failure unless another rank has printed one, and end this process.

    `processes` are the identities of all ranks. An ordinary exit would wait for tools in their threads, and for
    collectives that cannot finish. A rank that lost another also kills the ranks of its machine: one may hang, and
    torchrun would give it 30 seconds.
    """
    first = not isinstance(error, OtherRankFailed) and _first_to_fail(ranks)
    if first:
        print(failure_message(f"rank {ranks.rank} of {ranks.size}", error), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if not first or _lost_another_rank(error):
        time.sleep(3)  # torchrun names the rank that ends first, and ends the others: let it be the one that failed
    if _lost_another_rank(error):
        own = _identity(os.getpid())
        for process in processes:
            _, pid, started = process
            still_runs_here = started is not None and process == _identity(pid)
            if process != own and still_runs_here:
                os.kill(pid, signal.SIGKILL)
    os._exit(_exit_status(error))


def _identity(pid: int) -> tuple[str, int, str | None]:
    """(machine, process id, start time). The start time tells a process from a later one with the same id.

    It is None for a process that has ended, and on macOS, which has no /proc: there torchrun ends the others.
    """
    machine = socket.gethostname()
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return machine, pid, None
    after_name = stat.rpartition(")")[2].split()
    return machine, pid, after_name[19]


def _first_to_fail(ranks: Ranks) -> bool:
    """Whether no rank has failed before. The lost connections that follow on other ranks need no message."""
    try:
        return ranks.store.add("failures", 1) == 1
    except RuntimeError:  # the main rank held the store, and has ended
        return False


def _lost_another_rank(error: BaseException) -> bool:
    """Whether the error is that of a collective: another rank ended, or did not come in time."""
    if not isinstance(error, RuntimeError):
        return False
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return "c10d" in raised_in


def failure_message(who: str, error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"{os.path.basename(sys.argv[0])}: {error} [{who}]"
    if isinstance(error, KeyboardInterrupt):
        return f"Interrupted [{who}]."
    if _lost_another_rank(error):
        return f"{who} lost another rank, or waited for it too long: {first_line(error)}"
    return f"{who} failed:\n{''.join(traceback.format_exception(error))}"


# ---- sharded models


def shard(model: AnyModule, ranks: Ranks, compute: torch.dtype, across: str = "node") -> AnyModule:
    """Shard the weights of `model` (a VLModel, on the meta device or in memory) over the ranks, in place.

    FSDP units: each decoder block, each vision block, and the root with the rest. Weights keep their dtype, are
    gathered in `compute`, and their gradients are summed in fp32. `across` "all": one shard per rank. "node": one shard
    per rank of a machine, and every machine holds all of them, which spares the slower network between machines.
    """
    if ranks.size == 1:
        return model
    stored = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == stored else compute,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    options: dict[str, Any] = dict(mesh=_mesh(ranks, across), mp_policy=policy, reshard_after_forward=True)
    for block in model.visual.blocks:
        fully_shard(block, **options)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "encode_images")
    return model


@lru_cache
def _mesh(ranks: Ranks, across: str) -> DeviceMesh:
    """One dimension, "shard", over all ranks; or two, "replicate" over the machines and "shard" within each.

    The groups are made here, because those of `init_device_mesh` wait for NCCL's 10 minutes, whatever the time-out.
    """
    nodes = ranks.size // ranks.node_size
    device_type = ranks.device.type
    if across == "all" or nodes == 1 or ranks.node_size == 1:
        return DeviceMesh.from_group(dist.group.WORLD, device_type, mesh_dim_names=("shard",))
    grid = torch.arange(ranks.size).view(nodes, ranks.node_size)  # (machines, ranks of one)
    limit = timedelta(seconds=ranks.timeout)
    replicate_group, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=limit)
    shard_group, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=limit)
    groups = [replicate_group, shard_group]
    return DeviceMesh.from_group(groups, device_type, grid, mesh_dim_names=("replicate", "shard"))


def load_on_ranks(model: AnyModule, weights: Iterable[tuple[str, Tensor]], ranks: Ranks) -> AnyModule:
    """Fill a model that is on the meta device, sharded or whole. The main rank reads the weights, a tensor at a time.

    `weights` gives (name, full tensor); other ranks do not use it. Beside its part no rank holds more than one full
    tensor. An error of the reading ends all ranks.
    """
    model.to_empty(device=ranks.device)
    parameters = dict(model.named_parameters())
    source = iter(weights)
    while True:
        name = None
        tensor = None
        with ranks.sync_errors():
            if ranks.main:
                name, tensor = next(source, (None, None))
        name = ranks.all_gather(name)[0]
        if name is None:
            return model
        target = parameters[name]
        if tensor is None:
            full = torch.empty(target.shape, dtype=target.dtype, device=ranks.device)
        else:
            full = tensor.to(ranks.device, target.dtype).contiguous()
        with torch.no_grad():
            if isinstance(target, DTensor):
                target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
            else:
                dist.broadcast(full, 0)
                target.copy_(full)


def average_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Average the gradients of weights that every rank holds whole, as FSDP does with those that are sharded."""
    if ranks.size == 1:
        return
    whole = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
    if not whole:
        return
    together = torch.cat([gradient.flatten() for gradient in whole])  # one collective, not hundreds
    dist.all_reduce(together)
    together /= ranks.size
    for gradient, mean in zip(whole, together.split([gradient.numel() for gradient in whole])):
        gradient.copy_(mean.view_as(gradient))


def full_state_dict(model: nn.Module, ranks: Ranks, dtype: torch.dtype) -> dict[str, Tensor]:
    """Full weights by name, in `dtype` on the CPU of the main rank; an empty dict on the others. Collective.

    In a single process the model's own state dict.
    """
    if ranks.size == 1:
        return model.state_dict()
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = whole_tensor(parameter)
        if ranks.main:
            weights[name] = tensor.to("cpu", dtype)
    return weights


def whole_tensor(parameter: Tensor) -> Tensor:
    """A parameter's values, gathered where it is sharded. Collective then."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def unsharded(model: AnyModule) -> Iterator[AnyModule]:
    """The model with full weights on every rank: any number of forward passes (no gradient), without other ranks.

    For a sharded model this gives a second model without FSDP's hooks. They cost each decode step some thousands of
    calls, and cannot be captured in a CUDA graph. Its parameters are the tensors that FSDP gathered, so it takes no
    memory of its own. They are freed when the block ends: do not use the model, or graphs of it, after that.
    """
    if not isinstance(model, FSDPModule):
        yield model
        return
    for unit in fsdp_units(model):
        unit.unshard()
    try:
        yield _unsharded_copy(model)
    finally:
        for unit in fsdp_units(model):
            unit.reshard()


def _unsharded_copy(model: AnyModule) -> AnyModule:
    """A model of the original class whose parameters are those of `model`, gathered at this moment."""
    # FSDP has changed the model's class to a subclass of its own and the original one.
    original_class: Any = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        copy = original_class(model.config)
    # Detached, because FSDP's own parameters must still require gradients. Adapters stay behind: `lora.for_sampling`.
    parameters = dict(model.named_parameters())
    gathered = {name: parameters[name].detach() for name, _ in copy.named_parameters()}
    copy.load_state_dict(gathered, assign=True)
    return copy.requires_grad_(False)


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
