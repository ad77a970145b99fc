"""search.py as a new user meets it: what it prints, what it exits with, and what it says to each mistake."""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import unicodedata
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from fake_web import FakeWeb
from helpers import picture_bytes
from test_index import PAGES, corpus, write_lines

import search
from mmsr.config import Options
from mmsr.episode import Example, Hit, Observation
from mmsr.search import index
from mmsr.search.backends import SearchEngine, open_backend
from mmsr.search.index import Local
from mmsr.search.serve import Server
from mmsr.search.store import Budget, Store, image_key, text_key
from mmsr.system.errors import UserError
from mmsr.tools import Call, ToolFailure, search_tools
from mmsr.toy.world import FULL, World

ROOT = Path(__file__).parent.parent


@pytest.fixture
def made(tmp_path, capsys) -> Path:
    """Folder with `my.index`, made by the command that the help gives, and what it was made of."""
    corpus(tmp_path / "photos", 6)
    write_lines(tmp_path / "pages.jsonl", PAGES)
    assert search.main(index_command(tmp_path)) == 0
    assert "new: 6 pictures, 6 titles, 3 pages; lines that were there already: 0;" in capsys.readouterr().out
    return tmp_path


def test_a_corpus_cannot_be_indexed_and_searched_by_the_programs(tmp_path, capsys):
    lines = write_lines(tmp_path / "wiki.jsonl", [{"id": "0", "contents": '"Paris"\nThe capital of France.'}])
    assert run(capsys, "index", "--corpus", lines, "--out", tmp_path / "wiki.index")[0] == 0
    code, out, _ = run(capsys, "index", "--corpus", lines, "--out", tmp_path / "wiki.index")
    assert code == 0 and "wiki.index: 0 new passages in 0:0" in out and "1 were there; 0.0 MB" in out
    name = f"image=none,text=local:{tmp_path / 'wiki.index'}"
    code, out, _ = run(capsys, "text", "capital of France", "--search", name)
    assert code == 0 and out.startswith("[1] Paris   (score ") and "The capital of France." in out


def index_command(folder: Path) -> list[str]:
    photos = folder / "photos"
    given = {"images": photos, "titles": photos / "titles.jsonl", "pages": folder / "pages.jsonl"}
    return ["index", *(f"--{name}={value}" for name, value in given.items()), f"--out={folder / 'my.index'}"]


def run(capsys, *args) -> tuple[int, str, str]:
    code = search.main([str(arg) for arg in args])
    return code, *capsys.readouterr()


class Fake:
    """A back-end that finds what it is told to, or fails."""

    def __init__(self, found):
        self.found = found

    def text_search(self, query: str) -> Observation:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def image_search(self, image: bytes, question: str, image_url: str = "") -> Observation:
        return self.text_search(question)


def finding(monkeypatch, found) -> None:
    monkeypatch.setattr(search, "open_backend", lambda options: SearchEngine(Fake(found)))


# ---- for people and for machines


def test_an_image_search_tells_less_than_the_model_sees(made, capsys):
    code, out, err = run(capsys, "image", made / "photos" / "4.jpg", "--search", f"local:{made / 'my.index'}")
    lines = out.splitlines()
    assert code == 0 and err == "" and lines[0] == "[1] scene 4   (score 1.000)"
    assert lines[1].startswith("    thumbnail 160 x 120, ") and lines[2] == "    http://s.example/4"
    assert lines[-1].startswith(f"5 results from local:{made / 'my.index'}, in ") and lines[-1].endswith(" ms")


def test_a_text_search_tells_less_than_the_model_sees(made, capsys):
    code, out, _ = run(capsys, "text", "gustave eiffel", "--search", f"local:{made / 'my.index'}", "--results", 1)
    assert code == 0 and "http://a.example/1" in out and "    " + PAGES[0]["text"] in out and "[2]" not in out
    code, out, _ = run(capsys, "text", "zebra", "--search", f"local:{made / 'my.index'}")
    assert code == 0 and out.startswith("No results from local:")


