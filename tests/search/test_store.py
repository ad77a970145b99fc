"""The file of search results: nothing acknowledged is lost, nothing wrong is believed, nothing is paid twice."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest
from crew import fresh_processes
from helpers import in_threads, refused

from mmsr.episode import Hit, Observation
from mmsr.search import store as stores
from mmsr.search.store import Budget, Store, image_key, text_key
from mmsr.tools import ToolFailure

DEADLINE = 60
FORK = multiprocessing.get_context("fork")


def found(number: int, thumbnail: bytes | None = None) -> Observation:
    return Observation((Hit(f"title {number}", f"https://{number}", "text " * 20, thumbnail, 0.5),), source="made")


def same(seen: Observation | None, expected: Observation) -> bool:
    return seen is not None and (seen.hits, seen.source) == (expected.hits, expected.source)


def filled(path: Path, rows: int) -> Path:
    with closing(Store(path)) as store:
        for number in range(rows):
            assert store.put(text_key(f"query {number}"), found(number, b"thumbnail %d" % number))
    return path


def run_all(target, arguments) -> list:
    """Processes that run `target` on each of the arguments."""
    crew = [FORK.Process(target=target, args=given, daemon=True) for given in arguments]
    for process in crew:
        process.start()
    return crew


def join(crew) -> None:
    for process in crew:
        process.join(DEADLINE)
        assert process.exitcode == 0, f"a child ended with {process.exitcode}"


def note(path: Path, text: str) -> None:
    """A line that is there once this returns, whatever happens to the process."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{text}\n".encode())
    os.close(handle)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# Round trips.


def anything(draw: random.Random) -> Observation:
    alphabet = 'aé漢🎈"\\\n\0\u2028</>\ud800  '

    def text():
        return "".join(draw.choice(alphabet) for _ in range(draw.choice([0, 1, 5, 60])))

    def hit():
        image = draw.choice([None, b"", b"\x89PNG", draw.randbytes(300)])
        return Hit(text(), text(), text(), image, draw.choice([None, 0, -3, 0.1, 1e-300, float("inf")]))

    return Observation(tuple(hit() for _ in range(draw.choice([0, 1, 5]))), source=text(), seconds=draw.random())


def test_any_result_comes_back_as_it_was(tmp_path):
    draw, expected = random.Random(0), {}
    with closing(Store(tmp_path / "s.sqlite")) as store:
        for number in range(150):
            key = text_key(f"{number} \ud83d \0 {draw.random()}", form=draw.choice(["", "summary/5"]))
            expected[key] = anything(draw)
            assert store.put(key, expected[key])
    with closing(Store(tmp_path / "s.sqlite", readonly=True)) as store:
        for key, seen in expected.items():
            back = store.get(key)
            assert back.cached and (back.hits, back.source, back.seconds) == (seen.hits, seen.source, seen.seconds)
        assert [seen for _, seen, _ in store.records()] == [store.get(key) for key in expected]
        assert store.stats()["counts"] == {}


def test_letter_case_and_blanks_of_a_query_make_no_difference_and_anything_else_does(tmp_path):
    with closing(Store(None)) as store:
        store.put(text_key("Which  RIVER\n?"), found(1))
        assert same(store.get(text_key(" which river ?")), found(1))
        for other in ("which river", "which river!", "", "which_river ?"):
            assert store.get(text_key(other)) is None
        assert store.get(image_key(b"which river ?")) is None


def test_forms_and_questions_do_not_mix():
    with closing(Store(None)) as store:
        store.put(image_key(b"p", "thumbnails/5"), found(1))
        store.put(image_key(b"p", "summary", "who?"), found(2))
        assert store.get(image_key(b"p")) is None and store.get(image_key(b"p", "thumbnails/3")) is None
        assert store.get(image_key(b"p", "summary")) is None and store.get(image_key(b"p", "summary", "where?")) is None
        assert same(store.get(image_key(b"p", "summary", "who?")), found(2))
        assert same(store.get(image_key(b"p", None, "who?")), found(2)), "made for this very question"
        assert same(store.get(image_key(b"p", None, "where?")), found(1))
        assert store.get(image_key(b"q", None)) is None


