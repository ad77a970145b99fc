"""What a file of recorded searches holds, for people: a summary, a line a search, and which to drop.

Nothing here reads a thumbnail, so that a file of gigabytes is listed in seconds. Text is a stranger's: who prints it
has to make it printable.
"""

from __future__ import annotations

import time
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmsr.search.store import Entry, Store, image_key, page_key, text_key
from mmsr.tools import IMAGE_SEARCH

WIDTH = 100  # columns of a line, at most
DAMAGED = "(damaged)"  # the engine of a row that cannot be read
DAY = 86400.0  # seconds


@dataclass(frozen=True)
class Chosen:
    """Which searches: those that all given fields describe."""

    tool: str = ""
    engine: str = ""  # a part of its name
    words: str = ""  # a part of the query
    older_than: float | None = None  # days
    empty: bool = False  # those that found nothing
    superseded: bool = False  # those that a replay never gives, because a newer one has the same query or picture

    def of(self, entries: Sequence[Entry], now: float) -> Iterator[Entry]:
        newest = _newest(entries)
        for entry in entries:
            if self.tool and entry.tool != self.tool:
                continue
            if self.engine.casefold() not in engine(entry).casefold():
                continue
            if self.words and self.words.casefold() not in entry.query.casefold():
                continue
            if self.older_than is not None and entry.time >= now - self.older_than * DAY:
                continue
            if self.empty and (entry.hits or entry.source is None):
                continue
            if self.superseded and newest[_asked(entry)] == entry.number:
                continue
            yield entry


def _asked(entry: Entry) -> tuple[str, str, str]:
    return entry.tool, entry.query, entry.question


def _newest(entries: Iterable[Entry]) -> dict[tuple[str, str, str], int]:
    """The number of the newest answer to each search, as `Store.get` chooses it."""
    return {_asked(entry): entry.number for entry in sorted(entries, key=lambda entry: (entry.time, entry.number))}


def engine(entry: Entry) -> str:
    """The name of what answered."""
    return DAMAGED if entry.source is None else entry.source or "(no name)"


def found(entries: Sequence[Entry], what: str) -> list[Entry]:
    """The searches that `what` names, the newest first: a number of the list, a picture file, a query or an address."""
    named = [entry for entry in entries if what == str(entry.number)]
    if not named:
        picture = Path(what)
        keys = [image_key(picture.read_bytes())] if picture.is_file() else [text_key(what), page_key(what)]
        asked = [key[:2] for key in keys]
        named = [entry for entry in entries if (entry.tool, entry.query) in asked]
    return sorted(named, key=lambda entry: (entry.time, entry.number), reverse=True)


# ---- lines


def summary(store: Store, entries: Sequence[Entry], stats: dict[str, Any]) -> Iterator[str]:
    """The file in a few lines and a table: searches by tool and engine, their age, counts, paid calls."""
    size = f"{stats['bytes'] / 1e6:,.1f} MB, {stats['thumbnails']:,} thumbnails"
    yield f"{store.path}: {counted(len(entries), 'recorded search', 'recorded searches')}, {size}"
    if entries:
        yield from _table(entries)
    for name, by_tool in stats["counts"].items():
        yield f"{COUNTS.get(name, name)}: " + ", ".join(f"{n:,} {tool}" for tool, n in by_tool.items())
    for run, calls in stats["spent"].items():
        yield f"paid calls of {run}: " + ", ".join(f"{n:,} {provider}" for provider, n in calls.items())
    if stats["quarantined"]:
        yield f"{counted(stats['quarantined'], 'damaged row', 'damaged rows')} set aside: cache drop FILE --damaged"


# What the counts of a store are of.
COUNTS = {
    "hits": "answered from here",
    "calls": "asked of the engine",
    "failures": "failed, so not recorded",
    "misses": "not recorded when replayed",
    "damaged_rows": "damaged",
    "missing_thumbnails": "thumbnails missing",
    "unstorable": "results that could not be recorded",
}


def _table(entries: Sequence[Entry]) -> Iterator[str]:
    row = "{:<12} {:>8} {:>6} {:>10}  {:<16}  {:<16}  {}"
    yield row.format("tool", "searches", "empty", "superseded", "oldest", "newest", "engine")
    newest = _newest(entries)
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.tool, engine(entry)), []).append(entry)
    for (tool, name), group in sorted(groups.items()):
        empty = sum(not entry.hits for entry in group if entry.source is not None)
        superseded = sum(newest[_asked(entry)] != entry.number for entry in group)
        times = [entry.time for entry in group]
        ages = [when(min(times)), when(max(times))]
        numbers = [f"{number:,}" for number in (len(group), empty, superseded)]
        yield fitted(row.format(tool, *numbers, *ages, name))


def line(entry: Entry) -> str:
    """A search in a line: its number, time, tool, number of results, what was asked, and the first title."""
    asked = f"picture {entry.query[:12]}…" if entry.tool == IMAGE_SEARCH else entry.query
    title = "nothing found" if not entry.hits else entry.title
    answer = DAMAGED if entry.source is None else title
    kind = entry.tool.removesuffix("_search")
    return fitted(f"{entry.number:<6}  {when(entry.time)}  {kind:<5}  {entry.hits:>2} results  {asked} → {answer}")


def about(entry: Entry) -> Iterator[str]:
    """A search before its results."""
    asked = f"picture with SHA-256 {entry.query}" if entry.tool == IMAGE_SEARCH else entry.query
    yield f"{entry.number}: {entry.tool}, {asked}"
    form = f", form {entry.form}" if entry.form else ""
    question = f", for the question with digest {entry.question}" if entry.question else ""
    yield f"recorded {when(entry.time)} from {engine(entry)}{form}{question}"


def kinds(entries: Iterable[Entry]) -> str:
    """How many of which tool: "3 image_search, 2 text_search"."""
    counts = Counter(entry.tool for entry in entries)
    return ", ".join(f"{n:,} {tool}" for tool, n in sorted(counts.items()))


def when(seconds: float) -> str:
    """The local time, to the minute."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # a damaged time
        return "?"


def counted(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"


def fitted(text: str, columns: int = WIDTH) -> str:
    """A text in one line of at most so many columns; Chinese characters take two."""
    text = " ".join(text.splitlines()).rstrip()
    ends = list(accumulate(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text))
    if not ends or ends[-1] <= columns:
        return text
    return text[: bisect_right(ends, columns - 1)] + "…"
