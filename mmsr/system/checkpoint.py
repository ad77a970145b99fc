"""Verified, atomic checkpoints of a training run: save one, and resume from the newest that is sound.

    checkpoints/step-000060/shard-00001-model-00001-of-00003.safetensors ...   what rank 0 holds of every tensor
                            state.json      what the training loop wants back (step, sampler cursor, ...)
                            manifest.json   size and SHA-256 of every other file

A single flipped bit goes unnoticed by every reader of tensors, and a crash leaves half a folder. So a checkpoint is
written as `step-000060.tmp`, each file synced, the manifest last; it is read back, renamed and the parent synced, and
only then are older ones removed. Resuming hashes every byte before it reads one, and takes the previous checkpoint
where the newest is not sound.

`torch.distributed.checkpoint` cuts and joins the tensors, so that another number of ranks resumes too: plain tensors
and DTensors, with and without a process group. Its usual format keeps an index in a pickle, which runs whatever code
stands in it; its safetensors storage, used here, has JSON and bytes only. Nothing here ever unpickles a file: a forged
checkpoint with a fitting manifest gives wrong numbers at worst.

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
STATE, MANIFEST = "state.json", "manifest.json"
FILE_BYTES = 2 * 2**30  # of one rank's file; a file is put together in memory, twice over
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
    """Write `root/step-NNNNNN` with all weights, masters and moments and the JSON object `state`.

    The newest `keep` (at least 2) sound checkpoints stay, older ones are removed. Raises UserError on all ranks, and
    leaves older checkpoints as they are, when the new one cannot be written or does not read back as written.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: with fewer than 2 there is nothing to fall back on")
    final, side = root / f"step-{step:06d}", root / f"step-{step:06d}.tmp"
    try:
        _on_main(ranks, lambda: _clear_side(root, side))
        _write(side, _tensors(model, optimizer), state, ranks)
        if problem := _problem(side, ranks):
            raise OSError(f"{problem} when read back")
        _on_main(ranks, lambda: _publish(side, final))
        _purge(final, keep, ranks)
    except OSError as error:
        if ranks.main:
            shutil.rmtree(side, ignore_errors=True)  # what was written takes room that others may be short of
        complaint = f"checkpoint {final} could not be saved ({_reason(error)})"
        raise UserError(f"{complaint}: older ones are intact; mend that, then go on with --resume") from error


def resume(root: Path, model: nn.Module, optimizer: MasterWeights, ranks: Ranks = SINGLE) -> dict[str, Any] | None:
    """Load the newest sound checkpoint under `root` into `model` and `optimizer`, in place; returns its state.

    None where there is no checkpoint. One that is not sound is named on standard error and passed over. Raises
    UserError when none of those there are is sound, or when it is of another model, precision or optimizer.
    """
    found = _on_main(ranks, lambda: _checkpoints(root))
    for folder in found:
        problem = _problem(folder, ranks)
        if problem is None:
            try:
                _load(folder, model, optimizer, ranks)
                return json.loads((folder / STATE).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"checkpoint {folder} is not of this program's making ({_reason(error)})") from error
        if ranks.main:
            print(f"warning: checkpoint {folder} is not used: {problem}", file=sys.stderr)
    if found:
        raise UserError(f"{root}: none of its {len(found)} checkpoints is sound: start afresh with another --out")
    return None


# ---- tensors by name


def _tensors(model: nn.Module, optimizer: MasterWeights) -> dict[str, Tensor]:
    """What makes a run: the model's weights, and all that its optimizer keeps.

    The tensors themselves, so that loading into them is loading the run.
    """
    tensors = {f"weight.{name}": tensor for name, tensor in model.state_dict().items()}
    return {name: tensor.detach() for name, tensor in (tensors | optimizer.tensors()).items()}


# ---- the tensors of a folder


