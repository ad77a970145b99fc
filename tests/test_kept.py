"""Answers that were paid for: in the file before anybody uses them, and the same when they are read again."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmsr.kept import Kept, key_of


def test_what_is_kept_reads_the_same_again(tmp_path):
    texts = ["plain", "zwei\nZeilen\r\u2028", "\ud83d alone", "ünïcödé 漢字", ""]
    kept = Kept(tmp_path / "kept.jsonl", "reply")
    for n, text in enumerate(texts):
        kept.add(f"k{n}", reply=text, more=n)
    assert Kept(tmp_path / "kept.jsonl", "reply").values == kept.values == {f"k{n}": t for n, t in enumerate(texts)}


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_line_cut_short_takes_no_other_with_it(tmp_path, cut):
    path = tmp_path / "kept.jsonl"
    for n in range(3):
        Kept(path, "reply").add(f"k{n}", reply="x" * 40)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Kept(path, "reply")
    again.add("k3", reply="y")
    whole = {"k0", "k1", "k3"} | ({"k2"} if cut == 1 else set())  # without its line break it is still whole
    assert again.values.keys() == Kept(path, "reply").values.keys() == whole


def test_foreign_lines_are_no_answers(tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(b'3\n[]\n{"key": "a"}\n\xff\n\n{"key": "b", "reply": 1}\n')
    assert Kept(path, "reply").values == {"b": 1}


def test_threads_write_whole_lines(tmp_path):
    kept = Kept(tmp_path / "kept.jsonl", "reply")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: kept.add(f"k{n}", reply="x" * 20_000), range(64)))
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(f"k{n}" for n in range(64))


def test_keys_tell_what_was_asked_apart():
    asked = [("a", "b"), ("ab",), (["a"], "b"), ("a", {"b": 1}), ("a", {"b": 2})]
    assert len({key_of(*each) for each in asked}) == len(asked)
    assert key_of("a", [{"x": 1}]) == key_of("a", [{"x": 1}])
