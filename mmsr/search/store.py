"""Search results and counts of paid calls, in one SQLite file that several processes can share.

The key of a result is the tool, the normalised query or the SHA-256 of the picture's bytes, the form of the result
(thumbnails, summaries, …) and, where the result depends on it, the question. Rows are JSON with a checksum. Each
thumbnail is stored once, by digest. A row with a wrong checksum is moved aside and counts as not recorded. Nothing is
unpickled. Failures are not stored; empty results are.

A look-up of one form has one row. A look-up of any form (a replay) gives the newest row. What is imported takes the
place of an older row with its key; what a running search records does not (see `Store.put`).

Traps. A transaction that reads and then writes needs BEGIN IMMEDIATE: with a plain BEGIN most fail under contention.
Write-ahead logging needs shared memory: processes of one machine may share a file, machines on a network drive may not.
Open a file once per process, after a fork and not before: closing a second handle releases the first one's locks.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import json
import math
import os
import sqlite3
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

from mmsr.episode import Hit, Observation
from mmsr.system.errors import UserError
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, VISIT, ToolFailure

APPLICATION, VERSION = 0x6D6D7372, 1  # "mmsr" in the file's header, and the version of the tables
SCHEMA = """
CREATE TABLE results (id INTEGER PRIMARY KEY AUTOINCREMENT, tool TEXT, query TEXT, form TEXT, question TEXT,
                      payload TEXT, time REAL, checksum TEXT, UNIQUE (tool, query, form, question));
CREATE TABLE quarantine (id INTEGER PRIMARY KEY, tool, query, form, question, payload, time, checksum);
CREATE TABLE thumbnails (digest TEXT PRIMARY KEY, image BLOB);
CREATE TABLE counters (name TEXT, tool TEXT, n INTEGER, PRIMARY KEY (name, tool));
CREATE TABLE spend (run TEXT, step INTEGER, provider TEXT, n INTEGER, PRIMARY KEY (run, step, provider))
"""
TABLES = [statement.strip() for statement in SCHEMA.split(";")]
FIND = """
SELECT * FROM results WHERE tool=? AND query=? AND form=COALESCE(?, form) AND question IN ('', ?)
ORDER BY question DESC, time DESC, id DESC
"""
DELETE_OLDER = "DELETE FROM results WHERE tool=? AND query=? AND form=? AND question=? AND time<? AND payload!=?"
LIST = """
SELECT id, tool, query, form, question, time, json_extract(sound, '$.source'), json_array_length(sound, '$.hits'),
       json_extract(sound, '$.hits[0].title')
