"""Recording and replaying: a search is made once, what comes back is the same ever after, and nothing is invented."""

import base64
import json
import multiprocessing
import os
import pickle
import random
import re
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from helpers import FVQA, SEARCHES, TRANSCRIPTS, real_files, refused

from mmsr.config import Config, Options
from mmsr.data.formats import read_examples
from mmsr.data.recorded import recorded_turns
from mmsr.episode import Example, Hit, Observation
from mmsr.search import cache
from mmsr.search.backends import import_searches, open_backend
from mmsr.search.cache import Cached, Replayed, export_jsonl, import_jsonl, import_results, import_transcripts, merge
from mmsr.search.index import build
from mmsr.search.store import Store, image_key, text_key
from mmsr.setup.questions import Questions
from mmsr.setup.search import open_search
from mmsr.system.parallel import SINGLE
from mmsr.tools import Call, Toolbox, ToolFailure, search_tools

DEADLINE = 60


@pytest.fixture
def store():
    with closing(Store(None)) as opened:
        yield opened


class Engine:
    """A search engine that counts its calls; an exception among its results is raised."""

    def __init__(self, *results):
        self.results, self.calls = list(results), []

    def image_search(self, image, question, image_url=""):
        return self._next(("image", image, question))

    def text_search(self, query):
        return self._next(("text", query))

    def _next(self, call):
        self.calls.append(call)
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def page(number: int, **fields) -> Observation:
    return Observation((Hit(f"title {number}", f"https://{number}", f"page {number}", **fields),), source="web")


# Recording.


def test_a_search_is_made_once_and_comes_back_the_same(store):
    engine = Engine(page(1, image=b"png", score=0.5), page(2))
    searched = Cached(engine, store)
    first, again = searched.text_search("Which river?"), searched.text_search(" which RIVER?")
    assert first.hits == again.hits == page(1, image=b"png", score=0.5).hits
    assert (first.cached, again.cached, again.source) == (False, True, "web") and first.seconds > again.seconds == 0
    first, again = searched.image_search(b"picture", "who?"), searched.image_search(b"picture", "where?")
    assert first.hits == again.hits and again.cached
    assert engine.calls == [("text", "Which river?"), ("image", b"picture", "who?")]
    assert store.stats()["counts"] == {
        "calls": {"image_search": 1, "text_search": 1}, "hits": {"image_search": 1, "text_search": 1},
    }  # fmt: skip


def test_results_that_are_made_for_a_question_are_for_no_other(store):
    searched = Cached(Engine(page(1), page(2)), store, form="summary", by_question=True)
    assert searched.image_search(b"p", "who?").hits == page(1).hits
    assert searched.image_search(b"p", "where?").hits == page(2).hits
    assert searched.image_search(b"p", "who?").hits == page(1).hits
    replayed = Replayed(store)
    assert replayed.image_search(b"p", "where?").hits == page(2).hits
    with pytest.raises(ToolFailure, match="miss"):
        replayed.image_search(b"p", "when?")


@pytest.mark.parametrize("failure", [ToolFailure("rate", "429"), OSError("down"), Observation(ok=False, error="502")])
def test_a_failure_is_not_recorded_and_the_next_search_is_made(store, failure):
    searched = Cached(Engine(failure, page(1)), store)
    if isinstance(failure, Exception):
        with pytest.raises(type(failure)):
            searched.text_search("q")
    else:
        assert searched.text_search("q") == failure
    assert searched.text_search("q").hits == searched.text_search("q").hits == page(1).hits
    told = store.stats()
    assert told["results"] == {"text_search": {"web": 1}}
    assert told["counts"] == {name: {"text_search": 1} for name in ("calls", "failures", "hits")}