def test_failures_are_not_stored_and_nothing_found_is():
    with closing(Store(None)) as store:
        assert not store.put(text_key("down"), Observation(ok=False, error="timeout"))
        assert store.get(text_key("down")) is None
        assert store.put(text_key("nothing"), Observation(source="made"))
        assert store.get(text_key("nothing")).hits == ()


@pytest.mark.parametrize(
    "bad", [Hit(None), Hit("t", 5), Hit(text=b"x"), Hit(image="x"), Hit(score="1"), Hit(score=True)]
)
def test_what_could_not_be_read_back_is_not_written(bad):
    with closing(Store(None)) as store:
        assert not store.put(text_key("q"), Observation((bad,)))
        assert store.get(text_key("q")) is None and store.stats()["counts"] == {"unstorable": {"text_search": 1}}


def test_the_first_recording_counts_and_a_thumbnail_is_kept_once():
    with closing(Store(None)) as store:
        assert store.put(text_key("q"), found(1, b"same")) and not store.put(text_key("q"), found(2))
        assert same(store.get(text_key("q")), found(1, b"same"))
        store.put(text_key("r"), found(3, b"same"))
        assert store.stats()["thumbnails"] == 1


def test_an_older_answer_is_imported_over_a_newer_one_or_the_other_way_round():
    key = text_key("q")
    with closing(Store(None)) as store:
        recorded = [store.add([(key, found(number), when)]) for number, when in ((1, 10.0), (2, 20.0), (3, 15.0))]
        assert recorded == [1, 1, 0]
        assert same(store.get(key), found(2)) and len(list(store.records())) == 1
        store.add([(text_key("q", "other"), found(4), 30.0), (text_key("q", "third"), found(5), 25.0)])
        assert same(store.get(text_key("q", None)), found(4)) and same(store.get(key), found(2))
        assert store.add([(key, found(2), 40.0)]) == 0, "the same again is called new"


def test_a_dropped_search_comes_back_or_takes_another_ones_thumbnail(tmp_path):
    with closing(Store(tmp_path / "s.sqlite")) as store:
        for number, picture in enumerate((b"a", b"b", b"a" * 100_000)):
            store.put(text_key(f"q {number}"), found(number, picture))
        store.put(text_key("q 3"), found(3, b"b"))
        Budget(store, "run", 9).spend("serpapi")
        first, *_, last = [entry.number for entry in store.entries()]
        size = store.stats()["bytes"]
        assert store.drop([first, first + 1, first + 2, 99]) == 3 and store.stats()["bytes"] < size - 90_000
        assert [entry.number for entry in store.entries()] == [last] and store.stats()["thumbnails"] == 1
        assert same(store.get(text_key("q 3")), found(3, b"b")) and store.get(text_key("q 0")) is None
        assert store.put(text_key("q 0"), found(7)) and store.spent("run") == {"serpapi": 1}
        assert [entry.number for entry in store.entries()][-1] > last, "a number is given twice"


def test_a_missing_thumbnail_leaves_the_title_and_is_counted(tmp_path):
    path = filled(tmp_path / "s.sqlite", 2)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM thumbnails WHERE digest=?", [stores.sha256(b"thumbnail 0")])
        db.execute("UPDATE thumbnails SET image = x'00'")
    with closing(Store(path, readonly=True)) as store:
        for number in range(2):
            assert store.get(text_key(f"query {number}")).hits == found(number).hits
        assert store.stats()["counts"] == {"missing_thumbnails": {"text_search": 2}}


