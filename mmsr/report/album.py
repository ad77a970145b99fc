"""The pictures of a run, under OUT/images/: each distinct one once, small, and no more of them than a disk can hold.

Rollout lines name pictures by `episode.digest` of the original file. What is kept is a JPEG of at most 256 pixels a
side: enough to see what the model saw, in a page that holds thousands of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mmsr.episode import Episode, digest
from mmsr.system.files import beside
from mmsr.system.images import decode, jpeg

SIDE = 256  # pixels of a kept picture's longer side
MOST_PICTURE_BYTES = 2**18  # of a kept picture
MOST_BYTES = 128 * 2**20  # of a run's folder


class Album:
    """Every rank has one and reports with `new` what it has seen. The main rank keeps that with `add`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: set[str] = set()
        self.room = MOST_BYTES - sum(file.stat().st_size for file in folder.glob("*.jpg"))  # bytes

    def new(self, episodes: Sequence[Episode]) -> list[tuple[str, bytes]]:
        """The episodes' pictures that no call before this had, made small. One that cannot be opened is left out."""
        pictures: set[bytes] = set()
        for episode in episodes:
            pictures.update(episode.pictures())
        found = []
        for picture in pictures:
            name = digest(picture)
            if name in self.seen:
                continue
            self.seen.add(name)
            try:
                found.append((name, jpeg(decode(picture), SIDE, MOST_PICTURE_BYTES)))
            except ValueError:
                continue
        return found

    def add(self, pictures: Iterable[tuple[str, bytes]]) -> None:
        """Write what is not there yet, while there is room."""
        self.folder.mkdir(exist_ok=True)
        for name, data in pictures:
            file = self.folder / f"{name}.jpg"
            if len(data) > self.room or file.exists():
                continue
            with beside(file) as side:
                side.write_bytes(data)
            self.room -= len(data)
