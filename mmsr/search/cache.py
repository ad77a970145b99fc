"""A search engine in front of a store of results (`Cached`), and one that only replays the store (`Replayed`).

`Cached` answers recorded searches from the file, waits where another thread or process makes the same search, and
records a new result on disk before it returns it, so that a resumed run gets the same results. Results are also
imported from recorded conversations, stores and JSON lines, and exported.

A replay gives the newest answer: after an index was corrected and searched again, it does not give what the old index
said. While a run records, it makes each search once, so its answer stays the same when the run is resumed.
"""

from __future__ import annotations

import base64
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mmsr.episode import Example, Hit, Observation
from mmsr.search import bm25
from mmsr.search import store as stores
from mmsr.search.pages import has_own_pages, page_reader
from mmsr.search.store import Key, Record, Store, image_key, page_key, refuse_pickle, sha256, storable, text_key
from mmsr.system.errors import UserError
from mmsr.system.files import beside, lines
from mmsr.tools import IMAGE_SEARCH, TEXT_SEARCH, Backend, ToolFailure

NOT_RECORDED = "replay"  # the source of what a recording lacks
NEAREST = 5  # pages that stand in for a search, where `results` does not say how many


class Cached:
    """A search engine that is asked only what is not recorded, and each search by only one caller at a time.

    `form` names how results are made ("thumbnails/5"); results of another form are not used. With `by_question` the
    results of an image search are used for its question only. With `imported` the results of an imported image search,
    which have no form, are used as well, with at most `results` hits: right where results are titles and thumbnails, as
    those are. A caller waits `patience` seconds for another's search (ToolFailure("timeout")): more than the engine's
    own deadline.
    """

    def __init__(
        self,
        backend: Backend,
        store: Store,
        form: str = "",
        by_question: bool = False,
        patience: float = 300.0,
        imported: bool = False,
        results: int | None = None,
    ):
        self.backend, self.store, self.patience = backend, store, patience
        self.form, self.by_question, self.imported = form, by_question, imported
        self.results = results

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        key = image_key(image, self.form, question if self.by_question else "")
        return self._answer(key, lambda: self.backend.image_search(image, question, image_url))

    def text_search(self, query: str) -> Observation:
        return self._answer(text_key(query, self.form), lambda: self.backend.text_search(query))

    @property
    def own_pages(self) -> bool:
        return has_own_pages(self.backend)

    def read_page(self, address: str) -> Observation:
        return self._answer(page_key(address, self.form), lambda: page_reader(self.backend)(address))

    def _answer(self, key: Key, ask: Callable[[], Observation]) -> Observation:
        seen = self.store.get(key)
        if not seen and self.imported and key.tool == IMAGE_SEARCH:
            seen = _first_hits(self.store.get(key._replace(form="", question="")), self.results)
        seen = seen or self.store.once(key, lambda: self._ask(key, ask), self.patience)
        if not seen.cached:
            return seen
        self.store.count("hits", key.tool)
        return replace(seen, seconds=0.0)  # the recorded seconds are those of the first caller

    def _ask(self, key: Key, ask: Callable[[], Observation]) -> Observation:
        if recorded := self.store.get(key):  # by another process, while this caller waited
            return recorded
        start = time.perf_counter()
        ok = False
        try:
            seen = ask()
            ok = seen.ok
        finally:
            self.store.count("calls" if ok else "failures", key.tool)
        self.store.put(key, replace(seen, seconds=seen.seconds or time.perf_counter() - start))
        return replace(self.store.get(key) or seen, cached=False)  # exactly as later callers will get it


def _first_hits(seen: Observation | None, most: int | None) -> Observation | None:
    return seen and replace(seen, hits=seen.hits[:most])


class Replayed:
    """A search engine that answers from recorded results only, of any form: with the newest of those for the same
    question, or else with the newest for any question. It gives at most `results` hits; None: all that were recorded.

    A search that is not recorded gives, by `miss`:
    - "error": ToolFailure("miss");
    - "empty": an observation without hits;
    - "nearest": for a text search the nearest recorded pages, by BM25; for a picture no hits.
    """

    own_pages = True

    def __init__(self, store: Store, miss: Literal["error", "empty", "nearest"] = "error", results: int | None = None):
        self.store, self.miss, self.results = store, miss, results
        self.pages = _Pages(store) if miss == "nearest" else None

    def image_search(self, image: bytes, question: str = "", image_url: str = "") -> Observation:
        return self._answer(image_key(image, None, question), f"picture {sha256(image)[:12]}…")

    def text_search(self, query: str) -> Observation:
        return self._answer(text_key(query, None), f"query {query!r:.80}", query)

    def read_page(self, address: str) -> Observation:
        return self._answer(page_key(address, None), f"page {address:.80}")

    def _answer(self, key: Key, what: str, query: str = "") -> Observation:
        seen = _first_hits(self.store.get(key), self.results)
        self.store.count("hits" if seen else "misses", key.tool)
        if seen:
            return replace(seen, seconds=0.0)
        if self.miss == "error":
            raise ToolFailure("miss", f"{what} is not recorded in {self.store.path}")
        if self.pages and (hits := self.pages.nearest(query, self.results)):
            return Observation(hits, source="nearest", cached=True)
        return Observation(source=NOT_RECORDED)


