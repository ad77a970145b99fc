"""What another model was asked and has answered, kept on disk: JSON lines by key, so that nothing is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any, Iterator


def key_of(*asked: Any) -> str:
    """Names what was asked: equal JSON, equal key."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


class Kept:
    """A file of lines {"key", `field`, …}, and `values`: what it has in `field`, by key. Safe in any number of threads.

    A line that a crash cut short is as good as none. Lone surrogates, which UTF-8 cannot hold, stay escaped.
    """

    def __init__(self, path: Path, field: str):
        self.path, self.field, self.lock = path, field, threading.Lock()
        self.values: dict[str, Any] = dict(self._read())

    def add(self, key: str, **line: Any) -> None:
        """On the disk first, then in `values`."""
        written = (json.dumps({"key": key, **line}, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self.lock, open(self.path, "ab") as file:
            file.write(written if _ends_whole(self.path) else b"\n" + written)
            file.flush()
            os.fsync(file.fileno())
            self.values[key] = line[self.field]

    def _read(self) -> Iterator[tuple[str, Any]]:
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                found = json.loads(line)
                yield str(found["key"]), found[self.field]
            except (ValueError, TypeError, KeyError):
                continue


def _ends_whole(file: Path) -> bool:
    with open(file, "rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 1))
        return opened.read() in (b"", b"\n")
