"""The toy web's pages as a corpus: a run that searches the toy web by picture and an index by text."""

import json

import pytest

import search
from mmsr.config import Options
from mmsr.search.backends import open_backend
from mmsr.toy import passages
from mmsr.toy.world import FULL, PAGES, World


def test_an_index_of_the_toys_pages_does_not_find_every_town(tmp_path, capsys):
    """Three results, as in the toy web: the base model has never seen one alone, and reads no town out of it."""
    passages.main(["--toy", "full", "--seed", "3", "--out", str(tmp_path / "pages.jsonl")])
    assert search.main(["index", "--corpus", str(tmp_path / "pages.jsonl"), "--out", str(tmp_path / "toy.index")]) == 0
    assert "1944 pages" in capsys.readouterr().out
    world = World(3, FULL)
    name = f"image=toy,text=local:{tmp_path / 'toy.index'}"
    options = Options(search=name, search_cache=str(tmp_path / "searches.sqlite"))
    engine = open_backend(options, toy_web=world.web).backend
    for concept in world.concepts[::20]:
        seen = engine.text_search(f"{concept.name} town")
        said = [form.format(name=concept.name, town=concept.town) for form in PAGES]
        assert sorted(hit.text for hit in seen.hits) == sorted(said) and seen.source.startswith("local:")
    question = world.train[-1]
    assert engine.image_search(question.image, "").source == "toy"


def test_pages_that_cannot_be_written_end_in_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        passages.main(["--out", str(tmp_path / "no" / "pages.jsonl")])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        passages.main(["--toy", "ful"])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert all(json.loads(line)["text"] for line in passages.lines(World(0, FULL)))