FROM (SELECT *, CASE WHEN json_valid(payload) THEN payload END AS sound FROM results) ORDER BY id
"""
DAMAGE = (sqlite3.DatabaseError, UnicodeError)  # UnicodeError: an error message that quotes damaged text
BUSY = 30.0  # seconds that one write waits for another
POLL = 0.02  # seconds between two tries to get a lock that another process holds
UNWRITTEN = 500  # counts that a kill may lose
BATCH = 200  # rows in one transaction


class StoreWarning(RuntimeWarning):
    """A file of recorded searches cannot be used fully; the run continues."""


class Key(NamedTuple):
    """The key of a result."""

    tool: str
    query: str  # normalised, or the picture's SHA-256
    form: str | None = ""  # None, in a look-up: any form
    question: str = ""  # a digest, where the result is for one question


Record = tuple[Key, Observation, float]  # the time of recording is in seconds since 1970


class Entry(NamedTuple):
    """A row of the file without its thumbnails. Its checksum has not been checked."""

    number: int
    tool: str
    query: str
    form: str
    question: str
    time: float  # seconds since 1970
    source: str | None  # None: the row is damaged
    hits: int
    title: str  # of the first hit


def text_key(query: str, form: str | None = "") -> Key:
    """Queries that differ only in letter case and blanks have the same key."""
    return Key(TEXT_SEARCH, " ".join(query.casefold().split()), form)


def image_key(image: bytes, form: str | None = "", question: str = "") -> Key:
    return Key(IMAGE_SEARCH, sha256(image), form, question and sha256(storable(question).encode())[:16])


def page_key(address: str, form: str | None = "") -> Key:
    """Of a page that was read: addresses are compared letter by letter."""
    return Key(VISIT, address, form)


class Store:
    """The file. Without a path it is temporary; with `readonly` it is only read. Any thread may use any method. A
    damaged file is moved aside, and what can be read of it is copied into a new one. A file that cannot be written
    gives one StoreWarning; everything but a `Budget` works without recording. Raises UserError for a file of another
    kind and, with `readonly`, for one that is missing or damaged."""

    def __init__(self, path: str | Path | None, readonly: bool = False):
        self._folder = None
        if path is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mmsr-searches-", ignore_cleanup_errors=True)
            path = Path(self._folder.name) / "searches.sqlite"
        self.path, self.readonly = Path(path), readonly
        self.counts: Counter[tuple[str, str]] = Counter()  # by (name, tool), not yet in the file
        self._lock = threading.Lock()
        self._local = threading.local()  # each thread's connection, as `db`
        self._connections: list[sqlite3.Connection] = []
        self._in_flight: dict[Key, Future[Observation]] = {}  # searches that a thread is making
        self._locks: Any = None  # a file; each search that is being made locks one byte
        self._warned = False
        refuse_pickle(self.path)
        if readonly:
            self._open_to_replay()
        else:
            self._open_to_record()
        atexit.register(self.close)

    def close(self) -> None:
        """Write the counts and close the file. The store cannot be used after that."""
        atexit.unregister(self.close)
        with suppress(sqlite3.Error):
            self._write(self._write_counts)
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        if self._locks:
            self._locks.close()
        if self._folder:
            self._folder.cleanup()

    def require_writable(self) -> None:
        """Raises UserError where nothing can be recorded."""
        try:
            self._write(lambda db: None)
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be written ({error}); name another file") from None

    # ---- results

    def get(self, key: Key) -> Observation | None:
        """The recorded result, with `cached` set; None where there is none, or only a damaged one. Of several forms
        the newest."""
        key = Key(*(part and storable(part) for part in key))
        try:
            rows = self._db.execute(FIND, key).fetchall()
        except sqlite3.Error as error:
            self._warn("cannot be read", error)
            return None
        for row in rows:
            if row[1:3] == key[:2] and (seen := self._checked(row)):  # a damaged index may give rows of other keys
                return seen
        return None

    def put(self, key: Key, seen: Observation) -> bool:
        """Record a result, on disk when this returns. False where there is one already, or it cannot be recorded: two
        processes that made the same search both go on with the first result, which a resumed run sees again."""
        return self.add([(key, seen, time.time())], keep=True) == 1

    def add(self, records: Iterable[Record], keep: bool = False) -> int:
        """Record results, except failures and malformed ones. An older result with the same key is replaced, unless
        `keep`. Returns how many were recorded; not those that were there already."""
        new = 0
        records = iter(records)
        while batch := list(islice(records, BATCH)):
            rows = []
            for record in batch:
                if row := self._row(*record):
                    rows.append(row)
            try:
                new += self._write(self._insert, rows, keep)
            except sqlite3.Error as error:
                self._warn("results are not recorded", error)
        return new

    def records(self) -> Iterator[Record]:
        """All undamaged results, in the order of their recording."""
        for row in self._db.execute("SELECT * FROM results ORDER BY id"):
            if seen := self._checked(row):
                yield Key(*row[1:5]), seen, row[6]

    def entries(self) -> Iterator[Entry]:
        """All rows, damaged ones too, in the order of their recording."""
        for number, *key, when, source, hits, title in self._db.execute(LIST):
            sound = source is not None and isinstance(when, float) and all(isinstance(part, str) for part in key)
            seconds = when if isinstance(when, float) else 0.0
            tool, query, form, question = map(str, key)
            engine = str(source) if sound else None
            yield Entry(number, tool, query, form, question, seconds, engine, hits or 0, str(title or ""))

    def record(self, number: int) -> Record | None:
        """The undamaged result of this number."""
        row = self._db.execute("SELECT * FROM results WHERE id=?", [number]).fetchone()
        seen = row and self._checked(row)
        return (Key(*row[1:5]), seen, row[6]) if seen else None

    def drop(self, numbers: Iterable[int], damaged: bool = False) -> int:
        """Remove the results of these numbers and, with `damaged`, all rows that were set aside; then the thumbnails
        that no result has. Returns how many rows were removed. Counts and paid calls stay. Raises UserError."""
        try:
            removed = self._write(_drop, list(numbers), damaged)
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: cannot be written ({error}); end what uses it, or copy it") from None
        return removed

    def _row(self, key: Key, seen: Observation, when: float) -> tuple[tuple, dict[str, bytes]] | None:
        """A result's row and its thumbnails by digest. None for a failure, and for what could not be read back."""
        thumbnails = {sha256(hit.image): hit.image for hit in seen.hits if isinstance(hit.image, bytes)}
        try:
            payload = json.dumps(as_json(seen, sha256), default=float)
            observation(json.loads(payload), thumbnails.get)
        except (ValueError, TypeError):
            self.count("unstorable", key.tool)
            return None
        if not seen.ok:
            return None
        fields = (*map(storable, key), payload, float(when))
        return (None, *fields, _checksum(fields)), thumbnails

    def _insert(self, db: sqlite3.Connection, rows: list[tuple[tuple, dict[str, bytes]]], keep: bool) -> int:
        new = 0
        for row, thumbnails in rows:
            if not keep:
                _, *key, payload, when, _ = row
                db.execute(DELETE_OLDER, (*key, when, payload))
            db.executemany("INSERT OR REPLACE INTO thumbnails VALUES (?, ?)", thumbnails.items())
            new += db.execute("INSERT OR IGNORE INTO results VALUES (?,?,?,?,?,?,?,?)", row).rowcount
        self._write_counts(db)
        return new

    def _checked(self, row: tuple) -> Observation | None:
        """A row's result; a damaged row gives None and is moved to the table `quarantine`."""
        number, tool, *_, payload, when, checksum = row
        try:
            if checksum != _checksum(row[1:-1]):
                raise ValueError("checksum")
            demand(str, *row[1:5])
            demand_number(when)
            return observation(json.loads(payload), lambda name: self._thumbnail(name, tool))
        except (ValueError, TypeError, KeyError, RecursionError):
            self.count("damaged_rows", str(tool))
        with suppress(sqlite3.Error):  # in a file that cannot be written it stays where it is
            self._write(_quarantine, number)
        return None

    def _thumbnail(self, name: str, tool: str) -> bytes | None:
        with suppress(sqlite3.Error):
            found = self._db.execute("SELECT image FROM thumbnails WHERE digest=?", [storable(name)]).fetchone()
            if found and isinstance(found[0], bytes) and sha256(found[0]) == name:
                return found[0]
        self.count("missing_thumbnails", tool)
        return None

    # ---- one caller at a time

    def once(self, key: Key, work: Callable[[], Observation], patience: float) -> Observation:
        """`work()`, called by one thread of one process at a time for each key. Threads that call this meanwhile share
        its result or exception; other processes wait until it ends or its process dies. ToolFailure("timeout") after
        `patience` seconds of waiting."""
        with self._lock:
            future = self._in_flight.get(key)
            first = future is None
            if first:
                future = self._in_flight[key] = Future()
        if first:
            self._work(future, key, work, patience)
            return future.result()
        if not wait([future], patience).done:
            raise _waited(patience)
        return replace(future.result(), cached=True)

    def _work(self, future: Future[Observation], key: Key, work: Callable[[], Observation], patience: float) -> None:
        try:
            with self._locked(1 + int(sha256(ascii(key).encode())[:15], 16), patience):
                future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        finally:
            with self._lock:
                del self._in_flight[key]

    @contextmanager
    def _locked(self, offset: int, patience: float) -> Iterator[None]:
        """Lock one byte of the lock file. The system releases it when this process dies, even by kill -9."""
        deadline = time.monotonic() + patience
        while self._locks:
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break  # a file system without locks: a search may then be made twice
                if time.monotonic() > deadline:
                    raise _waited(patience) from None
                time.sleep(POLL)
        try:
            yield
        finally:
            if self._locks:
                with suppress(OSError):
                    fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, offset)

    # ---- counts and money

    def count(self, name: str, tool: str) -> None:
        """Add one. Counts are written with the next result, when there are UNWRITTEN of them, and by `close`."""
        with self._lock:
            self.counts[name, tool] += 1
            many = self.counts.total() % UNWRITTEN == 0
        if many:
            with suppress(sqlite3.Error):
                self._write(self._write_counts)

    def _write_counts(self, db: sqlite3.Connection) -> None:
        with self._lock:
            counts, self.counts = self.counts, Counter()
        sql = "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n"
        db.executemany(sql, [(*name, n) for name, n in counts.items()])

    def spent(self, run: str) -> dict[str, int]:
        """Paid calls of a run, by provider."""
        return dict(self._db.execute("SELECT provider, SUM(n) FROM spend WHERE run=? GROUP BY 1 ORDER BY 1", [run]))

    def stats(self) -> dict[str, Any]:
        """The file's contents in numbers: `results` by tool and source, `counts` by name and tool, `spent` by run."""
        source = "CASE WHEN json_valid(payload) THEN json_extract(payload, '$.source') END"
        tables: dict[str, dict[str, dict[str, int]]] = {"results": {}, "counts": {}}
        for tool, name, n in self._db.execute(f"SELECT tool, {source}, COUNT(*) FROM results GROUP BY 1, 2"):
            tables["results"].setdefault(str(tool), {})[str(name)] = n
        counts = self.counts.copy()
        undamaged = "typeof(name) = 'text' AND typeof(tool) = 'text' AND typeof(n) = 'integer'"
        rows = self._db.execute(f"SELECT name, tool, n FROM counters WHERE {undamaged}")
        counts.update({(name, tool): n for name, tool, n in rows})
        for (name, tool), n in sorted(counts.items()):
            tables["counts"].setdefault(name, {})[tool] = n
        runs = [run for (run,) in self._db.execute("SELECT DISTINCT run FROM spend ORDER BY 1")]
        sizes = "SELECT (SELECT COUNT(*) FROM thumbnails), (SELECT COUNT(*) FROM quarantine)"
        thumbnails, quarantined = self._db.execute(sizes).fetchone()
        size = sum(file.stat().st_size for file in self._files() if file.exists())
        spent = {run: self.spent(run) for run in runs}
        return {"bytes": size, "thumbnails": thumbnails, "quarantined": quarantined, "spent": spent, **tables}

    # ---- the file

    @property
    def _db(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self._local, "db"):
            self._local.db = self._connect()
            with self._lock:
                self._connections.append(self._local.db)
        return self._local.db

    def _connect(self) -> sqlite3.Connection:
        modes = ["mode=ro"] if self.readonly else ["mode=rwc", "mode=ro"]
        journal = self._files()[1]
        if not (journal.exists() and journal.stat().st_size):
            modes.append("mode=ro&immutable=1")  # for a folder that cannot be written; this mode ignores a journal
        for mode in modes:
            try:
                db = _opened(self.path, mode)
                db.execute("SELECT 1 FROM sqlite_master")  # `connect` alone does not open the file
                return db
            except sqlite3.OperationalError as error:
                problem = error
        raise problem

    def _write(self, work: Callable[..., Any], *arguments: Any) -> Any:
        with self._db as db:  # commits, or rolls back after an exception
            db.execute("BEGIN IMMEDIATE")
            return work(db, *arguments)

    def _open_to_replay(self) -> None:
        if not self.path.is_file():
            what = "a folder; name a file" if self.path.is_dir() else "no such file; check the path"
            raise UserError(f"{self.path}: {what}")
        try:
            self._prepare()
        except sqlite3.OperationalError as error:
            hint = "if its folder is read-only, copy it and its -wal file to another"
            raise UserError(f"{self.path}: cannot be opened ({error}); {hint}") from None
        except DAMAGE as error:
            complaint = f"no file of recorded searches, or damaged ({error}); get it again"
            raise UserError(f"{self.path}: {complaint}") from None

    def _open_to_record(self) -> None:
        if self.path.is_dir():
            raise UserError(f"{self.path}: a folder; name a file")
        lock = Path(f"{self.path}.lock")
        new = not lock.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._locks = lock.open("ab")
        except OSError as error:
            self._warn("cannot be locked", error)
        with self._locked(0, BUSY):  # only one process moves a damaged file aside
            try:
                self._prepare()
            except sqlite3.OperationalError as error:
                self._warn("results are not recorded", error)
            except DAMAGE as error:
                if _of_another_kind(self.path):
                    if new:
                        lock.unlink(missing_ok=True)
                    raise UserError(f"{self.path}: no file of recorded searches; name another file") from None
                self._replace_damaged(error)
            except UserError:  # a file of another kind gets no lock beside it
                if new:
                    lock.unlink(missing_ok=True)
                raise

    def _prepare(self) -> None:
        """Check the file, or make its tables. sqlite3.DatabaseError where it is damaged."""
        db = self._db
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        fresh = not self.readonly and not db.execute("SELECT 1 FROM sqlite_master").fetchone()
        if not fresh and application != APPLICATION:
            raise UserError(f"{self.path}: a database of something else; name a file of recorded searches")
        if not fresh and version != VERSION:
            raise UserError(f"{self.path}: has version {version}, this program reads {VERSION}; name another file")
        if fresh:
            db.execute("PRAGMA journal_mode=WAL")
            self._write(_make_tables)
        if db.execute("SELECT 1 FROM sqlite_master WHERE name='pictures'").fetchone():
            advice = "search it with --search local:FILE, or name another file"
            raise UserError(f"{self.path}: an index of pictures and pages, no recorded searches; {advice}")
        if (found := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(" ".join(found.split()))
        objects = db.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        if not {*TABLES} <= {sql for *_, sql in objects}:
            raise sqlite3.DatabaseError("a table is not as it was made")
        for kind, name, sql in objects:  # nothing else may be there: a trigger could undo what was just written
            if sql not in TABLES and (kind in ("trigger", "view") or not str(name).startswith("sqlite_")):
                raise sqlite3.DatabaseError(f"the {kind} {name!r:.60} is not one of ours")

    def _replace_damaged(self, error: Exception) -> None:
        """Move a damaged file aside, and copy what can be read of it into a new one."""
        for connection in self._connections:
            connection.close()
        self._connections = []
        self._local = threading.local()
        n = 1
        while os.path.exists(aside := f"{self.path}.damaged-{n}"):
            n += 1
        for file, suffix in zip(self._files(), ("", "-wal", "-shm")):
            with suppress(FileNotFoundError):
                file.rename(aside + suffix)
        self._prepare()
        copied = self._write(_salvage, Path(aside))
        complaint = f"damaged ({error}): moved to {aside}, {copied} results kept"
        warnings.warn(f"{self.path}: {complaint}", StoreWarning, stacklevel=5)

    def _files(self) -> list[Path]:
        return [Path(f"{self.path}{suffix}") for suffix in ("", "-wal", "-shm")]

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self.path}: {what} ({error}); the run continues", StoreWarning, stacklevel=3)


