"""The index of a corpus: what is found, with which score, and what an interruption or a wrong file does."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import random
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from helpers import in_threads
from test_index import PAGES, write_lines

from mmsr.config import Options
from mmsr.search import corpus, index
from mmsr.search.backends import open_backend
from mmsr.search.corpus import Corpus, build
from mmsr.system.errors import UserError
from mmsr.tools import ToolFailure

SEARCH_R1 = [  # lines as wiki-18.jsonl has them
    {"id": "0", "contents": '"Aaron"\nAaron is a prophet, high priest, and the brother of Moses in the religions.'},
    {"id": "1", "contents": '"Eiffel Tower"\nThe tower in Paris was designed by the company of Gustave Eiffel.'},
    {"id": "2", "contents": '"Paris"\nParis is the capital of France. It has a tower.'},
    {"id": "3", "contents": '"Kraków"\nA Polish city that searches for its beginnings; 東京タワー is elsewhere.'},
]


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Segments of 8 passages, so that a few hundred of them are many; what makes them stays in this process."""
    monkeypatch.setattr(corpus, "SEGMENT", 8)
    monkeypatch.setattr(corpus, "ProcessPoolExecutor", _InThisProcess)


class _InThisProcess:
    def __init__(self, workers: int, **how):
        pass

    def submit(self, work, *arguments):
        done: corpus.Future = corpus.Future()
        try:
            done.set_result(work(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, cancel_futures: bool) -> None:
        pass


def made(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Passages of a small vocabulary, in which some words are frequent."""
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(60)]
    lines = []
    for number in range(n):
        text = draw.choices(words, weights=[1 / (i + 1) for i in range(60)], k=draw.randint(1, 30))
        lines.append({"title": f"page {number}", "text": " ".join(text)})
    return lines


def titles(file: Path, query: str, k: int = 5) -> list[str]:
    return [hit.title for hit in Corpus(file, k).text_search(query).hits]


def tables(file: Path) -> list:
    """All rows of the file."""
    with closing(sqlite3.connect(file)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1")]
        return [(name, sorted(db.execute(f"SELECT * FROM {name}"))) for name in names]


# ---- what is found


def test_scores_are_not_those_of_the_equation(tmp_path):
    """Computed here word by word, for all passages, from the equation in the module's docstring."""
    lines = made(300)
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", lines)])
    index_of = Corpus(tmp_path / "c", k=10)
    documents = [Counter(f"{line['title']} {line['text']}".split()) for line in lines]
    mean = sum(document.total() for document in documents) / len(documents)
    k1, b = 1.5, 0.75
    for query in ("w0 w7 w31", "w59", "w1 w1 w2", "page w20", "w3 300", "299 w0"):
        expected = []
        for number, document in enumerate(documents):
            score = 0.0
            for word in set(query.split()):
                n = sum(word in other for other in documents)
                idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
                tf = document[word]
                score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * document.total() / mean))
            if score:
                expected.append((score, number))
        expected.sort(key=lambda pair: (-pair[0], pair[1]))
        hits = index_of.text_search(query).hits
        assert [hit.score for hit in hits] == pytest.approx([score for score, _ in expected[:10]], rel=1e-5)
        best = {score: number for score, number in expected[:10]}
        if len(best) == 10:  # no two with the same score, whose order rounding decides
            assert [hit.title for hit in hits] == [f"page {number}" for _, number in expected[:10]]


def test_of_equal_passages_a_later_one_comes_first(tmp_path):
    """Also where the earlier one is in another segment, and where the best are full."""
    lines = [{"title": str(number), "text": "the same words"} for number in range(30)]
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", lines)])
    assert titles(tmp_path / "c", "same words", k=12) == [str(number) for number in range(12)]


def test_words_of_another_spelling_or_script_or_ending_or_of_the_title_are_not_found(tmp_path):
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", SEARCH_R1)])
    for query, title in (
        ("who designed the TOWER in Paris", "Eiffel Tower"),
        ("krakow", "Kraków"),
        ("東京タワー", "Kraków"),
        ("searching beginning", "Kraków"),
        ("a religion", "Aaron"),
        ("eiffel", "Eiffel Tower"),
    ):
        found = Corpus(tmp_path / "c").text_search(query)
        assert found.ok and found.hits[0].title == title, query
    assert titles(tmp_path / "c", "zebra") == titles(tmp_path / "c", "?!") == titles(tmp_path / "c", "") == []
    hit = Corpus(tmp_path / "c").text_search("capital of France").hits[0]
    assert (hit.title, hit.url, hit.text) == ("Paris", "", "Paris is the capital of France. It has a tower.")
    assert Corpus(tmp_path / "c").image_search(b"picture").hits == ()


