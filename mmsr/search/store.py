"""Search results, and what was paid for them, in one SQLite file that processes share.

A result is known by its `Key`: the tool, the normalised query or the SHA-256 of the picture's bytes, the form it was
made in (thumbnails, summaries, …) and, where that guided it, the question. Rows are JSON with a checksum, thumbnails
stand once under their digest. A row that does not fit its checksum is set aside and counts as not recorded; nothing is
ever unpickled. Failures are not stored, nothing found is.

Traps. A transaction that reads and then writes needs BEGIN IMMEDIATE: with a plain BEGIN most fail under contention.
Write-ahead logging needs shared memory: processes of one machine may share a file, machines on a network drive may not.
Open a file once per process, after a fork and not before: closing a second copy lets go of the first one's locks.
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
from itertools import count, islice, product
from pathlib import Path
from typing import Any, NamedTuple

from mmsr.episode import Hit, Observation
from mmsr.system.errors import UserError
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, ToolFailure

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
ORDER BY question DESC, id
"""
DAMAGE = (sqlite3.DatabaseError, UnicodeError)  # the latter where an error message quotes damaged text
BUSY = 30.0  # seconds that one write waits for another
POLL = 0.02  # seconds between two looks at a lock that another process holds
UNWRITTEN = 500  # counts that a kill may lose
BATCH = 200  # rows in one transaction


class StoreWarning(RuntimeWarning):
    """A file of recorded searches is not what it should be; the run goes on."""


class Key(NamedTuple):
    """What a result is known by."""

    tool: str
    query: str  # normalised, or the picture's SHA-256
    form: str | None = ""  # None, in a look-up: whichever there is
    question: str = ""  # a digest, where results were made for one question


Record = tuple[Key, Observation, float]  # the last is when it was recorded, in seconds since 1970


def text_key(query: str, form: str | None = "") -> Key:
    """Letter case and blanks make no difference."""
    return Key(TEXT_SEARCH, " ".join(query.casefold().split()), form)


def image_key(image: bytes, form: str | None = "", question: str = "") -> Key:
    return Key(IMAGE_SEARCH, sha256(image), form, question and sha256(storable(question).encode())[:16])