def test_counts_survive_and_do_not_cost_a_write_each(tmp_path, monkeypatch):
    written, write = [], Store._write_counts
    monkeypatch.setattr(Store, "_write_counts", lambda self, db: written.append(1) or write(self, db))
    for _ in range(2):
        with closing(Store(tmp_path / "s.sqlite")) as store:
            for _ in range(1200):
                store.count("hits", "text_search")
            assert store.stats()["counts"]["hits"]["text_search"] in (1200, 2400)
    assert len(written) == 6
    with closing(Store(tmp_path / "s.sqlite", readonly=True)) as store:
        assert store.stats()["counts"] == {"hits": {"text_search": 2400}}


def test_stats_tell_rows_by_tool_and_source_and_spend_by_run(tmp_path):
    with closing(Store(filled(tmp_path / "s.sqlite", 3))) as store:
        store.put(image_key(b"p"), Observation(source="lens"))
        Budget(store, "a", 9).spend("serpapi")
        told = store.stats()
    assert told["results"] == {"image_search": {"lens": 1}, "text_search": {"made": 3}}
    assert told["spent"] == {"a": {"serpapi": 1}} and told["bytes"] > 4096
    assert (told["thumbnails"], told["quarantined"]) == (3, 0) and json.dumps(told)


# One caller at a time: row 14.


def ask_often(path: Path, calls: Path, answers: Path, threads: int, together) -> None:
    store = Store(path)

    def upstream():
        if (recorded := store.get(text_key("q"))) is not None:
            return recorded
        note(calls, "called")
        time.sleep(0.3)
        store.put(text_key("q"), found(7))
        return found(7)

    def ask():
        together.wait(DEADLINE)
        seen = store.get(text_key("q")) or store.once(text_key("q"), upstream, DEADLINE)
        note(answers, seen.hits[0].title)

    in_threads(*[ask] * threads)
    store.close()


@pytest.mark.first_is_quick
@pytest.mark.parametrize("guarded", [True, False])
def test_64_equal_searches_in_two_processes_make_one_call(tmp_path, monkeypatch, guarded):
    if not guarded:
        monkeypatch.setattr(Store, "once", lambda self, key, work, patience: work())
    path, calls, answers = (tmp_path / name for name in ("s.sqlite", "calls", "answers"))
    together = FORK.Barrier(64)
    join(run_all(ask_often, [(path, calls, answers, 32, together)] * 2))
    assert lines(answers) == ["title 7"] * 64
    assert len(lines(calls)) == 1 if guarded else len(lines(calls)) > 1


def hold(path: Path, calls: Path, seconds: float) -> None:
    store = Store(path)

    def work():
        note(calls, "called")
        time.sleep(seconds)
        return found(1)

    store.once(text_key("q"), work, DEADLINE)


def test_a_killed_callers_search_is_taken_over(tmp_path):
    path, calls = tmp_path / "s.sqlite", tmp_path / "calls"
    (holder,) = run_all(hold, [(path, calls, 10 * DEADLINE)])
    wait_for(lambda: lines(calls))
    (waiter,) = run_all(hold, [(path, calls, 0)])
    time.sleep(0.3)
    assert len(lines(calls)) == 1, "the waiter must wait as long as the holder lives"
    holder.kill()
    join([waiter])
    assert len(lines(calls)) == 2


def test_waiting_for_another_process_or_thread_has_an_end(tmp_path):
    path, calls = tmp_path / "s.sqlite", tmp_path / "calls"
    (holder,) = run_all(hold, [(path, calls, 10 * DEADLINE)])
    wait_for(lambda: lines(calls))
    with closing(Store(path)) as store:
        with pytest.raises(ToolFailure) as caught:
            store.once(text_key("q"), lambda: found(2), 0.2)
        assert caught.value.kind == "timeout"
        go, inside = threading.Event(), threading.Event()
        slow = threading.Thread(
            target=store.once, args=(text_key("r"), lambda: inside.set() or go.wait(DEADLINE) and found(1), 1)
        )
        slow.start()
        inside.wait(DEADLINE)
        with pytest.raises(ToolFailure, match="timeout"):
            store.once(text_key("r"), lambda: found(2), 0.2)
        go.set()
        slow.join(DEADLINE)
        assert same(store.once(text_key("r"), lambda: found(3), 1), found(3)), "what is over must not be waited for"
    holder.kill()
    holder.join()


