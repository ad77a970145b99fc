"""A journal: results by key, in a file of JSON lines that is only ever appended to.

It keeps what was paid for or took long to compute. A line is in the file before its result is used, so a killed process
loses no result and no call is paid for twice; a power failure may lose the last second. Memory holds keys and offsets.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Callable

from mmsr.system.errors import UserError

SYNC_SECONDS = 1.0  # between two fsync: the work that a power failure may cost


def key_of(*request: Any) -> str:
    """The key of a request: equal JSON gives equal keys."""
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


class Journal:
    """A file of lines {"key": …, …}. Any number of threads may use it, and several processes may append to the file. A
    line that a crash cut short, or that has another form, is ignored. Lone surrogates, which UTF-8 cannot encode, are
    written as escapes."""

    def __init__(self, path: Path):
        self.path = path
        self.lock = threading.Lock()
        self.synced = 0.0  # the time of the last fsync
        self.offsets: dict[str, int] = {}  # key → first byte of its line
        self.in_flight: dict[str, Future[dict[str, Any]]] = {}  # key → the result that a thread is working on
        self.read = 0  # bytes of the file whose keys are known
        self._read_on()

    def _read_on(self) -> None:
        """Learn the keys of the lines that were added, by other processes too, since this was last called."""
        with open(self.path, "rb") if self.path.exists() else nullcontext(io.BytesIO()) as file:
            file.seek(self.read)
            for line in file:
                with suppress(ValueError, TypeError, KeyError):
                    self.offsets[json.loads(line)["key"]] = self.read
                if not line.endswith(b"\n"):
                    break  # it is being written, or a crash has cut it short: it is read again
                self.read += len(line)

    def once(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a key: the recorded one, or else what `work` returns. One thread calls `work`; others that ask
        for the same key meanwhile wait for it. Its result is in the file before any of them gets it. An exception of
        `work` is not recorded; it is raised in all of them."""
        with self.lock:
            if key not in self.offsets:
                self._read_on()
            future = self.in_flight.get(key)
            first = future is None and key not in self.offsets
            if first:
                future = self.in_flight[key] = Future()
        if future is None:
            return self.get(key)
        if first:
            try:
                fields = work()
                self.add(key, **fields)
                future.set_result(fields)
            except BaseException as error:
                future.set_exception(error)
            finally:
                with self.lock:
                    del self.in_flight[key]
        return future.result()

    def get(self, key: str) -> dict[str, Any] | None:
        """The line of a key; None for an unknown key."""
        if key not in self.offsets:
            return None
        with open(self.path, "rb") as file:
            file.seek(self.offsets[key])
            return json.loads(file.readline())

    def add(self, key: str, **fields: Any) -> None:
        """Append a line. Raises UserError where it cannot be written."""
        line = (json.dumps({"key": key, **fields}, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self.lock:
            try:
                with open(self.path, "a+b", buffering=0) as file:
                    if _cut_short(file):
                        file.write(b"\n")
                    if file.write(line) < len(line):
                        raise OSError("no room for a whole line")
                    # Counted from the end after the write: another process may have appended just before it.
                    self.offsets[key] = file.tell() - len(line)
                    if time.monotonic() - self.synced > SYNC_SECONDS:
                        os.fsync(file.fileno())
                        self.synced = time.monotonic()
            except OSError as error:
                why = error.strerror or error
                raise UserError(f"{self.path}: cannot be written ({why}); make room and run the same again") from None


def _cut_short(file: Any) -> bool:
    """Whether the file's last line has no line end."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    return file.read(1) not in (b"", b"\n")
