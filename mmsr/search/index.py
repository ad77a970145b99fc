"""The local search engine: pictures and pages of your own in one SQLite file, found without a network or a key.

Pages are found by BM25 (SQLite's FTS5), pictures by comparing an encoder's vectors with every one in the index:
100,000 pictures of 1,280 numbers are one product of a matrix and a vector, 30 ms on one core. `build` adds to a file,
batch by batch; each is committed, so whatever ends it early, the next run goes on from there. Nothing is keyed by file
name: the same bytes are encoded once, under however many titles.

Traps: whatever a user types must be quoted word by word, or FTS5 reads it as its query language. Its tokenizers find no
Chinese, so the full-text table holds the tokens that `bm25.py` makes; a file of an earlier version is indexed anew from
its pages when it is opened. An index is worth nothing with another encoder, so the file holds the vector of a test
picture, and opening it compares.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import PIL.Image
from tqdm import tqdm

from mmsr.episode import Hit, Observation
from mmsr.search import bm25
from mmsr.search.encoders import Encoder, open_encoder
from mmsr.system.errors import UserError
from mmsr.system.files import json_object, lines
from mmsr.system.images import decode, jpeg
from mmsr.tools import ToolFailure

APPLICATION, VERSION = 0x6D6D7372, 1  # "mmsr" in the file's header, and the version of the table `words`
SCHEMA = f"""
BEGIN IMMEDIATE;
PRAGMA application_id = {APPLICATION};
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value);
CREATE TABLE IF NOT EXISTS pictures
    (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, vector BLOB NOT NULL, thumbnail BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS titles
    (picture INTEGER NOT NULL, title TEXT NOT NULL, url TEXT NOT NULL, UNIQUE (picture, title, url));
CREATE TABLE IF NOT EXISTS pages
    (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, url TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL);
COMMIT;
"""
WORDS = f"CREATE VIRTUAL TABLE words USING fts5 (title, text, content = '', {bm25.STEMMED})"
PICTURES_PER_BATCH, PAGES_PER_BATCH = 32, 500
ENCODED, THUMBNAIL = 1024, 256  # pixels of the longer side at most: of what is encoded, and of what is shown
THUMBNAIL_BYTES = 2**18
PASSAGE = 800  # characters of a page that a search shows at most
REBUILDING = 3600  # seconds that one process waits while another indexes the words anew


# ---- building


def build(
    file: str | Path, encoder: str, images: str | Path | None, titles: str | Path | None, pages: str | Path | None
) -> Counter:
    """Add to the index `file`, made where there is none: pictures of the folder `images` as the lines of `titles` name
    them ({"file", "title", "url": optional}), and `pages` ({"url", "title": optional, "text"}).

    Counts what was added (`pictures`, `titles`, `pages`), was there already (`known`) and could not be read (`broken`,
    each reported on the way). Raises UserError for a wrong line, an index of another encoder, or nothing to add.
    """
    file, counts = Path(file), Counter()
    listed = _Records(titles, ("file", "title"), "url", "picture")
    texts = _Records(pages, ("url", "text"), "title", "page")
    if titles and not (images and Path(images).is_dir()):
        raise UserError(f"--images {images}: no such folder; give the one that the files in {titles} lie in")
    fresh = not file.exists()
    try:
        with closing(_connect(file, create=True)) as db:
            opened = _open_encoder(db, encoder) if titles else None
            for batch in listed.batches(PICTURES_PER_BATCH):
                _add_pictures(db, opened, Path(images), batch, counts)
            for batch in texts.batches(PAGES_PER_BATCH):
                _add_pages(db, batch, counts)
            if not _size(db):
                raise UserError(f"{file}: nothing could be indexed, so the index would be empty")
    except sqlite3.Error as error:
        raise UserError(f"{file}: {error}; mend that and go on with the same command") from error
    except UserError:
        if fresh and not (counts["titles"] or counts["pages"]):
            file.unlink(missing_ok=True)
        raise
    return counts


class _Records:
    """The objects of a JSONL file, all checked before the first is used. No path: none. `optional` may be null."""

    def __init__(self, path: str | Path | None, fields: tuple[str, ...], optional: str, unit: str):
        self.path, self.fields, self.optional, self.unit = Path(path) if path else None, fields, optional, unit
        self.total = sum(1 for _ in self)

    def __iter__(self) -> Iterator[dict[str, str]]:
        names = {*self.fields, self.optional}
        for row, (_, line) in enumerate(lines(self.path) if self.path else ()):
            found = json_object(self.path, row, line)
            if found.get(self.optional) is None:  # left out, or null
                found[self.optional] = ""
            if wrong := sorted(name for name in names if not isinstance(found.get(name), str)):
                listed = ", ".join(self.fields)
                raise UserError(f"{self.path}: row {row}, field {wrong[0]}: not a text; every line has {listed}")
            yield {name: _clean(found[name]) for name in names}

    def batches(self, size: int) -> Iterator[list[dict[str, str]]]:
        records = iter(self)
        with tqdm(total=self.total, desc=f"indexing {self.unit}s", unit=self.unit, disable=not self.total) as bar:
            while batch := list(islice(records, size)):
                yield batch
                bar.update(len(batch))


def _clean(text: str) -> str:
    """Without control characters, and without lone surrogates, which SQLite refuses."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", " ", text)


