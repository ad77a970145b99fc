"""What `--search` may name: one back-end, or one for each of the two searches."""

import json
from contextlib import closing
from functools import partial

import pytest
from helpers import picture_bytes, refused

from mmsr import disk, plan
from mmsr.config import FVQA_SEARCH, Config, EvalConfig, Options, back_ends, parse
from mmsr.episode import Example, Hit, Observation
from mmsr.pretrained.published import SIZES
from mmsr.search import corpus
from mmsr.search.backends import open_backend
from mmsr.search.cache import import_results
from mmsr.search.index import build
from mmsr.search.store import Store, image_key, text_key
from mmsr.setup.preflight import wanted
from mmsr.setup.questions import Questions
from mmsr.setup.search import check_search, open_search
from mmsr.system.parallel import SINGLE
from mmsr.tools import Call
from mmsr.toy import world as toy

PICTURE = picture_bytes(56, 56)
BRIDGE = Observation((Hit("A bridge"),), source="web")


@pytest.fixture
def pages(tmp_path):
    """An index of one page."""
    (tmp_path / "pages.jsonl").write_text(json.dumps({"url": "http://a", "text": "The bridge is of 1966."}) + "\n")
    build(tmp_path / "my, second.index", "builtin", None, None, tmp_path / "pages.jsonl")
    return tmp_path / "my, second.index"


@pytest.fixture
def recording(tmp_path):
    """One image search and one text search."""
    with closing(Store(tmp_path / "recorded.sqlite")) as store:
        store.put(image_key(PICTURE), BRIDGE)
        store.put(text_key("bridge"), Observation((Hit("recorded"),)))
    return tmp_path / "recorded.sqlite"


@pytest.mark.parametrize(
    "search, image, text",
    [
        ("live", "live", "live"),
        ("image=replay:fvqa,text=local:a,b.index", "replay:fvqa", "local:a,b.index"),
        ("text=remote:http://h/p?a=1,image=none", "none", "remote:http://h/p?a=1"),
        ("local:image=1,text=2", "local:image=1,text=2", "local:image=1,text=2"),
    ],
)
def test_a_name_is_split_where_a_path_has_a_comma(search, image, text):
    assert back_ends(search) == {"image": image, "text": text}


@pytest.mark.parametrize(
    "search", ["image=live", "text=live", "image=live,image=none", "text=,image=none", "image=a,text="]
)
def test_half_a_search_engine_is_taken_for_a_whole_one(search):
    refused(lambda: Options(search=search), "image=A,text=B")


@pytest.mark.parametrize("turned", [False, True])
def test_both_searches_go_to_one_back_end(turned, pages, recording, tmp_path):
    parts = [f"image=replay:{recording}", f"text=local:{pages}"]
    options = Options(search=",".join(parts[::-1] if turned else parts), search_cache=str(tmp_path / "new.sqlite"))
    check_search(options)
    backend = open_backend(options, quiet=True).backend
    assert [hit.title for hit in backend.image_search(PICTURE, "?").hits] == ["A bridge"]
    assert [hit.text for hit in backend.text_search("bridge").hits] == ["The bridge is of 1966."]
    recorded = f"image=replay:{recording},text=replay:{recording}"
    assert open_backend(Options(search=recorded), quiet=True).backend.text_search("bridge").hits[0].title == "recorded"


def test_the_wrong_half_is_not_named(recording, tmp_path):
    for wrong, named in (("local:no.index", "local:no.index: no such file"), ("lokal:x", "lokal:x: unknown back-end")):
        options = Options(search=f"image=replay:{recording},text={wrong}", search_cache=str(tmp_path / "new.sqlite"))
        refused(partial(check_search, options), named)
    refused(lambda: Options(search="image=none,text=remote:http://user:secret@host"), "--search", "password")


def test_passages_are_searched_by_picture_and_find_nothing(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a passage"}\n')
    corpus.build(tmp_path / "wiki.index", [tmp_path / "c.jsonl"])
    name = f"local:{tmp_path / 'wiki.index'}"
    refused(partial(check_search, Config(search=name)), f"--search {name}: holds passages and no pictures", "image=A")
    check_search(Config(search=f"image=none,text={name}"))
    check_search(Config(search=name, max_images=0))


def test_a_run_opens_another_toy_web_than_its_own(pages):
    """The web of another world knows none of the run's pictures."""
    world = toy.World(7, toy.BASIC)
    options = Config(search=f"image=toy,text=local:{pages}", toy="basic", seed=7, search_cache=str(pages) + ".sqlite")
    check_search(options)
    tools = open_search(options, world, Questions({}), SINGLE).tools
    example = world.train[0]
    assert tools[0].run(Call("<img>", example.image, example.question)).hits
    assert tools[1].run(Call("bridge", example.image, example.question)).hits[0].text == "The bridge is of 1966."


def test_forced_searches_need_both_searches_recorded(recording):
    conversations = "image=replay:turns.jsonl,text=live"
    Config(search=conversations, force_searches=True, budget=1)
    refused(lambda: Config(search="image=live,text=none", force_searches=True), "replay:FILE")


def test_half_of_fvqas_recording_needs_no_download_and_no_memory():
    half = f"image={FVQA_SEARCH},text=none"
    found = {}
    for search in (FVQA_SEARCH, half, "none"):
        config = parse(["--model", "Qwen2.5-VL-7B", "--search", search], Config, "train.py")
        files = [file for want in wanted(config) for file in want.files]
        model = SIZES["Qwen2.5-VL-7B"]
        found[search] = files, disk.downloads(config, model), plan.host_memory(model, config)["recorded searches"]
    assert found[half] == found[FVQA_SEARCH] != found["none"]


def test_imported_image_results_answer_the_live_web_alone(pages, tmp_path):
    """Results that are titles and thumbnails serve every engine; text searches go to the index."""
    cache = tmp_path / "searches.sqlite"
    with closing(Store(cache)) as store:
        import_results(store, {"1": BRIDGE}, [Example("1", PICTURE, "?", ("a",))])
        store.put(text_key("bridge"), Observation((Hit("recorded"),)))
    for image in (f"local:{pages}", "remote:http://127.0.0.1:9"):
        options = Options(search=f"image={image},text=local:{pages}", search_cache=str(cache))
        backend = open_backend(options, quiet=True).backend
        assert backend.image_search(PICTURE, "?").hits == BRIDGE.hits
        assert backend.text_search("bridge").hits[0].text == "The bridge is of 1966."
    assert EvalConfig(search=f"image=none,text=local:{pages}").back_ends["image"] == "none"