def test_json_departs_from_the_contract(made, capsys):
    source = f"local:{made / 'my.index'}"
    code, out, _ = run(capsys, "image", made / "photos" / "4.jpg", "--search", source, "--json", "--results", 2)
    found = json.loads(out)
    assert code == 0 and [*found] == ["ok", "source", "seconds", "cached", "results"]
    assert (found["ok"], found["source"], found["cached"]) == (True, source, False) and found["seconds"] > 0
    first, second = found["results"]
    assert {"title", "link", "score", "thumbnail"} <= {*first} and first["title"] == "scene 4"
    assert first["url"] == first["link"] == "http://s.example/4", "a result's address has two names"
    assert base64.b64decode(first["thumbnail"]).startswith(b"\xff\xd8") and first["score"] > second["score"]
    code, out, _ = run(capsys, "text", "tower", "--search", source, "--json")
    pages = json.loads(out)["results"]
    assert code == 0 and [page["url"] for page in pages] == ["http://a.example/1", "http://a.example/2"]
    assert pages[0]["text"] == PAGES[0]["text"] and pages[0]["title"] == "Eiffel Tower"


def test_a_failure_exits_with_0_or_without_its_kind(made, capsys, monkeypatch):
    finding(monkeypatch, ToolFailure("auth", "the key is wrong"))
    code, out, _ = run(capsys, "text", "x", "--search", "live", "--json")
    assert code == 1 and json.loads(out) == {"ok": False, "error": {"kind": "auth", "message": "the key is wrong"}}
    code, out, err = run(capsys, "image", made / "photos" / "0.jpg", "--search", "live")
    assert (code, out, err) == (1, "", "search.py: live failed: auth: the key is wrong\n")
    finding(monkeypatch, Observation(ok=False, error="timeout: too slow"))
    code, out, _ = run(capsys, "text", "x", "--search", "live", "--json")
    assert code == 1 and json.loads(out)["error"] == {"kind": "timeout", "message": "too slow"}


def test_a_page_steers_the_terminal(monkeypatch, capsys):
    nasty = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e red \ud800"
    finding(monkeypatch, Observation((Hit(nasty, nasty, f"one\n{nasty}", b"no picture", 0.5),), source="x"))
    code, out, _ = run(capsys, "text", "x", "--search", "live")
    assert code == 0 and all(char.isprintable() or char == "\n" for char in out) and "red" in out
    assert "that the model will not see: not a readable" in out
    code, out, _ = run(capsys, "text", "x", "--search", "live", "--json")
    assert code == 0 and out.isascii() and json.loads(out)["results"][0]["title"] == nasty


# ---- mistakes


