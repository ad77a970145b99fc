"""Several processes: who they are, what they agree on, and models whose weights lie in shards (FSDP2).

Started by torchrun, every process ("rank") runs the same program on its own share of each step's questions. Ranks work
alone while they roll out and score, and meet to update: FSDP gathers a block's weights just before they are used and
adds up the ranks' gradients just after. In a single process nothing here does anything, and no process group exists.

Nothing else imports torch.distributed but checkpoint.py, whose storage is torch's. What this keeps to, each learnt from
a failure:
- Embedding, head and norms lie in the root unit: tied weights in two units are refused.
- Inputs are not cast: rotary angles would arrive in bfloat16.
- Every unit gives its weights back after each forward pass, the root too. Each forward and backward pass is then the
  same row of collectives, which `Lockstep` relies on.
- FSDP averages gradients and gloo refuses another divisor, so whoever wants the sum multiplies the loss by `size`.
- Small facts (flags, sums, names) travel over gloo also where the weights travel over NCCL: they wait for no kernel.
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
from torch.distributed.tensor import distribute_tensor

from mmsr.system.errors import UserError, first_line

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
    store: Any = field(default=None, repr=False, compare=False)  # what ranks can leave each other without meeting

    @property
    def main(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def print(self, text: str) -> None:
        """Print on the main rank what all ranks would say."""
        if self.main:
            print(text)

    def all_gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, items: list[T]) -> list[T]:
        """All ranks' items one after another on the main rank, nothing on the others."""
        if self.size == 1:
            return items
        parts: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(items, parts)
        return [item for part in parts or () for item in part]

    def sum(self, values: Mapping[Any, float]) -> Mapping[Any, float]:
        """Values added up by key. A rank may lack a key."""
        if self.size == 1:
            return values
        total: dict[Any, float] = {}
        for part in self.all_gather(dict(values)):
            for key, value in part.items():
                total[key] = total.get(key, 0) + value
        return total

    def max(self, value: float) -> float:
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def raise_together(self, error: Exception | None) -> None:
        """Continue only if no rank has an error: else the first of them raises its own, the others `OtherRankFailed`."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        mine = None if error is None else (f"{type(error).__name__}: {error}", _exit_status(error))
        for rank, failure in enumerate(self.all_gather(mine)):
            if failure is not None and rank == self.rank:
                raise error
            if failure is not None:
                raise OtherRankFailed(f"rank {rank} failed: {failure[0]}", failure[1])

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """For work without collectives inside: when all ranks have done with it, they agree on whether it succeeded."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        self.raise_together(failure)

    def main_process_first(self, name: str, work: Callable[[], T]) -> T:
        """work() on the main rank, and on the others when it is done there: what it made lies on disk by then.

        They wait for as long as it takes, whatever the time-out. `name` may be used once.
        """
        if self.size == 1:
            return work()
        if not self.main:
            self.store.wait([name], timedelta(days=30))
        result = work()
        if self.main:
            self.store.set(name, "done")
        return result


SINGLE = Ranks()


@contextmanager
def distributed(device: str = "", timeout: float = 1800) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be the only one. `timeout`: seconds that a rank waits for another.

    A failure in the block ends this process at once, after one rank has said what happened; of a single process it is
    raised. SystemExit is no failure: let all ranks leave by it together. UserError for a device that is not there.
    A program whose block has ended calls `exit_process`.
    """
    ranks = _init_ranks(device, timeout)
    if ranks.size == 1:
        yield ranks
        return
    peers = ranks.all_gather(_identity(os.getpid()))
    try:
        yield ranks
    except SystemExit as stop:
        dist.destroy_process_group()
        exit_process(ranks, stop.code or 0)
    except BaseException as error:
        _report_and_exit(ranks, error, peers)
    dist.destroy_process_group()


def exit_process(ranks: Ranks, status: int = 0) -> None:
    """End a process with this exit status if it is one of several ranks; a single one goes on and ends as ever.

    An ordinary exit takes the interpreter apart while gloo's threads still let go of tensors, and now and then aborts.
    """
    if ranks.size > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def _init_ranks(device: str, timeout: float) -> Ranks:
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its old name; read at the first allocation
        # The cache, freed before every update and made anew for every rollout, would split the memory into pieces.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    place = _device(device, local if size > 1 else None)
    cuda = place.type == "cuda"
    if cuda:
        torch.cuda.set_device(place)  # graphs are captured on the current device
    if size == 1:
        return Ranks(device=place)
    limit = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    # torchrun's store outlives the processes that it restarts: keep these from the addresses that the dead ones left.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=place if cuda else None
    )
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return Ranks(rank, size, place, node_size, timeout, dist.PrefixStore("mmsr", store))


def _device(name: str, local_rank: int | None = None) -> torch.device:
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


def _exit_status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.status if isinstance(error, OtherRankFailed) else 2 if isinstance(error, UserError) else 1


def _report_and_exit(ranks: Ranks, error: BaseException, peers: Sequence[tuple]) -> NoReturn:
    """Say what happened unless another rank has, and end this process.

    Not by an ordinary exit: that would wait for tools in their threads, and for collectives that cannot finish. Who has
    waited for another rank in vain ends the others of its machine too: torchrun would give one that hangs 30 seconds.
    """
    first = not isinstance(error, OtherRankFailed) and _first_to_fail(ranks)
    if first:
        print(failure_message(f"rank {ranks.rank} of {ranks.size}", error), file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    if not first or _lost_another_rank(error):
        time.sleep(3)  # torchrun ends all when it sees one end, and names that one: let it be the one that failed
    if _lost_another_rank(error):
        for peer in peers:
            if peer != _identity(os.getpid()) and peer == _identity(peer[1]):
                os.kill(peer[1], signal.SIGKILL)
    os._exit(_exit_status(error))


def _identity(pid: int) -> tuple[str, int, str | None]:
    """(machine, process, when it began): numbers of processes are used again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # gone, or no Linux
        return socket.gethostname(), pid, None
    return socket.gethostname(), pid, stat.rpartition(")")[2].split()[19]


