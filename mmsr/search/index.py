"""The local search engine: the user's pictures and pages in one SQLite file, without a network or a key.

Pages are found by BM25 (SQLite's FTS5), pictures by comparing an encoder's vector with all vectors of the index: for
100,000 pictures of 1,280 numbers that is one matrix-vector product, 30 ms on one core. `build` adds to a file in
batches. Each is committed, so that after an interruption the next run continues from there.

What is indexed again replaces what was there: a page replaces the page with its address, and the lines about a picture
file replace all earlier lines about it. A picture is kept under the hash of its bytes: equal bytes are encoded once,
even in two files or with several titles.

Traps. Every word of a query must be quoted, or FTS5 reads it as its query language. FTS5's tokenizers do not find
Chinese, so the full-text table holds the tokens of `bm25.py`; a file from an earlier version is indexed again when it
is opened. That table keeps no texts, so what is removed from it has to be given to it as it was added. An index is
useless with another encoder, so it holds the vector of a test picture, which is compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import sys
import threading
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, TypeVar

import numpy as np
import PIL.Image

from mmsr.episode import Hit, Observation
from mmsr.search import bm25
from mmsr.search.corpus import is_corpus, open_file
from mmsr.search.encoders import Encoder, open_encoder
from mmsr.system.errors import UserError
from mmsr.system.files import json_object, lines
from mmsr.system.images import decode, jpeg
from mmsr.system.progress import progress, say
from mmsr.tools import ToolFailure

Item = TypeVar("Item")

APPLICATION, VERSION = 0x6D6D7372, 1  # "mmsr" in the file's header, and the version of the table `words`
TITLES = """titles (picture INTEGER NOT NULL, title TEXT NOT NULL, url TEXT NOT NULL,
                    file TEXT NOT NULL, UNIQUE (picture, title, url, file))"""
SCHEMA = f"""
BEGIN IMMEDIATE;
PRAGMA application_id = {APPLICATION};
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value);
CREATE TABLE IF NOT EXISTS pictures
    (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, vector BLOB NOT NULL, thumbnail BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS {TITLES};
CREATE TABLE IF NOT EXISTS pages
    (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, url TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS pages_url ON pages (url);
COMMIT;
"""
TITLES_FILE = "CREATE INDEX IF NOT EXISTS titles_file ON titles (file)"
WORDS = f"CREATE VIRTUAL TABLE words USING fts5 (title, text, content = '', {bm25.STEMMED})"
PICTURES_PER_BATCH, PAGES_PER_BATCH = 32, 500
ENCODED, THUMBNAIL = 1024, 256  # pixels of the longer side, at most, for the encoder and for the thumbnail
THUMBNAIL_BYTES = 2**18
PASSAGE = 800  # characters of a page that a search returns at most
REBUILDING = 3600  # seconds that one process waits while another indexes the words again


# ---- building


def build(
    file: str | Path, encoder: str, images: str | Path | None, titles: str | Path | None, pages: str | Path | None
) -> Counter:
    """Add to the index `file`, which is created if needed: the pictures of the folder `images` that the lines of
    `titles` name ({"file", "title", "url": optional}), and `pages` ({"url", "title": optional, "text"}). Returns counts
    of what was added (`pictures`, `titles`, `pages`), was there already (`known`), was removed because a new line takes
    its place (`replaced`), is not used because a later line of the same file takes its place (`repeated`), and could
    not be read (`broken`; each is reported). Raises UserError for a wrong line, an index of another encoder, or nothing
    to add."""
    file = Path(file)
    listed = _Records(titles, ("file", "title"), "url", lambda line: (line["file"], line["url"]))
    texts = _Records(pages, ("url", "text"), "title", lambda page: page["url"] or _page_digest(page))
    counts = Counter(repeated=listed.repeated + texts.repeated)
    if titles and not (images and Path(images).is_dir()):
        raise UserError(f"--images {images}: no such folder; give the one that the files in {titles} lie in")
    fresh = not file.exists()
    try:
        with closing(_connect(file, create=True)) as db:
            opened = _open_encoder(db, encoder) if titles else None
            by_file: dict[str, list[dict[str, str]]] = {}
            for line in listed:
                by_file.setdefault(line["file"], []).append(line)
            for pictures in _batches(by_file.items(), len(by_file), PICTURES_PER_BATCH, "picture"):
                _add_pictures(db, opened, Path(images), dict(pictures), counts)
            for batch in _batches(texts, len(texts.last), PAGES_PER_BATCH, "page"):
                _add_pages(db, batch, counts)
            if not _size(db):
                raise UserError(f"{file}: nothing could be indexed, so the index would be empty")
    except sqlite3.Error as error:
        raise UserError(f"{file}: {error}; correct that and run the same command again") from error
    except UserError:
        if fresh and not (counts["titles"] or counts["pages"]):
            file.unlink(missing_ok=True)
        raise
    return +counts  # those that are not 0


class _Records:
    """The objects of a JSONL file, or none. All are checked before the first is used. `optional` may be null. Of those
    with the same key the last is used."""

    def __init__(self, path: str | Path | None, fields: tuple[str, ...], optional: str, key: Callable[[dict], Any]):
        self.path = Path(path) if path else None
        self.fields, self.optional, self.key = fields, optional, key
        self.last: dict[Any, int] = {}  # by key: the number of the object that is used
        total = 0
        for total, record in enumerate(self._all(), start=1):
            self.last[key(record)] = total
        self.repeated = total - len(self.last)

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number, record in enumerate(self._all(), start=1):
            if self.last[self.key(record)] == number:
                yield record

    def _all(self) -> Iterator[dict[str, str]]:
        names = {*self.fields, self.optional}
        for row, (_, line) in enumerate(lines(self.path) if self.path else ()):
            found = json_object(self.path, row, line)
            fields = ", ".join(found)
            if found.get(self.optional) is None:  # missing, or null
                found[self.optional] = ""
            if wrong := sorted(name for name in names if not isinstance(found.get(name), str)):
                what = "not a text" if wrong[0] in found else f"missing; the line has {fields or 'none'}"
                listed = " and ".join(self.fields)
                raise UserError(f"{self.path}: row {row}, field {wrong[0]}: {what:.200}; every line needs {listed}")
            yield {name: _clean(found[name]) for name in names}


def _batches(items: Iterable[Item], total: int, size: int, unit: str) -> Iterator[list[Item]]:
    """The items in lists of `size`, with a progress bar."""
    items = iter(items)
    with progress(f"indexing {unit}s", total, unit) as bar:
        while batch := list(islice(items, size)):
            yield batch
            bar.update(len(batch))


def _clean(text: str) -> str:
    """`text` without control characters and lone surrogates, which SQLite refuses."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", " ", text)


def _add_pictures(
    db: sqlite3.Connection, encoder: Encoder, folder: Path, batch: dict[str, list[dict]], counts: Counter
) -> None:
    """One commit. `batch`: the lines of each file. A picture that cannot be opened is reported and left out; what was
    there of this file stays."""
    digests: dict[str, bytes] = {}  # by file name
    new: dict[bytes, PIL.Image.Image] = {}  # by digest
    for name in batch:
        try:
            data = (folder / name).read_bytes()
            digest = hashlib.sha256(data).digest()
            if digest not in new and _known(db, "pictures", digest) is None:
                new[digest] = _open_picture(data)
            digests[name] = digest
        except (OSError, ValueError) as error:
            counts["broken"] += 1
            say(f"{folder / name}: left out: {getattr(error, 'strerror', None) or error}")
    vectors = encoder.encode(list(new.values())).astype(np.float16) if new else ()
    with db:
        for (digest, picture), vector in zip(new.items(), vectors):
            row = (digest, vector.tobytes(), jpeg(picture, THUMBNAIL, THUMBNAIL_BYTES))
            db.execute("INSERT OR IGNORE INTO pictures (digest, vector, thumbnail) VALUES (?, ?, ?)", row)
        counts["pictures"] += len(new)
        without: set[int] = set()  # pictures that a line no longer names
        for name, digest in digests.items():
            without |= _put_titles(db, _place(db, folder / name), _known(db, "pictures", digest), batch[name], counts)
        unused = "DELETE FROM pictures WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM titles WHERE picture = ?1)"
        db.executemany(unused, [(picture,) for picture in without])  # last: another file may hold the same bytes


def _put_titles(db: sqlite3.Connection, file: str, picture: int, lines: list[dict], counts: Counter) -> set[int]:
    """Make `lines` all that the index has about a file. Returns the pictures of the rows that were removed."""
    # An earlier version did not record the file: it is taken to be this one where the bytes are the same.
    db.execute("UPDATE OR IGNORE titles SET file = ? WHERE picture = ? AND file = ''", (file, picture))
    there = set(db.execute("SELECT * FROM titles WHERE file = ?", (file,)))
    wanted = {(picture, line["title"], line["url"], file) for line in lines}
    stale = there - wanted
    db.executemany("DELETE FROM titles WHERE picture = ? AND title = ? AND url = ? AND file = ?", stale)
    db.executemany("INSERT INTO titles VALUES (?, ?, ?, ?)", sorted(wanted - there))
    counts.update(titles=len(wanted - there), known=len(wanted & there), replaced=len(stale))
    return {row[0] for row in stale}


def _place(db: sqlite3.Connection, file: Path) -> str:
    """The path of a picture from the index's folder: two folders may have files of the same names, and index and
    pictures may be moved together."""
    index = db.execute("PRAGMA database_list").fetchone()[2]
    return os.path.relpath(file.resolve(), Path(index).parent)


def _page_digest(page: dict[str, str]) -> bytes:
    return hashlib.sha256(json.dumps((page["url"], page["title"], page["text"])).encode()).digest()


def _add_pages(db: sqlite3.Connection, batch: list[dict], counts: Counter) -> None:
    """One commit. A page replaces what has its address; pages without an address stand beside each other."""
    with db:
        for page in batch:
            digest, url, title, text = _page_digest(page), page["url"], page["title"], page["text"]
            if url:
                old = "SELECT id, title, text FROM pages WHERE url = ? AND digest != ?"
                for row in db.execute(old, (url, digest)).fetchall():
                    _remove_page(db, *row)
                    counts["replaced"] += 1
            sql = "INSERT OR IGNORE INTO pages (digest, url, title, text) VALUES (?, ?, ?, ?)"
            added = db.execute(sql, (digest, url, title, text))
            if added.rowcount:
                _add_words(db, added.lastrowid, title, text)
            counts["pages" if added.rowcount else "known"] += 1


def _remove_page(db: sqlite3.Connection, page: int, title: str, text: str) -> None:
    row = (page, bm25.searchable(title), bm25.searchable(text))
    db.execute("INSERT INTO words (words, rowid, title, text) VALUES ('delete', ?, ?, ?)", row)
    db.execute("DELETE FROM pages WHERE id = ?", (page,))


def _add_words(db: sqlite3.Connection, page: int, title: str, text: str) -> None:
    row = (page, bm25.searchable(title), bm25.searchable(text))
    db.execute("INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", row)


def _known(db: sqlite3.Connection, table: str, digest: bytes) -> int | None:
    found = db.execute(f"SELECT id FROM {table} WHERE digest = ?", (digest,)).fetchone()
    return found and found[0]


def _open_picture(data: bytes) -> PIL.Image.Image:
    """The picture at the size that is encoded. Raises ValueError for another file."""
    picture = decode(data)
    picture.thumbnail((ENCODED, ENCODED), PIL.Image.Resampling.BICUBIC, reducing_gap=2.0)
    return picture


# ---- the file


def _connect(file: Path, create: bool = False) -> sqlite3.Connection:
    """The index in a file; without `create` it cannot be changed. Raises UserError for another file."""
    try:
        db = open_file(file, create, f"--out {file} …")
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if is_corpus(file):
            raise UserError(f"{file} holds the passages of a corpus: name another file, or add to it with --corpus")
        if tables and db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
            raise UserError(f"{file} is a database, but not an index of search.py; name another file")
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'results'").fetchone():
            raise UserError(
                f"{file} holds recorded searches, not an index: use --search replay:{file}, or another file"
            )
        if create:
            db.executescript(SCHEMA)
            _renew_titles(db)
        if create or tables:
            _renew_words(db, file)
        if not create:
            db.execute("PRAGMA query_only = ON")
        return db
    except sqlite3.Error as error:
        raise UserError(f"{file} cannot be opened as an index ({error}); name another file, or make it again") from None


def _renew_titles(db: sqlite3.Connection) -> None:
    """Give the titles of an earlier version the column `file`, empty. One commit."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        if "file" not in {name for _, name, *_ in db.execute("PRAGMA table_info(titles)")}:
            db.execute("ALTER TABLE titles RENAME TO earlier")
            db.execute(f"CREATE TABLE {TITLES}")
            db.execute("INSERT INTO titles SELECT picture, title, url, '' FROM earlier")
            db.execute("DROP TABLE earlier")
        db.execute(TITLES_FILE)


def _renew_words(db: sqlite3.Connection, file: Path) -> None:
    """Make the full-text table of a new file, or make that of an earlier version again from its pages. One commit."""
    if _version(db) == VERSION:
        return
    try:
        db.execute(f"PRAGMA busy_timeout = {REBUILDING * 1000}")
        with db:
            db.execute("BEGIN IMMEDIATE")
            if _version(db) == VERSION:  # another process has done it meanwhile
                return
            db.execute("DROP TABLE IF EXISTS words")
            db.execute(WORDS)
            total = db.execute("SELECT count(*) FROM pages").fetchone()[0]
            pages = db.execute("SELECT id, title, text FROM pages")
            if total:
                say(f"{file}: indexing the words of {total} pages again, once", sys.stderr)
            with progress("indexing words", total, "page") as bar:
                for page in pages:
                    _add_words(db, *page)
                    bar.update()
            db.execute(f"PRAGMA user_version = {VERSION}")
    except sqlite3.OperationalError as error:
        what = f"{file} is of an earlier version, and its words cannot be indexed again ({error})"
        raise UserError(f"{what}: open it once where it can be written, or make it again") from None


def _version(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def _size(db: sqlite3.Connection) -> int:
    return db.execute("SELECT (SELECT count(*) FROM titles) + (SELECT count(*) FROM pages)").fetchone()[0]


def _open_encoder(db: sqlite3.Connection, name: str | None = None) -> Encoder:
    """The encoder of an index, compared with the one that made it. A new index records `name`, and its test vector."""
    meta = dict(db.execute("SELECT key, value FROM meta"))
    encoder = open_encoder(name or meta["encoder"])
    test = encoder.encode([_test_picture()])[0].astype(np.float32)
    if not meta:
        with db:
            db.executemany("INSERT INTO meta VALUES (?, ?)", [("encoder", encoder.name), ("test", test.tobytes())])
        return encoder
    if encoder.name != meta["encoder"]:
        raise UserError(f"the index was made with --encoder {meta['encoder']}: give that, or another --out")
    before = np.frombuffer(meta["test"], dtype=np.float32)
    if before.shape != test.shape or not before @ test > 0.999:
        raise UserError(f"encoder {encoder.name} has changed since the index was made with it: make the index again")
    return encoder


def _test_picture() -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((224, 224), PIL.Image.Resampling.BICUBIC)


# ---- searching


class Local:
    """A back-end for an index `file`, as it is when opened; `k` hits per search. Many threads may call it. All vectors
    are in memory as float32: 227 MB for 100,000 pictures with the built-in encoder."""

    own_pages = True

    def __init__(self, file: str | Path, k: int = 5):
        self.file, self.k, self.source = Path(file), k, f"local:{file}"
        self.connections = threading.local()  # one for each thread, so that SQLite searches in parallel
        try:
            with closing(_connect(self.file)) as db:
                if not _size(db):
                    raise UserError(f"{file}: the index is empty; add to it: python search.py index --out {file} …")
                self.digests, self.vectors = _load(db)
                self.encoder = _open_encoder(db) if self.digests else None
        except (sqlite3.Error, ValueError, KeyError) as error:
            raise UserError(f"{file}: the index is damaged ({error}); make it again") from None

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        """The titles of the most similar pictures; scores are cosines."""
        if self.encoder is None:
            return Observation(source=self.source)
        try:
            picture = _open_picture(image)
        except ValueError as error:
            raise ToolFailure("image", str(error)) from None
        scores = self.vectors @ self.encoder.encode([picture])[0].astype(np.float32)  # (n,)
        best = np.argpartition(-scores, min(self.k, len(scores)) - 1)[: self.k]
        best = best[np.argsort(-scores[best], kind="stable")]
        hits: list[Hit] = []
        for i in best:
            if len(hits) < self.k:
                hits += self._titles(self.digests[i], min(float(scores[i]), 1.0))
        return Observation(tuple(hits[: self.k]), source=self.source)

    def _titles(self, digest: bytes, score: float) -> Iterator[Hit]:
        """By digest: the id of a picture that is replaced after this index was opened may be used again."""
        sql = """SELECT DISTINCT title, url, thumbnail FROM titles JOIN pictures ON id = picture
                 WHERE digest = ? ORDER BY 1, 2"""
        for title, url, thumbnail in self._rows(sql, digest):
            yield Hit(title, url, image=thumbnail, score=score)

    def text_search(self, query: str) -> Observation:
        """The best pages for the query's words, each with the passage around them. BM25 counts titles twice."""
        words = bm25.sqlite_query(query)
        sql = """SELECT pages.title, url, pages.text, -rank FROM words JOIN pages ON pages.id = words.rowid
                 WHERE words MATCH ? AND rank MATCH 'bm25(2.0, 1.0)' ORDER BY rank LIMIT ?"""
        found = self._rows(sql, words, self.k) if words else []
        matched = _matched(query, [text for _, _, text, _ in found])
        hits = (Hit(title, url, passage(text, matched), score=score) for title, url, text, score in found)
        return Observation(tuple(hits), source=self.source)

    def read_page(self, address: str) -> Observation:
        """The whole page with this address; none where there is no such page."""
        found = self._rows("SELECT title, url, text FROM pages WHERE url = ?", address)
        hits = (Hit(title, url, text) for title, url, text in found)
        return Observation(tuple(hits), source=self.source)

    def _rows(self, sql: str, *values: Any) -> list[tuple]:
        try:
            if not hasattr(self.connections, "own"):
                self.connections.own = _connect(self.file)
            return self.connections.own.execute(sql, values).fetchall()
        except (sqlite3.Error, UserError) as error:
            raise ToolFailure("index", f"{self.source}: {error}") from None


def _load(db: sqlite3.Connection) -> tuple[list[bytes], np.ndarray]:
    """Digests, n, and vectors (n, d) float32 of all pictures. Raises ValueError where the vectors differ in length."""
    n, length = db.execute("SELECT count(*), max(length(vector)) FROM pictures").fetchone()
    digests = []
    vectors = np.empty((n, (length or 0) // 2), dtype=np.float32)
    rows = db.execute("SELECT digest, vector FROM pictures ORDER BY id LIMIT ?", (n,))
    for i, (digest, vector) in enumerate(rows):
        digests.append(digest)
        vectors[i] = np.frombuffer(vector, dtype=np.float16)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(vectors.sum())
    if not finite:
        raise ValueError("a vector is not finite")
    return digests, vectors


def _matched(query: str, texts: list[str]) -> set[str]:
    """The tokens of `texts` that match the query. SQLite has to tell, because it removes English endings."""
    starts = {word[:2] for word in bm25.query_tokens(query)}  # never part of an ending; leaves few tokens to try
    tokens = {token for text in texts for token in bm25.tokens(text) if token[:2] in starts}
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"CREATE VIRTUAL TABLE words USING fts5 (word, {bm25.STEMMED})")
        db.executemany("INSERT INTO words VALUES (?)", zip(tokens))
        found = db.execute("SELECT word FROM words WHERE words MATCH ?", [bm25.sqlite_query(query)]) if tokens else ()
        return {word for (word,) in found}


def passage(text: str, matched: set[str], limit: int = PASSAGE) -> str:
    """At most `limit` characters of a text, in whole words, around the part with the most different matched tokens; the
    beginning of the text where no token matches."""
    words = list(re.finditer(r"\S{1,100}", text))  # cut at 100, because Chinese texts and addresses have no blanks
    if not words:
        return ""
    starts = [word.start() for word in words]
    ends = [word.end() for word in words]
    found = []
    for i, word in enumerate(words):
        found += [(i, token) for token in matched.intersection(bm25.tokens(word[0]))]
    first, last = _densest(found, starts, limit - 100)
    grown = True
    while grown:  # add a word on each side while there is room
        grown = False
        for before, after in ((0, 1), (1, 0)):
            left, right = first - before, last + after
            if left >= 0 and right < len(words) and ends[right] - starts[left] <= limit:
                first, last, grown = left, right, True
    shown = " ".join(text[starts[first] : ends[last]].split())
    return "… " * (first > 0) + shown + " …" * (last < len(words) - 1)


def _densest(found: list[tuple[int, str]], starts: list[int], limit: int) -> tuple[int, int]:
    """The first and the last word of the shortest part with the most different tokens; `found`: (word, token)."""
    most = 0
    chosen = (0, 0)
    left = 0  # of the sliding window over `found`
    inside: Counter = Counter()  # tokens in the window
    for word, token in found:
        inside[token] += 1
        while starts[word] - starts[found[left][0]] > limit or inside[found[left][1]] > 1:
            inside[found[left][1]] -= 1
            left += 1
        distinct = len(+inside)  # without zero counts
        if distinct > most:
            most = distinct
            chosen = (found[left][0], word)
    return chosen