def _add_pictures(db: sqlite3.Connection, encoder: Encoder, folder: Path, batch: list[dict], counts: Counter) -> None:
    """One commit. A picture is known by its bytes; one that cannot be opened is reported and left out."""
    digests, new = {}, {}
    for name in dict.fromkeys(record["file"] for record in batch):
        try:
            data = (folder / name).read_bytes()
            digest = hashlib.sha256(data).digest()
            if digest not in new and _known(db, "pictures", digest) is None:
                new[digest] = _open_picture(data)
            digests[name] = digest
        except (OSError, ValueError) as error:
            counts["broken"] += 1
            tqdm.write(f"{folder / name}: left out: {getattr(error, 'strerror', None) or error}")
    vectors = encoder.encode(list(new.values())).astype(np.float16) if new else ()
    with db:
        for (digest, picture), vector in zip(new.items(), vectors):
            row = (digest, vector.tobytes(), jpeg(picture, THUMBNAIL, THUMBNAIL_BYTES))
            db.execute("INSERT OR IGNORE INTO pictures (digest, vector, thumbnail) VALUES (?, ?, ?)", row)
        counts["pictures"] += len(new)
        for record in batch:
            if record["file"] in digests:
                row = (_known(db, "pictures", digests[record["file"]]), record["title"], record["url"])
                added = db.execute("INSERT OR IGNORE INTO titles VALUES (?, ?, ?)", row).rowcount
                counts["titles" if added else "known"] += 1


def _add_pages(db: sqlite3.Connection, batch: list[dict], counts: Counter) -> None:
    """One commit. A page is known by address, title and text together: several passages may share an address."""
    with db:
        for page in batch:
            row = (page["url"], page["title"], page["text"])
            digest = hashlib.sha256(json.dumps(row).encode()).digest()
            sql = "INSERT OR IGNORE INTO pages (digest, url, title, text) VALUES (?, ?, ?, ?)"
            done = db.execute(sql, (digest, *row))
            if done.rowcount:
                _add_words(db, done.lastrowid, *row[1:])
            counts["pages" if done.rowcount else "known"] += 1


def _add_words(db: sqlite3.Connection, page: int, title: str, text: str) -> None:
    row = (page, bm25.searchable(title), bm25.searchable(text))
    db.execute("INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", row)


def _known(db: sqlite3.Connection, table: str, digest: bytes) -> int | None:
    found = db.execute(f"SELECT id FROM {table} WHERE digest = ?", (digest,)).fetchone()
    return found and found[0]


def _open_picture(data: bytes) -> PIL.Image.Image:
    """The picture as it is encoded. Raises ValueError for what is none."""
    picture = decode(data)
    picture.thumbnail((ENCODED, ENCODED), PIL.Image.Resampling.BICUBIC, reducing_gap=2.0)
    return picture


# ---- the file


def _connect(file: Path, create: bool = False) -> sqlite3.Connection:
    """The index of a path; nothing is written unless it may be created. Raises UserError for what is no index."""
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file")
    if create and not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}; make it, or name another file")
    if not create and not file.exists():
        raise UserError(f"{file}: no such index; make one with: python search.py index --out {file} …")
    try:
        # Not "ro": after a kill in the middle of a batch, whoever opens the file next must be able to roll it back.
        address = f"{file.resolve().as_uri()}?mode={'rwc' if create else 'rw'}"
        db = sqlite3.connect(address, uri=True, timeout=60, check_same_thread=False)
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
            raise UserError(f"{file} is a database, but not an index of search.py; name another file")
        if create:
            db.executescript(SCHEMA)
        if create or tables:
            _renew_words(db, file)
        if not create:
            db.execute("PRAGMA query_only = ON")
        return db
    except sqlite3.Error as error:
        raise UserError(f"{file} cannot be opened as an index ({error}); name another file, or make it anew") from None