def test_a_picture_whose_results_were_imported_is_paid_for(store):
    import_results(store, {"1": page(1)}, [Example("1", b"known", "?", ("a",))])
    store.put(text_key("q"), page(2))
    live = Cached(Engine(page(3), page(4)), store, "live/thumbnails/5", imported=True)
    assert live.image_search(b"known", "who?").hits == page(1).hits
    assert live.image_search(b"new", "who?").hits == page(3).hits == live.image_search(b"new", "where?").hits
    assert live.text_search("q").hits == page(4).hits, "a page of another form was taken for one of this"
    assert [call[0] for call in live.backend.calls] == ["image", "text"]
    summaries = Cached(Engine(page(5)), store, "live/summary/5", by_question=True)
    assert summaries.image_search(b"known", "who?").hits == page(5).hits, "titles were taken for a summary"


def test_nothing_found_is_recorded(store):
    searched = Cached(Engine(Observation(source="web")), store)
    assert searched.text_search("q").hits == searched.text_search("q").hits == ()


def test_a_fresh_result_is_to_the_letter_what_a_resumed_run_will_see(store):
    odd = Observation((Hit("\ud83d\ude00", score=np.float32(0.1)),), source="web", cached=True)
    fresh = Cached(Engine(odd), store).text_search("q")
    again = Cached(Engine(), store).text_search("q")
    assert ascii(fresh.hits) == ascii(again.hits) and not fresh.cached


def die_after_a_search(path, seen):
    class Web(Engine):
        def text_search(self, query):
            return page(os.getpid())

    hits = Cached(Web(), Store(path)).text_search("q").hits
    seen.send(hits[0].title)
    os.kill(os.getpid(), 9)


def test_a_result_that_was_seen_survives_kill_9(tmp_path):
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    child = fork.Process(target=die_after_a_search, args=(tmp_path / "s.sqlite", theirs))
    child.start()
    assert ours.poll(DEADLINE)
    title = ours.recv()
    child.join(DEADLINE)
    assert child.exitcode == -9
    with closing(Store(tmp_path / "s.sqlite")) as store:
        assert Cached(Engine(), store).text_search("q").hits[0].title == title


def test_32_threads_that_search_for_the_same_make_one_call(store):
    go = threading.Event()

    class Slow(Engine):
        def text_search(self, query):
            go.wait(DEADLINE)
            return super().text_search(query)

    engine = Slow(page(1), page(2))
    box = Toolbox(search_tools(Cached(engine, store), 1, 1), inline=False, workers=32)
    calls = [box.call("text_search", Call("q", b"", "")) for _ in range(32)]
    go.set()
    seen = [call.result(DEADLINE) for call in calls]
    assert len(engine.calls) == 1 and {one.hits for one in seen} == {page(1).hits}
    assert sorted(one.cached for one in seen) == [False] + 31 * [True]


# Replaying.


def test_a_miss_is_what_was_asked_for(store):
    store.put(text_key("the tagus"), page(1))
    with pytest.raises(ToolFailure) as caught:
        Replayed(store).text_search("the rhine")
    assert caught.value.kind == "miss" and "the rhine" in str(caught.value)
    with pytest.raises(ToolFailure, match="miss: picture"):
        Replayed(store).image_search(b"p")
    failed = Toolbox(search_tools(Replayed(store), 1, 1), inline=True).call("text_search", Call("x", b"", "")).result()
    assert not failed.ok and failed.error.startswith("miss: ")
    for empty in (Replayed(store, "empty").text_search("page"), Replayed(store, "nearest").image_search(b"p")):
        assert (empty.ok, empty.error, empty.hits, empty.source) == (True, None, (), "replay")
    assert store.stats()["counts"]["misses"] == {"image_search": 2, "text_search": 3}