def test_a_failure_is_shared_by_those_who_waited_and_forgotten_after():
    with closing(Store(None)) as store:
        entered, go, failures = threading.Event(), threading.Event(), []

        def fail():
            entered.set()
            go.wait(DEADLINE)
            raise TimeoutError("upstream")

        def ask(work):
            try:
                store.once(text_key("q"), work, DEADLINE)
            except TimeoutError as error:
                failures.append(str(error))

        crew = [threading.Thread(target=ask, args=(fail,))]
        crew[0].start()
        entered.wait(DEADLINE)
        crew += [threading.Thread(target=ask, args=(lambda: pytest.fail("called twice"),)) for _ in range(8)]
        for thread in crew[1:]:
            thread.start()
        wait_for(lambda: threading.active_count() >= len(crew))
        time.sleep(0.1)
        go.set()
        for thread in crew:
            thread.join(DEADLINE)
        assert failures == ["upstream"] * 9
        assert same(store.once(text_key("q"), lambda: found(1), 1), found(1))


# Money: row 13.

BUDGET = 12


def pay(path: Path, paid: Path, threads: int, together) -> None:
    """Threads that pay until the budget is gone."""
    budget = Budget(Store(path), "run", BUDGET)

    def caller():
        together.wait(DEADLINE)
        while True:
            try:
                budget.spend("serpapi")
            except ToolFailure as failure:
                assert failure.kind == "budget" and "cannot" not in str(failure), failure
                return
            note(paid, "paid")
            time.sleep(0.01)

    in_threads(*[caller] * threads)


@pytest.mark.parametrize("guarded", [True, False])
def test_16_callers_in_4_processes_stay_within_the_budget(tmp_path, monkeypatch, guarded):
    between, mine = FORK.Barrier(16), threading.local()

    def read_then_write(self, provider):
        if hasattr(mine, "paid") or sum(self.spent.values()) >= self.total:
            raise ToolFailure("budget", "spent")
        mine.paid = True
        between.wait(DEADLINE)  # what contention does now and then
        sql = "INSERT INTO spend VALUES ('run', 0, ?, 1) ON CONFLICT DO UPDATE SET n = n + 1"
        self._store()._write(lambda db: db.execute(sql, [provider]))

    if not guarded:
        monkeypatch.setattr(Budget, "spend", read_then_write)
    path, paid = tmp_path / "s.sqlite", tmp_path / "paid"
    join(run_all(pay, [(path, paid, 4, FORK.Barrier(16))] * 4))
    assert len(lines(paid)) == (BUDGET if guarded else 16)