class Store:
    """The file. Without a path, a private one that goes with the process; with `readonly`, one to replay from.

    One that is no database or damaged is moved aside, and what can be read of it is kept. One that cannot be written is
    told of once, as a StoreWarning, and everything but a `Budget` goes on without. Raises UserError for a file of
    another kind and, with `readonly`, for one that is missing or damaged. Any thread may use any method.
    """

    def __init__(self, path: str | Path | None, readonly: bool = False):
        self._folder = None
        if path is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mmsr-searches-", ignore_cleanup_errors=True)
            path = Path(self._folder.name) / "searches.sqlite"
        self.path, self.readonly = Path(path), readonly
        self.counts: Counter[tuple[str, str]] = Counter()  # (name, tool) that are not yet in the file
        self._lock, self._local = threading.Lock(), threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._flights: dict[Key, Future[Observation]] = {}
        self._locks: Any = None  # a file, every byte of which stands for a search under way
        self._warned = False
        refuse_pickle(self.path)
        self._open_to_replay() if readonly else self._open_to_record()
        atexit.register(self.close)

    def close(self) -> None:
        """Write the counts and let go of the file. A store is not used after that."""
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
        """The recorded result, as it was but for `cached`; None where there is none, or no sound one."""
        key = Key(*(part and storable(part) for part in key))
        try:
            rows = self._db.execute(FIND, key).fetchall()
        except sqlite3.Error as error:
            self._warn("cannot be read", error)
            return None
        meant = (row for row in rows if row[1:3] == key[:2])  # a damaged index gives rows of other keys
        return next(filter(None, map(self._sound, meant)), None)

    def put(self, key: Key, seen: Observation) -> bool:
        """Record a result; on the disk when this returns. False where there is one already or it is not recorded."""
        return self.add([(key, seen, time.time())]) == 1

    def add(self, records: Iterable[Record]) -> int:
        """Record results, and return how many were new. Failures and ill-formed ones are passed over."""
        new, records = 0, iter(records)
        while batch := list(islice(records, BATCH)):
            rows = [row for row in (self._row(*record) for record in batch) if row]
            try:
                new += self._write(self._insert, rows)
            except sqlite3.Error as error:
                self._warn("results are not recorded", error)
        return new

    def records(self) -> Iterator[Record]:
        """All sound results, in the order of their recording."""
        for row in self._db.execute("SELECT * FROM results ORDER BY id"):
            if seen := self._sound(row):
                yield Key(*row[1:5]), seen, row[6]

    def _row(self, key: Key, seen: Observation, when: float) -> tuple[tuple, dict[str, bytes]] | None:
        """A result's row and its thumbnails by digest. What could not be read back is not written."""
        thumbnails = {sha256(hit.image): hit.image for hit in seen.hits if isinstance(hit.image, bytes)}
        try:
            payload = json.dumps(plain(seen, sha256), default=float)
            observation(json.loads(payload), thumbnails.get)
        except (ValueError, TypeError):
            self.count("unstorable", key.tool)
            return None
        fields = (*map(storable, key), payload, float(when))
        return ((None, *fields, _checksum(fields)), thumbnails) if seen.ok else None

    def _insert(self, db: sqlite3.Connection, rows: list[tuple[tuple, dict[str, bytes]]]) -> int:
        new = 0
        for row, thumbnails in rows:
            db.executemany("INSERT OR REPLACE INTO thumbnails VALUES (?, ?)", thumbnails.items())
            new += db.execute("INSERT OR IGNORE INTO results VALUES (?,?,?,?,?,?,?,?)", row).rowcount
        self._write_counts(db)
        return new

    def _sound(self, row: tuple) -> Observation | None:
        """A row's result; an unsound row is set aside."""
        number, tool, *_, payload, when, checksum = row
        try:
            if checksum != _checksum(row[1:-1]):
                raise ValueError("checksum")
            demand(str, *row[1:5])
            demand_number(when)
            return observation(json.loads(payload), lambda name: self._thumbnail(name, tool))
        except (ValueError, TypeError, KeyError, RecursionError):
            self.count("damaged_rows", str(tool))
        with suppress(sqlite3.Error):  # in a file that cannot be written it stays, and is passed over again
            self._write(_set_aside, number)
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
        """`work()`, while nobody else does the same: threads that come meanwhile share its result or exception, other
        processes wait for it to end or its process to die. ToolFailure("timeout") after `patience` seconds of that.
        """
        with self._lock:
            flight = self._flights.get(key)
            if first := flight is None:
                flight = self._flights[key] = Future()
        if first:
            self._lead(flight, key, work, patience)
        elif not wait([flight], patience).done:
            raise _waited(patience)
        return flight.result() if first else replace(flight.result(), cached=True)

    def _lead(self, flight: Future[Observation], key: Key, work: Callable[[], Observation], patience: float) -> None:
        try:
            with self._alone(1 + int(sha256(ascii(key).encode())[:15], 16), patience):
                flight.set_result(work())
        except BaseException as error:
            flight.set_exception(error)
        finally:
            with self._lock:
                del self._flights[key]

    @contextmanager
    def _alone(self, place: int, patience: float) -> Iterator[None]:
        """Hold a byte of the lock file; the system lets go of it when this process dies, however it dies."""
        deadline = time.monotonic() + patience
        while self._locks:
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break  # a file system without locks: searches may then be made twice
                if time.monotonic() > deadline:
                    raise _waited(patience) from None
                time.sleep(POLL)
        try:
            yield
        finally:
            if self._locks:
                with suppress(OSError):
                    fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    # ---- counts and money

    def count(self, name: str, tool: str) -> None:
        """Add one. Counts reach the file with the next result, when there are many, and on `close`."""
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
        """What the file holds, as JSON: `results` by tool and source, counts by name and tool, `spent` by run."""
        source = "CASE WHEN json_valid(payload) THEN json_extract(payload, '$.source') END"
        tables: dict[str, dict[str, dict[str, int]]] = {"results": {}, "counts": {}}
        for tool, name, n in self._db.execute(f"SELECT tool, {source}, COUNT(*) FROM results GROUP BY 1, 2"):
            tables["results"].setdefault(str(tool), {})[str(name)] = n
        counts = self.counts.copy()
        sound = "typeof(name) = 'text' AND typeof(tool) = 'text' AND typeof(n) = 'integer'"
        kept = self._db.execute(f"SELECT name, tool, n FROM counters WHERE {sound}")
        counts.update({(name, tool): n for name, tool, n in kept})
        for (name, tool), n in sorted(counts.items()):
            tables["counts"].setdefault(name, {})[tool] = n
        runs = [run for (run,) in self._db.execute("SELECT DISTINCT run FROM spend ORDER BY 1")]
        rows = "(SELECT COUNT(*) FROM thumbnails), (SELECT COUNT(*) FROM quarantine)"
        thumbnails, quarantined = self._db.execute(f"SELECT {rows}").fetchone()
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
            modes.append("mode=ro&immutable=1")  # for a folder that cannot be written; it would not see a journal
        for mode in modes:
            try:
                db = _opened(self.path, mode)
                db.execute("SELECT 1 FROM sqlite_master")  # only this really opens the file
                return db
            except sqlite3.OperationalError as error:
                problem = error
        raise problem

    def _write(self, work: Callable[..., Any], *arguments: Any) -> Any:
        with self._db as db:  # commits, or rolls back what raised
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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._locks = open(f"{self.path}.lock", "ab")
        except OSError as error:
            self._warn("cannot be locked", error)
        with self._alone(0, BUSY):  # one at a time sees the damage and moves it aside
            try:
                self._prepare()
            except sqlite3.OperationalError as error:
                self._warn("results are not recorded", error)
            except DAMAGE as error:
                self._start_anew(error)

    def _prepare(self) -> None:
        """Check the file, or make its tables. sqlite3.DatabaseError where it is damaged."""
        db = self._db
        ours, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        fresh = not self.readonly and not db.execute("SELECT 1 FROM sqlite_master").fetchone()
        if not fresh and ours != APPLICATION:
            raise UserError(f"{self.path}: a database of something else; name a file of recorded searches")
        if not fresh and version != VERSION:
            raise UserError(f"{self.path}: has version {version}, this program reads {VERSION}; name another file")
        if fresh:
            db.execute("PRAGMA journal_mode=WAL")
            header = f"PRAGMA application_id={APPLICATION}", f"PRAGMA user_version={VERSION}"
            self._write(lambda db: [db.execute(statement) for statement in (*TABLES, *header)])
        if (found := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(" ".join(found.split()))
        made = db.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        if not {*TABLES} <= {sql for *_, sql in made}:
            raise sqlite3.DatabaseError("a table is not as it was made")
        for kind, name, sql in made:  # a trigger, say, may undo what was just written
            if sql not in TABLES and (kind in ("trigger", "view") or not str(name).startswith("sqlite_")):
                raise sqlite3.DatabaseError(f"the {kind} {name!r:.60} is none of ours")

    def _start_anew(self, error: Exception) -> None:
        """Move a damaged file aside, and take over what can be read of it."""
        for connection in self._connections:
            connection.close()
        self._connections, self._local = [], threading.local()
        aside = next(name for n in count(1) if not os.path.exists(name := f"{self.path}.damaged-{n}"))
        for file, suffix in zip(self._files(), ("", "-wal", "-shm")):
            with suppress(FileNotFoundError):
                file.rename(aside + suffix)
        self._prepare()
        complaint = f"damaged ({error}): moved to {aside}, {self._write(_salvage, Path(aside))} results kept"
        warnings.warn(f"{self.path}: {complaint}", StoreWarning, stacklevel=5)

    def _files(self) -> list[Path]:
        return [Path(f"{self.path}{suffix}") for suffix in ("", "-wal", "-shm")]

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self.path}: {what} ({error}); the run goes on", StoreWarning, stacklevel=3)


