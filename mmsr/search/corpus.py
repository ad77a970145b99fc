"""The index of a corpus: millions of passages, searched by BM25 with posting lists.

    score(query, passage) = Σ over the query's terms of  idf · tf · (k1 + 1) / (tf + k1 · (1 − b + b · length / mean))
    idf = log(1 + (N − n + ½) / (n + ½)),  N passages, n of them with the term;  tf: how often the passage has it

(Robertson and Zaragoza, 2009.) A *posting list* holds the passages that have a term. To answer a query means to add up
these terms over a few lists, each with one NumPy operation. `index.py`, for pages that come and go one by one, leaves
that to SQLite's FTS5, which computes the score of one page after another: too slow where a word occurs in 100,000.

The file is an SQLite database. Its passages are in segments of at most 16,384, whose scores fit in the processor's
cache. A segment is written in one commit: after an interruption the same command goes on behind the last one.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import os
import signal
import sqlite3
import threading
import zlib
from array import array
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmsr.episode import Hit, Observation
from mmsr.search import bm25
from mmsr.search.bm25 import K1, B
from mmsr.system.errors import UserError
from mmsr.system.files import json_object, opened
from mmsr.system.progress import progress
from mmsr.tools import ToolFailure

APPLICATION, VERSION = 0x6D6D7363, 2  # "mmsc" in the file's header, and the version of what follows
SCHEMA = f"""
BEGIN IMMEDIATE;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE IF NOT EXISTS files
    (first BLOB PRIMARY KEY, path TEXT NOT NULL, rows INTEGER NOT NULL, digest BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS passages
    (id INTEGER PRIMARY KEY, title TEXT NOT NULL, url TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS segments (id INTEGER PRIMARY KEY, start INTEGER NOT NULL, lengths BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS postings
    (segment INTEGER NOT NULL, term TEXT NOT NULL, places BLOB NOT NULL, counts BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS postings_term ON postings (segment, term);
COMMIT;
"""
SEGMENT = 2**14  # passages; a place in one has two bytes
MOST_TIMES = 255  # that a term is counted in a passage
PLACE, COUNT, LENGTH = np.dtype("<u2"), np.dtype("u1"), np.dtype("<u4")  # in the file

PROCESSES = min(os.cpu_count() or 1, 4)  # that index
REMEMBERED = 2**17  # different pieces of text whose terms are kept in memory
WORDS = 4  # terms that such a piece has at most; without blanks a whole passage is one piece

GZIP = b"\x1f\x8b"  # at the beginning of such a file
OTHERS = {
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"SQLite format 3": "an index already",
    b"[": "a JSON array",
}

Passage = tuple[str, str, str]  # title, url, text
Posting = tuple[str, bytes, bytes]  # term, places, counts
Inverted = tuple[list[Passage], list[Posting], np.ndarray]  # a segment, with the terms that each passage has


# ---- reading a corpus


def _lines(path: Path, file: BinaryIO, bar: Any) -> Iterator[bytes]:
    """Each line that is not blank, of JSON lines that may be compressed by gzip. `bar` shows the bytes that were read.

    Raises UserError for a file of another kind, and where compressed data are damaged.
    """
    start = file.read(16)
    file.seek(0)
    for beginning, kind in OTHERS.items():
        if start.startswith(beginning):
            raise UserError(f"{path}: is {kind}; give JSON lines, as they are or compressed by gzip")
    source: Any = gzip.GzipFile(fileobj=file) if start.startswith(GZIP) else file
    try:
        for number, line in enumerate(source):
            if number % SEGMENT == 0:
                bar.update(file.tell() - bar.n)
            if line.strip():
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or not complete ({error}); get it again") from None


def passage(path: Path, row: int, line: bytes) -> Passage:
    """A line's passage: {"contents": a title in quotes, a line end, the text}, as Search-R1 has them, or {"text"}, with
    "title" and "url" where there are. Raises UserError for another line."""
    found = json_object(path, row, line)
    title, url = found.get("title") or "", found.get("url") or ""
    text, contents = found.get("text"), found.get("contents")
    if text is None and isinstance(contents, str):
        head, line_end, body = contents.partition("\n")
        title, text = (_unquoted(head), body) if line_end else (title, head)
    elif text is None:
        text = contents  # of another type: refused below
    if text is None:
        fields = ", ".join(found) or "none"
        raise UserError(f"{path}: row {row}: fields {fields:.200}; every line needs contents, or text")
    for name, value in (("title", title), ("url", url), ("text", text)):
        if not isinstance(value, str):
            name = "contents" if value is contents else name
            raise UserError(f"{path}: row {row}, field {name}: {value!r:.60} is not text; correct the line")
    return _storable(title), _storable(url), _storable(text)


def _unquoted(title: str) -> str:
    """A title without the quotes around it; quotes of its own stay."""
    title = title.strip()
    return title[1:-1] if len(title) > 1 and title[0] == title[-1] == '"' else title


def _storable(text: str) -> str:
    """`text` without lone surrogates, which SQLite refuses."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


# ---- building


def build(file: str | Path, corpora: Iterable[str | Path]) -> dict[str, int]:
    """Add passages to the corpus `file`, which is created if needed. Returns how many are `new` and `known`.

    Raises UserError for a wrong line, a file that has changed since its beginning was indexed, or nothing to index.
    """
    counts = {"new": 0, "known": 0}
    file = Path(file)
    empty = False
    try:
        with closing(_connect(file, create=True)) as db:
            try:
                for path in map(Path, corpora):
                    _add_file(db, path, counts)
            finally:
                empty = not db.execute("SELECT 1 FROM passages").fetchone()
        if empty:
            raise UserError(f"{file}: no passage to index: the given files are empty")
    except sqlite3.Error as error:
        raise UserError(f"{file}: {error}; correct that and run the same command again") from error
    finally:
        if empty:
            file.unlink(missing_ok=True)
    return counts


def _add_file(db: sqlite3.Connection, path: Path, counts: dict[str, int]) -> None:
    """Add what is not yet indexed of a file. It is known again by its first line, and then has to begin as it did.

    Raises UserError for a file that cannot be read, a wrong line, a file that has changed, or two builders of one file.
    """
    with opened(path) as file, progress(f"indexing {path.name}", path.stat().st_size, "B") as bar:
        bar.unit_scale = True
        lines = _lines(path, file, bar)
        first = next(lines, None)
        if first is None:
            return
        name = _digest_of([first]).digest()  # the file may be moved, and its path another one
        row, digest = _skip_known(db, path, name, chain([first], lines))
        counts["known"] += row
        new = lines if row else chain([first], lines)
        for batch, segment in _side_by_side(path, row, new):
            with db:
                db.execute("BEGIN IMMEDIATE")
                if _indexed(db, name)[0] != row:
                    raise UserError(f"{path}: another process is adding this file, too: wait for it to end")
                _add_segment(db, segment)
                row += len(batch)
                digest = _digest_of(batch, digest)
                done = (name, os.path.abspath(path), row, digest.digest())
                db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", done)
            counts["new"] += len(batch)


def _side_by_side(path: Path, row: int, lines: Iterator[bytes]) -> Iterator[tuple[list[bytes], Inverted]]:
    """The lines in lists of a segment, with what is made of each, in their order. Processes make several at a time.

    Raises UserError for a wrong line.
    """
    batch = list(islice(lines, SEGMENT))
    if len(batch) < SEGMENT:  # not worth a process
        if batch:
            yield batch, _inverted(path, row, batch)
        return
    pool = ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn"), initializer=_ignore_ctrl_c)
    waiting: deque[tuple[list[bytes], Future[Inverted]]] = deque()
    try:
        while batch or waiting:
            if batch:
                waiting.append((batch, pool.submit(_inverted, path, row, batch)))
                row += len(batch)
                batch = list(islice(lines, SEGMENT))
            if len(waiting) > PROCESSES or not batch:
                lines_of, segment = waiting.popleft()
                yield lines_of, segment.result()
    except BrokenProcessPool:
        raise UserError(f"{path}: a process that indexes was killed: out of memory? The same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_ctrl_c() -> None:
    """In a process of the pool: the one that started it gets the signal, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _inverted(path: Path, row: int, lines: list[bytes]) -> Inverted:
    """What is written of a segment: `lines`, of which the first is `row`. Raises UserError for a wrong line."""
    passages = [passage(path, row + i, line) for i, line in enumerate(lines)]
    return passages, *invert(passages)


def _skip_known(db: sqlite3.Connection, path: Path, name: bytes, lines: Iterator[bytes]) -> tuple[int, Any]:
    """Read the lines that are indexed already. Returns how many, and what digests them.

    Raises UserError where they are others now.
    """
    how = "make the index again, with another --out"
    rows, digest = _indexed(db, name)
    if not rows:
        if db.execute("SELECT 1 FROM files WHERE path = ?", (os.path.abspath(path),)).fetchone():
            what = "another first line was indexed from this path: name other passages otherwise, or"
            raise UserError(f"{path}: {what} {how}")
        return 0, hashlib.sha256()
    found = _digest_of(islice(lines, rows))
    if found.digest() != digest:
        what = f"another file with the same first line was indexed, or {path.name} has changed since"
        raise UserError(f"{path}: in the first {rows} lines: {what}; {how}")
    return rows, found


def _indexed(db: sqlite3.Connection, name: bytes) -> tuple[int, bytes]:
    """How many lines are indexed of the file whose first line has the digest `name`, and the digest of all of them."""
    return db.execute("SELECT rows, digest FROM files WHERE first = ?", (name,)).fetchone() or (0, b"")


def _digest_of(lines: Iterable[bytes], so_far: Any = None) -> Any:
    """The SHA-256 of lines without their line ends, continued from `so_far`."""
    digest = so_far or hashlib.sha256()
    for line in lines:
        digest.update(line.rstrip(b"\r\n") + b"\n")
    return digest


def _add_segment(db: sqlite3.Connection, segment: Inverted) -> None:
    """Write a segment behind the last one. The caller commits."""
    passages, postings, lengths = segment
    number = _next_id(db, "segments")
    start = _next_id(db, "passages")
    rows = ((start + place, *each) for place, each in enumerate(passages))
    db.executemany("INSERT INTO passages VALUES (?, ?, ?, ?)", rows)
    db.executemany("INSERT INTO postings VALUES (?, ?, ?, ?)", ((number, *posting) for posting in postings))
    db.execute("INSERT INTO segments VALUES (?, ?, ?)", (number, start, lengths.astype(LENGTH).tobytes()))


def _next_id(db: sqlite3.Connection, table: str) -> int:
    """The largest id and one; not the number of rows, for which SQLite would read every text."""
    return db.execute(f"SELECT coalesce(max(id) + 1, 0) FROM {table}").fetchone()[0]


def invert(passages: list[Passage]) -> tuple[list[Posting], np.ndarray]:
    """The posting lists of a segment's passages, and how many terms each passage has, (passages,).

    A text is cut at blanks, and each different piece is made into terms once.
    """
    pieces: dict[str, int] = defaultdict(count().__next__)  # piece → its number, given where it is first asked for
    occurring = array("i")  # numbers of the pieces of all passages, one passage after another
    sizes = []  # pieces of each passage
    for title, _, text in passages:
        found = f"{title} {text}".split()
        occurring.extend(map(pieces.__getitem__, found))
        sizes.append(len(found))

    names, of_piece, widths = TERMS.numbered(pieces)
    starts = np.cumsum(widths) - widths  # (pieces,): where the terms of each piece begin in `of_piece`
    piece = np.frombuffer(occurring, dtype=np.int32)  # (occurrences,)
    place = np.repeat(np.arange(len(passages)), sizes)  # (occurrences,): of the passage

    # Each occurrence of a piece becomes as many as the piece has terms: mostly one.
    width = widths[piece]
    ends = np.cumsum(width)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - width, width)
    term = of_piece[np.repeat(starts[piece], width) + within]  # (terms in all passages,)
    place = np.repeat(place, width)

    lengths = np.bincount(place, minlength=len(passages))
    pairs, times = np.unique(term * SEGMENT + place, return_counts=True)  # sorted by term, then by place
    bounds = np.searchsorted(pairs, np.arange(len(names) + 1) * SEGMENT)
    places = (pairs % SEGMENT).astype(PLACE).tobytes()
    counts = np.minimum(times, MOST_TIMES).astype(COUNT).tobytes()
    postings = []
    for name, start, end in zip(names, bounds[:-1].tolist(), bounds[1:].tolist()):
        postings.append((name, places[start * PLACE.itemsize : end * PLACE.itemsize], counts[start:end]))
    return postings, lengths


class Terms:
    """Makes the terms of pieces of text: their tokens without English endings. It remembers many of them."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, ...]] = {}

    def numbered(self, pieces: Iterable[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """The different terms of all pieces, T, sorted; the numbers (below T) of each piece's terms, one piece after
        another; and how many each piece has, (pieces,)."""
        if len(self.known) > REMEMBERED:
            self.known.clear()
        new = self._made([piece for piece in pieces if piece not in self.known])
        of_piece = [self.known.get(piece) or new[piece] for piece in pieces]
        self.known.update((piece, terms) for piece, terms in new.items() if 0 < len(terms) <= WORDS)
        names = sorted(set(chain.from_iterable(of_piece)))
        number = {name: i for i, name in enumerate(names)}
        numbers = np.fromiter(map(number.__getitem__, chain.from_iterable(of_piece)), dtype=np.int64)
        return names, numbers, np.fromiter(map(len, of_piece), dtype=np.int64)

    def _made(self, pieces: list[str]) -> dict[str, tuple[str, ...]]:
        """The terms of each piece."""
        tokens = {piece: bm25.tokens(piece) for piece in pieces}
        different = list(dict.fromkeys(chain.from_iterable(tokens.values())))
        stem = dict(zip(different, bm25.stems(different)))
        return {piece: tuple(map(stem.__getitem__, found)) for piece, found in tokens.items()}


TERMS = Terms()  # of this process


# ---- searching


@dataclass
class _Segment:
    """What is in memory of a segment: 4 bytes a passage."""

    number: int
    start: int  # id of its first passage
    norms: np.ndarray  # (passages,) float32: k1 · (1 − b + b · length / mean length)


class Corpus:
    """A back-end for the corpus in `file`, as it is when opened; `k` hits per search. Many threads may call it."""

    def __init__(self, file: str | Path, k: int = 5):
        """Raises UserError for a file that is not there, or is something else."""
        self.file, self.k, self.source = Path(file), k, f"local:{file}"
        self.connections = threading.local()  # one for each thread, so that SQLite reads in parallel
        try:
            with closing(_connect(self.file)) as db:
                rows = db.execute("SELECT id, start, lengths FROM segments ORDER BY id").fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{file}: the index is damaged ({error}); make it again") from None
        lengths = [np.frombuffer(data, dtype=LENGTH) for *_, data in rows]
        self.passages = sum(map(len, lengths))
        if not self.passages:
            raise UserError(f"{file}: the index is empty; add to it: python search.py index --corpus FILE --out {file}")
        mean = max(sum(int(each.sum()) for each in lengths) / self.passages, 1.0)
        self.segments = []
        for (number, start, _), each in zip(rows, lengths):
            self.segments.append(_Segment(number, start, (K1 * (1 - B + B / mean * each)).astype(np.float32)))

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        """A corpus has no pictures."""
        return Observation(source=self.source)

    def text_search(self, query: str) -> Observation:
        """The best passages for the query's words. The most frequent English words count only where they are alone."""
        terms = sorted(set(bm25.stems(bm25.informative(query))))
        try:
            if not hasattr(self.connections, "own"):
                self.connections.own = _connect(self.file)
            db = self.connections.own
            hits = []
            for score, number in self._best(db, terms):
                sql = "SELECT title, url, text FROM passages WHERE id = ?"
                title, url, text = db.execute(sql, (number,)).fetchone()
                hits.append(Hit(title, url, text, score=score))
        except (sqlite3.Error, UserError) as error:
            raise ToolFailure("index", f"{self.source}: {error}") from None
        return Observation(tuple(hits), source=self.source)

    def _best(self, db: sqlite3.Connection, terms: list[str]) -> list[tuple[float, int]]:
        """(score, id) of the `k` best passages, the best first; of equal ones the first in the corpus."""
        lists = [_postings(db, segment, terms) for segment in self.segments]
        having = dict.fromkeys(terms, 0)
        for found in lists:
            for term, (places, _) in found.items():
                having[term] += len(places)
        idf = {term: np.log1p((self.passages - n + 0.5) / (n + 0.5)) for term, n in having.items()}

        best: list[tuple[float, int]] = []
        worst = 0.0  # score of the last of the best
        for segment, found in zip(self.segments, lists):
            scores = np.zeros_like(segment.norms)
            for term, (places, counts) in found.items():
                tf = counts.astype(np.float32)
                scores[places] += np.float32(idf[term]) * tf * (K1 + 1) / (tf + segment.norms[places])
            candidates = np.flatnonzero(scores > worst)
            if len(candidates) > self.k:
                first = np.argsort(-scores[candidates], kind="stable")[: self.k]
                candidates = candidates[first]
            best += [(float(scores[place]), segment.start + int(place)) for place in candidates]
            best = heapq.nsmallest(self.k, best, key=lambda pair: (-pair[0], pair[1]))
            if len(best) == self.k:
                worst = best[-1][0]
        return best


def _postings(db: sqlite3.Connection, segment: _Segment, terms: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By term: the places (n,) uint16 of the passages that have it, and how often (n,) uint8."""
    marks = ", ".join("?" * len(terms))
    sql = f"SELECT term, places, counts FROM postings WHERE segment = ? AND term IN ({marks})"
    found = {}
    for term, places, counts in db.execute(sql, (segment.number, *terms)):
        found[term] = np.frombuffer(places, dtype=PLACE), np.frombuffer(counts, dtype=COUNT)
    return found


# ---- the file


def is_corpus(file: str | Path) -> bool:
    """Whether a file says in its header that it was made here."""
    try:
        with open(file, "rb") as database:
            return int.from_bytes(database.read(72)[68:], "big") == APPLICATION
    except OSError:
        return False


def open_file(file: Path, create: bool, options: str) -> sqlite3.Connection:
    """The database of an index of any kind. `options` of `search.py index` would make it.

    Raises UserError for a folder and for what is not there, sqlite3.Error where SQLite cannot open the file.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file")
    if create and not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}; make it, or name another file")
    if not create and not file.exists():
        raise UserError(f"{file}: no such index; make one with: python search.py index {options}")
    # Not "ro": after a kill in the middle of a commit, the next process that opens the file has to roll it back.
    address = f"{file.resolve().as_uri()}?mode={'rwc' if create else 'rw'}"
    return sqlite3.connect(address, uri=True, timeout=60, check_same_thread=False)


def _connect(file: Path, create: bool = False) -> sqlite3.Connection:
    """The corpus in a file; without `create` it cannot be changed. Raises UserError for another file."""
    if create and file.is_file() and file.stat().st_size and not is_corpus(file):
        raise UserError(f"{file} is no index of a corpus: passages have a file of their own; name another --out")
    try:
        db = open_file(file, create, f"--corpus FILE --out {file}")
        if create and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            db.executescript(SCHEMA)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            raise UserError(f"{file}: has version {version}, this program reads {VERSION}; make it again")
        if not create:
            db.execute("PRAGMA query_only = ON")
        return db
    except sqlite3.Error as error:
        raise UserError(f"{file} cannot be opened as an index ({error}); name another file, or make it again") from None
