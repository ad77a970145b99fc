"""The pictures of a run, under OUT/images/: each distinct one once, small, and no more of them than a disk can bear.

Rollout lines name pictures by `episode.digest` of the original file. What is kept is a JPEG of at most 256 pixels a
side: enough to see what the model saw, in a page that holds thousands of them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Iterable, Sequence

from .episode import Episode, digest
from .pictures import decode

SIDE = 256  # pixels
MOST_BYTES = 128 * 2**20  # of a run's folder


class Album:
    """Every rank has one and says with `new` what it has seen; the main one keeps that with `add`."""

    def __init__(self, folder: Path):
        self.folder, self.seen = folder, set()
        self.room = MOST_BYTES - sum(file.stat().st_size for file in folder.glob("*.jpg"))

    def new(self, episodes: Sequence[Episode]) -> list[tuple[str, bytes]]:
        """The episodes' pictures that no call before this had, made small. One that cannot be opened is left out."""
        found = {}
        for picture in {picture for episode in episodes for picture in episode.pictures()}:
            name = digest(picture)
            if name not in self.seen:
                self.seen.add(name)
                try:
                    found[name] = _small(picture)
                except ValueError:
                    continue
        return list(found.items())

    def add(self, pictures: Iterable[tuple[str, bytes]]) -> None:
        """Write what is not there yet, while there is room."""
        self.folder.mkdir(exist_ok=True)
        for name, data in pictures:
            file = self.folder / f"{name}.jpg"
            if len(data) > self.room or file.exists():
                continue
            side = file.with_suffix(".tmp")
            side.write_bytes(data)
            side.replace(file)
            self.room -= len(data)


def _small(picture: bytes) -> bytes:
    opened, file = decode(picture), io.BytesIO()
    opened.thumbnail((SIDE, SIDE))
    opened.save(file, "JPEG", quality=85)
    return file.getvalue()
