"""Search results in one SQLite file: recorded as they come, shared by processes, replayed without a network.

`Cached` puts a `Store` before a search engine: what was asked before is answered from the file, what is being asked by
another thread or process is waited for, and a new result is on the disk before its caller sees it, so that a resumed
run sees the same. `Replayed` answers from the file alone. `Budget` counts paid calls there, before they are made.

A result is known by its tool, the normalised query or the SHA-256 of the picture's bytes, the form it was made in
(thumbnails, summaries, …) and, where that guided it, the question. Failures are never stored. Every row has a checksum:
one that does not fit is set aside and asked anew. Everything is JSON and bytes; a pickle is refused.

Traps. Transactions that read and then write need BEGIN IMMEDIATE: with a plain BEGIN most fail under contention.
Write-ahead logging needs shared memory: processes of one machine may share a file, machines on a network drive may not.
Open a file once per process, and after a fork rather than before: closing a second copy drops the locks of the first.
"""

from __future__ import annotations

import atexit
import base64
import errno
import fcntl
import hashlib
import json
import os
import re
import sqlite3
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from itertools import count, islice, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .data import recorded_turns
from .episode import Example, Hit, Observation, UserError
from .tools import IMAGE_SEARCH, TEXT_SEARCH, Backend, ToolFailure

APPLICATION, VERSION = 0x6D6D7372, 1  # "mmsr" in the file's header, and the tables' version
SCHEMA = """
CREATE TABLE results (id INTEGER PRIMARY KEY AUTOINCREMENT, tool TEXT, query TEXT, form TEXT, question TEXT,
                      payload TEXT, time REAL, checksum TEXT, UNIQUE (tool, query, form, question));
CREATE TABLE quarantine (id INTEGER PRIMARY KEY, tool, query, form, question, payload, time, checksum);
CREATE TABLE thumbnails (digest TEXT PRIMARY KEY, image BLOB);
CREATE TABLE counters (name TEXT, tool TEXT, n INTEGER, PRIMARY KEY (name, tool));
CREATE TABLE spend (run TEXT, step INTEGER, provider TEXT, n INTEGER, PRIMARY KEY (run, step, provider))
"""
ROW = "id, tool, query, form, question, payload, time, checksum"
BUSY = 30.0  # seconds that one write waits for another
POLL = 0.02  # seconds between two looks at what another process is doing
UNWRITTEN = 500  # counts that a kill may lose, where nothing else is written
BATCH = 200  # rows of an import in one transaction
NEAREST = 5  # pages


class Key(NamedTuple):
    """What a result is known by."""

    tool: str
    query: str  # normalised, or the picture's SHA-256
    form: str | None = ""  # None, in a look-up: whichever there is
    question: str = ""  # a digest, where results were made for one question


def text_key(query: str, form: str | None = "") -> Key:
    """Letter case and blanks make no difference."""
    return Key(TEXT_SEARCH, _storable(" ".join(query.casefold().split())), form)


def image_key(image: bytes, form: str | None = "", question: str = "") -> Key:
    digest = _digest(" ".join(question.split()).encode("utf-8", "backslashreplace"))[:16] if question else ""
    return Key(IMAGE_SEARCH, _digest(image), form, digest)