def _renew_words(db: sqlite3.Connection, file: Path) -> None:
    """Make the full-text table of a new file, or that of an earlier version anew from its pages. One commit."""
    if _version(db) == VERSION:
        return
    try:
        db.execute(f"PRAGMA busy_timeout = {REBUILDING * 1000}")
        with db:
            db.execute("BEGIN IMMEDIATE")
            if _version(db) == VERSION:  # by another process, meanwhile
                return
            db.execute("DROP TABLE IF EXISTS words")
            db.execute(WORDS)
            total = db.execute("SELECT count(*) FROM pages").fetchone()[0]
            pages = db.execute("SELECT id, title, text FROM pages")
            for page in tqdm(pages, f"{file}: indexing its words anew, once", total, unit="page", disable=not total):
                _add_words(db, *page)
            db.execute(f"PRAGMA user_version = {VERSION}")
    except sqlite3.OperationalError as error:
        what = f"{file} is of an earlier version, and its words cannot be indexed anew ({error})"
        raise UserError(f"{what}: open it once where it can be written, or make it anew") from None


def _version(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def _size(db: sqlite3.Connection) -> int:
    return db.execute("SELECT (SELECT count(*) FROM titles) + (SELECT count(*) FROM pages)").fetchone()[0]


def _open_encoder(db: sqlite3.Connection, name: str | None = None) -> Encoder:
    """The encoder of an index, compared with what it gave at first. Its `name` is given to write, and kept if new."""
    kept = dict(db.execute("SELECT key, value FROM meta"))
    encoder = open_encoder(name or kept["encoder"])
    test = encoder.encode([_test_picture()])[0].astype(np.float32)
    if not kept:
        with db:
            db.executemany("INSERT INTO meta VALUES (?, ?)", [("encoder", encoder.name), ("test", test.tobytes())])
        return encoder
    if encoder.name != kept["encoder"]:
        raise UserError(f"the index was made with --encoder {kept['encoder']}: give that, or another --out")
    before = np.frombuffer(kept["test"], dtype=np.float32)
    if before.shape != test.shape or not before @ test > 0.999:
        raise UserError(f"encoder {encoder.name} has changed since the index was made with it: make the index anew")
    return encoder


def _test_picture() -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((224, 224), PIL.Image.Resampling.BICUBIC)


# ---- searching


class Local:
    """A back-end over the index `file`, as it is when opened; `k` hits a search. Safe to call from many threads.

    The pictures' vectors are held in memory as float32: 227 MB for 100,000 by the built-in encoder.
    """

    def __init__(self, file: str | Path, k: int = 5):
        self.file, self.k, self.source = Path(file), k, f"local:{file}"
        self.connections = threading.local()  # one a thread: SQLite then searches in all of them at once
        try:
            with closing(_connect(self.file)) as db:
                if not _size(db):
                    raise UserError(f"{file}: the index is empty; add to it: python search.py index --out {file} …")
                self.ids, self.vectors = _load(db)
                self.encoder = _open_encoder(db) if len(self.ids) else None
        except (sqlite3.Error, ValueError, KeyError) as error:
            raise UserError(f"{file}: the index is damaged ({error}); make it anew") from None

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        """The titles of the pictures that look most like this one, with cosines as scores."""
        if self.encoder is None:
            return Observation(source=self.source)
        try:
            picture = _open_picture(image)
        except ValueError as error:
            raise ToolFailure("image", str(error)) from None
        scores = self.vectors @ self.encoder.encode([picture])[0].astype(np.float32)
        best = np.argpartition(-scores, min(self.k, len(scores)) - 1)[: self.k]
        best = best[np.argsort(-scores[best], kind="stable")]
        hits = (hit for place in best for hit in self._titles(int(self.ids[place]), min(float(scores[place]), 1.0)))
        return Observation(tuple(islice(hits, self.k)), source=self.source)

    def _titles(self, picture: int, score: float) -> Iterator[Hit]:
        sql = "SELECT title, url, thumbnail FROM titles JOIN pictures ON id = picture WHERE id = ? ORDER BY 1, 2"
        for title, url, thumbnail in self._rows(sql, picture):
            yield Hit(title, url, image=thumbnail, score=score)

    def text_search(self, query: str) -> Observation:
        """The pages that fit the words best, each with the passage around them. Scores are BM25, titles twice."""
        words = bm25.sqlite_query(query)
        sql = """SELECT pages.title, url, pages.text, -rank FROM words JOIN pages ON pages.id = words.rowid
                 WHERE words MATCH ? AND rank MATCH 'bm25(2.0, 1.0)' ORDER BY rank LIMIT ?"""
        found = self._rows(sql, words, self.k) if words else []
        matched = _matched(query, [text for _, _, text, _ in found])
        hits = (Hit(title, url, passage(text, matched), score=score) for title, url, text, score in found)
        return Observation(tuple(hits), source=self.source)

    def _rows(self, sql: str, *values: Any) -> list[tuple]:
        try:
            if not hasattr(self.connections, "own"):
                self.connections.own = _connect(self.file)
            return self.connections.own.execute(sql, values).fetchall()
        except (sqlite3.Error, UserError) as error:
            raise ToolFailure("index", f"{self.source}: {error}") from None


def _load(db: sqlite3.Connection) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n,) and vectors (n, d) float32 of all pictures. Raises ValueError where the vectors differ in length."""
    n, length = db.execute("SELECT count(*), max(length(vector)) FROM pictures").fetchone()
    ids, vectors = np.zeros(n, dtype=np.int64), np.empty((n, (length or 0) // 2), dtype=np.float32)
    rows = db.execute("SELECT id, vector FROM pictures ORDER BY id LIMIT ?", (n,))
    for place, (number, vector) in enumerate(rows):
        ids[place], vectors[place] = number, np.frombuffer(vector, dtype=np.float16)
    with np.errstate(invalid="ignore"):
        sound = np.isfinite(vectors.sum())
    if not sound:
        raise ValueError("a vector is not finite")
    return ids, vectors


def _matched(query: str, texts: list[str]) -> set[str]:
    """The tokens of some texts that a query asks for. Only SQLite knows, as it strips English endings."""
    starts = {word[:2] for word in bm25.query_tokens(query)}  # these no ending takes, and most words have others
    tokens = {token for text in texts for token in bm25.tokens(text) if token[:2] in starts}
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"CREATE VIRTUAL TABLE words USING fts5 (word, {bm25.STEMMED})")
        db.executemany("INSERT INTO words VALUES (?)", zip(tokens))
        found = db.execute("SELECT word FROM words WHERE words MATCH ?", [bm25.sqlite_query(query)]) if tokens else ()
        return {word for (word,) in found}


def passage(text: str, matched: set[str], limit: int = PASSAGE) -> str:
    """At most `limit` characters of a text, whole words, around the stretch with the most different matched tokens.

    Where none is matched it is the text's beginning.
    """
    words = list(re.finditer(r"\S{1,100}", text))  # Chinese has no blanks, nor has an address
    if not words:
        return ""
    starts, ends = [word.start() for word in words], [word.end() for word in words]
    found = [(place, token) for place, word in enumerate(words) for token in matched.intersection(bm25.tokens(word[0]))]
    first, last = _densest(found, starts, limit - 100)
    grown = True
    while grown:  # by a word on either side, as long as there is room
        grown = False
        for before, after in ((0, 1), (1, 0)):
            left, right = first - before, last + after
            if left >= 0 and right < len(words) and ends[right] - starts[left] <= limit:
                first, last, grown = left, right, True
    shown = " ".join(text[starts[first] : ends[last]].split())
    return "… " * (first > 0) + shown + " …" * (last < len(words) - 1)


def _densest(found: list[tuple[int, str]], starts: list[int], limit: int) -> tuple[int, int]:
    """The first and the last word of the shortest stretch with the most different tokens; `found`: (word, token)."""
    best, chosen, left = 0, (0, 0), 0
    inside: Counter = Counter()
    for word, token in found:
        inside[token] += 1
        while starts[word] - starts[found[left][0]] > limit or inside[found[left][1]] > 1:
            inside[found[left][1]] -= 1
            left += 1
        distinct = len(+inside)
        if distinct > best:
            best, chosen = distinct, (found[left][0], word)
    return chosen
