"""Much work in many threads that no crash undoes: a journal, paid answers recorded before they are used, stages.

A stage maps items to records. An item's outcome is one line of the stage's journal, known by the digest of the item and
of the settings, so that whatever ends a run, the same command goes on from there, and an input that grew costs only
what is new. The stage's file is written last, sorted by the records' ids: its bytes depend neither on the order in
which threads finished nor on crashes.

What a kill can cost: calls under way at that moment are sent again, with the same Idempotency-Key, which only some
servers honour. What failed for now (a time-out, a busy server) is not in the journal: the next run tries it again.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from tqdm import tqdm

from mmsr.net.client import FATAL
from mmsr.net.completions import ChatServer
from mmsr.system.errors import UserError
from mmsr.system.files import Lock, write_whole
from mmsr.system.journal import Journal, key_of
from mmsr.tools import ToolFailure

PATIENCE = 60  # seconds that a call waits for a busy or resting server, at a time
IN_A_ROW = 50  # calls that fail for now before a stage gives up
STOPPING = (*FATAL, "budget")  # kinds of failure after which no call can succeed
FOR_GOOD = ("blocked", "too-large", "forbidden")  # kinds that would be the same tomorrow
LASTING = re.compile(r"HTTP 4(?!08|29)\d\d")  # and so would a refusal of this very request

Work = Callable[[dict, Counter], list[dict]]


class LeftOut(Exception):
    """An item, or a part of one, is of no use; says why."""


class Calls:
    """A chat server that is asked nothing twice: every answer is kept before anybody sees it."""

    def __init__(self, server: ChatServer, kept: Journal):
        self.server, self.kept = server, kept

    def complete(self, messages: list[dict], max_tokens: int) -> str:
        """As `ChatServer.complete`; where the server is busy or given a rest, waits up to `PATIENCE` seconds."""
        key = key_of(self.server.model, messages, max_tokens)
        return self.kept.once(key, lambda: {"answer": self._patiently(messages, max_tokens)})["answer"]

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
    """Raises UserError where another process is at work in the folder."""
    lock = Lock(folder)
    try:
        yield
    finally:
        lock.release()


class Factory:
    """Stages in a folder: `NAME.jsonl` is a stage's file, `work/NAME.jsonl` its journal. `report` tells what became of
    each stage's items."""

    def __init__(self, folder: Path, workers: int):
        self.folder, self.workers = folder, workers
        self.report: dict[str, dict[str, Any]] = {}
        (folder / "work").mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, items: Iterable[dict], work: Work, settings: Any = None, workers: int = 0) -> Lines:
        """The records of all items, each an object with an "id".

        `items` is gone through several times and never held. `work(item, reasons)` runs in threads, gives the item's
        records and counts what is worth telling; it raises LeftOut, or ToolFailure for what may pass. Equal `settings`
        promise equal results for equal items. Raises UserError where no call can succeed any more, or many in a row
        did not.
        """
        run = _Run(name, items, work, key_of(settings), Journal(self.folder / "work" / f"{name}.jsonl"))
        run.go(workers or self.workers)
        return self._finish(run)

    def _finish(self, run: _Run) -> Lines:
        order, reasons, total = [], Counter(), 0
        for key, _ in run.keyed():
            total += 1
            if done := run.journal.get(key):
                reasons.update(done["reasons"])
                order += [(record["id"], key, place) for place, record in enumerate(done["records"])]
        records = (run.journal.get(key)["records"][place] for _, key, place in sorted(order))
        counted = {"reasons": dict(sorted(reasons.items())), "postponed": dict(sorted(run.postponed.items()))}
        self.report[run.name] = {"items": total, "records": len(order), **counted}
        return write_lines(self.folder / f"{run.name}.jsonl", records)


class _Run:
    """The threads of one stage. Each takes an item when it is idle, so no more than that many are in memory."""

    def __init__(self, name: str, items: Iterable[dict], work: Work, settings: str, journal: Journal):
        self.name, self.items, self.work, self.settings, self.journal = name, items, work, settings, journal
        self.lock, self.stopped, self.postponed = threading.Lock(), threading.Event(), Counter()
        self.failed_in_a_row = 0
        self.error: BaseException | None = None

    def go(self, workers: int) -> None:
        left = sum(1 for _ in self._left())
        self.waiting = self._left()
        with tqdm(total=left, desc=self.name, unit="item", disable=None if left else True) as self.bar:
            crew = [threading.Thread(target=self._work, daemon=True) for _ in range(min(workers, left))]
            try:
                for worker in crew:
                    worker.start()
                _wait(crew)
            finally:
                self.stopped.set()  # Ctrl-C: what is under way is recorded, nothing new begun
                _wait(crew)
        if self.error is not None:
            raise self.error

    def keyed(self) -> Iterator[tuple[str, dict]]:
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
        except BaseException as error:  # a mistake of ours or of the user's: it must end the run, not a thread
            self._stop(error)

    def _settle(self, key: str, item: dict) -> None:
        reasons: Counter = Counter()
        try:
            records = self.work(item, reasons)
        except ToolFailure as refused:
            if refused.kind in STOPPING or not (refused.kind in FOR_GOOD or LASTING.search(refused.message)):
                return self._postpone(refused)
            records, reasons[f"refused: {refused.kind}"] = [], 1
        except LeftOut as why:
            records, reasons[str(why)] = [], 1
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


def _wait(crew: list[threading.Thread]) -> None:
    """Not by `join`: Python 3.11 takes a thread for ended when Ctrl-C comes while it is waited for."""
    while any(worker.is_alive() for worker in crew):
        time.sleep(0.02)


class Lines:
    """The records of a JSONL file, read anew each time they are gone through."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[dict]:
        with open(self.path, "rb") as file:
            for line in file:
                yield json.loads(line)


def write_lines(path: Path, records: Iterable[dict]) -> Lines:
    """Whole or not at all. Half a surrogate pair, which a model may write, is no text and becomes a question mark."""
    write_whole(path, (json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for record in records))
    return Lines(path)