def _write(side: Path, tensors: dict[str, Tensor], state: dict[str, Any], ranks: Ranks) -> None:
    """Fill the side folder; when this returns, all of it is on the disk."""
    writer = HuggingFaceStorageWriter(str(side), _file_numbers(tensors), save_distributed=True)
    with _plain_errors():
        dcp.save(tensors, storage_writer=writer, no_dist=ranks.size == 1)
    _on_main(ranks, lambda: (side / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8"))
    names = _on_main(ranks, lambda: sorted(file.name for file in side.iterdir()))
    parts = _together(ranks, lambda: {name: _synced(side / name) for name in names[ranks.rank :: ranks.size]})
    files = {name: entry for part in parts for name, entry in part.items()}
    _on_main(ranks, lambda: (side / MANIFEST).write_text(_manifest_text(_step_of(side), files), encoding="utf-8"))
    _on_main(ranks, lambda: (_synced(side / MANIFEST), _sync_folder(side)))


def _load(folder: Path, model: nn.Module, optimizer: MasterWeights, ranks: Ranks) -> None:
    """Read a sound checkpoint into the tensors of `model` and `optimizer`, one tensor of a file at a time."""
    reader = HuggingFaceStorageReader(str(folder))
    with _plain_errors():
        stored = reader.read_metadata().state_dict_metadata
    optimizer.make_state()
    for name, state in optimizer.states():
        if not any(f"optimizer.{key}.{name}" in stored for key in state):
            state.clear()  # had no gradient before the save
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
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if size and size + local.nbytes > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name] = number
        size += local.nbytes
    return numbers


@contextmanager
def _plain_errors() -> Iterator[None]:
    """DCP hands errors over as a BaseException with all ranks' tracebacks: a failing file system becomes OSError."""
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


def _clear_side(root: Path, side: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    _sync_folder(root.parent)
    for stale in root.glob("step-*.tmp"):  # of a save or a removal that was cut short
        _remove(stale)
    side.mkdir()


def _publish(side: Path, final: Path) -> None:
    for later in _checkpoints(final.parent):
        if _step_of(later) >= _step_of(final):  # resume went back behind it: what it holds has not happened
            _discard(later)
    side.rename(final)
    _sync_folder(final.parent)


def _purge(newest: Path, keep: int, ranks: Ranks) -> None:
    """Remove what is older than the `keep` last sound checkpoints, of which `newest` is known to be one."""
    sound = 1
    for folder in _on_main(ranks, lambda: _checkpoints(newest.parent)[1:]):
        if sound == keep:
            _on_main(ranks, partial(_discard, folder))
        elif _problem(folder, ranks) is None:
            sound += 1


def _discard(folder: Path) -> None:
    """Remove a checkpoint so that it is there whole or not at all: cut short, the rest is of a side folder's name."""
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    folder.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Of a link, which may lead to another disk, the link alone: what it leads to is not ours."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _checkpoints(root: Path) -> list[Path]:
    """Whatever is named like a checkpoint, the newest first."""
    entries = root.iterdir() if root.is_dir() else ()
    return sorted((p for p in entries if re.fullmatch(r"step-\d{6,}", p.name)), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removesuffix(".tmp").removeprefix("step-"))


def _synced(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file that is then on the disk, and no longer in memory: reading it again reads the disk.

    DCP syncs what it writes, but before the last of it has left Python's buffer.
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
    """What is wrong with a checkpoint; None where every byte is as it was saved. The ranks share the hashing."""

    def look() -> str | None:
        try:
            files = _manifest(folder)
            mine = sorted(files)[ranks.rank :: ranks.size]
            wrong = [name for name in mine if _entry(folder / name) != files[name]]
            return f"{wrong[0]} is not as it was saved" if wrong else None
        except (OSError, ValueError) as error:
            return _reason(error)

    return next(filter(None, _together(ranks, look)), None)


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """{"size", "sha256"} by file name. ValueError where the manifest or the folder's list of files is not in order."""
    text = (folder / MANIFEST).read_bytes()
    try:
        files = json.loads(text)["files"]
        expected = {*files.keys(), MANIFEST}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if text != _manifest_text(_step_of(folder), files).encode() or STATE not in files:
        raise ValueError(f"{MANIFEST} is damaged, or of another version of this program")
    if alien := [name for name in files if name != STATE and not name.endswith(".safetensors")]:
        raise ValueError(f"{alien[0]} is no file of a checkpoint")
    if odd := sorted(expected ^ {file.name for file in folder.iterdir()}):
        raise ValueError(f"{odd[0]} is {'missing' if odd[0] in expected else 'none of its files'}")
    return files


def _manifest_text(step: int, files: dict[str, dict[str, Any]]) -> str:
    return json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2) + "\n"


def _entry(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
            size += len(piece)
    return {"size": size, "sha256": digest.hexdigest()}


def _reason(error: BaseException) -> str:
    """One line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return first_line(error)


# ---- ranks


def _together(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Every rank's value of `work`, on every rank. An OSError on any of them is raised on all."""
    try:
        mine = work(), None
    except OSError as error:
        mine = None, _reason(error)
    every = ranks.all_gather(mine)
    if failed := [error for _, error in every if error is not None]:
        raise OSError(failed[0])
    return [value for value, _ in every]


def _on_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """The main rank's value of `work`, which no other rank runs."""
    return _together(ranks, lambda: work() if ranks.main else None)[0]
