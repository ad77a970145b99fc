"""Files that are there whole or not at all, and JSON whose damage is told with file and row. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .episode import UserError


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path to write to: what stands there in the end takes the place of `path`. UserError where that cannot be."""
    side = path.with_name(f".{path.name}.{threading.get_ident()}.tmp")
    try:
        with _written(path):
            yield side
            side.replace(path)
    finally:
        side.unlink(missing_ok=True)


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """On the disk, and not only in its cache, when this returns. Raises UserError as `beside` does."""
    with beside(path) as side:
        _write(side, "wb", pieces)


def append(path: Path, pieces: Iterable[bytes]) -> None:
    """As `write_whole`, at the end of what is there; a crash may leave some of it."""
    with _written(path):
        _write(path, "ab", pieces)


def _write(path: Path, mode: str, pieces: Iterable[bytes]) -> None:
    with open(path, mode) as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be written ({why}); make room there, or name another") from None


def make_out(folder: Path) -> None:
    """The folder that --out means. UserError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); name another folder") from None


def cache_folder() -> Path:
    """Where base models and recorded searches are kept, of all runs: MMSR_CACHE, or else in the home folder."""
    return Path(os.environ.get("MMSR_CACHE") or Path.home() / ".cache" / "mmsr")


def json_file(path: Path) -> Any:
    """What a whole JSON file holds. Raises UserError where it is missing or none."""
    with opened(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a JSON file, or cut short ({str(error)[:80]}); get it again") from None


def json_object(path: Path, row: int, line: bytes) -> dict[str, Any]:
    """The object that a line of a JSON lines file holds. Raises UserError where it holds none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: row {row}: {line[:60]!r} is not a JSON object; write one a line")
    return found


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its offset."""
    offset = 0
    with opened(path) as file:
        for line in file:
            if line.strip():
                yield offset, line
            offset += len(line)


def opened(path: Path) -> BinaryIO:
    """Open for reading, or say in a UserError why not."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


def missing(path: Path) -> UserError:
    return UserError(f"{path}: no such file; check the path")