class Store:
    """The file. Without a path, a private one that goes with the process; with `readonly`, one to replay from.

    What is no database or damaged is moved aside, and what can still be read of it is kept; a file that cannot be
    written is told of once (a RuntimeWarning) and the run goes on. Raises UserError for a file of another kind, and
    with `readonly` for one that is missing or damaged.
    """

    def __init__(self, path: str | Path | None, readonly: bool = False):
        if path is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mmsr-searches-", ignore_cleanup_errors=True)
            path = Path(self._folder.name) / "searches.sqlite"
        self.path, self.readonly = Path(path), readonly
        self.counts: Counter[tuple[str, str]] = Counter()  # (name, tool), not yet in the file
        self._lock, self._local = threading.Lock(), threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._flights: dict[Key, Future[Observation]] = {}
        self._locks: Any = None  # a file whose bytes stand for searches under way
        self._warned = False
        if self.path.is_dir():
            raise UserError(f"{self.path}: a folder; name a file")
        _refuse_pickle(self.path)
        self._open_to_replay() if readonly else self._open_to_record()
        atexit.register(self.close)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Write the counts and close. A store is not used after that."""
        atexit.unregister(self.close)
        with suppress(sqlite3.Error):
            if self.counts and not self.readonly:
                self._write(self._write_counts)
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        if self._locks:
            self._locks.close()

    # ---- results

    def get(self, key: Key) -> Observation | None:
        """The recorded result, as it was but `cached`; None where there is none that is sound."""
        try:
            rows = self._db.execute(
                f"SELECT {ROW} FROM results WHERE tool=? AND query=? AND form=COALESCE(?, form) AND question IN ('', ?)"
                " ORDER BY question DESC, id",
                key,
            ).fetchall()
        except sqlite3.Error as error:
            self._warn("cannot be read", error)
            return None
        return next(filter(None, map(self._sound, rows)), None)

    def put(self, key: Key, seen: Observation) -> bool:
        """Record a result, on the disk when this returns. False where there is one already, or nothing is recorded."""
        return self.add([(key, seen, time.time())]) == 1

    def add(self, records: Iterable[tuple[Key, Observation, float]]) -> int:
        """Record many results with their times; how many were new. Failures and ill-formed ones are passed over."""
        new, records = 0, iter(records)
        while batch := list(islice(records, BATCH)):
            rows = [row for row in (self._row(*record) for record in batch) if row]
            try:
                new += self._write(self._insert, rows)
            except sqlite3.Error as error:
                self._warn("results are not recorded", error)
        return new

    def records(self) -> Iterator[tuple[Key, Observation, float]]:
        """All sound results with their times, in the order of their recording."""
        for row in self._db.execute(f"SELECT {ROW} FROM results ORDER BY id"):
            if seen := self._sound(row):
                yield Key(*row[1:5]), seen, row[6]

    def _row(self, key: Key, seen: Observation, when: float) -> tuple[tuple, dict[str, bytes]] | None:
        """A result's row but for its id, and its thumbnails by digest. What could not be read back is not written."""
        thumbnails = {_digest(hit.image): hit.image for hit in seen.hits if isinstance(hit.image, bytes)}
        try:
            payload = json.dumps(_plain(seen, _digest), default=float)
            _observation(json.loads(payload), thumbnails.get)
        except (ValueError, TypeError):
            self.count("unstorable", key.tool)
            return None
        fields = (*map(_storable, key), payload, float(when))
        return ((*fields, _checksum(fields)), thumbnails) if seen.ok else None

    def _insert(self, db: sqlite3.Connection, rows: list[tuple[tuple, dict[str, bytes]]]) -> int:
        new = 0
        for row, thumbnails in rows:
            db.executemany("INSERT OR REPLACE INTO thumbnails VALUES (?, ?)", thumbnails.items())
            new += db.execute(f"INSERT OR IGNORE INTO results ({ROW}) VALUES (NULL, ?,?,?,?,?,?,?)", row).rowcount
        self._write_counts(db)
        return new

    def _sound(self, row: tuple) -> Observation | None:
        """A row's result; an unsound row is set aside, its id never used again."""
        number, tool, *_, payload, _, checksum = row
        try:
            if checksum != _checksum(row[1:-1]):
                raise ValueError("checksum")
            return _observation(json.loads(payload), lambda digest: self._thumbnail(digest, tool))
        except (ValueError, TypeError, KeyError, RecursionError):
            self.count("damaged rows", str(tool))
        with suppress(sqlite3.Error):  # where the file cannot be written the row stays, and is passed over again
            self._write(lambda db: db.execute("INSERT INTO quarantine SELECT * FROM results WHERE id=?", [number])
                        and db.execute("DELETE FROM results WHERE id=?", [number]))  # fmt: skip
        return None

    def _thumbnail(self, digest: str, tool: str) -> bytes | None:
        with suppress(sqlite3.Error):
            found = self._db.execute("SELECT image FROM thumbnails WHERE digest=?", [digest]).fetchone()
            if found and isinstance(found[0], bytes) and _digest(found[0]) == digest:
                return found[0]
        self.count("missing thumbnails", tool)
        return None

    # ---- one caller at a time

    def once(self, key: Key, work: Callable[[], Observation], patience: float) -> Observation:
        """`work()`, while nobody else does the same: threads that come meanwhile share its result or its exception,
        processes wait until it is done or its process is dead. ToolFailure after `patience` seconds of waiting.
        """
        with self._lock:
            flight = self._flights.get(key)
            if first := flight is None:
                flight = self._flights[key] = Future()
        if not first:
            try:
                return replace(flight.result(patience), cached=True)
            except FutureTimeout:
                raise _waited(patience) from None
        try:
            with self._alone(1 + int(_digest(ascii(key).encode())[:15], 16), patience):
                flight.set_result(work())
        except BaseException as error:
            flight.set_exception(error)
        finally:
            with self._lock:
                del self._flights[key]
        return flight.result()

    @contextmanager
    def _alone(self, place: int, patience: float) -> Iterator[None]:
        """Hold one byte of the lock file, which the system lets go when this process dies, however it dies."""
        deadline = time.monotonic() + patience
        while self._locks:
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break  # a file system without locks
                if time.monotonic() > deadline:
                    raise _waited(patience) from None
                time.sleep(POLL)
        try:
            yield
        finally:
            with suppress(OSError, TypeError):
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    # ---- counts and money

    def count(self, name: str, tool: str) -> None:
        """Add one. Counts go to the file with the next result, or when there are many, or on `close`."""
        with self._lock:
            self.counts[name, tool] += 1
            many = self.counts.total() % UNWRITTEN == 0
        if many and not self.readonly:
            with suppress(sqlite3.Error):
                self._write(self._write_counts)

    def budget(self, run: str, total: int, per_step: int = 0) -> Budget:
        """The paid calls of a run, `total` in all and, unless 0, `per_step` in a step."""
        return Budget(self, run, total, per_step)

    def spent(self, run: str) -> dict[str, int]:
        """Paid calls of a run by provider."""
        rows = self._db.execute("SELECT provider, SUM(n) FROM spend WHERE run=? GROUP BY provider", [run])
        return dict(rows.fetchall())

    def stats(self) -> dict[str, Any]:
        """What the file holds, as JSON. `results` by tool and source, counters by name and tool, `spent` by run."""
        source = "CASE WHEN json_valid(payload) THEN json_extract(payload, '$.source') END"
        results: dict[str, dict[str, int]] = {}
        for tool, name, n in self._db.execute(
            f"SELECT tool, {source}, COUNT(*) FROM results GROUP BY 1, 2 ORDER BY 1, 2"
        ):
            results.setdefault(str(tool), {})[str(name)] = n
        counters: dict[str, dict[str, int]] = {}
        with self._lock:
            counts = Counter(self.counts)
        counts.update({(name, tool): n for name, tool, n in self._db.execute("SELECT * FROM counters")})
        for (name, tool), n in sorted(counts.items()):
            counters.setdefault(name, {})[tool] = n
        runs = [run for (run,) in self._db.execute("SELECT DISTINCT run FROM spend ORDER BY run")]
        size = sum(file.stat().st_size for file in self._files() if file.exists())
        one = {
            name: self._db.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0]
            for name in ("thumbnails", "quarantine")
        }
        return {"bytes": size, "results": results, **one, **counters, "spent": {run: self.spent(run) for run in runs}}

    def _write_counts(self, db: sqlite3.Connection) -> None:
        with self._lock:
            counts, self.counts = self.counts, Counter()
        try:
            sql = "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n"
            db.executemany(sql, [(*name, n) for name, n in counts.items()])
        except sqlite3.Error:
            self.counts.update(counts)
            raise

    # ---- import and export

    def import_transcripts(self, path: str | Path, examples: Iterable[Example]) -> int:
        """Record the searches of a transcripts file (see `data.recorded_turns`); how many were new.

        Image searches are joined to their pictures by the ids of `examples`. The first recording of a search counts.
        """
        _refuse_pickle(Path(path))
        recorded, now = recorded_turns(path), time.time()

        def searches() -> Iterator[tuple[Key, Observation, float]]:
            for turns in recorded.values():
                for turn in turns:
                    if turn.action == TEXT_SEARCH and turn.observation is not None:
                        yield text_key(turn.query or ""), turn.observation, now
            for example in examples:
                for turn in recorded.get(example.id, ()):
                    if turn.action == IMAGE_SEARCH and turn.observation is not None:
                        yield image_key(example.image), turn.observation, now

        return self.add(searches())

    def import_results(self, results: Iterable[tuple[bytes, Observation]], form: str = "") -> int:
        """Record image searches given as (picture, what was found); how many were new."""
        now = time.time()
        return self.add((image_key(image, form), seen, now) for image, seen in results)

    def merge(self, path: str | Path) -> int:
        """Record the results of another store's file; how many were new. Its counts and spend stay its own."""
        with Store(path, readonly=True) as other:
            return self.add(other.records())

    def export(self, path: str | Path) -> int:
        """Write all sound results as JSON lines, thumbnails in base64; how many. Whole or not at all."""
        side, written = Path(f"{path}.tmp"), 0
        try:
            with side.open("w", encoding="ascii") as file:
                for written, (key, seen, when) in enumerate(self.records(), 1):
                    plain = _plain(seen, lambda image: base64.b64encode(image).decode())
                    file.write(json.dumps(key._asdict() | {"time": when} | plain) + "\n")
            side.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from None
        return written

    def import_jsonl(self, path: str | Path) -> int:
        """Record what `export` wrote; how many were new. Raises UserError, naming the row, before the batch it is in."""
        _refuse_pickle(Path(path))
        return self.add(_exported(Path(path)))

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
        if not self._files()[1].exists() or not self._files()[1].stat().st_size:
            modes.append("mode=ro&immutable=1")  # in a folder that cannot be written; would not see a journal
        for mode in modes:
            try:
                return _opened(self.path, mode)
            except sqlite3.OperationalError as error:
                problem = error
        raise problem

    def _write(self, work: Callable, *arguments: Any) -> Any:
        with self._db as db:  # commits, or rolls back what raised
            db.execute("BEGIN IMMEDIATE")
            return work(db, *arguments)

    def _open_to_replay(self) -> None:
        if not self.path.exists():
            raise UserError(f"{self.path}: no such file; check the path")
        try:
            self._prepare()
        except sqlite3.OperationalError as error:
            hint = "where its folder is read-only, copy it and its -wal file to another"
            raise UserError(f"{self.path}: cannot be opened ({error}); {hint}") from None
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: no database, or damaged ({error}); get it again, or record into it"
            ) from None

    def _open_to_record(self) -> None:
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
            except sqlite3.DatabaseError as error:
                self._start_anew(error)

    def _prepare(self) -> None:
        """Check the file, or make its tables. sqlite3.DatabaseError where it is damaged."""
        db = self._db
        ours, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        fresh = not self.readonly and not db.execute("SELECT 1 FROM sqlite_master").fetchone()
        if not fresh and ours != APPLICATION:
            raise UserError(f"{self.path}: a database of something else; name a file of recorded searches")
        if not fresh and version != VERSION:
            raise UserError(
                f"{self.path}: of version {version}, this program reads {VERSION}; export it with the other"
            )
        if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(" ".join(found.split()))
        if fresh:
            db.execute("PRAGMA journal_mode=WAL")
            made = f"PRAGMA application_id={APPLICATION}; PRAGMA user_version={VERSION}"
            self._write(lambda db: [db.execute(statement) for statement in f"{SCHEMA};{made}".split(";")])

    def _start_anew(self, error: Exception) -> None:
        """Move a damaged file aside, and take over what can be read of it."""
        for connection in self._connections:
            connection.close()
        self._connections, self._local = [], threading.local()
        name = next(name for n in count(1) if not os.path.exists(name := f"{self.path}.damaged-{n}"))
        for file, suffix in zip(self._files(), ("", "-wal", "-shm")):
            with suppress(FileNotFoundError):
                file.rename(name + suffix)
        self._prepare()
        kept = self._write(self._salvage, Path(name))
        warnings.warn(
            f"{self.path}: damaged ({error}); moved to {name}, {kept} results kept", RuntimeWarning, stacklevel=5
        )

    def _salvage(self, db: sqlite3.Connection, damaged: Path) -> int:
        """Copy what can be read: of each table the rows before the damage and, from the end, those behind it."""
        kept: Counter[str] = Counter()
        with suppress(sqlite3.Error), closing(_opened(damaged, "mode=ro")) as old:
            for table, order in product(("spend", "results", "thumbnails"), ("ASC", "DESC")):
                with suppress(sqlite3.Error):
                    for row in old.execute(f"SELECT * FROM {table} ORDER BY rowid {order}"):
                        blanks = ",".join("?" * len(row))
                        kept[table] += db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({blanks})", row).rowcount
        return kept["results"]

    def _files(self) -> list[Path]:
        return [Path(f"{self.path}{suffix}") for suffix in ("", "-wal", "-shm")]

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self.path}: {what} ({error}); the run goes on", RuntimeWarning, stacklevel=3)


