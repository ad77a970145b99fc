import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from fake_web import FakeWeb, raw, status
from picture_files import private

from mmsr.construct import __main__ as construct
from mmsr.construct.__main__ import Rollouts, build, chunks, need_of, options
from mmsr.construct.curate import FREE, REQUIRED, balanced, category, choose, draw_concepts, table_text, write_parquet
from mmsr.construct.dedup import NEAR, difference_hash, distinct, near_duplicates, normal, says
from mmsr.construct.demo import ScriptedModel
from mmsr.construct.factory import IN_A_ROW, Calls, Factory, LeftOut, alone, write_lines
from mmsr.construct.questions import Shelf, Stages, checked_question, external, parsed_answer
from mmsr.construct.sources import Corpus, Web
from mmsr.data.formats import read_examples
from mmsr.net.client import Client
from mmsr.net.completions import ChatServer
from mmsr.search.cache import Cached
from mmsr.search.store import Store
from mmsr.system.errors import UserError
from mmsr.system.journal import Journal
from mmsr.tools import ToolFailure

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"


def noise(seed: int, side: int = 32) -> bytes:
    """A picture like no other."""
    cells = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(cells).resize((side, side)).save(file, "PNG")
    return file.getvalue()


def corpus(folder: Path, n: int) -> tuple[Path, Path]:
    """Titles of `n` pictures, and counts that make a half of them familiar."""
    folder.mkdir(parents=True)
    names = [f"thing{i:05d}" for i in range(n)]
    for i, name in enumerate(names):
        (folder / f"{name}.png").write_bytes(noise(i))
    lines = ({"file": f"{n}.png", "title": n, "text": f"This is called {n} .", "licence": "CC0"} for n in names)
    write_lines(folder / "titles.jsonl", lines)
    counts = folder / "counts.json"
    counts.write_text(json.dumps({name: 10 if i % 2 else 1000 for i, name in enumerate(names)}))
    return folder / "titles.jsonl", counts