def test_a_titles_own_quotes_are_lost(tmp_path):
    lines = [{"contents": '"\\"Weird Al\\" Yankovic"\nA singer.'.replace("\\", "")}]
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", lines)])
    assert titles(tmp_path / "c", "singer") == ['"Weird Al" Yankovic']


def test_every_commit_reads_all_passages(tmp_path):
    """SQLite counts rows by reading them, texts included."""
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", made(20))])
    with closing(sqlite3.connect(tmp_path / "c")) as db:
        asked = []
        db.set_trace_callback(asked.append)
        corpus._add_segment(db, ([("", "", "text")], [], corpus.np.array([1])))
        assert db.execute("SELECT max(id) FROM passages").fetchone() == (20,)
        assert not any("count(" in sql for sql in asked)


def test_a_word_that_occurs_300_times_is_counted_modulo_256(tmp_path):
    lines = [{"text": "echo " * 300}, {"text": "echo " * 44 + "filler " * 256}, {"text": "other"}]
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", lines)])
    hits = Corpus(tmp_path / "c").text_search("echo").hits
    assert hits[0].text == lines[0]["text"] and hits[0].score > hits[1].score


def test_a_corpus_is_indexed_otherwise_than_its_whole_texts(tmp_path):
    """`invert` cuts texts at blanks before it makes tokens of them: the same as of the whole text."""
    texts = [
        "Straße\u00a0NEIN—doch, it's 手机 2024年! ﬁn a_b\tÉcole.",
        "co\u00adop ¨x 𝔘nicode ١٢٣",
        "한강 ᄒ\u1161ᆫ강 한강은",
    ]
    postings, lengths = corpus.invert([("", "", text) for text in texts])
    found = [Counter() for _ in texts]
    for term, places, counts in postings:
        for place, times in zip(memoryview(places).cast("H"), counts):
            found[place][term] = times
    assert found == [Counter(corpus.bm25.stems(corpus.bm25.tokens(text))) for text in texts]
    assert lengths.tolist() == [len(corpus.bm25.tokens(text)) for text in texts]


def test_texts_without_blanks_are_kept_in_memory(monkeypatch):
    """In such a script a whole passage is one piece, with hundreds of terms."""
    monkeypatch.setattr(corpus, "TERMS", corpus.Terms())
    corpus.invert([("", "", "塔霍河" * 80 + " Tagus"), ("", "", "the Tagus river.")])
    assert set(corpus.TERMS.known) == {"Tagus", "the", "river."}


def test_many_threads_cannot_search_at_once(tmp_path):
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", made(100))])
    searched = Corpus(tmp_path / "c")
    expected = searched.text_search("w5 w40").hits
    found = []
    in_threads(*[lambda: found.extend(searched.text_search("w5 w40").hits for _ in range(20))] * 8)
    assert found == [expected] * 160


# ---- building


def test_an_interrupted_build_begins_again_or_indexes_a_passage_twice(tmp_path, monkeypatch):
    lines = write_lines(tmp_path / "c.jsonl", made(50))
    build(tmp_path / "whole", [lines])
    for crash_at in (1, 2, 5, 7):
        file = tmp_path / f"part-{crash_at}"
        written = []
        add = corpus._add_segment

        def crash(db, segment, add=add, written=written, crash_at=crash_at):
            add(db, segment)
            written.append(1)
            if len(written) == crash_at:
                raise KeyboardInterrupt  # behind the insertions, before the commit

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(corpus, "_add_segment", crash)
            build(file, [lines])
        counts = build(file, [lines])
        assert counts == {"new": 50 - 8 * (crash_at - 1), "known": 8 * (crash_at - 1)}
        assert tables(file) == tables(tmp_path / "whole")
        assert build(file, [lines]) == {"new": 0, "known": 50}


