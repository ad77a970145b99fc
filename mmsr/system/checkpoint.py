"""Verified, atomic checkpoints of a training run: save one, and resume from the newest sound one.

    checkpoints/step-000060/shard-00001-model-00001-of-00003.safetensors ...   rank 0's part of every tensor
                            state.json      the training loop's own state (step, sampler cursor, ...)
                            manifest.json   size and SHA-256 of every other file

A checkpoint is sound if every byte is as it was saved. Readers of tensors do not notice a flipped bit, and a crash
leaves half a folder. So a checkpoint is saved in these steps:

1. write all files into the temporary folder `step-000060.tmp`, sync each to the disk, the manifest last;
2. read everything back and compare it with the manifest;
3. rename the folder to `step-000060`, and sync its parent folder;
4. remove older checkpoints.

Resuming hashes every byte before any is used, and takes the previous checkpoint where the newest is not sound.

`torch.distributed.checkpoint` (DCP) splits the tensors over the ranks' files and puts them together again, so another
number of ranks can resume: plain tensors and DTensors, with and without a process group. DCP's usual format keeps an
index in a pickle, and a pickle can run any code. Its safetensors storage, used here, has only JSON and bytes. Nothing
here ever unpickles a file: the worst that a forged checkpoint with a matching manifest can do is give wrong numbers.

`save` and `resume` are collective: all ranks call them, on a file system that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, TypeVar

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from mmsr.system.errors import UserError, first_line
from mmsr.system.parallel import SINGLE, Ranks

if TYPE_CHECKING:
    from mmsr.system.optimizer import MasterWeights

FORMAT = 1
STATE = "state.json"
MANIFEST = "manifest.json"
FILE_BYTES = 2 * 2**30  # of one rank's file; a file is built in memory, in two copies
T = TypeVar("T")


# ---- save and resume


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: MasterWeights,
    state: dict[str, Any],
    keep: int,
    ranks: Ranks = SINGLE,
) -> None:
    """Write `root/step-NNNNNN` with all trained weights, their masters and moments, and the JSON object `state`.

    The newest `keep` (at least 2) sound checkpoints are kept, older ones removed. When the new one cannot be written,
    or does not read back as written, raises UserError on all ranks and leaves the older ones as they are.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: with fewer than 2 there is nothing to fall back on")
    final = root / f"step-{step:06d}"
    temporary = root / f"step-{step:06d}.tmp"
    try:
        _on_main(ranks, lambda: _make_temporary(root, temporary))
        _write(temporary, _tensors(model, optimizer), state, ranks)
        problem = _problem(temporary, ranks)
        if problem is not None:
            raise OSError(f"{problem} when read back")
        _on_main(ranks, lambda: _publish(temporary, final))
        _remove_older(final, keep, ranks)
    except OSError as error:
        if ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full: free what was written
        complaint = f"checkpoint {final} could not be saved ({_reason(error)})"
        raise UserError(f"{complaint}: older ones are intact; mend that, then go on with --resume") from error