def test_the_nearest_pages_stand_in_for_a_query_that_was_not_recorded(store):
    pages = ["The Tagus rises in Spain.", "Lisbon lies on the Tagus.", "The Rhine passes Basel.", "Ça coule à Genève"]
    for number, text in enumerate(pages):
        store.put(text_key(f"query {number}"), Observation((Hit("page", f"https://{number}", text), Hit("other"))))
    store.put(image_key(b"p"), Observation((Hit("Tagus tower", text="Lisbon"),)))
    near = Replayed(store, "nearest")
    seen = near.text_search("Which river flows through LISBON, the Tagus?")
    assert [hit.url for hit in seen.hits[:2]] == ["https://1", "https://0"] and seen.source == "nearest" and seen.ok
    assert seen.hits[0].score > seen.hits[1].score > 0 and seen.hits[0].text == pages[1]
    assert near.text_search("Tagus").hits[0].title == "page" and len(near.text_search("the page").hits) == 4
    assert near.text_search("geneve").hits[0].url == "https://3"
    assert near.text_search("zebra").hits == near.text_search("").hits == ()
    assert near.text_search("query 2").hits[0].text == pages[2] and near.text_search("query 2").source == ""


def test_a_recording_answers_as_before_its_index_was_corrected(tmp_path):
    """By the same path, or by another form: `--results 3` recorded the first, `--results 5` the second."""
    recording = tmp_path / "searches.sqlite"
    pages = tmp_path / "pages.jsonl"
    for year, results in (("1887", 3), ("1889", 5)):
        pages.write_text(json.dumps({"url": "http://a.example", "text": f"The tower was opened in {year}."}) + "\n")
        build(tmp_path / "my.index", "builtin", None, None, pages)
        options = Options(search=f"local:{tmp_path / 'my.index'}", results=results, search_cache=str(recording))
        open_backend(options).backend.text_search("when was the tower opened")
    for query, miss in (("when was the tower opened", "error"), ("tower opened", "nearest")):
        replayed = open_backend(Options(search=f"replay:{recording}", on_miss=miss)).backend
        assert [hit.text for hit in replayed.text_search(query).hits] == ["The tower was opened in 1889."]
    lines = tmp_path / "corrected.jsonl"
    with closing(Store(recording)) as store:
        export_jsonl(store, lines)
        lines.write_text(lines.read_text().replace("in 1889", "on 31 March 1889"))
        assert import_jsonl(store, lines) == 0, "a change without a newer time"
        said = [json.loads(line) | {"time": 4e9} for line in lines.read_text().splitlines()]
        lines.write_text("".join(json.dumps(line) + "\n" for line in said[-1:]))
        assert import_jsonl(store, lines) == 1 and import_jsonl(store, lines) == 0
        assert "31 March" in Replayed(store).text_search("when was the tower opened").hits[0].text


def test_a_recording_shows_more_results_than_asked_for(tmp_path, store):
    hits = tuple(Hit(f"title {rank}", text="the Tagus") for rank in range(8))
    store.put(text_key("q", "local/8"), Observation(hits))
    import_results(store, {"1": Observation(hits)}, [Example("1", b"p", "?", ("a",))])
    export_jsonl(store, tmp_path / "lines.jsonl")
    for most in (1, 3, 7):
        options = Options(search=f"replay:{tmp_path / 'lines.jsonl'}", results=most, on_miss="nearest")
        replayed = open_backend(options, quiet=True).backend
        for seen in (replayed.text_search("q"), replayed.image_search(b"p", "?"), replayed.text_search("Tagus")):
            assert [hit.title for hit in seen.hits] == [hit.title for hit in hits[:most]]
        live = Cached(Engine(), store, "live/thumbnails/5", imported=True, results=most)
        assert live.image_search(b"p", "?").hits == hits[:most]


def test_conversations_that_searched_twice_change_the_answer_at_every_import(tmp_path, store):
    found = [{"documents": [{"rank": 1, "title": title}], "summaries": []} for title in "ab"]
    turns = [{"response": "", "action": "text_search", "query": "q", "tool_result": result} for result in found]
    path = tmp_path / "transcripts.jsonl"
    path.write_text(json.dumps({"data_id": "made_0", "turns": turns}) + "\n")
    assert [import_transcripts(store, path, []) for _ in range(3)] == [1, 0, 0]
    assert Replayed(store).text_search("q").hits[0].title == "a"