@pytest.mark.parametrize(
    "command, message",
    [
        ("image nowhere.jpg --search none", "nowhere.jpg: cannot be read (No such file"),
        ("image {folder} --search none", "cannot be read (Is a directory)"),
        ("image {folder}/paper.pdf --search none", "paper.pdf: not a readable JPEG, PNG, WEBP, GIF picture"),
        ("image {folder}/empty --search none", "empty: not a readable"),
        ("image {folder}/line.png --search none", "aspect ratio"),
        ("text x --search local:{folder}/nothing", "no such index; make one with"),
        ("text x --search local:{folder}/paper.pdf", "cannot be opened as an index"),
        ("text x --search local:", "not complete; give toy, local:FILE"),
        ("text x --search toy:1", "not complete"),
        ("text x --search google", "unknown back-end; give toy, local:FILE"),
        ("text x --search=", "--search is missing"),
        ("text x", "--search is missing; give toy"),
        ("text x --search none --results 0", "--results 0: give a number from 1"),
        ("text {blank} --search none", "the query is empty"),
        ("index --out {folder}/i", "nothing to index: give --images DIR"),
        ("index --out {folder}/i --images {folder}", "--images and --titles go together"),
        ("index --out {folder}/i --titles {folder}/pages.jsonl", "--images and --titles go together"),
        ("index --out {folder}/i --pages {folder}/nothing", "nothing: no such file; check the path"),
        ("index --out {folder}/i --pages {folder}/empty", "nothing could be indexed"),
        ("index --out {folder}/no/i --pages {folder}/pages.jsonl", "there is no folder"),
        ("index --out {folder} --pages {folder}/pages.jsonl", "is a folder"),
        ("index --out {folder}/paper.pdf --pages {folder}/pages.jsonl", "cannot be opened as an index"),
        ("index --out {folder}/i --corpus {folder}/nothing", "nothing: no such file; check the path"),
        ("index --out {folder}/i --corpus {folder}/empty", "no passage to index"),
        ("index --out {folder}/i --corpus {folder}/x --pages {folder}/pages.jsonl", "have a file of their own"),
        ("serve --search none --port 70000", "cannot listen there"),
        ("serve --search none --host 300.0.0.1", "cannot listen there"),
    ],
)
def test_a_mistake_is_a_traceback_or_leaves_a_file(command, message, tmp_path, capsys):
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7\n" * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "line.png").write_bytes(picture_bytes(1000, 1))
    write_lines(tmp_path / "pages.jsonl", PAGES)
    before = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    code, out, err = run(capsys, *(part.format(folder=tmp_path, blank=" ") for part in command.split()))
    *bars, line = err.rstrip("\n").split("\n")
    assert code == 2 and out == "" and not bars and line.startswith("search.py: ") and message in line, err
    assert {file.name: file.stat().st_size for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "command, message",
    [
        ("", "arguments are required: COMMAND"),
        ("find x", "invalid choice: 'find'"),
        ("text x --search none --results few", "invalid int value"),
        ("text x --search none --jsno", "unrecognized arguments: --jsno"),
        ("serve --search none --port x", "invalid int value"),
    ],
)
def test_a_wrong_option_prints_more_than_a_line(command, message, capsys):
    with pytest.raises(SystemExit) as caught:
        search.main(command.split())
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and message in said.err