def resume(root: Path, model: nn.Module, optimizer: MasterWeights, ranks: Ranks = SINGLE) -> dict[str, Any] | None:
    """Load the newest sound checkpoint under `root` into `model` and `optimizer`, in place; returns its state.

    None if there is no checkpoint. A checkpoint that is not sound is named on standard error and left out. Raises
    UserError when there are checkpoints, all of them damaged, or when it is of another model, precision or optimizer.
    """
    found = _on_main(ranks, lambda: _checkpoints(root))
    for folder in found:
        problem = _problem(folder, ranks)
        if problem is not None:
            if ranks.main:
                print(f"warning: checkpoint {folder} is not used: {problem}", file=sys.stderr)
            continue
        try:
            _load(folder, model, optimizer, ranks)
            return json.loads((folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"checkpoint {folder} was not written by this program ({_reason(error)})") from error
    if found:
        raise UserError(f"{root}: none of its {len(found)} checkpoints is sound: start afresh with another --out")
    return None


# ---- the tensors of a folder


def _tensors(model: nn.Module, optimizer: MasterWeights) -> dict[str, Tensor]:
    """The model's trained weights and all that its optimizer keeps. The tensors themselves: `_load` writes into them.

    Frozen weights are those of the folder that the model was opened from.
    """
    weights = {f"weight.{name}": weight for name, weight in model.named_parameters() if weight.requires_grad}
    tensors = weights | optimizer.tensors()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _write(temporary: Path, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks) -> None:
    """Fill the temporary folder. When this returns, all of it is on the disk."""
    writer = HuggingFaceStorageWriter(str(temporary), _file_numbers(tensors), save_distributed=True)
    with _plain_errors():
        dcp.save(tensors, storage_writer=writer, no_dist=ranks.size == 1)
    text = json.dumps(state, indent=2) + "\n"
    _on_main(ranks, lambda: (temporary / STATE).write_text(text, encoding="utf-8"))

    names = _on_main(ranks, lambda: sorted(file.name for file in temporary.iterdir()))

    def sync_my_part() -> dict[str, dict[str, Any]]:
        return {name: _synced(temporary / name) for name in names[ranks.rank :: ranks.size]}

    files: dict[str, dict[str, Any]] = {}
    for entries in _together(ranks, sync_my_part):
        files |= entries
    _on_main(ranks, lambda: _write_manifest(temporary, files))


def _write_manifest(temporary: Path, files: dict[str, dict[str, Any]]) -> None:
    (temporary / MANIFEST).write_text(_manifest_text(_step_of(temporary), files), encoding="utf-8")
    _synced(temporary / MANIFEST)
    _sync_folder(temporary)


def _load(folder: Path, model: nn.Module, optimizer: MasterWeights, ranks: Ranks) -> None:
    """Read a sound checkpoint into the tensors of `model` and `optimizer`, one tensor of a file at a time."""
    reader = HuggingFaceStorageReader(str(folder))
    with _plain_errors():
        stored = reader.read_metadata().state_dict_metadata
    optimizer.make_state()
    for name, state in optimizer.states():
        if not any(f"optimizer.{key}.{name}" in stored for key in state):
            state.clear()  # the parameter had no gradient before the save
    tensors = _tensors(model, optimizer)
    for name in sorted(tensors.keys() | stored.keys()):
        here = (tuple(tensors[name].shape), tensors[name].dtype) if name in tensors else "nothing"
        kept: Any = stored.get(name)
        there = (tuple(kept.size), kept.properties.dtype) if name in stored else "nothing"
        if here != there:
            raise UserError(f"{folder}: {name} is {there} there and {here} in this run: resume with equal options")
    with _plain_errors():
        dcp.load(tensors, storage_reader=reader, no_dist=ranks.size == 1)


def _file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which file, counted from 1, holds (a rank's part of) each tensor: about FILE_BYTES a file."""
    numbers = {}
    number = 1
    size = 0
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if size and size + local.nbytes > FILE_BYTES:
            number += 1
            size = 0
        numbers[name] = number
        size += local.nbytes
    return numbers


@contextmanager
def _plain_errors() -> Iterator[None]:
    """DCP wraps errors in a BaseException with all ranks' tracebacks. Unwrap it; a failing file system is OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except SafetensorError as error:
            raise OSError(_reason(error)) from error
        except CheckpointException as failure:
            rank, (error, _) = min(failure.failures.items(), key=lambda item: item[0])
            if isinstance(error, (OSError, SafetensorError)):
                raise OSError(f"rank {rank}: {_reason(error)}") from error
            raise RuntimeError(f"rank {rank}: {error}") from error


# ---- files


def _make_temporary(root: Path, temporary: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    _sync_folder(root.parent)
    for stale in root.glob("step-*.tmp"):  # of a save or a removal that was interrupted
        _remove(stale)
    temporary.mkdir()


def _publish(temporary: Path, final: Path) -> None:
    """Rename, so that the checkpoint is there as a whole or not at all."""
    for other in _checkpoints(final.parent):
        if _step_of(other) >= _step_of(final):  # saved before the run went back to an older one
            _discard(other)
    temporary.rename(final)
    _sync_folder(final.parent)


def _remove_older(newest: Path, keep: int, ranks: Ranks) -> None:
    """Remove what is older than the last `keep` sound checkpoints; `newest` is known to be sound."""
    sound = 1
    for folder in _on_main(ranks, lambda: _checkpoints(newest.parent)[1:]):
        if sound == keep:
            _on_main(ranks, partial(_discard, folder))
        elif _problem(folder, ranks) is None:
            sound += 1


def _discard(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: what an interrupted removal leaves has a temporary folder's name."""
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    folder.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link. A link may lead to another disk: what it leads to is not ours."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _checkpoints(root: Path) -> list[Path]:
    """All that is named like a checkpoint, the newest first."""
    entries = root.iterdir() if root.is_dir() else ()
    found = [path for path in entries if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removesuffix(".tmp").removeprefix("step-"))


def _synced(file: Path) -> dict[str, Any]:
    """Sync a file to the disk, drop it from the page cache, and return its size and SHA-256.

    Reading it again then reads the disk. DCP syncs its files too, but before the last bytes have left Python's buffer.
    """
    entry = _entry(file)
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return entry


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- verification


def _problem(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint; None if it is sound. Each rank hashes a part of the files."""
    for problem in _together(ranks, lambda: _local_problem(folder, ranks)):
        if problem is not None:
            return problem
    return None


def _local_problem(folder: Path, ranks: Ranks) -> str | None:
    try:
        files = _manifest(folder)
        for name in sorted(files)[ranks.rank :: ranks.size]:
            if _entry(folder / name) != files[name]:
                return f"{name} is not as it was saved"
    except (OSError, ValueError) as error:
        return _reason(error)
    return None


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{"size", "sha256"} by file name. ValueError if the manifest is damaged or does not list the folder's files."""
    text = (folder / MANIFEST).read_bytes()
    try:
        files = json.loads(text)["files"]
        expected = {*files.keys(), MANIFEST}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if text != _manifest_text(_step_of(folder), files).encode() or STATE not in files:
        raise ValueError(f"{MANIFEST} is damaged, or of another version of this program")
    for name in files:
        if name != STATE and not name.endswith(".safetensors"):
            raise ValueError(f"{name} is no file of a checkpoint")
    present = {file.name for file in folder.iterdir()}
    if expected != present:
        name = sorted(expected ^ present)[0]
        raise ValueError(f"{name} is {'missing' if name in expected else 'none of its files'}")
    return files


def _manifest_text(step: int, files: dict[str, dict[str, Any]]) -> str:
    return json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2) + "\n"


def _entry(file: Path) -> dict[str, Any]:
    """A file's size and SHA-256: its entry in the manifest."""
    digest = hashlib.sha256()
    size = 0
    with open(file, "rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
            size += len(piece)
    return {"size": size, "sha256": digest.hexdigest()}


def _reason(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return first_line(error)


# ---- ranks


def _together(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """work() on every rank; returns all ranks' results, by rank. An OSError on any of them is raised on all."""
    result: Any = None
    failure = None
    try:
        result = work()
    except OSError as error:
        failure = _reason(error)
    gathered = ranks.all_gather((result, failure))
    for _, failure in gathered:
        if failure is not None:
            raise OSError(failure)
    return [result for result, _ in gathered]


def _on_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """work() on the main rank alone; returns its result on every rank."""
    return _together(ranks, lambda: work() if ranks.main else None)[0]