class Budget:
    """The paid calls of a run: at most `total`, and in a step at most `per_step` unless that is 0.

    Each is reserved in a store before it is made, so that a crash may waste one and nothing can overspend.
    `ledger` is the store, or its file, which is made when the first call is to be paid: a run that is refused before it
    starts leaves none. None: a private one.
    """

    def __init__(self, ledger: Store | Path | None, run: str, total: int, per_step: int = 0):
        self.ledger, self.run, self.total, self.per_step = ledger, run, total, per_step
        self.step: str | int = 0
        self._lock = threading.Lock()

    def begin_step(self, step: str | int) -> None:
        """What is spent from now on belongs to this step."""
        self.step = step

    def spend(self, provider: str) -> None:
        """Reserve one call. ToolFailure("budget") where none is left, or where the file cannot be written."""
        try:
            self._store()._write(self._reserve, provider)
        except sqlite3.Error as error:
            raise ToolFailure("budget", f"cannot be kept in {self._store().path} ({error})") from None

    @property
    def spent(self) -> dict[str, int]:
        """Paid calls by provider, of all processes and from before a resume; none where there is no file to read."""
        if isinstance(self.ledger, Store) or self.ledger and self.ledger.exists():
            with suppress(sqlite3.Error):
                return self._store().spent(self.run)
        return {}

    def _store(self) -> Store:
        with self._lock:
            if not isinstance(self.ledger, Store):
                self.ledger = Store(self.ledger)
            return self.ledger

    def _reserve(self, db: sqlite3.Connection, provider: str) -> None:
        sums = "SELECT COALESCE(SUM(n), 0), COALESCE(SUM(n * (step=?)), 0) FROM spend WHERE run=?"
        spent, in_step = db.execute(sums, [self.step, self.run]).fetchone()
        if db.execute("SELECT 1 FROM spend WHERE run=? AND (typeof(n) != 'integer' OR n < 0)", [self.run]).fetchone():
            raise ToolFailure(
                "budget", f"a count of paid calls of run {self.run} is damaged; remove its row from the table spend"
            )
        if spent >= self.total:
            raise ToolFailure("budget", f"all {self.total} paid calls of run {self.run} are spent")
        if self.per_step and in_step >= self.per_step:
            raise ToolFailure("budget", f"all {self.per_step} paid calls of step {self.step} are spent")
        sql = "INSERT INTO spend VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET n = n + 1"
        db.execute(sql, [self.run, self.step, provider])


