"""search.py as a new user meets it: what it prints, what it exits with, and what it says to each mistake."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
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
from mmsr.search.backends import SearchEngine, open_backend
from mmsr.search.index import Local
from mmsr.search.store import Budget, Store, text_key
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
    assert "6 new pictures under 6 new titles, 3 new pages; 0 lines were there already" in capsys.readouterr().out
    return tmp_path


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
    (["index"], ["--images", "--titles", "--pages", "--encoder", "hf:NAME", "tower:FOLDER"]),
    (["image"], ["--search", "--json", "local:FILE"]), (["text"], ["QUERY", "--results"]),
    (["serve"], ["--host", "--port", "/retrieve"]),
])  # fmt: skip
def test_help_hides_an_option(command, words, capsys):
    with pytest.raises(SystemExit) as caught:
        search.main([*command, "--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0 and all(word in said for word in words)


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
    assert "1 searches" in said and "1 new searches" in said and "0 new searches" in said
    assert search.main(["cache", again]) == 0
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
        ("import", "deep.jsonl", "c", "row 0"),
        ("import", "a.sqlite", "broken", "cannot be written"),
    ):
        assert search.main(["cache", verb, file, "--out", out]) == 2
        told = capsys.readouterr().err
        said_first = 2 if out == "broken" else 1  # a line says that it cannot be locked
        assert said in told and told.count("\n") == said_first and not (tmp_path / "b").exists()
    with closing(Store("a.sqlite", readonly=True)) as kept:
        assert len(list(kept.records())) == 1


@pytest.mark.parametrize("words", [["import"], ["a", "b"], ["import", "a"], ["export", "a"], ["a", "--out", "b"]])
def test_cache_words_that_make_no_sense(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert search.main(["cache", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
