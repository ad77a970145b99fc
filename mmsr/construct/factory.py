"""Work in many threads whose results survive a crash: stages, their journals, and paid answers saved before use.

A stage maps items to records. An item's outcome is one line of the stage's journal, under the digest of the item and of
the settings. So after a run ends, for any reason, the same command continues from there, and a longer input costs only
its new items. The stage's file is written last, sorted by the records' ids: its bytes depend neither on the order in
which threads finished nor on crashes.

The cost of a kill: calls in flight at that moment are sent again, with the same Idempotency-Key, which only some
servers honour. Items that failed for now (a time-out, a busy server) are not in the journal; the next run tries them.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from mmsr.net.client import FATAL
from mmsr.net.completions import ChatServer
from mmsr.system.errors import UserError
from mmsr.system.files import Lock, write_whole
from mmsr.system.journal import Journal, key_of
from mmsr.system.progress import duration, progress, say
from mmsr.tools import ToolFailure

PATIENCE = 60  # seconds that a call waits for a busy server, at most
IN_A_ROW = 50  # items that fail for now, one after another, before a stage gives up
STOPPING = (*FATAL, "budget")  # kinds of failure after which no call can succeed
FOR_GOOD = ("blocked", "too-large", "forbidden")  # kinds of failure that a retry does not change
LASTING = re.compile(r"HTTP 4(?!08|29)\d\d")  # nor does it change a server's refusal of this request

Work = Callable[[dict, Counter], list[dict]]


class LeftOut(Exception):
    """An item, or a part of one, is not usable; the message says why."""


class Calls:
    """A chat server that is asked nothing twice: every answer is saved before it is used."""

    def __init__(self, server: ChatServer, journal: Journal):
        self.server = server
        self.journal = journal

    def complete(self, messages: list[dict], max_tokens: int) -> str:
        """As `ChatServer.complete`, but waits up to `PATIENCE` seconds for a server that is busy or paused."""
        key = key_of(self.server.model, messages, max_tokens)
        return self.journal.once(key, lambda: {"answer": self._patiently(messages, max_tokens)})["answer"]

    def _patiently(self, messages: list[dict], max_tokens: int) -> str:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return self.server.complete(messages, max_tokens)
            except ToolFailure as refused:
                if refused.kind not in ("breaker", "rate") or time.monotonic() > end:
                    raise
            time.sleep(1.0)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock the folder. Raises UserError where another process works in it."""
    lock = Lock(folder)
    try:
        yield
    finally:
        lock.release()


class Factory:
    """Stages in a folder: `NAME.jsonl` is a stage's file, `work/NAME.jsonl` its journal.

    `report` counts the outcomes of each stage's items.
    """

    def __init__(self, folder: Path, workers: int):
        self.folder = folder
        self.workers = workers
        self.report: dict[str, dict[str, Any]] = {}
        (folder / "work").mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, items: Iterable[dict], work: Work, settings: Any = None, workers: int = 0) -> Lines:
        """The records of all items, each an object with an "id".

        `items` is read several times and never held in memory. `work(item, reasons)` runs in threads, returns the
        item's records and counts remarkable events in `reasons`. It raises LeftOut, or ToolFailure where a later try
        may succeed. Equal `settings` must mean equal results for equal items. Raises UserError where no call can
        succeed any more, or many in a row failed.
        """
        run = _Run(name, items, work, key_of(settings), Journal(self.folder / "work" / f"{name}.jsonl"))
        run.go(workers or self.workers)
        return self._finish(run)

    def _finish(self, run: _Run) -> Lines:
        """Write the stage's file from its journal. It holds the order of the records in memory, not the records."""
        order = []
        reasons = Counter()
        total = 0
        for key, _ in run.keyed():
            total += 1
            done = run.journal.get(key)
            if done is None:
                continue
            reasons.update(done["reasons"])
            order += [(record["id"], key, place) for place, record in enumerate(done["records"])]
        self.report[run.name] = {
            "items": total,
            "records": len(order),
            "reasons": dict(sorted(reasons.items())),
            "postponed": dict(sorted(run.postponed.items())),
        }
        records = (run.journal.get(key)["records"][place] for _, key, place in sorted(order))
        return write_lines(self.folder / f"{run.name}.jsonl", records)


