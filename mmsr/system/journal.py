"""What was paid for or worked out, by key, in a file of JSON lines that is only ever appended to.

A line is in the file before anybody sees what it says, so a killed process loses none and nothing is paid for twice; a
loss of power may cost the last second. Memory holds keys and places alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Callable

from mmsr.system.errors import UserError

SYNC = 1.0  # seconds of work that a loss of power may cost


def key_of(*asked: Any) -> str:
    """Names what was asked: equal JSON, equal key."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class Journal:
    """A file of lines {"key", …}. Safe in any number of threads; processes may append to the same.

    A line that a crash cut short, or that is none of ours, is as good as none. Lone surrogates, which UTF-8 cannot
    hold, stay escaped.
    """

    def __init__(self, path: Path):
        self.path, self.lock, self.synced = path, threading.Lock(), 0.0
        self.offsets: dict[str, int] = {}
        self.flights: dict[str, Future[dict[str, Any]]] = {}
        with open(path, "rb") if path.exists() else nullcontext(()) as written:
            place = 0
            for line in written:
                with suppress(ValueError, TypeError, KeyError):
                    self.offsets[json.loads(line)["key"]] = place
                place += len(line)

    def once(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under a key, or else what `work` gives, which one thread does while others wait for it.

        It is in the file before anybody sees it. What `work` raises is not, and is raised in all of them.
        """
        with self.lock:
            flight = self.flights.get(key)
            if first := flight is None and key not in self.offsets:
                flight = self.flights[key] = Future()
        if flight is None:
            return self.get(key)
        if first:
            try:
                fields = work()
                self.add(key, **fields)
                flight.set_result(fields)
            except BaseException as error:
                flight.set_exception(error)
            finally:
                with self.lock:
                    del self.flights[key]
        return flight.result()

    def get(self, key: str) -> dict[str, Any] | None:
        """The line of a key."""
        if key not in self.offsets:
            return None
        with open(self.path, "rb") as file:
            file.seek(self.offsets[key])
            return json.loads(file.readline())

    def add(self, key: str, **fields: Any) -> None:
        """Raises UserError where the line cannot be written."""
        line = (json.dumps({"key": key, **fields}, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self.lock:
            try:
                with open(self.path, "a+b", buffering=0) as file:
                    if _cut_short(file):
                        file.write(b"\n")
                    if file.write(line) < len(line):
                        raise OSError("no room for a whole line")
                    self.offsets[key] = file.tell() - len(line)  # not the end of before: others may have appended
                    if time.monotonic() - self.synced > SYNC:
                        os.fsync(file.fileno())
                        self.synced = time.monotonic()
            except OSError as error:
                why = error.strerror or error
                raise UserError(f"{self.path}: cannot be written ({why}); make room and run the same again") from None


def _cut_short(file: Any) -> bool:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    return file.read(1) not in (b"", b"\n")