# ---- rows


def plain(seen: Observation, image: Callable[[bytes], str]) -> dict[str, Any]:
    """A result as JSON; `image` gives what stands for a thumbnail."""
    hits = [asdict(hit) | {"image": None if hit.image is None else image(hit.image)} for hit in seen.hits]
    return {"source": seen.source, "seconds": seen.seconds, "hits": hits}


def observation(found: Any, image: Callable[[str], bytes | None]) -> Observation:
    """`plain` reversed. TypeError or KeyError where anything is missing or not of its type."""
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
    """Raises TypeError for a value of another type; True is no number."""
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{value!r:.60} is of the wrong type")


def demand_number(value: Any, finite: bool = True) -> float:
    """The number as a float. TypeError for anything else, and for one that a float cannot hold: 400 digits, say."""
    demand((int, float), value)
    if isinstance(value, int) and value.bit_length() > 1000 or finite and not math.isfinite(value):
        raise TypeError("the number is out of bounds")
    return float(value)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def storable(text: str) -> str:
    """Text that SQLite takes: lone surrogates are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def refuse_pickle(path: Path) -> None:
    with suppress(OSError), path.open("rb") as file:
        if file.read(1) == b"\x80" or path.suffix in (".pkl", ".pickle"):
            raise UserError(f"{path}: a pickle, which may run any code when it is read; give a file of another format")


def _waited(patience: float) -> ToolFailure:
    return ToolFailure("timeout", f"the same search has been under way elsewhere for {patience:g} s")


def _checksum(fields: Iterable[Any]) -> str:
    return sha256(ascii(tuple(fields)).encode())


def _set_aside(db: sqlite3.Connection, number: int) -> None:
    db.execute("INSERT INTO quarantine SELECT * FROM results WHERE id=?", [number])
    db.execute("DELETE FROM results WHERE id=?", [number])  # AUTOINCREMENT: no other row ever gets this id


def _salvage(db: sqlite3.Connection, damaged: Path) -> int:
    """Copy what can be read, of each table the rows before the damage and, from the end, those behind it."""
    kept: Counter[str] = Counter()
    with suppress(*DAMAGE), closing(_opened(damaged, "mode=ro")) as old:
        old.execute("PRAGMA writable_schema=ON")  # a table whose definition is damaged must not hide the others
        tables = {name for (name,) in old.execute("SELECT name FROM sqlite_master WHERE type='table'")}  # no views
        for table, order in product(("spend", "results", "thumbnails"), ("ASC", "DESC")):
            if table not in tables:
                continue
            with suppress(*DAMAGE):
                columns = [name for (_, name, *_) in db.execute(f"PRAGMA table_info({table})")]  # others are left out
                values = ",".join("?" * len(columns))
                for row in old.execute(f"SELECT {','.join(columns)} FROM {table} ORDER BY rowid {order}"):
                    kept[table] += db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({values})", row).rowcount
    return kept["results"]


def _opened(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{mode}"
    db = sqlite3.connect(uri, BUSY, isolation_level=None, check_same_thread=False, uri=True)
    db.execute("PRAGMA trusted_schema=OFF")  # what a stranger wrote into it calls no function
    db.text_factory = lambda raw: raw.decode(errors="backslashreplace")  # what is damaged fails its checksum later
    return db