class _Run:
    """The threads of one stage. Each takes an item when it is idle, so no more items than threads are in memory."""

    def __init__(self, name: str, items: Iterable[dict], work: Work, settings: str, journal: Journal):
        self.name = name
        self.items = items
        self.work = work
        self.settings = settings
        self.journal = journal
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.waiting: Iterator[tuple[str, dict]] = iter(())
        self.bar: Any = None  # how far it is
        self.postponed: Counter = Counter()
        self.failed_in_a_row = 0
        self.error: BaseException | None = None

    def go(self, workers: int) -> None:
        left = sum(1 for _ in self._left())
        self.waiting = self._left()
        start = time.monotonic()
        with progress(self.name, left, "item") as self.bar:
            threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(workers, left))]
            try:
                for thread in threads:
                    thread.start()
                _wait(threads)
            finally:
                self.stopped.set()  # after Ctrl-C the items in work are recorded, and no new one is started
                _wait(threads)
        if self.error is not None:
            raise self.error
        if left:
            done = left - self.postponed.total()
            say(f"{self.name}: {done} of {left} items in {duration(time.monotonic() - start)}", sys.stderr)

    def keyed(self) -> Iterator[tuple[str, dict]]:
        """All items, each with its key in the journal."""
        return ((key_of(self.settings, item), item) for item in self.items)

    def _left(self) -> Iterator[tuple[str, dict]]:
        return ((key, item) for key, item in self.keyed() if key not in self.journal.offsets)

    def _work(self) -> None:
        try:
            while not self.stopped.is_set():
                with self.lock:
                    key, item = next(self.waiting, (None, None))
                if key is None:
                    return
                self._settle(key, item)
                with self.lock:
                    self.bar.update()
        except BaseException as error:  # a bug or a user's mistake: it must end the run, not just this thread
            self._stop(error)

    def _settle(self, key: str, item: dict) -> None:
        reasons: Counter = Counter()
        try:
            records = self.work(item, reasons)
        except ToolFailure as refused:
            if refused.kind in STOPPING or not (refused.kind in FOR_GOOD or LASTING.search(refused.message)):
                return self._postpone(refused)
            records = []
            reasons[f"refused: {refused.kind}"] = 1
        except LeftOut as why:
            records = []
            reasons[str(why)] = 1
        self.journal.add(key, records=records, reasons=+reasons)
        self.failed_in_a_row = 0

    def _postpone(self, refused: ToolFailure) -> None:
        with self.lock:
            self.postponed[refused.kind] += 1
            self.failed_in_a_row += 1
            self.bar.set_postfix(postponed=self.postponed.total())
        if refused.kind in STOPPING:
            self._stop(UserError(f"{self.name}: {refused}; mend that and run the same again, nothing is lost"))
        elif self.failed_in_a_row >= IN_A_ROW:
            why = f"{self.failed_in_a_row} items in a row failed, the last with {refused}"
            self._stop(UserError(f"{self.name}: {why}; run the same again later, nothing is lost"))

    def _stop(self, error: BaseException) -> None:
        self.error = self.error or error
        self.stopped.set()


def _wait(threads: list[threading.Thread]) -> None:
    """Wait without `join`: when Ctrl-C arrives during a join, Python 3.11 thinks that the thread has ended."""
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.02)


class Lines:
    """The records of a JSONL file, read from the file on each iteration."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[dict]:
        with open(self.path, "rb") as file:
            for line in file:
                yield json.loads(line)


def write_lines(path: Path, records: Iterable[dict]) -> Lines:
    """Write the whole file or nothing. A lone surrogate, which a model may write, becomes a question mark."""
    texts = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(path, (text.encode("utf-8", "replace") for text in texts))
    return Lines(path)