class Budget:
    """Paid calls, reserved in the file before they are made: a crash may waste one, nothing can overspend."""

    def __init__(self, store: Store, run: str, total: int, per_step: int = 0):
        self.store, self.run, self.total, self.per_step = store, run, total, per_step
        self.step = 0

    def begin_step(self, step: int) -> None:
        """What is spent from now on belongs to this step."""
        self.step = step

    def spend(self, provider: str) -> None:
        """Reserve one call. Raises ToolFailure("budget") where none is left, or where the file cannot be written."""
        try:
            self.store._write(self._reserve, provider)
        except sqlite3.Error as error:
            raise ToolFailure("budget", f"cannot be counted in {self.store.path} ({error})") from None

    def _reserve(self, db: sqlite3.Connection, provider: str) -> None:
        sums = "SELECT COALESCE(SUM(n), 0), COALESCE(SUM(n * (step = ?)), 0) FROM spend WHERE run=?"
        spent, in_step = db.execute(sums, [self.step, self.run]).fetchone()
        if spent >= self.total:
            raise ToolFailure("budget", f"all {self.total} paid calls of run {self.run} are spent")
        if self.per_step and in_step >= self.per_step:
            raise ToolFailure("budget", f"all {self.per_step} paid calls of step {self.step} are spent")
        sql = "INSERT INTO spend VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET n = n + 1"
        db.execute(sql, [self.run, self.step, provider])

    @property
    def spent(self) -> dict[str, int]:
        """Paid calls so far, by provider."""
        return self.store.spent(self.run)