def test_a_killed_process_wastes_at_most_the_calls_it_was_at_and_overspends_none(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.BUDGET", 300)
    path, paid, draw = tmp_path / "s.sqlite", tmp_path / "paid", random.Random(0)
    Store(path).close()
    kills = 6
    for _ in range(kills):
        before = len(lines(paid))
        crew = run_all(pay, [(path, paid, 4, FORK.Barrier(8))] * 2)
        wait_for(lambda before=before: len(lines(paid)) > before or len(lines(paid)) >= 300 - 8 * kills)
        time.sleep(draw.uniform(0, 0.03))
        for process in crew:
            process.kill()
            process.join()
    join(run_all(pay, [(path, paid, 4, FORK.Barrier(16))] * 4))
    with closing(Store(path)) as store:
        assert store.spent("run") == {"serpapi": 300}
    assert 300 - 8 * kills <= len(lines(paid)) <= 300


def test_runs_steps_and_providers_are_counted_apart(tmp_path):
    with closing(Store(tmp_path / "s.sqlite")) as store:
        budget = Budget(store, "run", total=5, per_step=2)
        for step, more in ((1, 2), (2, 2), (3, 1)):
            budget.begin_step(step)
            for number in range(more):
                assert budget.left == more - number
                budget.spend(("serpapi", "jina")[number])
            assert budget.left == 0
            with pytest.raises(ToolFailure, match="of step" if step < 3 else "of run run"):
                budget.spend("serpapi")
        assert budget.spent == {"serpapi": 3, "jina": 2} and list(budget.spent) == ["jina", "serpapi"]
        with pytest.raises(ToolFailure, match="budget"):
            Budget(store, "run", total=5).spend("serpapi")
        Budget(store, "another", total=1).spend("serpapi")
        assert Budget(store, "third", total=7).left == 7
        assert Budget(tmp_path / "absent.sqlite", "run", total=7, per_step=3).left == 3
        assert not (tmp_path / "absent.sqlite").exists()
        with pytest.raises(ToolFailure):
            Budget(store, "none", total=0).spend("serpapi")


# Faults: row 15.


def write_on(path: Path, acknowledged: Path, start: int) -> None:
    store = Store(path)
    for number in range(start, start + 10**6):
        assert store.put(text_key(f"query {number}"), found(number, b"thumbnail %d" % number))
        note(acknowledged, str(number))


def test_kill_9_loses_no_acknowledged_row(tmp_path):
    path, acknowledged, draw = tmp_path / "s.sqlite", tmp_path / "acknowledged", random.Random(1)
    for round_ in range(8):
        before = len(lines(acknowledged))
        crew = run_all(write_on, [(path, acknowledged, (2 * round_ + half) * 10**6) for half in range(2)])
        wait_for(lambda before=before: len(lines(acknowledged)) > before + 2)
        time.sleep(draw.uniform(0, 0.05))
        for process in crew:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    with warnings.catch_warnings(), closing(Store(path)) as store:
        warnings.simplefilter("error")
        numbers = lines(acknowledged)
        assert len(numbers) > 16
        for number in map(int, numbers):
            assert same(store.get(text_key(f"query {number}")), found(number, b"thumbnail %d" % number))


def put_raw(path: Path, payload, checksum=None, query="query 0") -> None:
    with closing(sqlite3.connect(path)) as db, db:
        fields = db.execute("SELECT tool, query, form, question, time FROM results WHERE query=?", [query]).fetchone()
        fields = (*fields[:4], payload, fields[4])
        checksum = stores._checksum(fields) if checksum is None else checksum
        db.execute("UPDATE results SET payload=?, checksum=? WHERE query=?", [payload, checksum, query])


HIT = {"title": "t", "url": "", "text": "", "image": None, "score": None}
POISON = [
    None, 5, b"bytes", "", "no JSON", "[]", "null", "3", '"x"', "{}", "[" * 100000, '{"hits": []}',
    json.dumps({"hits": [HIT | {"title": 5}], "source": "", "seconds": 0}),
    json.dumps({"hits": [HIT | {"image": 5}], "source": "", "seconds": 0}),
    json.dumps({"hits": [HIT | {"score": "high"}], "source": "", "seconds": 0}),
    json.dumps({"hits": [["t"]], "source": "", "seconds": 0}),
    json.dumps({"hits": 3, "source": "", "seconds": 0}),
    json.dumps({"hits": [], "source": None, "seconds": 0}),
    json.dumps({"hits": [], "source": "", "seconds": True}),
    json.dumps({"hits": [], "source": "", "seconds": 10**400}),
    json.dumps({"hits": [HIT | {"score": -(10**400)}], "source": "", "seconds": 0}),
]  # fmt: skip


@pytest.mark.parametrize("payload", POISON, ids=range(len(POISON)))
def test_a_poisoned_row_is_set_aside_and_recorded_anew(tmp_path, payload):
    path = filled(tmp_path / "s.sqlite", 2)
    put_raw(path, payload)
    with closing(Store(path, readonly=True)) as store:
        assert store.get(text_key("query 0")) is None and store.stats()["quarantined"] == 0
    with closing(Store(path)) as store:
        assert store.get(text_key("query 0")) is None
        told = store.stats()
        assert told["quarantined"] == 1 and told["counts"]["damaged_rows"] == {"text_search": 1}
        assert store.put(text_key("query 0"), found(9)) and same(store.get(text_key("query 0")), found(9))
        assert same(store.get(text_key("query 1")), found(1, b"thumbnail 1"))


def test_a_row_that_was_changed_is_not_believed(tmp_path):
    path = filled(tmp_path / "s.sqlite", 3)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE results SET payload = replace(payload, 'title', 'titel') WHERE query='query 0'")
        db.execute("UPDATE results SET query = 'query 9' WHERE query='query 1'")
        db.execute("UPDATE results SET payload = CAST(x'ff' || payload AS TEXT) WHERE query='query 2'")
    with closing(Store(path)) as store:
        assert not any(store.get(text_key(f"query {number}")) for number in (0, 1, 2, 9))
        assert store.stats()["quarantined"] == 3 and not list(store.records())


def flip_and_use(source: Path, path: Path, draw: random.Random, flips: int, rows: int) -> int:
    """Damage a copy, record into it, and return how many of its rows are still right; none may be wrong."""
    data = bytearray(source.read_bytes())
    for _ in range(flips):
        data[draw.randrange(100, len(data))] ^= 1 << draw.randrange(8)  # behind the file's header
    path.write_bytes(data)
    with warnings.catch_warnings(), closing(Store(path)) as store:
        warnings.simplefilter("ignore")
        right = 0
        for number in range(rows):
            seen = store.get(text_key(f"query {number}"))
            if seen is not None:
                expected = found(number, b"thumbnail %d" % number if seen.hits[0].image else None)
                assert same(seen, expected), "a damaged row was believed"
                right += 1
        store.put(text_key("after"), found(99))
        store.count("hits", "text_search")
        list(store.records())
        return right


@pytest.mark.filterwarnings("ignore:.*damaged")
@pytest.mark.parametrize("cases, flips", [(60, 1), pytest.param(300, 1, marks=pytest.mark.slow), (20, 30)])
def test_flipped_bits_give_a_right_row_or_none(tmp_path, cases, flips):
    source, draw, rows = filled(tmp_path / "sound.sqlite", 60), random.Random(2), 60
    kept = [flip_and_use(source, tmp_path / f"{case}.sqlite", draw, flips, rows) for case in range(cases)]
    if flips == 1:
        assert sum(kept) / cases > 0.9 * rows, "one bit must not cost many rows"


def test_a_damaged_file_is_moved_aside_and_what_it_holds_is_kept(tmp_path):
    path = filled(tmp_path / "s.sqlite", 400)
    with closing(Store(path)) as store:
        for _ in range(5):
            Budget(store, "run", 9).spend("serpapi")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 8192] = bytes(8192)
    path.write_bytes(data)
    refused(lambda: Store(path, readonly=True), str(path), "damaged")
    with pytest.warns(RuntimeWarning, match="damaged.* moved to .*s.sqlite.damaged-1, [1-9]"):
        store = Store(path)
    assert (tmp_path / "s.sqlite.damaged-1").read_bytes() == data
    kept = sum(store.get(text_key(f"query {number}")) is not None for number in range(400))
    assert 300 < kept < 400 and store.spent("run") == {"serpapi": 5}
    assert store.put(text_key("after"), found(1))
    store.close()
    with closing(Store(path, readonly=True)) as store:
        assert len(list(store.records())) == kept + 1


