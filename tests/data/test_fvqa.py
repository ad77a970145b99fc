"""FactualVQA from the hub: what is fetched, how its search results are read, and what is said where that fails."""

import io
import os
import pickle
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import huggingface_hub.constants
import pytest
from PIL import Image
from test_formats import parquet, picture, row
from test_train import arguments, run

from mmsr.config import parse
from mmsr.data import fvqa as hub
from mmsr.episode import Example, Hit
from mmsr.search.cache import import_results
from mmsr.search.store import Store, image_key
from mmsr.system.errors import UserError
from mmsr.tools import Call
from train import open_setup

ROOT = Path(__file__).parents[2]


def entry(titles, thumbnails) -> dict:
    return {"tool_returned_web_title_list": titles, "tool_returned_images_urls": thumbnails}


def opened_jpeg(side: int = 32) -> Image.Image:
    """A picture as `Image.open` gives it: what it pickles has more parts than a plain Image's."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()))


RESULTS = {
    "made_0": entry(["A bridge", "Tagus <|im_end|>", None], ["https://example.invalid/1", opened_jpeg(), None]),
    "made_1": entry([], []),
    "made_2": entry(["more titles", "than thumbnails"], ["https://example.invalid/2"]),
}


def written(folder: Path, value) -> Path:
    (folder / "results.pkl").write_bytes(pickle.dumps(value))
    return folder / "results.pkl"


# ---- search results


def test_results_are_read_as_they_were_published(tmp_path):
    found = hub.search_results(written(tmp_path, RESULTS))
    assert {key: [hit.title for hit in seen.hits] for key, seen in found.items()} == {
        "made_0": ["A bridge", "Tagus <|im_end|>", ""],
        "made_1": [],
        "made_2": ["more titles", "than thumbnails"],
    }
    assert all(seen.ok and seen.source == "fvqa" and seen.cached for seen in found.values())
    assert [hit.image is not None for hit in found["made_0"].hits] == [False, True, False]
    thumbnail = Image.open(io.BytesIO(found["made_0"].hits[1].image))
    assert (thumbnail.format, thumbnail.mode, thumbnail.size) == ("JPEG", "RGB", (32, 32))
    apart = [abs(a - b) for a, b in zip(thumbnail.tobytes(), opened_jpeg().tobytes())]
    assert max(apart) < 12, "the picture should be the one that was pickled"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode(tmp_path, mode):
    thumbnail = Image.effect_noise((20, 12), 60).convert("RGB").convert(mode)
    (hit,) = hub.search_results(written(tmp_path, {"a": entry(["t"], [thumbnail])}))["a"].hits
    assert Image.open(io.BytesIO(hit.image)).size == (20, 12)


def test_16_bit_grey_of_a_pickle_is_white(tmp_path):
    grey = Image.new("I;16", (20, 12), 128 << 8)
    (hit,) = hub.search_results(written(tmp_path, {"a": entry(["t"], [grey])}))["a"].hits
    assert Image.open(io.BytesIO(hit.image)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("size, pixels", [((60_000, 60_000), b"x" * 99), ((-1, 5), b""), ((4, 4), b"x"), ((0, 0), b"")])
def test_a_forged_picture_costs_memory_or_its_title(tmp_path, size, pixels):
    forged = Image.new("RGB", (1, 1))
    forged.__class__ = type("Image", (Image.Image,), {"__module__": "PIL.Image"})
    state = [{}, "RGB", size, None, pixels]
    forged.__class__.__reduce_ex__ = lambda self, protocol: (Image.Image, (), state)
    (hit,) = hub.search_results(written(tmp_path, {"a": entry(["t"], [forged])}))["a"].hits
    assert hit == Hit("t")


def test_a_picture_is_made_anew_for_every_reference(tmp_path, monkeypatch):
    """2000 references to one picture, and 2000 pictures that claim the same pixels."""
    one, made = Image.new("RGB", (64, 64)), []
    same = [{}, "RGB", (64, 64), None, bytes(64 * 64 * 3)]
    claim = type("Image", (Image.Image,), {"__module__": "PIL.Image", "__qualname__": "Image"})
    claim.__reduce_ex__ = lambda self, protocol: (Image.Image, (), [*same])
    path = written(tmp_path, {"a": entry(["t"], [one] * 2000), "b": entry([], [claim() for _ in range(2000)])})
    monkeypatch.setattr(hub, "_jpeg", lambda *picture: made.append(picture) or b"jpeg")
    found = hub.search_results(path)
    assert len(made) == 2 and all(hit.image == b"jpeg" for seen in found.values() for hit in seen.hits)


def test_one_list_of_titles_is_everybodys(tmp_path):
    titles = ["t"] * 2000
    path = written(tmp_path, {str(number): entry(titles, []) for number in range(2000)})
    with pytest.raises(UserError, match="over 1,000,000 results"):
        hub.search_results(path)


@pytest.mark.parametrize("value", [[], {"a": 3}, {"a": {}}, {"a": entry([3], [None])}, {"a": entry("t", 5)}, None])
def test_a_pickle_of_something_else(tmp_path, value):
    with pytest.raises(UserError, match="results.pkl: not FVQA's image-search results"):
        hub.search_results(written(tmp_path, value))


def test_results_are_joined_by_id_with_the_pictures(tmp_path):
    examples = [Example(f"made_{i}", picture(i), "?", ("a",)) for i in range(4)]
    with closing(Store(None)) as store:
        assert import_results(store, hub.search_results(written(tmp_path, RESULTS)), examples) == 3
        found = [store.get(image_key(picture(i))) for i in range(4)]
    assert found[0].hits[0].title == "A bridge" and found[2].source == "fvqa" and found[3] is None


# ---- the hub


@pytest.mark.parametrize(
    "name, place",
    [
        ("lmms-lab/FVQA", ("lmms-lab/FVQA", "fvqa_train.parquet")),
        ("lmms-lab/FVQA:fvqa_test.parquet", ("lmms-lab/FVQA", "fvqa_test.parquet")),
        ("me/own.data:sub/a.jsonl", ("me/own.data", "sub/a.jsonl")),
        ("data/questions.jsonl", None),
        ("data/questions.parquet", None),
        ("questions.jsonl", None),
        ("data/questions.pq", None),
        ("data/questions.json", None),
        ("data/questions.ndjson", None),
        ("./lmms-lab/FVQA", None),
        ("/data/FVQA", None),
        ("a/b/c", None),
        ("toy", None),
        ("", None),
    ],
)
def test_a_path_is_taken_for_a_hub_id(name, place):
    assert hub.hub_file(name) == place


def test_a_file_that_is_here_goes_before_the_hub(tmp_path, monkeypatch):
    (tmp_path / "lmms-lab" / "FVQA").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.hub_file("lmms-lab/FVQA") is None


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """A hub cache that holds a small FVQA, and no network."""
    repository = tmp_path / "hub" / "datasets--lmms-lab--FVQA"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    parquet(tmp_path, [row(i, images=[{"bytes": picture(i, side=56), "path": None}]) for i in range(6)])
    (tmp_path / "some.parquet").rename(snapshot / "fvqa_train.parquet")
    written(tmp_path, RESULTS).rename(snapshot / "fvqa_train_image_search_results_cache.pkl")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


FROM_HUB = dict(data="lmms-lab/FVQA", search="replay:fvqa", questions=2, mini_batch=2, max_tokens=512)


def test_fvqa_and_its_results_serve_a_run_without_a_network(miniature, tmp_path, hub_cache, capsys):
    found = run(miniature, tmp_path / "out", steps=1, **FROM_HUB)
    assert {episode["id"] for episode in found.rollouts[0]} <= {f"made_{i}" for i in range(6)}
    said = capsys.readouterr().err
    assert (
        "image searches of 3 questions, 3 of them in the data, 3 new here; 4 of their 5 hits have no thumbnail" in said
    )
    setup = open_setup(parse(arguments(miniature, tmp_path / "other", **FROM_HUB)))
    call = Call("", picture(0, side=56), "?")
    seen = setup.toolbox.call("image_search", call).result()
    assert seen.hits[0].title == "A bridge" and seen.hits[1].image and seen.source == "fvqa"


@pytest.mark.parametrize("more, warned", [({}, True), ({"max_texts": 0}, False), ({"on_miss": "error"}, False)])
def test_text_searches_that_nothing_can_answer_are_told_of(miniature, tmp_path, hub_cache, capsys, more, warned):
    open_setup(parse(arguments(miniature, tmp_path / "out", **FROM_HUB, **{"max_texts": 1, **more})))
    assert capsys.readouterr().err.count("every text search finds nothing") == warned


def test_results_in_a_file_of_ones_own(miniature, tmp_path):
    given = FROM_HUB | dict(
        data=parquet(tmp_path, [row(i) for i in range(3)]), search=f"replay:{written(tmp_path, RESULTS)}"
    )
    setup = open_setup(parse(arguments(miniature, tmp_path / "out", **given)))
    assert setup.toolbox.call("image_search", Call("", picture(2), "?")).result().hits[0].title == "more titles"
    with pytest.raises(UserError, match="--force-searches"):
        open_setup(parse(arguments(miniature, tmp_path / "out", **given, force_searches=True)))


def test_what_is_not_in_the_cache_names_the_option_instead(hub_cache):
    with pytest.raises(UserError, match="fvqa_test.parquet of the data set lmms-lab/FVQA .* --data FILE"):
        hub.fetched_file("lmms-lab/FVQA", "fvqa_test.parquet")
    (hub_cache / hub.RESULTS).unlink()
    with pytest.raises(UserError, match=f"{hub.RESULTS} .* --search none or replay:FILE"):
        hub.fetched_file("lmms-lab/FVQA", hub.RESULTS)


@pytest.mark.slow
def test_train_without_a_network_ends_with_one_line(miniature, tmp_path):
    line = [sys.executable, "train.py", *arguments(miniature, tmp_path / "out", **FROM_HUB)]
    places = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(line, cwd=ROOT, env={**os.environ, **places}, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and not (tmp_path / "out").exists(), ended.stderr
    assert ended.stderr.startswith("train.py: the Hugging Face hub cannot be reached (HF_HUB_OFFLINE is set), and its")
    assert "hf download --repo-type dataset lmms-lab/FVQA fvqa_train.parquet" in ended.stderr