class Cached:
    """A search engine behind a store: asked only what is not recorded, and by one caller at a time.

    `form` names how results are made ("thumbnails/5"), so that other forms are not taken for them; with `by_question`
    an image search's results are for its question only. Whoever waits for another's call gives up after `patience`
    seconds (ToolFailure "timeout"); it should be longer than the engine's own deadline.
    """

    def __init__(
        self, backend: Backend, store: Store, form: str = "", by_question: bool = False, patience: float = 300.0
    ):
        self.backend, self.store, self.form, self.by_question, self.patience = (
            backend,
            store,
            form,
            by_question,
            patience,
        )

    def image_search(self, image: bytes, question: str = "") -> Observation:
        key = image_key(image, self.form, question if self.by_question else "")
        return self._answer(key, lambda: self.backend.image_search(image, question))

    def text_search(self, query: str) -> Observation:
        return self._answer(text_key(query, self.form), lambda: self.backend.text_search(query))

    def _answer(self, key: Key, ask: Callable[[], Observation]) -> Observation:
        seen = self.store.get(key) or self.store.once(key, lambda: self._ask(key, ask), self.patience)
        self.store.count(("hits" if seen.cached else "calls") if seen.ok else "failures", key.tool)
        return replace(seen, seconds=0.0) if seen.cached else seen

    def _ask(self, key: Key, ask: Callable[[], Observation]) -> Observation:
        if recorded := self.store.get(key):  # while this caller waited for its turn
            return recorded
        start = time.perf_counter()
        try:
            seen = ask()
        except Exception:
            self.store.count("failures", key.tool)
            raise
        seen = replace(seen, seconds=seen.seconds or time.perf_counter() - start)
        return seen if self.store.put(key, seen) else self.store.get(key) or seen