def test_the_nearest_page_is_none_in_the_language_of_the_query(store):
    for query, page in SEARCHES:
        store.put(text_key(f"recorded {query}"), Observation((Hit("page", text=page),)))
    near = Replayed(store, "nearest")
    found = [near.text_search(query).hits[0].text for query, _ in SEARCHES]
    assert found == [page for _, page in SEARCHES], "and the text is as it was recorded"


def test_no_query_is_an_operator_of_the_index(store):
    store.put(text_key("q"), page(1))
    near, draw = Replayed(store, "nearest"), random.Random(0)
    parts = [
        '"',
        "'",
        "*",
        "NEAR(",
        ")",
        " AND ",
        " OR ",
        " NOT ",
        "title:",
        "^",
        "+",
        "-",
        "\0",
        "\ud800",
        "_",
        "page",
        "%",
    ]
    for _ in range(400):
        query = "".join(draw.choices(parts, k=draw.randrange(12)))
        found = "page" in re.findall(r"[^\W_]+", query) or "title" in re.findall(r"[^\W_]+", query)
        assert bool(near.text_search(query).hits) == found, ascii(query)
    assert near.text_search("page " * 5000).hits and near.text_search('page" NOT "page').hits
    assert near.text_search(" ".join(map(str, range(5000)))).ok


def test_replaying_from_threads(store):
    for number in range(40):
        store.put(text_key(f"q {number}"), page(number))
    box = Toolbox(search_tools(Replayed(store, "nearest"), 1, 1), inline=False, workers=16)
    calls = [box.call("text_search", Call(f"q {number % 80}", b"", "")) for number in range(320)]
    for number, call in enumerate(calls):
        seen = call.result(DEADLINE)
        assert seen.ok and (number % 80 >= 40 or seen.hits == page(number % 80).hits)


# Import and export.

TURNS = [
    {"response": "a", "action": "image_search", "tool_result": {"titles": ["A bridge", None]}},
    {
        "response": "b",
        "action": "text_search",
        "query": "Which  River?",
        "tool_result": {"documents": [{"rank": 1, "title": "River"}], "summaries": [{"rank": 1, "summary": "Tagus."}]},
    },
    {"response": "c", "action": "text_search", "query": "nothing", "tool_result": {"documents": [], "summaries": []}},
    {"response": "d", "action": "text_search", "query": "failed", "tool_result": None},
    {"response": "e", "action": "answer", "query": None, "tool_result": None},
]


@pytest.fixture
def transcripts(tmp_path):
    path = tmp_path / "transcripts.jsonl"
    path.write_text(json.dumps({"data_id": "made_0", "turns": TURNS}) + "\n\n")
    return path


def examples() -> list[Example]:
    return [Example(f"made_{i}", f"picture {i}".encode(), "?", ("Tagus",)) for i in range(2)]


def test_recorded_conversations_answer_what_they_hold_and_nothing_else(store, transcripts):
    assert import_transcripts(store, transcripts, examples()) == 3
    assert import_transcripts(store, transcripts, examples()) == 0
    replayed = Replayed(store)
    assert replayed.image_search(b"picture 0", "?").hits == (Hit("A bridge"), Hit())
    assert replayed.text_search(" which river?\n").hits == (Hit("River", text="Tagus."),)
    assert replayed.text_search("nothing").hits == ()
    for search in (
        lambda: replayed.image_search(b"picture 1", "?"),
        *(lambda query=query: replayed.text_search(query) for query in ("failed", "which sea?", "")),
    ):
        with pytest.raises(ToolFailure, match="miss"):
            search()