class Budget:
    """The paid calls of a run: at most `total`, and at most `per_step` in a step unless that is 0. Each call is
    reserved in a store before it is made, so that a crash may waste one call but never overspends. `ledger` is the
    store, or its file, which is created by the first paid call, so that a run which is refused before it starts leaves
    no file. None: a temporary store."""

    def __init__(self, ledger: Store | Path | None, run: str, total: int, per_step: int = 0):
        self.ledger, self.run, self.total, self.per_step = ledger, run, total, per_step
        self.step: str | int = 0
        self._lock = threading.Lock()

    def begin_step(self, step: str | int) -> None:
        """Count the calls from now on for this step."""
        self.step = step

    def spend(self, provider: str) -> None:
        """Reserve one call. ToolFailure("budget") where no call is left, or where the file cannot be written."""
        try:
            self._store()._write(self._reserve, provider)
        except sqlite3.Error as error:
            raise ToolFailure("budget", f"cannot be kept in {self._store().path} ({error})") from None

    @property
    def spent(self) -> dict[str, int]:
        """Paid calls by provider, of all processes and from before a resume; empty where there is no readable file."""
        if isinstance(self.ledger, Store) or self.ledger and self.ledger.exists():
            with suppress(sqlite3.Error):
                return self._store().spent(self.run)
        return {}

    @property
    def left(self) -> float:
        """Paid calls that may still be made in this step."""
        spent, in_step = 0, 0
        if isinstance(self.ledger, Store) or self.ledger and self.ledger.exists():
            with suppress(sqlite3.Error):  # `spend` says so, at the next call
                spent, in_step = self._spent(self._store()._db)
        left = self.total - spent
        return min(left, self.per_step - in_step) if self.per_step else left

    def _store(self) -> Store:
        with self._lock:
            if not isinstance(self.ledger, Store):
                self.ledger = Store(self.ledger)
            return self.ledger

    def _spent(self, db: sqlite3.Connection) -> tuple[int, int]:
        """Paid calls of the run, and of this step."""
        sums = "SELECT COALESCE(SUM(n), 0), COALESCE(SUM(n * (step=?)), 0) FROM spend WHERE run=?"
        return db.execute(sums, [self.step, self.run]).fetchone()

    def _reserve(self, db: sqlite3.Connection, provider: str) -> None:
        spent, in_step = self._spent(db)
        if db.execute("SELECT 1 FROM spend WHERE run=? AND (typeof(n) != 'integer' OR n < 0)", [self.run]).fetchone():
            what = f"a count of paid calls of run {self.run} is damaged"
            raise ToolFailure("budget", f"{what}; remove its row from the table spend")
        if spent >= self.total:
            raise ToolFailure("budget", f"all {self.total} paid calls of run {self.run} are spent")
        if self.per_step and in_step >= self.per_step:
            raise ToolFailure("budget", f"all {self.per_step} paid calls of step {self.step} are spent")
        sql = "INSERT INTO spend VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET n = n + 1"
        db.execute(sql, [self.run, self.step, provider])