def test_a_file_that_grew_or_a_second_one_is_indexed_from_its_beginning(tmp_path):
    first, second = made(20), made(15, seed=1)[5:]
    lines = write_lines(tmp_path / "c.jsonl", first[:13])
    assert build(tmp_path / "c", [lines]) == {"new": 13, "known": 0}
    write_lines(lines, first)
    with lines.open("a") as file:
        file.write("\n\n")
    more = tmp_path / "more.jsonl.gz"
    more.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in second).encode()))
    assert build(tmp_path / "c", [lines, more]) == {"new": 17, "known": 13}
    assert Corpus(tmp_path / "c").passages == 30
    assert titles(tmp_path / "c", "page 14") and titles(tmp_path / "c", "19")[0] == "page 19"


def test_a_file_that_changed_is_added_to_what_it_was(tmp_path):
    lines = write_lines(tmp_path / "c.jsonl", made(20))
    build(tmp_path / "c", [lines])
    write_lines(lines, made(12) + made(20, seed=3)[12:])
    with pytest.raises(UserError, match=r"first 20 lines: .*has changed since; make the index again"):
        build(tmp_path / "c", [lines])


@pytest.mark.parametrize("changed, said", [(0, "another first line was indexed"), (7, "first 20 lines: .*changed")])
def test_a_line_that_changed_stays_in_the_index_or_is_added_beside_it(changed, said, tmp_path):
    """Also where the last line is still the same, or more lines follow."""
    passages = made(20)
    lines = write_lines(tmp_path / "c.jsonl", passages)
    build(tmp_path / "c", [lines])
    passages[changed] = made(20, seed=3)[changed]
    for more in ([], made(25)[20:]):
        write_lines(lines, passages + more)
        with pytest.raises(UserError, match=said):
            build(tmp_path / "c", [lines])
    assert Corpus(tmp_path / "c").passages == 20