@real_files
def test_the_real_transcripts_replay_every_recorded_search_and_nothing_else(store):
    known, recorded, searches = read_examples(FVQA), recorded_turns(TRANSCRIPTS), 0
    import_transcripts(store, TRANSCRIPTS, known)
    replayed = Replayed(store)
    for example in known:
        turns = [turn for turn in recorded[example.id] if turn.observation is not None]
        searches += len(turns)
        for turn in turns:
            if turn.action == "image_search":
                assert turn.observation.hits and replayed.image_search(example.image) == turn.observation
            else:
                assert turn.observation.hits and replayed.text_search(f"  {turn.query.upper()}\n") == turn.observation
                with pytest.raises(ToolFailure, match="miss"):
                    replayed.text_search(turn.query + " indeed")
        if not any(turn.action == "image_search" for turn in turns):
            with pytest.raises(ToolFailure, match="miss"):
                replayed.image_search(example.image)
    assert searches == sum(map(sum, (by.values() for by in store.stats()["results"].values()))) > 20


@real_files
def test_a_reworded_real_query_finds_its_pages_among_all_that_were_recorded(store):
    import_transcripts(store, TRANSCRIPTS, [])
    near, found, queries = Replayed(store, "nearest"), 0, 0
    for key, seen, _ in list(store.records()):
        words = sorted(key.query.split())[1:]
        queries += 1
        found += bool({hit.url for hit in seen.hits} & {hit.url for hit in near.text_search(" ".join(words)).hits})
    assert queries > 10 and found / queries > 0.9