# ---- rows


def as_json(seen: Observation, image: Callable[[bytes], str]) -> dict[str, Any]:
    """A result as a JSON object; `image` gives the text for a thumbnail."""
    hits = [asdict(hit) | {"image": None if hit.image is None else image(hit.image)} for hit in seen.hits]
    return {"source": seen.source, "seconds": seen.seconds, "hits": hits}


def observation(found: Any, image: Callable[[str], bytes | None]) -> Observation:
    """The inverse of `as_json`. TypeError or KeyError where a field is missing or has a wrong type."""
    hits = []
    demand(list, found["hits"])
    for given in found["hits"]:
        hit = Hit(given["title"], given["url"], given["text"], given["image"], given["score"])
        demand(str, hit.title, hit.url, hit.text)
        demand((str, type(None)), hit.image)
        if hit.score is not None:
            demand_number(hit.score, finite=False)
        hits.append(hit if hit.image is None else replace(hit, image=image(given["image"])))
    demand(str, found["source"])
    if demand_number(found["seconds"]) < 0:
        raise TypeError("the number is out of bounds")
    return Observation(tuple(hits), source=found["source"], seconds=found["seconds"], cached=True)


def demand(kind: Any, *values: object) -> None:
    """Raises TypeError for a value of another type; True and False are not numbers."""
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{value!r:.60} is of the wrong type")