def test_a_file_of_another_kind_is_read_as_broken_lines(tmp_path):
    lines = write_lines(tmp_path / "c.jsonl", made(20)).read_bytes()
    for name, data, said in (
        ("c.bz2", bz2.compress(lines), "by bzip2"),
        ("c.xz", lzma.compress(lines), "by xz"),
        ("c.json", json.dumps(made(3)).encode(), "a JSON array"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{said}; give JSON lines"):
            build(tmp_path / "other", [tmp_path / name])
    assert not (tmp_path / "other").exists()
    (tmp_path / "renamed.jsonl").write_bytes(gzip.compress(lines))
    assert build(tmp_path / "c", [tmp_path / "renamed.jsonl"])["new"] == 20
    with pytest.raises(UserError, match="an index already"):
        build(tmp_path / "other", [tmp_path / "c"])


def test_two_processes_that_add_the_same_file_add_it_twice(tmp_path, monkeypatch):
    lines = write_lines(tmp_path / "c.jsonl", made(30))
    add = corpus._inverted
    other = threading.Event()

    def meanwhile(*arguments):
        if not other.is_set():
            other.set()
            build(tmp_path / "c", [lines])
        return add(*arguments)

    monkeypatch.setattr(corpus, "_inverted", meanwhile)
    with pytest.raises(UserError, match="another process is adding this file"):
        build(tmp_path / "c", [lines])
    assert Corpus(tmp_path / "c").passages == 30


@pytest.mark.parametrize("line, complaint", [
    (b'{"id": "9", "title": "x"}', r"row 9: fields id, title; every line needs contents, or text"),
    (b'{"contents": 5}', "row 9, field contents: 5 is not text"),
    (b'{"text": ["a"]}', r"row 9, field text: \['a'\] is not text"),
    (b'{"text": "a", "title": 3}', r"row 9, field title: 3 is not text"),
    (b"{'text': 'a'}", "row 9: .* write double quotes"),
    (b"[1]", "row 9: .* is not a JSON object"),
    (b"\xff\xfe", "row 9: .* save the file as UTF-8"),
])  # fmt: skip
def test_a_wrong_line_ends_without_its_row_or_loses_what_was_indexed(tmp_path, line, complaint):
    lines = write_lines(tmp_path / "c.jsonl", made(9))
    lines.write_bytes(lines.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=complaint):
        build(tmp_path / "c", [lines])
    assert Corpus(tmp_path / "c").passages == 8, "the segment before it"
    write_lines(lines, made(10))
    assert build(tmp_path / "c", [lines]) == {"new": 2, "known": 8}


def test_contents_without_a_title_and_odd_texts_are_refused(tmp_path):
    lines = [
        {"contents": "only a text"},
        {"contents": '""\nbody'},
        {"text": "\ud800 lone", "title": None},
        {"text": ""},
    ]
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", lines)])
    assert [hit.title for hit in Corpus(tmp_path / "c").text_search("only lone body").hits] == ["", "", ""]


@pytest.mark.parametrize("content, complaint", [
    (b"", "no passage to index"),
    (b"\n\n", "no passage to index"),
    (None, "no such file"),
    (gzip.compress(b'{"text": "a"}\n' * 2000, mtime=0)[:-20], "damaged or not complete"),
    (b"plain", "row 0: b'plain' is not a JSON object"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_leaves_an_empty_index(tmp_path, content, complaint):
    source = tmp_path / ("c.jsonl.gz" if content and content.strip() else "c.jsonl")
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        build(tmp_path / "c", [source])
    assert not (tmp_path / "c").exists() or Corpus(tmp_path / "c").passages


def test_a_wrong_line_in_another_process_ends_in_a_traceback(tmp_path, monkeypatch):
    """And what processes make is what this one makes."""
    monkeypatch.undo()
    monkeypatch.setattr(corpus, "SEGMENT", 8)
    monkeypatch.setattr(corpus, "PROCESSES", 2)
    lines = write_lines(tmp_path / "c.jsonl", made(40))
    build(tmp_path / "c", [lines])
    monkeypatch.setattr(corpus, "ProcessPoolExecutor", _InThisProcess)
    build(tmp_path / "here", [lines])
    assert tables(tmp_path / "c") == tables(tmp_path / "here")
    monkeypatch.undo()
    monkeypatch.setattr(corpus, "SEGMENT", 8)
    write_lines(lines, [*made(20), {"nothing": 1}, *made(20, seed=1)])
    with pytest.raises(UserError, match="row 20: fields nothing"):
        build(tmp_path / "d", [lines])


# ---- the file


def test_a_corpus_is_taken_for_an_index_of_pages_or_the_other_way_round(tmp_path):
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", SEARCH_R1)])
    pages = write_lines(tmp_path / "pages.jsonl", PAGES)
    index.build(tmp_path / "i", "builtin", None, None, pages)
    with pytest.raises(UserError, match="holds the passages of a corpus"):
        index.build(tmp_path / "c", "builtin", None, None, pages)
    with pytest.raises(UserError, match="no index of a corpus: passages have a file of their own"):
        build(tmp_path / "i", [tmp_path / "c.jsonl"])
    (tmp_path / "text").write_text("a letter")
    with pytest.raises(UserError, match="no index of a corpus"):
        build(tmp_path / "text", [tmp_path / "c.jsonl"])
    assert (tmp_path / "text").read_text() == "a letter"
    with pytest.raises(UserError, match="no such index"):
        Corpus(tmp_path / "nothing")
    with pytest.raises(UserError, match="there is no folder"):
        build(tmp_path / "no" / "c", [tmp_path / "c.jsonl"])
    with pytest.raises(UserError, match="is a folder"):
        build(tmp_path, [tmp_path / "c.jsonl"])
    with closing(sqlite3.connect(tmp_path / "c")) as db:
        db.execute("PRAGMA user_version = 9")
    for open_it in (lambda: Corpus(tmp_path / "c"), lambda: build(tmp_path / "c", [tmp_path / "c.jsonl"])):
        with pytest.raises(UserError, match="has version 9, this program reads 2"):
            open_it()


def test_a_corpus_that_is_damaged_while_it_is_searched_ends_the_run(tmp_path):
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", made(30))])
    searched = Corpus(tmp_path / "c")
    with closing(sqlite3.connect(tmp_path / "c")) as db:
        db.execute("DROP TABLE postings")
    with pytest.raises(ToolFailure, match="index: .*no such table: postings"):
        searched.text_search("w5")


def test_pictures_and_a_corpus_cannot_be_searched_in_one_run(tmp_path):
    """Nor is its file recognised, nor cut to --results."""
    build(tmp_path / "c", [write_lines(tmp_path / "c.jsonl", made(30))])
    index.build(tmp_path / "i", "builtin", None, None, write_lines(tmp_path / "pages.jsonl", PAGES))
    name = f"image=local:{tmp_path / 'i'},text=local:{tmp_path / 'c'}"
    options = Options(search=name, results=2, search_cache=str(tmp_path / "searches.sqlite"))
    engine = open_backend(options).backend
    seen = engine.text_search("w1 w2")
    assert len(seen.hits) == 2 and seen.source == f"local:{tmp_path / 'c'}" and not seen.cached
    assert engine.text_search("w1 w2").cached and not engine.text_search("Eiffel").hits