class _Pages:
    """The pages that all recorded text searches found last, in a full-text index of this process."""

    def __init__(self, store: Store):
        self.lock = threading.Lock()
        self.db = sqlite3.connect("", check_same_thread=False)
        self.db.execute("CREATE TABLE pages (id INTEGER PRIMARY KEY, title TEXT, text TEXT, url TEXT)")
        self.db.execute(f"CREATE VIRTUAL TABLE words USING fts5(title, text, content = '', {bm25.TOKENIZE})")
        pages: dict[tuple[str, str, str], None] = {}
        for seen, _ in _newest_by_query(store).values():
            for hit in seen.hits:
                pages[storable(hit.title), storable(hit.text), storable(hit.url)] = None
        for number, (title, text, url) in enumerate(pages):
            self.db.execute("INSERT INTO pages VALUES (?, ?, ?, ?)", (number, title, text, url))
            words = (number, bm25.searchable(title), bm25.searchable(text))
            self.db.execute("INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", words)

    def nearest(self, query: str, most: int | None) -> tuple[Hit, ...]:
        """The best pages for any of the query's words, scored by BM25; None: NEAREST of them."""
        match = bm25.sqlite_query(query)
        sql = """SELECT pages.title, url, pages.text, -rank FROM words JOIN pages ON id = words.rowid
                 WHERE words MATCH ? ORDER BY rank, id LIMIT ?"""
        with self.lock:
            rows = self.db.execute(sql, [match, most or NEAREST]).fetchall() if match else []
        return tuple(Hit(title, url, text, score=score) for title, url, text, score in rows)


def _newest_by_query(store: Store) -> dict[str, tuple[Observation, float]]:
    """What each recorded text search found last, and when."""
    newest: dict[str, tuple[Observation, float]] = {}
    for key, seen, when in store.records():
        if key.tool == TEXT_SEARCH and (key.query not in newest or when >= newest[key.query][1]):
            newest[key.query] = seen, when
    return newest


def import_transcripts(store: Store, path: str | Path, examples: Iterable[Example]) -> int:
    """Record the searches of a transcripts file (see `recorded.recorded_turns`); returns how many were new. Image
    searches are joined by id to the pictures of `examples`, which are read once. Where the file has a search twice, the
    first counts: conversations have no times."""
    from mmsr.data.recorded import recorded_turns

    refuse_pickle(Path(path))
    recorded = recorded_turns(path)
    now = time.time()

    def searches() -> Iterator[Record]:
        for turns in recorded.values():
            for turn in turns:
                if turn.action == TEXT_SEARCH and turn.observation is not None:
                    yield text_key(turn.query or ""), turn.observation, now
        for example in examples:
            for turn in recorded.get(example.id, ()):
                if turn.action == IMAGE_SEARCH and turn.observation is not None:
                    yield image_key(example.image), turn.observation, now

    return store.add(_each_once(searches()))


def _each_once(records: Iterable[Record]) -> Iterable[Record]:
    """The first record of each key: so the same file, imported again, changes nothing."""
    first: dict[Key, Record] = {}
    for record in records:
        first.setdefault(record[0], record)
    return first.values()


def import_results(store: Store, results: Mapping[str, Observation], examples: Iterable[Example]) -> int:
    """Record image searches, given by example id, for the pictures of `examples`; returns how many were new."""
    now = time.time()
    searches = ((image_key(example.image), results[example.id], now) for example in examples if example.id in results)
    return store.add(_each_once(searches))


def merge(store: Store, path: str | Path) -> int:
    """Record the results of another store's file, with their times: the newer of two results with the same key counts.
    Returns how many were new. Counts and spending are not merged."""
    with closing(Store(path, readonly=True)) as other:
        return store.add(other.records())


def export_jsonl(store: Store, path: str | Path) -> int:
    """Write all undamaged results as JSON lines, thumbnails in base64; returns how many. The file is atomic."""
    written = 0
    with beside(Path(path)) as side, side.open("w", encoding="ascii") as file:
        for key, seen, when in store.records():
            line = key._asdict() | {"time": when} | stores.as_json(seen, lambda image: base64.b64encode(image).decode())
            file.write(json.dumps(line) + "\n")
            written += 1
    return written


def import_jsonl(store: Store, path: str | Path) -> int:
    """Record what `export_jsonl` wrote; returns how many were new. With a bad row it records nothing: UserError."""
    refuse_pickle(Path(path))
    for _ in _exported(Path(path)):
        pass  # check all rows first
    return store.add(_exported(Path(path)))


def _exported(path: Path) -> Iterator[Record]:
    for row, (_, line) in enumerate(lines(path)):
        try:
            found = json.loads(line)
            key = Key(*(found[name] for name in Key._fields))
            stores.demand(str, *key)
            when = stores.demand_number(found["time"])
            yield key, stores.observation(found, lambda text: base64.b64decode(text, validate=True)), when
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: row {row}: no exported result ({what:.100}); correct the line") from None