def demand_number(value: Any, finite: bool = True) -> float:
    """The number as a float. TypeError for anything else, and for a number that is too large for a float."""
    demand((int, float), value)
    if isinstance(value, int) and value.bit_length() > 1000 or finite and not math.isfinite(value):
        raise TypeError("the number is out of bounds")
    return float(value)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def storable(text: str) -> str:
    """Text that SQLite accepts: lone surrogates become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def refuse_pickle(path: Path) -> None:
    with suppress(OSError), path.open("rb") as file:
        if file.read(1) == b"\x80" or path.suffix in (".pkl", ".pickle"):
            raise UserError(f"{path}: a pickle, which may run any code when it is read; give a file of another format")


def _of_another_kind(path: Path) -> bool:
    """Whether a file that SQLite cannot read is a picture, a text, or anything else that never was a database: neither
    its first bytes nor those that SQLite leaves 0 are as in a database. Damage rarely changes both."""
    with path.open("rb") as file:
        head = file.read(100)
    return not head.startswith(b"SQLite format 3\0") and any(head[72:92] or head)


def _waited(patience: float) -> ToolFailure:
    return ToolFailure("timeout", f"the same search has been running elsewhere for {patience:g} s")


def _checksum(fields: Iterable[Any]) -> str:
    return sha256(ascii(tuple(fields)).encode())


def _quarantine(db: sqlite3.Connection, number: int) -> None:
    db.execute("INSERT INTO quarantine SELECT * FROM results WHERE id=?", [number])
    db.execute("DELETE FROM results WHERE id=?", [number])  # because of AUTOINCREMENT no other row gets this id


def _drop(db: sqlite3.Connection, numbers: list[int], damaged: bool) -> int:
    removed = sum(db.execute("DELETE FROM results WHERE id=?", [number]).rowcount for number in numbers)
    if damaged:
        removed += db.execute("DELETE FROM quarantine").rowcount
    shown = set()
    for (payload,) in db.execute("SELECT payload FROM results"):
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # a damaged row shows nothing
            shown.update(hit["image"] for hit in json.loads(payload)["hits"] if isinstance(hit["image"], str))
    digests = [digest for (digest,) in db.execute("SELECT digest FROM thumbnails")]
    db.executemany("DELETE FROM thumbnails WHERE digest=?", [[digest] for digest in digests if digest not in shown])
    return removed


def _make_tables(db: sqlite3.Connection) -> None:
    for statement in (*TABLES, f"PRAGMA application_id={APPLICATION}", f"PRAGMA user_version={VERSION}"):
        db.execute(statement)


def _salvage(db: sqlite3.Connection, damaged: Path) -> int:
    """Copy what can be read; returns the number of results. Each table is read from both ends up to the damage."""
    copied: Counter[str] = Counter()
    with suppress(*DAMAGE), closing(_opened(damaged, "mode=ro")) as old:
        old.execute("PRAGMA writable_schema=ON")  # else one damaged table definition makes all tables unreadable
        tables = {name for (name,) in old.execute("SELECT name FROM sqlite_master WHERE type='table'")}  # no views
        for table, order in product(("spend", "results", "thumbnails"), ("ASC", "DESC")):
            if table not in tables:
                continue
            with suppress(*DAMAGE):
                columns = [name for (_, name, *_) in db.execute(f"PRAGMA table_info({table})")]
                values = ",".join("?" * len(columns))
                for row in old.execute(f"SELECT {','.join(columns)} FROM {table} ORDER BY rowid {order}"):
                    copied[table] += db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({values})", row).rowcount
    return copied["results"]


def _opened(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{mode}"
    db = sqlite3.connect(uri, BUSY, isolation_level=None, check_same_thread=False, uri=True)
    db.execute("PRAGMA trusted_schema=OFF")  # the schema of an untrusted file must not call functions
    db.text_factory = lambda raw: raw.decode(errors="backslashreplace")  # damaged text fails its checksum later
    return db