@pytest.mark.parametrize("command, words", [
    ([], ["index", "image", "text", "serve", "python search.py"]),
    (["index"], ["--images", "--titles", "--pages", "--encoder", "hf:NAME", "tower:FOLDER", "--adapter", "--corpus"]),
    (["image"], ["--search", "--json", "local:FILE"]), (["text"], ["QUERY", "--results"]),
    (["serve"], ["--host", "--port", "/retrieve"]), (["cache"], ["summary", "drop"]), (["cache", "drop"], ["--yes"]),
])  # fmt: skip
def test_help_hides_an_option(command, words, capsys):
    with pytest.raises(SystemExit) as caught:
        search.main([*command, "--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0 and all(word in said for word in words)


def parsers(parser) -> list:
    """The parser, and those of its commands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += parsers(command)
    return found


def test_the_help_of_an_option_keeps_its_default_to_itself():
    """Every option that takes a value ends in what holds without it, or is required, in brackets."""
    silent = set()
    for parser in parsers(search._parser()):
        for action in parser._actions:
            takes = action.option_strings and action.nargs != 0
            if takes and not re.search(r"\([^()]+\)\s*$", action.help):
                silent.add(f"{parser.prog} {action.option_strings[0]}")
    assert all(option.endswith(" --search-cache") for option in silent), "that one says it in words"


# ---- as a program


def test_a_search_of_a_local_index_imports_torch(made):
    code = (
        "import sys, search\n"
        "status = search.main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "raise SystemExit(status)"
    )
    command = [sys.executable, "-c", code, "image", made / "photos" / "3.jpg", "--search", f"local:{made / 'my.index'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("[1] scene 3") and done.stderr == ""


def test_a_reader_that_stops_gets_a_traceback(made):
    command = [sys.executable, "search.py", "image", made / "photos" / "3.jpg", "--json"]
    read, write = socket.socketpair()
    read.close()
    done = subprocess.run(
        [*command, "--search", f"local:{made / 'my.index'}"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True
    )
    write.close()
    assert "Traceback" not in done.stderr


def test_serve_does_not_answer_or_not_stop(made):
    command = [sys.executable, "search.py", "serve", "--search", f"local:{made / 'my.index'}", "--port", "0"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        where = child.stdout.readline().split(" on ")[1].split(",")[0]
        body = {"queries": ["gustave eiffel"], "topk": 1, "return_scores": True}
        ((found,),) = requests.post(f"{where}/retrieve", json=body, timeout=20).json()["result"]
        assert found["document"]["contents"] == f'"Eiffel Tower"\n{PAGES[0]["text"]}'
        picture = base64.b64encode((made / "photos" / "5.jpg").read_bytes()).decode()
        reply = requests.post(f"{where}/image_search", json={"image": picture, "topk": 2}, timeout=20).json()
        assert [hit["link"] for hit in reply["results"]][0] == "http://s.example/5" and len(reply["results"]) == 2
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 0 and child.stderr.read() == ""
    finally:
        child.kill()
        child.stdout.close()
        child.stderr.close()


# ---- back-ends by name


def test_a_run_cannot_search_a_local_index(made, monkeypatch):
    """Nor is it asked twice: what it found is recorded, for this state of the index."""
    options = Options(search=f"local:{made / 'my.index'}", results=2)
    first, again = open_backend(options).backend, open_backend(options).backend
    assert len(first.text_search("tower").hits) == 2 and isinstance(first.backend, Local)
    monkeypatch.setattr(again.backend, "text_search", None)
    assert again.text_search("tower").cached


def test_the_toy_web_knows_no_picture():
    web = open_backend(Options(search="toy")).backend
    name, *_ = web.image_search(World(0, FULL).train[0].image).hits[0].title.split()
    assert name in web.text_search(name).hits[0].title
    assert open_backend(Options(search="none")).backend.text_search("x").hits == ()


def test_a_live_search_without_a_budget(monkeypatch):
    for name in ("SERPAPI_API_KEY", "SERPER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="--budget N"):
        open_backend(Options(search="live"))
    with pytest.raises(UserError, match="SERPAPI_API_KEY"):
        open_backend(Options(search="live", budget=3))


def test_serper_alone_is_refused_though_the_pictures_have_addresses(monkeypatch, tmp_path):
    """Without a picture file it can be told where the picture is; whether it is, the first question tells."""
    options = Options(search="live", budget=3, search_cache=str(tmp_path / "searches.sqlite"))
    with FakeWeb() as web:
        for name, value in web.environ("serper").items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("SERPAPI_API_KEY", raising=False)
        bare = Example("1", b"picture", "Who?", ("Ada",))
        with pytest.raises(UserError, match="--columns address="):
            open_backend(options, [bare])
        example = replace(bare, image_url="https://example.com/ada.jpg")
        tools = search_tools(open_backend(options, [example]).backend, 1, 1)
        seen = tools[0].run(Call("<img>", example.image, example.question, example.image_url))
        assert seen.source == "serper" and web.calls("serper.lens")[0].json()["url"] == example.image_url


def test_a_run_that_never_pays_leaves_a_ledger_and_one_that_pays_is_not_stopped(tmp_path):
    spending = Budget(tmp_path / "spent.sqlite", "run", total=3, per_step=2)
    spending.begin_step("step 1")
    assert spending.spent == {} and not list(tmp_path.iterdir())
    spending.spend("serpapi"), spending.spend("openai")
    with pytest.raises(ToolFailure, match="budget"):
        spending.spend("serpapi")
    spending.begin_step("step 2")
    spending.spend("serpapi")
    spending.begin_step("step 3")
    with pytest.raises(ToolFailure, match="budget"):
        spending.spend("serpapi")
    assert spending.spent == {"openai": 1, "serpapi": 2}
    another = Budget(tmp_path / "spent.sqlite", "run", 3, 2)
    assert another.spent == spending.spent, "what other ranks paid, or this run before a resume, is not shown"


# ---- recorded searches


def test_import_and_export_lose_a_search(tmp_path, capsys):
    store, lines, again = (str(tmp_path / name) for name in ("a.sqlite", "a.jsonl", "b.sqlite"))
    with closing(Store(store)) as made:
        made.put(text_key("which river?"), Observation((Hit("Tagus"),), source="serpapi"))
    assert search.main(["cache", "export", store, "--out", lines]) == 0
    assert search.main(["cache", "import", lines, "--out", again]) == 0
    assert search.main(["cache", "import", store, "--out", again]) == 0
    said = capsys.readouterr().out
    assert "1 search\n" in said and "1 new search\n" in said and "0 new searches" in said
    assert search.main(["cache", again, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == {"text_search": {"serpapi": 1}}
    assert search.main(["text", "Which  river?", "--search", f"replay:{again}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["title"] == "Tagus"


def test_recorded_searches_are_written_over_by_their_own_export_or_made_of_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with closing(Store("a.sqlite")) as made:
        made.put(text_key("which river?"), Observation((Hit("Tagus"),), source="serpapi"))
    (tmp_path / "link").symlink_to("a.sqlite")
    (tmp_path / "broken").symlink_to("no/where")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for verb, file, out, said in (
        *(("export", "a.sqlite", name, "the file to be read") for name in ("a.sqlite", "link")),
        *(("import", "a.sqlite", name, "the file to be read") for name in ("a.sqlite", "link")),
        *((verb, "absent", "b", "no such file") for verb in ("import", "export")),
        ("import", ".", "b", "a folder"),
        ("export", "a.sqlite", ".", "cannot be written"),
        ("import", "deep.jsonl", "b", "row 0"),
        ("import", "a.sqlite", "broken", "cannot be written"),
    ):
        assert search.main(["cache", verb, file, "--out", out]) == 2
        told = capsys.readouterr().err
        said_first = 2 if out == "broken" else 1  # a line says that it cannot be locked
        assert said in told and told.count("\n") == said_first and not (tmp_path / "b").exists()
    with closing(Store("a.sqlite", readonly=True)) as kept:
        assert len(list(kept.records())) == 1


@pytest.mark.parametrize(
    "words, said",
    [
        ("", "required: FILE"), ("import", "required"), ("lst b", "invalid choice: 'lst'"), ("import a", "--out"),
        ("export a", "--out"), ("a --out b", "choose from"), ("list", "required: FILE"), ("drop a x", "invalid int"),
        ("a", "a: no such file"), ("list a.jsonl", "cache import a.jsonl --out"), ("drop a 1", "a: no such file"),
        ("drop a", "nothing to drop is named"), ("drop a 1 --yes", "a: no such file"), ("show a", "required: SEARCH"),
    ],
)  # fmt: skip
def test_cache_words_that_make_no_sense(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    try:
        code = search.main(["cache", *words.split()])
    except SystemExit as error:
        code = error.code
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1 and said in told and not list(tmp_path.iterdir())


@pytest.fixture
def recorded(tmp_path) -> Path:
    """Two answers to one query, a picture, an empty result, and a query and an engine that fill any line."""
    now = time.time()
    pages = Observation((Hit("東京タワー" * 30, "http://a.example", "333 m"),), source="local:/far/away/" + "x" * 99)
    with closing(Store(tmp_path / "searches.sqlite")) as store:
        store.add([(text_key("height", "old"), Observation((Hit("Old"),), source="serper"), now - 40 * 86400)])
        store.add([(text_key("height", "new"), pages, now)])
        store.add([(text_key("\x1b[31m 東京" + "か" * 200), pages, now)])
        store.add([(image_key(picture_bytes(60, 40)), Observation((Hit("P", image=b"x"),), source="lens"), now)])
        store.add([(text_key("nothing"), Observation(source="serper"), now)])
    return tmp_path / "searches.sqlite"


def columns(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def test_a_recording_is_shown_in_lines_that_do_not_fit_or_steer_the_terminal(recorded, capsys):
    code, out, err = run(capsys, "cache", recorded)
    first, head, *rows = out.splitlines()
    assert code == 0 and err == "" and first.startswith(f"{recorded}: 5 recorded searches, 0.")
    assert head.split() == ["tool", "searches", "empty", "superseded", "oldest", "newest", "engine"]
    assert [row.split()[:4] for row in rows] == [
        ["image_search", "1", "0", "0"], ["text_search", "2", "0", "0"], ["text_search", "2", "1", "1"],
    ]  # fmt: skip
    code, out, _ = run(capsys, "cache", "list", recorded)
    lines = out.splitlines()
    assert (
        code == 0 and len(lines) == 5 and lines[0].startswith("1  ") and lines[-1].endswith("nothing → nothing found")
    )
    for line in (head, *rows, *lines):
        assert columns(line) <= 100 and all(char.isprintable() for char in line)
    code, out, _ = run(capsys, "cache", "list", recorded, "--json", "--engine", "SERPER")
    assert [json.loads(line)["query"] for line in out.splitlines()] == ["height", "nothing"]


def test_a_search_is_not_shown_by_its_number_words_or_picture(recorded, tmp_path, capsys):
    (tmp_path / "photo.png").write_bytes(picture_bytes(60, 40))
    for what, numbers in (("4", [4]), ("  HEIGHT ", [2, 1]), (tmp_path / "photo.png", [4]), ("nothing", [5])):
        code, out, _ = run(capsys, "cache", "show", recorded, what, "--json")
        found = [json.loads(line) for line in out.splitlines()]
        assert code == 0 and [entry["number"] for entry in found] == numbers
        assert all(len(entry["results"]) == entry["hits"] for entry in found)
    code, out, _ = run(capsys, "cache", "show", recorded, "height")
    assert code == 0 and out.index("東京タワー") < out.index("[1] Old") and "333 m" in out and "form new" in out
    code, _, err = run(capsys, "cache", "show", recorded, "depth")
    assert code == 2 and "'depth' is not recorded" in err and err.count("\n") == 1


def test_searches_are_dropped_without_yes_or_others_with_them(recorded, capsys):
    def left() -> list[int]:
        with closing(Store(recorded, readonly=True)) as store:
            return [entry.number for entry in store.entries()]

    for options, would in (
        (["--older-than", "30"], "1 of 5 searches (1 text_search)"), (["--superseded"], "1 of 5"),
        (["--older-than", "0"], "5 of 5"),
        (["--engine", "local:"], "2 of 5"), (["--tool", "image_search"], "1 of 5 searches (1 image_search)"),
        (["--words", "東京"], "1 of 5"), (["--empty"], "1 of 5"), (["3", "4"], "2 of 5"),
        (["3", "4", "--empty"], "0 of 5"), (["--damaged"], "0 of 5"),
    ):  # fmt: skip
        code, out, _ = run(capsys, "cache", "drop", recorded, *options)
        assert code == 0 and f"would drop {would}" in out and "--yes" in out and left() == [1, 2, 3, 4, 5], options
    code, _, err = run(capsys, "cache", "drop", recorded, "3", "99", "--yes")
    assert code == 2 and "no search has the number 99" in err and left() == [1, 2, 3, 4, 5]
    assert run(capsys, "cache", "drop", recorded, "--superseded", "--yes")[0] == 0 and left() == [2, 3, 4, 5]
    assert run(capsys, "cache", "drop", recorded, "2", "5", "--yes")[1].endswith(
        "dropped 2 of 4 searches (2 text_search)\n"
    )
    assert left() == [3, 4]


def test_a_damaged_row_ends_the_list_or_cannot_be_dropped(recorded, capsys):
    with closing(sqlite3.connect(recorded)) as db, db:
        for number, change in enumerate(("tool=NULL", "time='x'", "payload='{'", "query=NULL", "form=x'ff'"), 1):
            db.execute(f"UPDATE results SET {change} WHERE id={number}")
    for words in ([], ["list"], ["list", "--json"], *(["show", number] for number in "12345")):
        verb, *rest = words or ["summary"]
        code, out, err = run(capsys, "cache", verb, recorded, *rest)
        assert code == 0 and not err and "damaged" in out or "--json" in rest
    code, out, _ = run(capsys, "cache", "drop", recorded, "--engine", "(damaged)", "--yes")
    assert code == 0 and "dropped 5 of 5 searches" in out


def test_an_index_is_taken_for_a_recording_and_moved_aside_as_damaged(made, recorded, capsys):
    """Both are SQLite files of ours."""
    file = made / "my.index"
    before = (file.read_bytes(), sorted(made.iterdir()))
    for command in (
        ["cache", file], ["cache", "drop", file, "1", "--yes"], ["text", "x", "--search", f"replay:{file}"],
        ["text", "x", "--search", f"local:{file}", "--search-cache", file],
    ):  # fmt: skip
        code, _, err = run(capsys, *command)
        assert code == 2 and err.count("\n") == 1 and "an index of pictures and pages" in err
    assert (file.read_bytes(), sorted(made.iterdir())) == before
    for command in (
        ["text", "x", "--search", f"local:{recorded}"],
        ["index", "--pages", made / "pages.jsonl", "--out", recorded],
    ):
        code, _, err = run(capsys, *command)
        assert code == 2 and err.count("\n") == 1 and "recorded searches" in err


# ---- the page


def commands(section: str) -> list[str]:
    """The commands of a section of docs/searching.md."""
    page = (ROOT / "docs" / "searching.md").read_text()
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return [line.strip() for line in text.splitlines() if line.startswith("    ") and not line.startswith("    {")]


@pytest.fixture
def newcomer(tmp_path, monkeypatch) -> Path:
    """The folder in which the page's commands are typed, with what it says that they need."""
    corpus(tmp_path / "DIR", 3)
    (tmp_path / "DIR" / "titles.jsonl").rename(tmp_path / "titles.jsonl")
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "DIR" / "1.jpg").read_bytes())
    write_lines(tmp_path / "pages.jsonl", PAGES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_command_of_the_page_about_searching_fails(newcomer, monkeypatch, capsys):
    done = 0
    for command in [*commands("By hand"), *commands("Recorded searches")]:
        program, *words = shlex.split(command)[1:]
        if "live" not in words:
            assert program == "search.py" and search.main(words) == 0, command
            done += 1
    assert done >= 10
    said = capsys.readouterr().out
    assert "Gustave Eiffel" in said and "2 recorded searches" in said and "0 new searches" not in said


def test_a_command_of_the_page_about_a_corpus_fails(newcomer, capsys):
    line = r'{"id": "0", "contents": "\"Aaron\"\nAaron is a prophet, high priest, and the brother of Moses."}'
    assert f"    {line}\n" in (ROOT / "docs" / "searching.md").read_text()
    Path("wiki-18.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    make, ask, serve, *others = commands("A corpus of passages")
    assert search.main(shlex.split(make)[2:]) == search.main(shlex.split(ask)[2:]) == 0
    said = capsys.readouterr().out
    assert "wiki.index: 1 new passages" in said and "[1] Aaron" in said
    assert search._parser().parse_args(shlex.split(serve)[2:]).search == "local:wiki.index"
    train = shlex.split(others[-1])
    assert Options(search=train[train.index("--search") + 1]).back_ends["image"] == "replay:fvqa"


def test_the_pages_example_of_a_server_is_refused(newcomer, capsys):
    if not shutil.which("curl"):
        pytest.skip("curl is not here")
    start, *asks = commands("The server")
    assert start == "python search.py serve --search local:my.index"
    index.build("my.index", "builtin", "DIR", "titles.jsonl", "pages.jsonl")
    with Server(Local("my.index"), "my.index", port=0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        where = f"127.0.0.1:{server.server_address[1]}"
        replies = []
        for ask in asks:
            ask = ask.replace("127.0.0.1:8000", where)
            if ask.startswith("python search.py"):
                assert search.main([*shlex.split(ask)[2:], "--search-cache", "s.sqlite"]) == 0
            else:
                replies.append(json.loads(subprocess.check_output(["bash", "-c", ask], timeout=30)))
        server.shutdown()
    pages, pictures = replies
    assert pages["result"][0][0]["document"]["id"] == "http://a.example/1" and len(pages["result"][0]) == 2
    assert [hit["title"] for hit in pictures["results"]][0] == "scene 1" and len(pictures["results"]) == 2
    assert pictures["results"][0]["url"] == "http://s.example/1"
    assert "[1] scene 1" in capsys.readouterr().out