FOREIGN = {
    "trigger": "CREATE TRIGGER free AFTER INSERT ON spend BEGIN DELETE FROM spend; END",
    "view": "CREATE VIEW seen AS SELECT query FROM results",
    "table": "CREATE TABLE notes (text)",
    "index": "CREATE UNIQUE INDEX one_a_run ON spend (run)",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_ledger_with_a_foreign_object_in_it_is_believed(tmp_path, kind):
    path = filled(tmp_path / "s.sqlite", 3)
    with closing(Store(path)) as store:
        Budget(store, "run", 2).spend("serpapi")
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(FOREIGN[kind])
    refused(lambda: Store(path, readonly=True), str(path), f"the {kind} '", "not one of ours")
    with pytest.warns(RuntimeWarning, match=f"the {kind} '.*not one of ours.* moved to .*, 3 results kept"):
        store = Store(path)
    with closing(store):
        Budget(store, "run", 2).spend("serper")
        with pytest.raises(ToolFailure, match="all 2 paid calls"):
            Budget(store, "run", 2).spend("serper")
        assert store.spent("run") == {"serpapi": 1, "serper": 1}


def test_a_column_that_somebody_added_forgets_what_was_paid(tmp_path):
    path = filled(tmp_path / "s.sqlite", 3)
    with closing(Store(path)) as store:
        Budget(store, "run", 2).spend("serpapi")
    with closing(sqlite3.connect(path)) as db, db:
        for table in ("spend", "results"):
            db.execute(f"ALTER TABLE {table} ADD COLUMN note")
    with pytest.warns(RuntimeWarning, match="not as it was made.*3 results kept"), closing(Store(path)) as store:
        assert store.spent("run") == {"serpapi": 1}


@pytest.mark.parametrize("count", ["NULL", "-100", "'many'", "1e300", "1.5", "x'00'"])
def test_a_damaged_count_of_paid_calls_counts_as_none(tmp_path, count):
    with closing(Store(tmp_path / "s.sqlite")) as store:
        Budget(store, "run", 9).spend("serpapi")
        store._db.execute(f"UPDATE spend SET n={count}")
        store._db.execute("INSERT INTO counters VALUES (NULL, 3, 'x'), ('hits', 'text_search', 2)")
        with pytest.raises(ToolFailure, match="budget: a count .* is damaged"):
            Budget(store, "run", 9).spend("serpapi")
        Budget(store, "another", 9).spend("serpapi")
        assert store.stats()["counts"] == {"hits": {"text_search": 2}}


def test_a_view_in_a_tables_place_never_ends(tmp_path):
    """A damaged file is copied row by row: a view may have rows without end."""
    path = filled(tmp_path / "s.sqlite", 3)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE spend")
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, 1, 'a', 1 FROM n"
        db.execute(f"CREATE VIEW spend AS {endless}")
    with pytest.warns(RuntimeWarning, match="3 results kept"), closing(Store(path)) as store:
        assert store.spent("1") == {}


@pytest.mark.parametrize("content", [bytes(8192), b"SQLite format 3\0" + bytes(4096)], ids=["zeros", "header"])
def test_what_is_no_database_is_moved_aside_once_by_four_processes(tmp_path, content):
    path = tmp_path / "s.sqlite"
    path.write_bytes(content)
    refused(lambda: Store(path, readonly=True), str(path), "damaged")
    assert path.read_bytes() == content
    join(run_all(open_and_put, [(path, number) for number in range(4)]))
    aside = [file.name for file in tmp_path.iterdir() if "damaged" in file.name]
    assert aside == ["s.sqlite.damaged-1"] and (tmp_path / aside[0]).read_bytes() == content
    with closing(Store(path)) as store:
        assert all(same(store.get(text_key(f"query {number}")), found(number)) for number in range(4))


@pytest.mark.parametrize("content", [b"\xff\xd8\xff" + bytes(range(256)), b"a page" * 99, b"{}\n"])
def test_a_picture_given_as_the_recording_is_moved_aside(tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    refused(lambda: Store(path), str(path), "no file of recorded searches; name another file")
    assert [file.name for file in tmp_path.iterdir()] == ["photo.jpg"] and path.read_bytes() == content


def open_and_put(path: Path, number: int) -> None:
    warnings.simplefilter("ignore")
    with closing(Store(path)) as store:
        assert store.put(text_key(f"query {number}"), found(number))


def as_nobody(work, *arguments) -> None:
    """Run in a process that no permission bit lets through."""
    process = fresh_processes().Process(target=_as_nobody, args=(work, arguments), daemon=True)
    process.start()
    join([process])


def _as_nobody(work, arguments) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    work(*arguments)


@pytest.fixture
def open_folder():
    """A folder that other users may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def record_in_vain(path: Path, there: bool = True) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        store = Store(path)
        for number in range(4):
            assert same(store.get(text_key("query 1")), found(1, b"thumbnail 1")) == there
            assert store.get(text_key(f"new {number}")) is None
            assert not store.put(text_key(f"new {number}"), found(number))
            store.count("hits", "text_search")
        with pytest.raises(ToolFailure, match="budget: cannot be kept"):
            Budget(store, "run", 9).spend("serpapi")
        assert same(store.once(text_key("new"), lambda: found(5), 1), found(5))
        store.close()
    assert len(told) == 1 and "the run continues" in str(told[0].message)


def replay_only(path: Path) -> None:
    with closing(Store(path, readonly=True)) as store:
        assert len(list(store.records())) == 3


@pytest.mark.first_is_quick
@pytest.mark.parametrize("folder_mode, file_mode", [(0o555, 0o444), (0o755, 0o444), (0o555, 0o666)])
def test_a_file_or_folder_that_cannot_be_written_lets_the_run_go_on(open_folder, folder_mode, file_mode):
    path = filled(open_folder / "s.sqlite", 3)
    path.chmod(file_mode)
    open_folder.chmod(folder_mode)
    as_nobody(replay_only, path)
    as_nobody(record_in_vain, path)


def test_a_folder_that_cannot_be_made_lets_the_run_go_on(open_folder):
    as_nobody(record_in_vain, open_folder / "new" / "s.sqlite", False)


def test_a_full_disk_lets_the_run_go_on_and_recording_too_once_there_is_room(tmp_path):
    path = filled(tmp_path / "s.sqlite", 20)
    with closing(Store(path)) as store:
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count={pages}")
        with pytest.warns(RuntimeWarning, match="not recorded .*full.* continues") as told:
            for number in range(3):
                assert not store.put(text_key(f"new {number}"), found(number, bytes(9000)))
        assert len(told) == 1
        assert all(store.get(text_key(f"query {number}")) for number in range(20))
        store._db.execute(f"PRAGMA max_page_count={pages + 1000}")
        assert store.put(text_key("new 0"), found(0, bytes(9000)))
        assert same(store.get(text_key("new 0")), found(0, bytes(9000)))


def test_a_folder_an_alien_database_and_a_later_version_are_refused(tmp_path):
    alien, later = tmp_path / "alien.sqlite", filled(tmp_path / "later.sqlite", 1)
    with closing(sqlite3.connect(alien)) as db, db:
        db.execute("CREATE TABLE moz_places (url)")
    with closing(sqlite3.connect(later)) as db:
        db.execute("PRAGMA user_version=2")
    for readonly in (False, True):
        refused(lambda readonly=readonly: Store(alien, readonly), str(alien), "something else")
        refused(lambda readonly=readonly: Store(later, readonly), str(later), "version 2")
        refused(lambda readonly=readonly: Store(tmp_path, readonly), str(tmp_path))
    refused(lambda: Store(tmp_path / "absent", readonly=True), "absent", "no such file")
    assert not (tmp_path / "absent").exists()


# Row 24.


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_by_name_and_left_alone(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("cache.pkl" if protocol < 2 else "cache.sqlite")
    path.write_bytes(pickle.dumps({"fvqa_train_0": Bomb()}, protocol))
    content = path.read_bytes()
    for readonly in (False, True):
        refused(lambda readonly=readonly: Store(path, readonly), str(path), "pickle")
    assert path.read_bytes() == content and sorted(os.listdir(tmp_path)) == [path.name]
