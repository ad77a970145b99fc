"""Eight processes search through one recorded cache while some are killed with kill -9; then the cache is checked.

    python bench/cache_storm.py                     # 10,000 calls, about a minute
    python bench/cache_storm.py --calls 2000 --seed 1

Calls are text and image searches that repeat; some fail upstream, and the budget runs out. An answer is acknowledged by
a line in a file; a paid call is noted there too, before it is made. At the end every acknowledged answer must be in the
cache as it was seen, and no call may exceed the budget.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmsr.episode import Hit, Observation
from mmsr.search.cache import Cached, Replayed
from mmsr.search.store import Budget, Store
from mmsr.tools import ToolFailure

PROCESSES, DEADLINE = 8, 600


class Engine:
    """A paid search engine that never gives the same answer twice, so that a lost and repeated answer is noticed."""

    def __init__(self, budget, notes: int):
        self.budget = budget
        self.notes = notes

    def text_search(self, query: str) -> Observation:
        self.budget.spend("made")
        os.write(self.notes, f"paid {query}\n".encode())
        time.sleep(random.expovariate(1 / 0.005))
        if random.random() < 0.05:
            raise ToolFailure("down", "as it happens")
        name = f"{os.getpid()}-{random.getrandbits(60)}"
        hit = Hit(name, text="page " * 100, image=name.encode() * 99)
        return Observation((hit, hit, hit), source="made")

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        return self.text_search(image.decode())


def search(engine, name: str) -> str:
    seen = engine.image_search(name.encode(), "?") if name.startswith("image") else engine.text_search(name)
    assert all(hit.image == hit.title.encode() * 99 for hit in seen.hits)
    return seen.hits[0].title if seen.hits else ""


def worker(folder: Path, seed: float, things: int, total: int) -> None:
    random.seed(seed)
    notes = os.open(folder / "notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = Store(folder / "cache.sqlite")
    engine = Cached(Engine(Budget(store, "storm", total), notes), store)
    while True:
        name, start = f"{random.choice(['text', 'image'])} {random.randrange(things // 2)}", time.perf_counter()
        try:
            result = f"seen {name} {search(engine, name)}"
        except ToolFailure as failure:
            result = failure.kind
        os.write(notes, f"{result} {time.perf_counter() - start:.6f}\n".encode())


def storm(folder: Path, calls: int, kills: int, seed: int) -> None:
    """Run eight workers until there were so many calls, and kill one from time to time."""
    random.seed(seed)
    (folder / "notes").touch()
    things, total, fork = calls // 4, calls // 5, multiprocessing.get_context("fork")
    workers, killed, done, start = [], 0, 0, time.monotonic()
    while done < calls and time.monotonic() < start + DEADLINE:
        while len(workers) < PROCESSES:
            workers.append(fork.Process(target=worker, args=(folder, random.random(), things, total)))
            workers[-1].start()
        time.sleep(random.uniform(0, 0.05))
        done = sum(not line.startswith("paid") for line in (folder / "notes").read_text().splitlines())
        if killed < kills * done / calls:
            victim = workers.pop(random.randrange(len(workers)))
            victim.kill()
            victim.join()
            killed += 1
    assert all(process.is_alive() for process in workers) and done >= calls, "a worker ended by itself, or time is up"
    for process in workers:
        process.kill()
        process.join()
    print(f"{killed + len(workers)} processes killed in {time.monotonic() - start:.0f} s")
    report(folder, total)


def report(folder: Path, total: int) -> None:
    lines = [line.split() for line in (folder / "notes").read_text().splitlines()]
    seen = [(f"{words[1]} {words[2]}", words[3]) for words in lines if words[0] == "seen"]
    paid = Counter(" ".join(words[1:3]) for words in lines if words[0] == "paid")
    failures = Counter(words[0] for words in lines if words[0] not in ("seen", "paid"))
    with closing(Store(folder / "cache.sqlite")) as store:
        replayed = Replayed(store, miss="empty")
        lost = sum(search(replayed, name) != title for name, title in set(seen))
        spent, told = sum(store.spent("storm").values()), store.stats()
    hits = sorted(float(words[4]) for words in lines if words[0] == "seen")
    print(f"{len(lines) - paid.total()} calls by {PROCESSES} processes at a time")
    print(f"{len(seen)} answers acknowledged, of {len(set(seen))} results: {lost} lost or changed")
    print(f"budget {total}: {spent} reserved, {paid.total()} paid for {len(paid)} searches")
    print(f"failures: {dict(failures)}; cache: {told['bytes'] / 1e6:.1f} MB, {told['quarantined']} rows quarantined")
    print(f"an answer took {1e3 * hits[len(hits) // 2]:.2f} ms (median), {1e3 * hits[-len(hits) // 100]:.1f} ms (99 %)")
    assert lost == 0 and paid.total() <= spent <= total and not told["quarantined"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("--calls", 10_000), ("--kills", 60), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    with tempfile.TemporaryDirectory() as folder:
        storm(Path(folder), **vars(parser.parse_args()))