def command(out: Path, titles: Path, counts: Path, n: int, *more: str) -> list[str]:
    """Options of a build from a corpus, by sections and not by rollouts."""
    sizes = ["--concepts", str(n), "--train", str(n // 4), "--test", str(n // 10), "--required", "0.5"]
    limits = ["--familiar", "500", "--unfamiliar", "100", "--min-side", "32", "--seconds", "30", "--workers", "16"]
    where = ["--out", str(out), "--search", f"corpus:{titles}", "--counts", str(counts)]
    return [*where, *sizes, *limits, "--vision-model", "scripted", "--no-rollouts", *more]


def built(folder: Path) -> dict[str, bytes]:
    """What must be the same however it came about."""
    names = ("concepts", "found", "pictures", "distinct", "questions", "groups", "needs")
    files = [*(folder / f"{name}.jsonl" for name in names), folder / "train.parquet", folder / "test.parquet"]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture
def model():
    with ScriptedModel(stall=0) as scripted:
        yield scripted


# ---- the stages


def test_a_stages_file_does_not_depend_on_who_was_first(tmp_path):
    items = [{"id": f"{i:03d}"} for i in range(200)]

    def work(item, reasons):
        time.sleep(random.random() / 500)
        reasons["odd"] += int(item["id"]) % 2
        return [{"id": f"{item['id']}-{n}"} for n in range(2)] * (int(item["id"]) % 2 == 0)

    files = []
    for name, workers in (("a", 1), ("b", 17)):
        factory = Factory(tmp_path / name, workers)
        lines = factory.stage("s", random.sample(items, len(items)), work)
        assert factory.report["s"] == {"items": 200, "records": 200, "reasons": {"odd": 100}, "postponed": {}}
        files.append(lines.path.read_bytes())
    assert files[0] == files[1]


def test_no_more_items_are_taken_than_are_worked_on(tmp_path):
    lock, seen = threading.Lock(), Counter()

    class Items:
        def __iter__(self):
            with lock:
                seen["pass"] += 1
            for i in range(300):
                with lock:
                    if seen["pass"] == 2:  # the first counts, the second works
                        seen["open"] += 1
                        seen["most"] = max(seen["most"], seen["open"])
                yield {"id": str(i)}

    def work(item, reasons):
        time.sleep(0.001)
        with lock:
            seen["open"] -= 1
        return []

    Factory(tmp_path, 8).stage("s", Items(), work)
    assert 2 <= seen["most"] <= 9 and seen["open"] == 0


def test_what_failed_for_now_is_tried_again_and_what_failed_for_good_is_not(tmp_path):
    tried, broken = Counter(), True

    def work(item, reasons):
        tried[item["id"]] += 1
        if item["id"] == "later" and broken:
            raise ToolFailure("timeout", "no whole reply")
        if item["id"] == "useless":
            raise LeftOut("of no use")
        if item["id"] == "never":
            raise ToolFailure("status", "openai: HTTP 400: picture refused")
        return [item]

    factory, items = Factory(tmp_path, 2), [{"id": "now"}, {"id": "later"}, {"id": "never"}, {"id": "useless"}]
    assert [one["id"] for one in factory.stage("s", items, work)] == ["now"]
    assert factory.report["s"]["postponed"] == {"timeout": 1}
    assert factory.report["s"]["reasons"] == {"of no use": 1, "refused: status": 1}
    broken = False
    assert [one["id"] for one in factory.stage("s", items, work)] == ["later", "now"]
    assert tried == {"now": 1, "later": 2, "never": 1, "useless": 1} and not factory.report["s"]["postponed"]


@pytest.mark.parametrize("kind", ["auth", "credits", "budget"])
def test_a_lasting_trouble_stops_at_once_and_loses_nothing(tmp_path, kind):
    def work(item, reasons):
        if int(item["id"]) >= 5:
            raise ToolFailure(kind, "HTTP 401: no")
        return [item]

    items = [{"id": str(i)} for i in range(1000)]
    with pytest.raises(UserError, match=f"s: {kind}.*nothing is lost"):
        Factory(tmp_path, 4).stage("s", items, work)
    done = []
    Factory(tmp_path, 4).stage("s", items, lambda item, reasons: done.append(item["id"]) or [item])
    assert len(done) == 995 and "0" not in done


def test_many_failures_in_a_row_stop_a_stage(tmp_path):
    tried = []

    def work(item, reasons):
        tried.append(item)
        raise ToolFailure("network", "refused")

    with pytest.raises(UserError, match=f"{IN_A_ROW} items in a row failed, the last with network: refused"):
        Factory(tmp_path, 4).stage("s", [{"id": str(i)} for i in range(500)], work)
    assert len(tried) <= IN_A_ROW + 4


def test_a_mistake_of_ours_ends_the_run_and_is_shown(tmp_path):
    def work(item, reasons):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        Factory(tmp_path, 4).stage("s", [{"id": "1"}, {"id": "2"}], work)


def test_a_changed_setting_or_item_is_worked_on_anew_and_the_others_are_not(tmp_path):
    tried = []

    def work(item, reasons):
        tried.append(item["id"])
        return [item]

    for items, settings in (("ab", 1), ("abc", 1), ("bc", 1), ("a", 2)):
        list(Factory(tmp_path, 1).stage("s", [{"id": name} for name in items], work, settings))
    assert tried == ["a", "b", "c", "a"]


# ---- paid answers


def test_one_question_of_many_threads_is_one_call_and_none_the_next_time(tmp_path, monkeypatch):
    with FakeWeb() as web:
        web.delay = 0.1
        for _ in range(2):
            server = ChatServer(web.url, "m", "", Client())
            calls = Calls(server, Journal(tmp_path / "calls"))
            with ThreadPoolExecutor(16) as pool:
                asked = [pool.submit(calls.complete, [{"role": "user", "content": "hello"}], 9) for _ in range(16)]
            assert {one.result() for one in asked} == {"The bridge crosses the Tagus."}
        assert len(web.calls("openai")) == 1


def test_an_answer_is_on_the_disk_before_it_is_used_and_a_failure_is_not(tmp_path):
    with FakeWeb() as web:
        calls = Calls(ChatServer(web.url, "m", "", Client()), Journal(tmp_path / "calls"))
        web.then("openai", raw(b"<html>rubbish"))
        with pytest.raises(ToolFailure, match="format"):
            calls.complete([{"role": "user", "content": "hello"}], 9)
        assert not (tmp_path / "calls").exists()
        calls.complete([{"role": "user", "content": "hello"}], 9)
        assert b"Tagus" in (tmp_path / "calls").read_bytes()


def test_a_busy_server_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("mmsr.construct.factory.time.sleep", lambda seconds: None)
    with FakeWeb() as web:
        calls = Calls(ChatServer(web.url, "m", "", Client(sleep=lambda seconds: None)), Journal(tmp_path / "calls"))
        web.then("openai", *[status(429, {"error": "slow down"}) for _ in range(7)])
        assert calls.complete([{"role": "user", "content": "a"}], 9) == "The bridge crosses the Tagus."


# ---- concepts


def test_concepts_come_once_from_head_and_tail():
    counts = {f"word {i}": i for i in range(101)} | {"WORD 100": 7, "Word-99!": 2}
    drawn = draw_concepts([*counts, "", "?!", "x" * 90], counts, 20, 0.9, 0.2, seed=0)
    by_section = {s: [c for c in drawn if c["section"] == s] for s in ("familiar", "unfamiliar")}
    assert len(by_section["familiar"]) == 10 and all(c["count"] >= 90 for c in by_section["familiar"])
    assert len(by_section["unfamiliar"]) == 10 and all(0 < c["count"] <= 20 for c in by_section["unfamiliar"])
    names = {c["concept"] for c in drawn}
    assert len({normal(name) for name in names}) == 20 and not {"WORD 100", "Word-99!"} & names
    assert drawn == draw_concepts([*counts], counts, 20, 90.1, 20.8, seed=0)  # counts instead of quantiles
    assert drawn != draw_concepts([*counts], counts, 20, 0.9, 0.2, seed=1)


@pytest.mark.parametrize(
    "metadata, counts, complaint",
    [
        ({"a": 1}, {"a": 1}, "--metadata: not a JSON list"),
        (["a", 3], {"a": 1}, "--metadata: not a JSON list"),
        (["a"], ["a"], "--counts: not a JSON object"),
        (["a"], {"a": "many"}, "--counts: not a JSON object"),
        (["a"], {"a": True}, "--counts: not a JSON object"),
        (["a"], {"b": 5}, "no entry of --metadata has a count"),
        (["a", "b"], {"a": 5, "b": 5}, "leave room between"),
    ],
)
def test_metadata_of_another_shape_is_refused(metadata, counts, complaint):
    with pytest.raises(UserError, match=complaint):
        draw_concepts(metadata, counts, 10, 0.9, 0.1, 0)


def test_names_are_the_same_whatever_their_case_and_punctuation_and_whole_words_only():
    assert normal("  Eiffel-Tower!") == normal("eiffel tower") and normal("İzmir Straße") == normal("IZMIR STRASSE")
    assert normal("कि") != normal("की") and says("東京タワーは港区にある", "東京タワー")
    assert says("the (Eiffel) tower.", "eiffel tower") and not says("counterfeit", "fei") and not says("a", "?")


# ---- pictures


def test_a_picture_saved_again_is_a_near_duplicate_and_another_is_not():
    first = PIL.Image.open(io.BytesIO(noise(0, 200))).convert("RGB")
    file = io.BytesIO()
    first.resize((120, 120)).save(file, "JPEG", quality=60)
    codes = [difference_hash(first), difference_hash(PIL.Image.open(file)), difference_hash(first.rotate(90))]
    assert list(near_duplicates(codes)) == [(0, 1)]
    pictures = [{"hash": code, "n": n} for n, code in enumerate([codes[2], codes[0], codes[1], codes[0]])]
    assert [one["n"] for one in distinct(pictures)] == [0, 1]
    assert list(near_duplicates([])) == []


def test_no_near_duplicate_is_missed():
    rng = random.Random(0)
    codes = [rng.getrandbits(128) for _ in range(20)]
    for _ in range(300):
        flips = rng.sample(range(128), rng.randrange(14))
        codes.append(rng.choice(codes[:20]) ^ sum(1 << bit for bit in flips))
    all_pairs = [(a, b) for b in range(len(codes)) for a in range(b) if (codes[a] ^ codes[b]).bit_count() <= NEAR]
    assert list(near_duplicates([f"{code:032x}" for code in codes])) == all_pairs and len(all_pairs) > 300


class Answers:
    """In a chat server's place: says what it is told to, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        self.server = type("Server", (), {"client": None})

    def complete(self, messages, max_tokens, temperature=0.0):
        self.asked.append(messages)
        return self.answers.pop(0)


class Shown:
    """A finder that shows these."""

    def __init__(self, *pictures, pages=()):
        self.found, self.pages = pictures, pages

    def pictures(self, concept):
        return list(self.found)

    def text_search(self, query):
        from mmsr.episode import Observation

        return Observation(tuple(self.pages), source="test")


def stages(tmp_path, *answers, finder=None, per_concept=9):
    finder = finder or Shown()
    store = Store(None)
    return Stages(Answers(*answers), finder, Cached(finder, store), Shelf(tmp_path / "pictures"), 32, per_concept)


def test_unfit_pictures_are_left_out_each_for_its_reason(tmp_path):
    from mmsr.construct.sources import Picture

    def shown(data, title="the heron", text="A heron is a bird."):
        return Picture(title, "https://a.example/", text, "https://a.example/p", "CC0", data)

    long = io.BytesIO()
    PIL.Image.new("RGB", (400, 40)).save(long, "PNG")
    again = io.BytesIO()
    PIL.Image.open(io.BytesIO(noise(1, 64))).save(again, "WEBP", lossless=True)
    finder = Shown(
        shown(b"no picture"), shown(noise(0, 20)), shown(long.getvalue()), shown(noise(1, 64)), shown(again.getvalue()),
        shown(noise(2), "a stork"), shown(noise(3), "bird", "Nothing of the sort."), shown(noise(4), "bird"),
    )  # fmt: skip
    made = stages(tmp_path, '{"shows": false}', "Yes.", '{"shows": true}', finder=finder)
    item = {"id": "i", "concept": "Heron", "count": 3, "section": "familiar"}
    reasons = Counter()
    (found,) = made.search(item, reasons)
    kept = made.pictures(json.loads(json.dumps(found)), reasons)
    assert [one["title"] for one in kept] == ["the heron", "bird"]
    assert +reasons == {
        "not a readable picture": 1, "too small": 1, "too elongated": 1, "much like another of its concept": 1,
        "shows something else": 1, "no page about the concept": 1, "relevant, mended: no JSON object": 1,
    }  # fmt: skip
    assert kept[0]["licence"] == "CC0" and kept[0]["address"] == "https://a.example/p"
    assert made.shelf.read(kept[0]["picture"]) == noise(1, 64) and len(kept[0]["page"]["sha256"]) == 64
    assert len(stages(tmp_path, finder=finder, per_concept=1).pictures(found, reasons)) == 1


def test_a_changed_picture_file_is_not_taken_for_the_one_that_was_found(tmp_path):
    shelf = Shelf(tmp_path)
    name = shelf.keep(noise(0))
    (tmp_path / name).write_bytes(noise(1))
    with pytest.raises(UserError, match="not the picture that was found"):
        shelf.read(name)


def test_a_data_set_holds_a_pictures_private_words(tmp_path):
    """It is made to be shared. A corpus still knows the picture, as it is kept and as it was."""
    full, bare = private("JPEG")
    (tmp_path / "a.jpg").write_bytes(full)
    (tmp_path / "titles.jsonl").write_text(json.dumps({"file": "a.jpg", "title": "the square"}) + "\n")
    shelf, corpus = Shelf(tmp_path / "shelf"), Corpus(tmp_path / "titles.jsonl")
    kept = shelf.read(shelf.keep(corpus.pictures("the square")[0].image))
    assert kept == bare and shelf.read(shelf.keep(b"no picture")) == b"no picture"
    assert {corpus.image_search(picture).hits[0].title for picture in (kept, full)} == {"the square"}


def test_pictures_and_licences_come_from_the_live_web(tmp_path, monkeypatch):
    monkeypatch.setenv("MMSR_ALLOW_LOOPBACK", "1")
    with FakeWeb() as web:
        shown = {"title": "a heron", "link": "https://h.example/", "license_details_url": "https://cc.example/"}
        entries = [shown | {"original": f"{web.url}/big.jpg"}, shown | {"original": "ftp://x"}, "rubbish"]
        web.then("serpapi.google", status(200, {"images_results": entries}))
        web.files["/big.jpg"] = noise(5, 300)
        web.pages = lambda url: "The heron eats fish."
        web.answer = lambda body: "The heron eats fish."
        spent = []
        finder = Web.from_environment(environ=web.environ(), client=Client(), spend=spent.append)
        calls = Answers()
        calls.server.client = finder.client
        made = Stages(calls, finder, Cached(finder, Store(None)), Shelf(tmp_path), 32, 1)
        (item,) = made.search({"id": "i", "concept": "heron", "count": 1, "section": "familiar"}, Counter())
        assert spent == ["serpapi"] and len(item["found"]) == 1
        (kept,) = made.pictures(item, Counter())
        assert kept["licence"] == "https://cc.example/" and kept["page"]["text"] == "The heron eats fish."
        web.then("serpapi.google", status(200, {"error": "Google hasn't returned any results for this query."}))
        assert finder.pictures("nothing") == []


# ---- questions

PAGE = "The grey heron is a wading bird. It was described by Carl Linnaeus in 1758."
GOOD = {
    "question": "Who described this bird?", "answer": "Carl Linnaeus", "aliases": ["Linnaeus", "carl linnaeus!", " "],
    "evidence": "It was described by Carl Linnaeus in 1758.",
}  # fmt: skip


def test_a_good_question_passes_and_its_aliases_are_distinct():
    made = checked_question("grey heron", PAGE, GOOD)
    assert made == GOOD | {"aliases": ["Linnaeus"]}


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"question": "Who described the Grey-Heron?"}, "names the concept"),
        ({"question": "Tell me."}, "not one short sentence"),
        ({"question": "Is this a bird?"}, "not one short sentence"),
        ({"question": "Who described this, Carl Linnaeus?"}, "stands in the question"),
        ({"answer": "a wading bird It was described by Carl"}, "empty or too long"),
        ({"answer": "?!"}, "empty or too long"),
        ({"answer": "Charles Darwin"}, "answer is not in the page"),
        ({"evidence": "It was described by Carl Linnaeus in Sweden."}, "evidence"),
        ({"evidence": "The grey heron is a wading bird."}, "evidence"),
        ({"answer": 1758}, "fields"),
        ({"aliases": "Linnaeus"}, "fields"),
    ],
)
def test_a_question_that_breaks_a_rule_is_refused(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        checked_question("grey heron", PAGE, GOOD | change)


@pytest.mark.parametrize(
    "answer, complaint",
    [
        ("I'm sorry, I can't help with that.", "refused"),
        ('{"question": "Wh', "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ("{" * 100_000, "no JSON object"),
        ("", "no JSON object"),
    ],
)
def test_rubbish_is_no_json(answer, complaint):
    with pytest.raises(ValueError, match=complaint):
        parsed_answer(answer)


def test_an_answer_is_mended_once_and_then_dropped_with_its_reason(tmp_path):
    item = {"id": "i", "concept": "grey heron", "page": {"url": "", "title": "", "sha256": "", "text": PAGE}}
    bad, good = json.dumps(GOOD | {"question": "Who described the grey heron?"}), json.dumps(GOOD)
    made = stages(tmp_path, bad, f"Here it is:\n```json\n{good}\n```")
    item["picture"], reasons = made.shelf.keep(noise(0)), Counter()
    (question,) = made.question(item, reasons)
    assert question["answer"] == "Carl Linnaeus" and "text" not in question["page"]
    assert reasons == {"question, mended: the question names the concept": 1}
    first, second = made.calls.asked
    assert first[0]["content"][0]["type"] == "image_url" and PAGE in first[0]["content"][1]["text"]
    assert second[:1] == first and second[1]["content"] == bad and "names the concept" in second[2]["content"]
    made.calls.answers, reasons = ["I cannot do that.", bad], Counter()
    with pytest.raises(LeftOut, match="question: the question names the concept"):
        made.question(item, reasons)
    assert not reasons


def test_what_a_page_says_is_not_taken_for_a_place_in_the_prompt(tmp_path):
    made = stages(tmp_path, '{"shows": true}')
    made.ask("relevant", {"concept": "{title}", "title": "{concept} \\1"}, lambda answer: True, Counter())
    assert "show {title}, large" in made.calls.asked[0][0]["content"][0]["text"]


def test_a_group_that_is_none_is_asked_for_again(tmp_path):
    made, reasons = stages(tmp_path, '{"group": "birds"}', '{"group": "animals and plants"}'), Counter()
    item = {"id": "i", "question": "q", "answer": "a", "concept": ""}
    assert len(made.groups) == 8 and made.group(item, reasons) == [item | {"group": "animals and plants"}]
    assert reasons == {"group, mended: not one of the groups": 1}


def test_questions_of_others_join(tmp_path):
    (tmp_path / "a.png").write_bytes(noise(0))
    line = {"id": 7, "image": "a.png", "question": "What?", "answers": ["x", "y"]}
    write_lines(tmp_path / "others.jsonl", [line])
    (one,) = external([str(tmp_path / "others.jsonl")], Shelf(tmp_path / "shelf"))
    assert (one["answer"], one["aliases"], one["section"], one["source"]) == ("x", ["y"], "external", "others.jsonl")


# ---- need, balance, splits


@pytest.mark.parametrize(
    "right, need",
    [
        ({}, ""), ({"direct": 1, "image": 8}, "free"), ({"none": 1, "both": 7}, "free"), ({"both": 1}, "both"),
        ({"image": 1, "both": 7}, "image"), ({"text": 3, "image": 2}, "text"), ({"text": 1}, "text"),
    ],
)  # fmt: skip
def test_need_is_the_least_that_sufficed(right, need):
    tries = {f"right_{way}": right.get(way, 0) for way in ("direct", "none", "image", "text", "both")}
    assert need_of(tries) == need


def pool(n: int, rng: random.Random) -> list[dict]:
    """Questions with shared concepts, shared pictures and near-duplicates."""
    codes = [f"{rng.getrandbits(128):032x}" for _ in range(n // 2)]
    questions = []
    for i in range(n):
        code = int(rng.choice(codes), 16) ^ (1 << rng.randrange(128)) * rng.randrange(2)
        about = {"concept": rng.choice(["", f"c{rng.randrange(n)}"]), "picture": f"p{rng.randrange(n)}"}
        kind = {"need": rng.choice(["free", "image"]), "group": f"g{rng.randrange(8)}", "section": rng.choice("fu")}
        questions.append({"id": f"q{i}", "hash": f"{code:032x}", **about, **kind})
    return questions


@pytest.mark.parametrize("seed", range(8))
def test_nothing_leaks_between_the_splits_and_the_ratio_is_kept(seed):
    questions = pool(300, random.Random(seed))
    chosen = choose(questions, {"train": 100, "test": 30}, 0.6, seed)
    train, test = chosen["train"], chosen["test"]
    for key in ("concept", "picture"):
        assert not {q[key] for q in train if q[key]} & {q[key] for q in test if q[key]}
    codes = [q["hash"] for q in train + test]
    assert not any(a < len(train) <= b for a, b in near_duplicates(codes))
    kinds = {split: Counter(map(category, chosen[split])) for split in chosen}
    for split in chosen:
        share = kinds[split][REQUIRED] / kinds[split].total()
        assert abs(share - 0.6) <= 1 / kinds[split].total() + 1e-9
    assert chosen == choose(questions[:], {"train": 100, "test": 30}, 0.6, seed)


def test_the_sizes_asked_for_are_given_where_there_is_enough():
    questions = [
        {"id": f"q{i}", "hash": f"{random.Random(i).getrandbits(128):032x}", "concept": f"c{i}", "picture": f"p{i}",
         "need": "free" if i % 2 else "text", "group": f"g{i % 7}", "section": "f"}
        for i in range(400)
    ]  # fmt: skip
    chosen = choose(questions, {"train": 200, "test": 50}, 0.68, 0)
    assert {split: len(found) for split, found in chosen.items()} == {"train": 200, "test": 50}
    assert Counter(map(category, chosen["train"])) == {REQUIRED: 136, FREE: 64}


def test_groups_and_sections_are_drawn_in_turn():
    sizes = {("a", "f"): 50, ("a", "u"): 5, ("b", "f"): 30, ("b", "u"): 50}
    questions = [{"id": f"{g}{s}{i}", "group": g, "section": s} for (g, s), n in sizes.items() for i in range(n)]
    drawn = Counter((q["group"], q["section"]) for q in balanced(questions, 65, 0))
    assert drawn == {("a", "f"): 20, ("a", "u"): 5, ("b", "f"): 20, ("b", "u"): 20}


def test_a_kind_of_which_there_is_none_is_an_error_and_no_other_ratio():
    questions = [q | {"need": "free"} for q in pool(50, random.Random(0))]
    with pytest.raises(UserError, match="not one of each kind"):
        choose(questions, {"train": 10, "test": 5}, 0.5, 0)


def test_the_parquet_has_fvqas_columns_and_is_opened_by_data(tmp_path):
    shelf = Shelf(tmp_path / "shelf")
    question = {
        "id": "q1", "picture": shelf.keep(noise(0)), "concept": "heron", "section": "familiar", "group": "birds",
        "page": {"url": "u", "title": "t", "sha256": "s"}, "address": "a", "licence": "CC0", "need": "image",
        "tries": {"tries": 8}, **GOOD,
    }  # fmt: skip
    write_parquet(tmp_path / "a.parquet", [question] * 70, shelf)
    data = read_examples(tmp_path / "a.parquet")
    assert len(data) == 70 and data[69].image == noise(0) and data[69].category == REQUIRED
    assert data[0].question == GOOD["question"] and data[0].answers[:2] == ("Carl Linnaeus", "Linnaeus")
    row = pq.read_table(tmp_path / "a.parquet").slice(0, 1).to_pylist()[0]
    assert list(row)[:7] == [
        "prompt", "images", "reward_model", "data_source", "image_urls", "data_id", "category"
    ]  # fmt: skip
    assert row["page_sha256"] == "s" and row["licence"] == "CC0" and json.loads(row["tries"]) == {"tries": 8}


def test_a_strangers_text_is_no_markup_in_the_card():
    assert table_text("a|b\n<script>[x](y)") == "a&#124;b &lt;script&gt;&#91;x](y)"


# ---- the whole


def run(argv: list[str], url: str, **environ: str) -> None:
    build(options(argv), environ={"OPENAI_BASE_URL": url, **environ})


def test_a_data_set_is_built_and_the_same_command_pays_nothing_more(tmp_path, model):
    titles, counts = corpus(tmp_path / "corpus", 60)
    argv = command(tmp_path / "out", titles, counts, 60, "--record")
    run(argv, model.url)
    asked, files = model.asked.copy(), built(tmp_path / "out")
    assert max(Counter(asked).values()) <= 3  # a busy server was asked again
    run(argv, model.url)
    assert model.asked == asked and built(tmp_path / "out") == files
    train, test = (read_examples(tmp_path / "out" / f"{split}.parquet") for split in ("train", "test"))
    assert len(train) + len(test) == pytest.approx(21, abs=6) and not {e.image for e in train} & {e.image for e in test}
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["stages"]["concepts"]["items"] == 60 and card["cost"]["answers"] > 150
    assert "CC0" in pq.read_table(tmp_path / "out" / "train.parquet")["licence"].to_pylist()
    shown = (tmp_path / "out" / "card.md").read_text()
    assert "| questions |" in shown and len(list((tmp_path / "out" / "samples").iterdir())) >= 4
    recorded = Store(tmp_path / "out" / "searches.sqlite", readonly=True)
    assert recorded.stats()["results"]["image_search"] == {"corpus": len(train) + len(test)}
    recorded.close()


@pytest.mark.slow
def test_more_concepts_cost_only_what_is_new(tmp_path, model):
    titles, counts = corpus(tmp_path / "corpus", 60)
    run(command(tmp_path / "out", titles, counts, 40), model.url)
    asked = model.asked.copy()
    run(command(tmp_path / "out", titles, counts, 60), model.url)
    assert all(model.asked[key] == n for key, n in asked.items()) and len(model.asked) > len(asked) + 50


@pytest.mark.first_is_quick
@pytest.mark.parametrize(
    "environ, more, complaint",
    [
        ({}, (), "OPENAI_API_KEY is not set"),
        ({"OPENAI_API_KEY": "k-0123456789"}, (), "give --budget N"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9"}, ("--search", "live"), "give --budget N"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9"}, ("--metadata", "not/there"), "no such file"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9"}, ("--search", "corpus:not/there"), "no such file"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9"}, ("--search", "none"), "finds no pictures by words"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9", "OPENAI_API_KEY": "k-0123456789"},
         ("--search", "live", "--budget", "9", "--metadata", "x"), "SERPAPI_API_KEY"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9"}, (), "does not answer"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:9"}, ("--rollouts",), "--model is missing"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_one_line(tmp_path, environ, more, complaint, monkeypatch):
    for name in ("SERPAPI_API_KEY", "SERPER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    titles, counts = corpus(tmp_path / "corpus", 4)
    argv = command(tmp_path / "out", titles, counts, 4, *more)
    with pytest.raises(UserError, match=complaint) as caught:
        build(options(argv), environ=environ)
    assert "\n" not in str(caught.value)


def test_a_server_that_answers_rubbish_is_told_of_and_nothing_is_lost(tmp_path, model):
    titles, counts = corpus(tmp_path / "corpus", 80)
    argv = command(tmp_path / "out", titles, counts, 80)
    with FakeWeb() as web:
        web.always("openai", raw(b"<html>Welcome</html>"))
        with pytest.raises(UserError, match="does not answer: format: "):
            run(argv, web.url)
        web.standing.clear()
        web.then("openai", *[status(200, {"choices": [{"message": {"content": "ready"}}]})])
        web.answer = lambda body: "ready" if "ready" in str(body["messages"]) else "gibberish"
        with pytest.raises(UserError, match="not one of each kind"):  # every answer was paid, and none was of use
            run(argv, web.url)
        report = (tmp_path / "out" / "concepts.jsonl").read_text()
        assert report == ""


def test_the_budget_is_never_overspent_and_a_larger_one_goes_on(tmp_path, model):
    titles, counts = corpus(tmp_path / "corpus", 40)
    argv = command(tmp_path / "out", titles, counts, 40)
    with pytest.raises(UserError, match="budget: all 50 paid calls.*nothing is lost"):
        run([*argv, "--budget", "50"], model.url, OPENAI_API_KEY="key-0123456789")
    asked = model.asked.copy()
    assert len(asked) <= 50  # one that was refused as busy is not paid
    run([*argv, "--budget", "500"], model.url, OPENAI_API_KEY="key-0123456789")
    assert "key-0123456789" not in "".join(f.read_text(errors="replace") for f in (tmp_path / "out").rglob("*.*json*"))


def test_two_runs_do_not_write_into_one_folder(tmp_path, model):
    titles, counts = corpus(tmp_path / "corpus", 4)
    (tmp_path / "out" / "work").mkdir(parents=True)
    with alone(tmp_path / "out"), pytest.raises(UserError, match="another run is at work"):
        run(command(tmp_path / "out", titles, counts, 4), model.url)
    with pytest.raises(UserError, match="not a folder of this command"):
        run(command(tmp_path / "corpus", titles, counts, 4), model.url)


def test_a_mistyped_option_is_one_line(capsys):
    for argv in (["--out", "x", "--workers", "0"], ["--workers", "3"], ["--out", "x", "--required", "2"], ["--outt"]):
        with pytest.raises(SystemExit) as stopped:
            construct.main(argv)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_demonstration_does_not_write_into_somebodys_folder(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert construct.main(["--demo", "--out", str(tmp_path)]) == 2
    assert "not a folder of this command" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="../shared/data/photos is not there")
def test_photographs_become_a_data_set_without_leaks(tmp_path, model):
    lines = [json.loads(line) for line in (PHOTOS.parent / "photos.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "titles.jsonl", ({**line, "file": str(PHOTOS / line["file"])} for line in lines))
    (tmp_path / "counts.json").write_text(
        json.dumps({line["title"]: 1 + 999 * (i % 2) for i, line in enumerate(lines)})
    )
    argv = command(tmp_path / "out", tmp_path / "titles.jsonl", tmp_path / "counts.json", 400)
    run([*argv, "--train", "220", "--test", "60", "--min-side", "200"], model.url)
    train, test = (read_examples(tmp_path / "out" / f"{split}.parquet") for split in ("train", "test"))
    assert len(train) >= 200 and len(test) >= 40
    rows = {split: pq.read_table(tmp_path / "out" / f"{split}.parquet").to_pylist() for split in ("train", "test")}
    assert not {row["concept"] for row in rows["train"]} & {row["concept"] for row in rows["test"]}
    codes = [difference_hash(PIL.Image.open(io.BytesIO(e.image))) for data in (train, test) for e in data]
    assert not any(a < len(train) <= b for a, b in near_duplicates(codes))


@pytest.mark.slow
def test_ctrl_c_records_what_is_under_way_and_says_nothing(tmp_path, model):
    titles, counts = corpus(tmp_path / "corpus", 300)
    argv = [sys.executable, "-m", "mmsr.construct", *command(tmp_path / "out", titles, counts, 300)]
    model.delay = 0.5
    environ = os.environ | {"OPENAI_BASE_URL": model.url, "OMP_NUM_THREADS": "1"}
    heed = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a suite in the background ignores it, and so would this
    process = subprocess.Popen(
        argv, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=heed
    )
    while model.asked.total() < 100 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    recorded = (tmp_path / "out" / "work" / "calls.jsonl").read_bytes().count(b"\n")
    assert process.returncode == 130 and b"Traceback" not in said
    assert recorded == len(model.asked) < 600  # of more than 900 in all


@pytest.mark.slow
def test_kill_9_at_random_moments_pays_no_recorded_call_twice_and_ends_with_the_same_bytes(tmp_path, model):
    n, kills, rng = 700, 7, random.Random(0)
    titles, counts = corpus(tmp_path / "corpus", n)
    whole = command(tmp_path / "whole", titles, counts, n, "--workers", "64")
    environ = os.environ | {"OPENAI_BASE_URL": model.url, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "mmsr.construct"]
    begun = time.monotonic()
    subprocess.run([*program, *whole], check=True, env=environ, cwd=ROOT, capture_output=True)
    usual, total = time.monotonic() - begun, model.asked.total()
    model.asked.clear()
    argv, settled = [*program, *command(tmp_path / "out", titles, counts, n, "--workers", "64")], {}
    for _ in range(kills):
        process = subprocess.Popen(argv, env=environ, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = model.asked.total()
        while model.asked.total() == before and process.poll() is None:
            time.sleep(0.01)  # starting up is no moment to be killed at
        time.sleep(rng.random() * 1.5 * usual / kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.3)  # what it had sent arrives
        journal = (tmp_path / "out" / "work" / "calls.jsonl").read_bytes()
        lines = [line for line in journal.splitlines(keepends=True) if line.endswith(b"\n")]
        for key in (json.loads(line)["key"] for line in lines):
            settled.setdefault(key, model.asked[key])
    done = subprocess.run(argv, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = [key for key, times in settled.items() if model.asked[key] > times]
    excess = model.asked.total() - total
    print(
        f"{kills} kills, {len(settled)} answers recorded before one, {excess} calls sent again, {usual:.0f} s unkilled"
    )
    assert len(settled) > 100 and not again
    assert excess <= kills * 64
    assert built(tmp_path / "out") == built(tmp_path / "whole")


@pytest.mark.slow
def test_the_demonstration_ends_with_questions_that_the_toy_model_can_be_trained_on(tmp_path, miniature, monkeypatch):
    out = tmp_path / "demo"
    argv = ["--demo", "--out", str(out), "--model", str(miniature), "--no-rollouts", "--train", "64", "--test", "16"]
    assert construct.main(argv) == 0
    data = read_examples(out / "train.parquet")
    assert Counter(example.category for example in data) == {FREE: 32, REQUIRED: 32}
    import train

    searches = f"replay:{out / 'searches.sqlite'}"
    train.main(
        ["--toy", "basic", "--model", str(miniature), "--recipe", "toy",
         "--data", str(out / "train.parquet"), "--search", searches,
         "--steps", "1", "--questions", "4", "--mini-batch", "4", "--group-size", "4", "--eval-size", "4",
         "--out", str(tmp_path / "run")]
    )  # fmt: skip
    line = json.loads((tmp_path / "run" / "rollouts" / "step-000001.jsonl").read_text().splitlines()[0])
    assert line["category"] in (FREE, REQUIRED)
    shown = (tmp_path / "run" / "rollouts" / "step-000001.jsonl").read_text()
    assert '"titles": ["' in shown  # searches are answered from the record


def test_rollouts_are_counted_by_what_they_searched(tmp_path, miniature, model):
    titles, counts = corpus(tmp_path / "corpus", 6)
    shelf = Shelf(tmp_path / "shelf")
    questions = [
        {"id": f"q{i}", "picture": shelf.keep(noise(i)), "concept": f"c{i}", "section": "", "group": "g", "address": "",
         "licence": "", "page": {"url": "", "title": "", "sha256": ""}, **GOOD}
        for i in range(3)
    ]  # fmt: skip
    write_parquet(tmp_path / "pool.parquet", questions, shelf)
    argv = ["--out", "x", "--model", str(miniature), "--recipe", "toy", "--tries", "3"]
    rollouts = Rollouts(tmp_path / "pool.parquet", Corpus(titles), options(argv))
    (item,) = chunks(questions)
    setup, said = rollouts.setup, []

    def roll_out(examples, k, seed, temperature, direct=False):
        episodes, counted = type(setup).roll_out(setup, examples, k, seed, temperature, direct=direct)
        for episode in episodes:  # question 0 is known, question 1 found by those that searched, question 2 by nobody
            right = direct if episode.group_id == 0 else episode.group_id == 1 and episode.searches() > 0
            episode.answer, episode.status = ("Carl Linnaeus", "answered") if right else ("x", "answered")
            said.append((direct, episode.searches()))
        return episodes, counted

    setup.roll_out = roll_out
    setup.score = lambda episodes: [e.reward_parts.update(accuracy=float(e.answer != "x")) for e in episodes]
    reasons = Counter()
    found = rollouts(item, reasons)
    searched = sum(n > 0 for direct, n in said[3:6])
    assert len(said) == 18 and all(n == 0 for direct, n in said if direct)
    needs = {record["id"]: (record["need"], record["tries"]) for record in found}
    assert needs["q0"][0] == "free" and needs["q0"][1]["right_direct"] == 3 and "q2" not in needs
    assert ("q1" in needs) == (searched > 0)
    if searched:
        assert needs["q1"] == ("image", {"tries": 3, "right_direct": 0, "right_none": 0, "right_image": searched,
                                         "right_text": 0, "right_both": 0})  # fmt: skip
    assert reasons["never answered"] == 3 - len(found)

    class Down:
        def image_search(self, image, question, image_url=""):
            raise ToolFailure("budget", "all spent")

    rollouts = Rollouts(tmp_path / "pool.parquet", Down(), options(argv))
    with pytest.raises(ToolFailure, match="budget: all spent"):  # a question is not to be called unanswerable for that
        rollouts(item, reasons)