def test_results_go_out_and_come_back_whole(tmp_path, store):
    draw, seen = random.Random(3), {}
    for number in range(500):
        key = image_key(b"%d" % number, "thumbnails/5", "?") if number % 2 else text_key(f"q {number} é漢\0", "s")
        thumbnail = draw.choice([None, b"", draw.randbytes(50)])
        seen[key] = Observation((Hit("tïtle\u2028", image=thumbnail, score=draw.choice([None, 1, 0.5])),), source="web")
        store.put(key, seen[key])
    path = tmp_path / "out.jsonl"
    assert export_jsonl(store, path) == 500 and os.listdir(tmp_path) == ["out.jsonl"]
    with closing(Store(tmp_path / "other.sqlite")) as other:
        other.put(text_key("q 0 é漢\0", "s"), page(9))
        assert import_jsonl(other, path) == 499 and import_jsonl(other, path) == 0
        assert other.get(text_key("q 0 é漢\0", "s")).hits == page(9).hits, "an older recording replaced a newer one"
        assert all(other.get(key).hits == one.hits for key, one in list(seen.items())[1:])
    assert merge(store, tmp_path / "other.sqlite") == 1 and merge(store, tmp_path / "other.sqlite") == 0
    assert store.get(text_key("q 0 é漢\0", "s")).hits == page(9).hits, "an older recording stays beside a newer one"
    with closing(Store(None)) as third:
        assert merge(third, tmp_path / "other.sqlite") == 500 and merge(third, tmp_path / "other.sqlite") == 0
        export_jsonl(third, tmp_path / "again.jsonl")
    lines = [dict(json.loads(line)) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    first = [dict(json.loads(line)) for line in path.read_text().splitlines()]
    assert [line for line in lines if line["query"] in {one["query"] for one in first[1:]}] == first[1:]


def test_image_results_of_another_reader(store):
    results = {"1": page(1, image=b"thumb"), "2": Observation(source="fvqa"), "3": page(2)}
    examples = [Example(name, image, "?", ()) for name, image in (("1", b"a"), ("2", b"b"), ("3", b"a"), ("4", b"d"))]
    assert import_results(store, results, examples) == 2 and import_results(store, results, examples) == 0
    assert Replayed(store).image_search(b"a", "?").hits == page(1, image=b"thumb").hits
    assert Replayed(store).image_search(b"b", "?").hits == ()


@pytest.mark.parametrize(
    "change",
    [
        {"query": None}, {"form": 3}, {"hits": [{"title": "t"}]}, {"hits": "x"}, {"time": "noon"}, {"source": []},
        {"time": 10**400}, {"seconds": 10**400}, {"time": float("nan")}, {"time": True}, {"seconds": -1}, {"hits": ""},
        {"hits": [{"title": "", "url": "", "text": "", "image": "no base64!", "score": None}]},
    ],
    ids=range(13),
)  # fmt: skip
def test_an_ill_formed_export_is_refused_by_its_row_and_nothing_of_it_recorded(tmp_path, store, change):
    store.put(text_key("q"), page(1))
    path = tmp_path / "out.jsonl"
    export_jsonl(store, path)
    line = path.read_text()
    path.write_text(line + json.dumps(json.loads(line) | change) + "\n")
    with closing(Store(None)) as other:
        refused(lambda: import_jsonl(other, path), f"{path}: row 1")
        path.write_text(line + line[:50])
        refused(lambda: import_jsonl(other, path), f"{path}: row 1")
        refused(lambda: import_jsonl(other, tmp_path / "absent.jsonl"), "absent.jsonl")
        assert not list(other.records())
    refused(lambda: export_jsonl(store, tmp_path / "no" / "folder.jsonl"), "folder.jsonl")


def test_thumbnails_stand_in_an_export_as_base64(tmp_path, store):
    store.put(image_key(b"p"), page(1, image=b"\x89PNG"))
    export_jsonl(store, tmp_path / "out.jsonl")
    (hit,) = json.loads((tmp_path / "out.jsonl").read_text())["hits"]
    assert base64.b64decode(hit["image"]) == b"\x89PNG"


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_refused_by_name_wherever_results_are_read(tmp_path, monkeypatch, store):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "fvqa_train_image_search_results_cache.pkl"
    path.write_bytes(pickle.dumps({"fvqa_train_0": Bomb()}))
    for read in (
        lambda: import_transcripts(store, path, []),
        lambda: import_jsonl(store, path),
        lambda: merge(store, path),
        lambda: open_backend(Options(search=f"replay:{path}")),
    ):
        refused(read, str(path), "pickle")
    assert os.listdir(tmp_path) == [path.name]


# `--search replay:FILE`.


def test_replay_takes_conversations_or_a_store(tmp_path, store, transcripts):
    path = tmp_path / "searches.sqlite"
    with closing(Store(path)) as recorded:
        recorded.put(text_key("which river?", "summary/5"), page(1))
        recorded.put(image_key(b"picture 0", "thumbnails/5"), page(2))
    before = path.read_bytes()
    for file, text, image in (
        (transcripts, (Hit("River", text="Tagus."),), (Hit("A bridge"), Hit())),
        (path, page(1).hits, page(2).hits),
    ):
        backend = open_backend(Options(search=f"replay:{file}"), examples()).backend
        assert backend.text_search("Which river?").hits == text
        assert backend.image_search(b"picture 0", "?").hits == image
        miss = backend.text_search("which sea?")
        assert miss.ok and miss.hits == () and miss.source == "replay"
    assert path.read_bytes() == before
    forced = Config(search=f"replay:{path}", force_searches=True)
    refused(lambda: open_search(forced, None, Questions({}), SINGLE), str(path), "force")
    refused(lambda: open_backend(Options(search=f"replay:{tmp_path}/no.sqlite")), "no.sqlite", "no such")


def test_exported_searches_are_taken_for_conversations(tmp_path, store, transcripts):
    """Both are .jsonl: a store's export must replay as what it is, and import again as nothing new."""
    store.put(text_key("which river?"), page(1))
    export_jsonl(store, tmp_path / "lines.jsonl")
    backend = open_backend(Options(search=f"replay:{tmp_path / 'lines.jsonl'}", on_miss="error")).backend
    assert backend.text_search("which river?").hits == page(1).hits
    assert import_searches(store, tmp_path / "lines.jsonl", ()) == "0 new searches"
    assert import_searches(store, transcripts, examples()).startswith("3 new"), "the newer answer to one is not taken"
    with pytest.raises(ToolFailure, match="miss"):
        backend.text_search("which sea?")


def test_cache_reads_no_pickle():
    source = Path(cache.__file__).read_text() + (Path(cache.__file__).parent / "store.py").read_text()
    assert "import pickle" not in source and "torch" not in source