def _first_to_fail(ranks: Ranks) -> bool:
    """What follows on other ranks (lost connections) is no news."""
    try:
        return ranks.store.add("failures", 1) == 1
    except RuntimeError:  # the store was the main rank's, and went with it
        return False


def _lost_another_rank(error: BaseException) -> bool:
    """Whether a collective failed, for want of another rank."""
    return isinstance(error, RuntimeError) and "c10d" in traceback.extract_tb(error.__traceback__)[-1].filename


def failure_message(who: str, error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"{os.path.basename(sys.argv[0])}: {error} [{who}]"
    if isinstance(error, KeyboardInterrupt):
        return f"Interrupted [{who}]."
    if _lost_another_rank(error):
        return f"{who} lost another rank, or waited for it too long: {first_line(error)}"
    return f"{who} failed:\n{''.join(traceback.format_exception(error))}"


def balanced_partition(loads: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of `loads` in `parts` ascending lists whose lengths differ by at most one and whose loads balance.

    Heaviest first, each to the part that has least and still has room.
    """
    hands: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    least, more = divmod(len(loads), parts)
    for index in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        full = sum(len(hand) > least for hand in hands)  # of these there may be `more`
        open_parts = [p for p in range(parts) if len(hands[p]) < least + (full < more)]
        part = min(open_parts, key=lambda p: (totals[p], p))
        hands[part].append(index)
        totals[part] += loads[index]
    return [sorted(hand) for hand in hands]


# ---- sharded models


def shard(model: AnyModule, ranks: Ranks, compute: torch.dtype, across: str = "node") -> AnyModule:
    """Spread the weights of `model` (a Qwen2_5_VL, on the meta device or in memory) over the ranks, in place.

    Units: each decoder block, each vision block, and the root with all the rest. Weights are kept in the dtype they
    have, used in `compute`, and their gradients added up in fp32. `across` "all": one shard per rank. "node": one per
    rank of a machine, the machines holding copies, which spares the slower network between them.
    """
    if ranks.size == 1:
        return model
    stored = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == stored else compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    options: dict[str, Any] = dict(mesh=_mesh(ranks, across), mp_policy=policy, reshard_after_forward=True)
    for block in (*model.visual.blocks, *model.model.layers):
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "encode_images")
    return model


@lru_cache
def _mesh(ranks: Ranks, across: str) -> DeviceMesh:
    """Of one dimension, "shard", over all ranks, or of two, "replicate" over the machines and "shard" within each.

    Its groups are made here, because those that `init_device_mesh` makes wait NCCL's 10 minutes, whatever the time-out.
    """
    nodes, place = ranks.size // ranks.node_size, ranks.device.type
    if across == "all" or nodes == 1 or ranks.node_size == 1:
        return DeviceMesh.from_group(dist.group.WORLD, place, mesh_dim_names=("shard",))
    grid, limit = torch.arange(ranks.size).view(nodes, ranks.node_size), timedelta(seconds=ranks.timeout)
    groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout=limit)[0] for rows in (grid.T, grid)]
    return DeviceMesh.from_group(groups, place, grid, mesh_dim_names=("replicate", "shard"))


def load_sharded(model: AnyModule, weights: Iterable[tuple[str, Tensor]], ranks: Ranks) -> AnyModule:
    """Give a sharded model on the meta device its weights, read on the main rank alone, one tensor at a time.

    `weights` (name, whole tensor) is not looked at on the other ranks. Beside its shards no rank holds more than one
    whole tensor. An error of the reading is raised on all ranks.
    """
    model.to_empty(device=ranks.device)
    parameters, source = dict(model.named_parameters()), iter(weights)
    while True:
        name, tensor, failure = None, None, None
        if ranks.main:
            try:
                name, tensor = next(source, (None, None))
            except UserError as error:
                failure = error
        ranks.raise_together(failure)
        name = ranks.all_gather(name)[0]
        if name is None:
            return model
        target = parameters[name]
        if tensor is None:
            whole = torch.empty(target.shape, dtype=target.dtype, device=ranks.device)
        else:
            whole = tensor.to(ranks.device, target.dtype).contiguous()
        with torch.no_grad():
            target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))


def full_state_dict(model: nn.Module, ranks: Ranks, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole weights by name, in `dtype` on the CPU of the main rank; nothing on the others. Collective.

    In a single process the model's own state dict.
    """
    if ranks.size == 1:
        return model.state_dict()
    whole = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().full_tensor()
        if ranks.main:
            whole[name] = tensor.to("cpu", dtype)
    return whole


@contextmanager
def unsharded(model: AnyModule) -> Iterator[AnyModule]:
    """`model` with all of its weights whole, to run any number of forward passes (no gradient) without other ranks.

    Of a sharded model that is a second one, without FSDP's hooks: they cost each decode step some thousands of calls,
    and cannot be captured in a CUDA graph. Its parameters are the very tensors that FSDP gathered, so it takes no
    memory of its own. They are emptied when the block ends: nothing may use the model, or graphs of it, after that.
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
    """A model of the same class whose parameters are those of `model`, gathered at this moment."""
    # FSDP has made a class of its own and put it first.
    kind: Any = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        twin = kind(model.config)
    whole = {name: p.detach() for name, p in model.named_parameters()}  # FSDP's own must keep asking for gradients
    twin.load_state_dict(whole, assign=True)
    return twin.requires_grad_(False)


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
