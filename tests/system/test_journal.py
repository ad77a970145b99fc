"""Answers that were paid for: in the file before anybody uses them, and the same when they are read again."""

import json
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmsr.system.errors import UserError
from mmsr.system.journal import Journal, key_of


def test_what_is_kept_reads_the_same_again(tmp_path):
    texts = ["plain", "zwei\nZeilen\r\u2028", "\ud83d alone", "ünïcödé 漢字", ""]
    kept = Journal(tmp_path / "kept.jsonl")
    for n, text in enumerate(texts):
        kept.add(f"k{n}", reply=text, more=n)
    for read in (kept, Journal(tmp_path / "kept.jsonl")):
        assert list(map(read.get, read.offsets)) == [
            {"key": f"k{n}", "reply": text, "more": n} for n, text in enumerate(texts)
        ]
    assert kept.get("another") is None


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_line_cut_short_takes_no_other_with_it(tmp_path, cut):
    path = tmp_path / "kept.jsonl"
    for n in range(3):
        Journal(path).add(f"k{n}", reply="x" * 40)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    again.add("k3", reply="y")
    whole = {"k0", "k1", "k3"} | ({"k2"} if cut == 1 else set())  # without its line break it is still whole
    assert again.offsets.keys() == Journal(path).offsets.keys() == whole
    assert again.get("k3")["reply"] == Journal(path).get("k3")["reply"] == "y"


def test_foreign_lines_are_no_answers(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(b'3\n[]\n{"k": "a"}\n\xff\n\n{"key": "b", "reply": 1}\n\0\0{"key": "c"}\n')
    assert Journal(path).offsets.keys() == {"b"}


def test_what_another_process_appends_does_not_shift_what_is_read(tmp_path):
    first, second = Journal(tmp_path / "kept.jsonl"), Journal(tmp_path / "kept.jsonl")
    for n in range(6):
        (first if n % 3 else second).add(f"k{n}", reply=n)
    assert [(second if n % 3 == 0 else first).get(f"k{n}")["reply"] for n in range(6)] == list(range(6))


def test_two_processes_ask_for_the_same(tmp_path):
    """As two ranks do. The second one reads what the first has kept since it was opened, also behind half a line."""
    first, second = Journal(tmp_path / "kept.jsonl"), Journal(tmp_path / "kept.jsonl")
    first.add("k0", reply="x")
    with open(tmp_path / "kept.jsonl", "ab") as file:
        file.write(b'{"key": "k1", "rep')
    assert second.once("k0", lambda: pytest.fail("it is asked again"))["reply"] == "x"
    first.add("k2", reply="z")
    assert second.once("k2", lambda: pytest.fail("it is asked again"))["reply"] == "z"
    assert second.once("k1", lambda: {"reply": "y"}) == {"reply": "y"}


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "kept.jsonl"
    Journal(path).add("k0", reply="x")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limit[1]))
        for _ in range(2):
            with pytest.raises(UserError, match="cannot be written .*make room"):
                Journal(path).add("k1", reply="y" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    Journal(path).add("k2", reply="z")
    assert Journal(path).offsets.keys() == {"k0", "k2"}


def test_threads_write_whole_lines(tmp_path):
    kept = Journal(tmp_path / "kept.jsonl")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: kept.add(f"k{n}", reply="x" * 20_000), range(64)))
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(f"k{n}" for n in range(64))


def test_what_many_threads_want_at_once_is_asked_for_once_and_a_failure_again(tmp_path):
    kept, begun, asked = Journal(tmp_path / "kept.jsonl"), threading.Barrier(8), []

    def work():
        asked.append(1)
        time.sleep(0.5)  # all have come by then
        if len(asked) == 1:
            raise ValueError("busy")
        return {"reply": "x"}

    def want(_):
        begun.wait(20)
        return kept.once("k", work)

    with ThreadPoolExecutor(8) as pool:
        with pytest.raises(ValueError, match="busy"):
            list(pool.map(want, range(8)))
        assert [found["reply"] for found in pool.map(want, range(8))] == ["x"] * 8
    assert len(asked) == 2 and Journal(tmp_path / "kept.jsonl").once("k", work)["reply"] == "x" and len(asked) == 2


def test_keys_tell_what_was_asked_apart():
    asked = [("a", "b"), ("ab",), (["a"], "b"), ("a", {"b": 1}), ("a", {"b": 2})]
    assert len({key_of(*each) for each in asked}) == len(asked)
    assert key_of("a", [{"x": 1}]) == key_of("a", [{"x": 1}])