class Replayed:
    """Recorded results alone; nothing is ever called. What is not recorded is by `miss`

    - "error": ToolFailure("miss");
    - "empty": an honest observation of nothing;
    - "nearest": for a text search the nearest of all recorded pages, for a picture nothing.

    With `form` None a result of any form will do, the one for this question first.
    """

    def __init__(self, store: Store, miss: Literal["error", "empty", "nearest"] = "error", form: str | None = None):
        self.store, self.miss, self.form = store, miss, form
        self.pages = _Pages(store) if miss == "nearest" else None

    def image_search(self, image: bytes, question: str = "") -> Observation:
        return self._answer(image_key(image, self.form, question), f"picture {_digest(image)[:12]}")

    def text_search(self, query: str) -> Observation:
        return self._answer(text_key(query, self.form), f"query {query!r:.80}", query)

    def _answer(self, key: Key, what: str, query: str = "") -> Observation:
        seen = self.store.get(key)
        self.store.count("hits" if seen else "misses", key.tool)
        if seen:
            return replace(seen, seconds=0.0)
        if self.miss == "error":
            raise ToolFailure("miss", f"{what} is not recorded in {self.store.path}")
        if self.pages and query:
            return Observation(self.pages.nearest(query), source="nearest", cached=True)
        return Observation(source="replay")


