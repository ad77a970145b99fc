"""Files written whole or not at all, folders that one process locks, digests of files, and JSON that is read with care.

A file that cannot be read, written or understood is a UserError with its name and row. Imports nothing heavy.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mmsr.system.errors import UserError


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary path to write to. When the block ends, the file there replaces `path`.

    Raises UserError where that fails.
    """
    side = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with _explain_write_errors(path):
            yield side
            side.replace(path)
    finally:
        with suppress(OSError):
            side.unlink()


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file. It is on the disk, not only in its cache, when this returns. Raises UserError where that fails."""
    with beside(path) as side:
        _write(side, "wb", pieces)


def append(path: Path, pieces: Iterable[bytes]) -> None:
    """Write at the end of a file, onto the disk as `write_whole` does. A crash may leave a part of it."""
    with _explain_write_errors(path):
        _write(path, "ab", pieces)


def _write(path: Path, mode: str, pieces: Iterable[bytes]) -> None:
    with open(path, mode) as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _explain_write_errors(path: Path) -> Iterator[None]:
    """Turns what the system says of a failed write into a UserError."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be written ({why}); make room there, or name another") from None


def make_out(folder: Path) -> None:
    """Make the folder of --out. Raises UserError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); name another folder") from None


def check_out(folder: Path) -> None:
    """Raises UserError where `make_out` would certainly fail, before a run spends minutes. Makes nothing."""
    nearest = folder.absolute()  # the folder, or the nearest one above it that exists
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"--out {folder}: cannot be made ({nearest} is no folder); name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: cannot be made ({nearest} may not be written in); name another folder")


LOCK = ".lock"


class Lock:
    """A folder that only this process works in, until `release` or its end. The system frees a dead process's lock.

    The file `.lock` in the folder names the holder, and is empty when there is none. Readers need no lock. On NFS the
    lock holds between machines; a machine that dies keeps it until its lease ends, about 90 seconds. On a file system
    without locks there is a warning, and nothing keeps a second run out.
    """

    def __init__(self, folder: Path):
        """Raises UserError where another process holds the folder, or where it cannot be written."""
        self.folder = folder
        with _explain_write_errors(folder / LOCK):
            self.file = open(folder / LOCK, "a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = self._holder()
            self.file.close()
            advice = "wait for it to end, stop it, or name another folder"
            raise UserError(f"--out {folder}: another run is at work in it{holder}: {advice}") from None
        except OSError as error:
            complaint = f"this file system has no locks ({error.strerror})"
            print(f"warning: --out {folder}: {complaint}: make sure that no other run uses it", file=sys.stderr)
        os.register_at_fork(after_in_child=self.file.close)  # a child that outlives this process would keep the lock
        with _explain_write_errors(folder / LOCK):
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())

    def check(self) -> None:
        """Raises UserError where the folder is gone, or is not the one that was locked."""
        try:
            same = os.path.samestat(os.stat(self.folder / LOCK), os.fstat(self.file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            complaint = "removed, moved or replaced while this run was at work in it"
            raise UserError(f"--out {self.folder}: {complaint}; put it back and go on, or name another folder")

    def release(self) -> None:
        """Free the folder. Does nothing the second time."""
        if self.file.closed:
            return
        with suppress(OSError):  # the folder may be gone, and with it what there was to release
            self.file.truncate(0)
            fcntl.flock(self.file, fcntl.LOCK_UN)  # a child that was forked a moment ago may still have it open
        self.file.close()

    def _holder(self) -> str:
        """What the file says about the process that holds the lock, in brackets."""
        self.file.seek(0)
        said = self.file.read(200).decode("utf-8", "replace")
        return f" ({said})" if said.isprintable() and said else ""


def cache_folder() -> Path:
    """Where the base models and recorded searches of all runs are kept: MMSR_CACHE, or a folder in the home folder."""
    return Path(os.environ.get("MMSR_CACHE") or Path.home() / ".cache" / "mmsr")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read piece by piece: about a second per gigabyte. Raises UserError where it cannot be read."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def code_digest(path: Path) -> str:
    """SHA-256 of what a Python file does: comments, docstrings and layout do not count.

    The syntax tree is hashed, written so that versions of Python agree: `ast.dump` differs between them. Of a file
    that is nested too deeply for that, the bytes are hashed. Raises UserError if the file is no Python.
    """
    spelled: list[str] = []
    try:
        _spell(ast.parse(path.read_bytes()), spelled)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as Python ({error}); mend it") from None
    except RecursionError:
        return file_digest(path)
    return hashlib.sha256("".join(spelled).encode("utf-8", "backslashreplace")).hexdigest()


def _spell(node: Any, spelled: list[str]) -> None:
    """Add a syntax tree as text without positions. Fields that are empty, which versions differ in, are left out."""
    if isinstance(node, ast.AST):
        spelled.append(f"{type(node).__name__}(")
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != []:
                spelled.append(f"{name}=")
                _spell(value, spelled)
        spelled.append(")")
    elif isinstance(node, list):
        for item in node:
            if not _is_text(item):
                _spell(item, spelled)
                spelled.append(",")
    else:
        spelled.append(repr(node))


def _is_text(node: Any) -> bool:
    """Whether a statement is a docstring, or another text that does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def object_in(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line. None where it is cut short, damaged or no object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def json_file(path: Path) -> Any:
    """What a JSON file holds. Raises UserError where it is missing or is no JSON."""
    with opened(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            complaint = f"not a JSON file, or cut short ({str(error)[:80]})"
            raise UserError(f"{path}: {complaint}; mend it there, or get it again") from None


def json_object(path: Path, row: int, line: bytes) -> dict[str, Any]:
    """The object that a line of a JSON lines file holds. Raises UserError where it holds none."""
    found = object_in(line)
    if found is None:
        raise UserError(f"{path}: row {row}: {line[:60]!r:.80} is not a JSON object; {_how_to_mend(line)}")
    return found


def _how_to_mend(line: bytes) -> str:
    """What makes a JSON object of a line that is none."""
    line = line.strip()
    try:
        line.decode()
    except UnicodeDecodeError:
        return "save the file as UTF-8"
    if line.endswith(b",") and object_in(line[:-1]):
        return "take away the comma behind it"
    if line.startswith(b"{'"):
        return "write double quotes, as JSON has them"
    if line.startswith(b"{") and not line.endswith(b"}"):
        return "write each on one line, or all of them as [{…}, …] in a .json file"
    return "write one a line"


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its offset."""
    offset = 0
    with opened(path) as file:
        for line in file:
            if line.strip():
                yield offset, line
            offset += len(line)


def opened(path: Path) -> BinaryIO:
    """The file, open for reading. Raises UserError where it cannot be opened."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


def missing(path: Path) -> UserError:
    """The error to raise for a file that is not there."""
    return UserError(f"{path}: no such file; check the path")