class _Pages:
    """The pages of all recorded text searches, ranked by BM25 in a private database of its own."""

    def __init__(self, store: Store):
        self.lock = threading.Lock()
        self.db = sqlite3.connect("", check_same_thread=False)
        self.db.execute("CREATE VIRTUAL TABLE pages USING fts5(title, text, url UNINDEXED)")
        found = (hit for key, seen, _ in store.records() if key.tool == TEXT_SEARCH for hit in seen.hits)
        pages = dict.fromkeys((_storable(hit.title), _storable(hit.text), _storable(hit.url)) for hit in found)
        self.db.executemany("INSERT INTO pages VALUES (?, ?, ?)", pages)

    def nearest(self, query: str) -> tuple[Hit, ...]:
        """The best pages for any of the query's words, their BM25 as score."""
        words = dict.fromkeys(re.findall(r"[^\W_]+", _storable(query.casefold())))
        match = " OR ".join(f'"{word}"' for word in islice(words, 64))  # in quotes, so that none is an operator
        sql = "SELECT title, url, text, -rank FROM pages WHERE pages MATCH ? ORDER BY rank, rowid LIMIT ?"
        with self.lock:
            rows = self.db.execute(sql, [match, NEAREST]).fetchall() if match else []
        return tuple(Hit(title, url, text, score=score) for title, url, text, score in rows)


# ---- rows


def _plain(seen: Observation, image: Callable[[bytes], str]) -> dict[str, Any]:
    """A result as JSON; `image` writes a thumbnail."""
    hits = [asdict(hit) | {"image": None if hit.image is None else image(hit.image)} for hit in seen.hits]
    return {"source": seen.source, "seconds": seen.seconds, "hits": hits}


def _observation(plain: Any, image: Callable[[str], bytes | None]) -> Observation:
    """The reverse. TypeError or KeyError where anything is not of its type."""
    hits = []
    for found in plain["hits"]:
        hit = Hit(found["title"], found["url"], found["text"], found["image"], found["score"])
        _demand(str, hit.title, hit.url, hit.text)
        _demand((str, type(None)), hit.image)
        _demand((int, float, type(None)), hit.score)
        hits.append(hit if hit.image is None else replace(hit, image=image(hit.image)))
    _demand(str, plain["source"])
    _demand((int, float), plain["seconds"])
    return Observation(tuple(hits), source=plain["source"], seconds=plain["seconds"], cached=True)


def _demand(kind: Any, *values: object) -> None:
    if wrong := [value for value in values if not isinstance(value, kind) or isinstance(value, bool)]:
        raise TypeError(f"{wrong[0]!r:.60} has the wrong type")


def _exported(path: Path) -> Iterator[tuple[Key, Observation, float]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    with file:
        for row, line in enumerate(file):
            try:
                plain = json.loads(line)
                key = Key(*(plain[name] for name in Key._fields))
                _demand(str, *key)
                seen = _observation(plain, lambda text: base64.b64decode(text, validate=True))
                yield key, seen, float(plain["time"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                why = f"{type(error).__name__}: {error}"
                raise UserError(f"{path}: row {row}: not an exported result ({why:.100}); mend the line") from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(fields: Iterable[Any]) -> str:
    return _digest(ascii(tuple(fields)).encode())


def _storable(text: str) -> str:
    """Text that SQLite takes: lone surrogates are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _opened(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?{mode}"
    db = sqlite3.connect(uri, BUSY, isolation_level=None, check_same_thread=False, uri=True)
    db.text_factory = lambda raw: raw.decode(errors="backslashreplace")  # damaged text fails its checksum, later
    db.execute("SELECT 1 FROM sqlite_master")
    return db


def _refuse_pickle(path: Path) -> None:
    with suppress(OSError), path.open("rb") as file:
        if file.read(1) == b"\x80" or path.suffix in (".pkl", ".pickle"):
            raise UserError(f"{path}: a pickle, which may run any code when it is read; give a file of another format")


def _waited(patience: float) -> ToolFailure:
    return ToolFailure("timeout", f"the same search has been under way elsewhere for {patience:g} s")
