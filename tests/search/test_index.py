"""The local index: what is found, what is kept, and what is refused."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import SEARCHES, each_family, in_threads, picture_bytes, random_adapter, tiny_model, with_adapters
from picture_files import SECRET, private, turned
from safetensors.torch import load_file, save_file

from mmsr.pretrained.save import save
from mmsr.search import index
from mmsr.search.bm25 import fold
from mmsr.search.encoders import Encoder, open_encoder
from mmsr.search.index import Local, build, passage
from mmsr.system.errors import UserError
from mmsr.tools import ToolFailure
from mmsr.vision import MIN_PIXELS, prepare

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
PAGES = [
    {
        "url": "http://a.example/1",
        "title": "Eiffel Tower",
        "text": "The tower in Paris was designed by Gustave Eiffel.",
    },
    {"url": "http://a.example/2", "title": "Paris", "text": "Paris is the capital of France. It has a tower."},
    {"url": "http://a.example/3", "title": "Kraków", "text": "A Polish city that searches for its beginnings."},
]


def scene(seed: int, width: int = 160, height: int = 120) -> PIL.Image.Image:
    """A picture with large shapes, unlike that of any other seed."""
    draw = np.random.default_rng(seed)
    small = PIL.Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), PIL.Image.Resampling.BICUBIC)


def jpeg(picture: PIL.Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_lines(file: Path, records: list) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def corpus(folder: Path, n: int, first: int = 0) -> Path:
    """`n` scenes in `folder`, and the titles file beside them."""
    folder.mkdir(exist_ok=True)
    for seed in range(first, first + n):
        (folder / f"{seed}.jpg").write_bytes(jpeg(scene(seed)))
    return write_lines(
        folder / "titles.jsonl",
        [{"file": f"{i}.jpg", "title": f"scene {i}", "url": f"http://s.example/{i}"} for i in range(first + n)],
    )


@pytest.fixture
def local(tmp_path) -> Local:
    titles, pages = corpus(tmp_path / "photos", 12), write_lines(tmp_path / "pages.jsonl", PAGES)
    build(tmp_path / "my.index", "builtin", tmp_path / "photos", titles, pages)
    return Local(tmp_path / "my.index", k=3)


# ---- pictures


def test_a_cropped_and_recompressed_picture_is_not_found(local):
    for seed in range(12):
        copy = scene(seed).crop((12, 8, 150, 112)).rotate(3).resize((70, 52))
        seen = local.image_search(jpeg(copy, quality=40))
        assert seen.hits[0].title == f"scene {seed}" and seen.hits[0].url == f"http://s.example/{seed}"
        assert len(seen.hits) == 3 and seen.source.startswith("local:") and seen.ok
        assert 1 >= seen.hits[0].score > seen.hits[1].score >= seen.hits[2].score
        thumbnail = PIL.Image.open(io.BytesIO(seen.hits[0].image))
        assert thumbnail.format == "JPEG" and max(thumbnail.size) <= index.THUMBNAIL


def test_a_photograph_on_its_side_is_not_found_or_shown_so(tmp_path):
    """Telephones store most pictures on their side; those to search with and those that are indexed."""
    titles = corpus(tmp_path / "photos", 12)
    for seed in range(1, 9):
        (tmp_path / "photos" / f"{seed}.jpg").write_bytes(turned(seed, picture=scene(seed)))
    build(tmp_path / "my.index", "builtin", tmp_path / "photos", titles, None)
    local = Local(tmp_path / "my.index", k=1)
    for seed in range(12):
        picture = scene(seed)
        for photograph in (jpeg(picture), turned(6, picture=picture), turned(seed % 8 + 1, picture=picture)):
            (hit,) = local.image_search(photograph).hits
            assert hit.title == f"scene {seed}" and hit.score > 0.99
            assert PIL.Image.open(io.BytesIO(hit.image)).size == (160, 120)


def test_an_index_keeps_a_pictures_private_words_or_ends_at_them(tmp_path):
    """A comment of 65 kB ended it with a traceback: the thumbnail could not be made small enough."""
    titles = write_lines(tmp_path / "titles.jsonl", [{"file": kind, "title": kind} for kind in ("JPEG", "PNG", "GIF")])
    for kind in ("JPEG", "PNG", "GIF"):
        (tmp_path / kind).write_bytes(private(kind, comment=400_000)[0])
    assert build(tmp_path / "my.index", "builtin", tmp_path, titles, None)["pictures"] == 3
    assert SECRET not in (tmp_path / "my.index").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the 400 photographs are not here")
def test_the_builtin_encoder_finds_fewer_than_95_of_100_distorted_photographs():
    sys.path.insert(0, str(ROOT / "bench"))
    from image_index import photographs, trial

    row = trial("builtin", photographs(PHOTOS)[::2], seed=1)  # half of them, for time
    assert row["recall@1"] >= 0.95 and row["recall@5"] >= 0.98


@pytest.mark.parametrize(
    "picture",
    [
        PIL.Image.new("RGB", (1, 1)),
        PIL.Image.new("RGB", (2, 390), "red"),
        PIL.Image.new("RGB", (64, 64), "white"),
        scene(0, 3000, 2000),
    ],
    ids=["one pixel", "strip", "plain", "large"],
)
def test_an_odd_picture_has_no_vector_of_length_one(picture):
    (vector,) = open_encoder("builtin").encode([picture])
    assert vector.dtype == np.float32 and vector.shape == (567,) and abs(np.linalg.norm(vector) - 1) < 1e-5


def test_fewer_pictures_than_hits_break_the_search(tmp_path):
    titles = corpus(tmp_path / "photos", 2)
    build(tmp_path / "my.index", "builtin", tmp_path / "photos", titles, None)
    assert [hit.title for hit in Local(tmp_path / "my.index", k=9).image_search(jpeg(scene(1))).hits] == [
        "scene 1",
        "scene 0",
    ]


def test_a_query_that_is_no_picture_is_searched_for(local):
    with pytest.raises(ToolFailure) as caught:
        local.image_search(b"%PDF-1.7 ...")
    assert caught.value.kind == "image"


# ---- building


def test_a_picture_is_encoded_again_under_a_second_title_or_run(tmp_path, monkeypatch):
    encoded = []
    builtin = open_encoder("builtin")

    def counting(pictures):
        encoded.append(len(pictures))
        return builtin.encode(pictures)

    monkeypatch.setattr(index, "open_encoder", lambda name: Encoder("builtin", counting))
    folder = tmp_path / "photos"
    corpus(folder, 3)
    (folder / "copy.jpg").write_bytes((folder / "0.jpg").read_bytes())
    lines = [("0.jpg", "one"), ("copy.jpg", "two"), ("0.jpg", "one"), ("1.jpg", "three")]
    records = [{"file": file, "title": title} for file, title in lines]
    records[2]["url"] = None  # as a table's empty cell is written: left out, too
    titles = write_lines(tmp_path / "t.jsonl", records)
    counts = build(tmp_path / "i", "builtin", folder, titles, None)
    assert counts == {"pictures": 2, "titles": 3, "repeated": 1}
    titles = write_lines(tmp_path / "t.jsonl", [{"file": f"{i}.jpg", "title": f"again {i}"} for i in range(3)])
    counts = build(tmp_path / "i", "builtin", folder, titles, None)
    assert counts == {"pictures": 1, "titles": 3, "replaced": 2}
    assert sum(encoded) == 3 + 2  # and the test picture, once a run
    hits = Local(tmp_path / "i", k=3).image_search((folder / "0.jpg").read_bytes()).hits
    assert [hit.title for hit in hits][:2] == ["again 0", "two"]


def titles_of(file: Path, picture: bytes) -> list[str]:
    """The titles of what looks just like it."""
    return [hit.title for hit in Local(file, k=9).image_search(picture).hits if hit.score > 0.99]


def test_a_picture_file_that_is_indexed_again_answers_as_before(tmp_path):
    folder, other, file = tmp_path / "photos", tmp_path / "other", tmp_path / "my.index"
    old, new, third = (jpeg(scene(seed)) for seed in range(3))
    titles = tmp_path / "t.jsonl"

    def add(images: Path, files: dict[str, bytes], **lines: str) -> dict:
        images.mkdir(exist_ok=True)
        for name, data in files.items():
            (images / name).write_bytes(data)
        records = [{"file": "a.jpg", "title": title, "url": url} for url, title in lines.items()]
        records += [{"file": name, "title": f"{images.name} {name}"} for name in files if name != "a.jpg"]
        return build(file, "builtin", images, write_lines(titles, records), None)

    opened = add(folder, {"a.jpg": old, "b.jpg": third}, here="first", there="elsewhere") and Local(file, k=1)
    assert titles_of(file, old) == ["elsewhere", "first"], "a picture is on two pages"
    assert add(folder, {}, here="corrected", there="elsewhere") == {"titles": 1, "known": 1, "replaced": 1}
    assert titles_of(file, old) == ["corrected", "elsewhere"]
    assert add(folder, {"a.jpg": new}, here="corrected") == {"pictures": 1, "titles": 1, "replaced": 2}
    assert titles_of(file, new) == ["corrected"] and titles_of(file, old) == []
    assert add(folder, {"a.jpg": third, "b.jpg": new}, here="a") == {"titles": 2, "replaced": 2}
    assert titles_of(file, new) == ["photos b.jpg"] and titles_of(file, third) == ["a"], "swapped files"
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("SELECT count(*) FROM pictures").fetchone() == (2,), "a picture without a title is kept"
    assert add(other, {"a.jpg": old}, here="of another folder")["titles"] == 1
    assert titles_of(file, third) == ["a"] and titles_of(file, old) == ["of another folder"]
    assert opened.image_search(third).hits[0].title == "a", "an index that was open has the title of another picture"


OLD_TITLES = """
DROP TABLE titles; DROP INDEX pages_url;
CREATE TABLE titles
    (picture INTEGER NOT NULL, title TEXT NOT NULL, url TEXT NOT NULL, UNIQUE (picture, title, url));
INSERT INTO titles SELECT id, 'earlier ' || id, '' FROM pictures;
"""


def test_an_index_without_the_names_of_its_files_is_not_opened_or_keeps_old_titles(local, tmp_path):
    with closing(sqlite3.connect(tmp_path / "my.index")) as db:
        db.executescript(OLD_TITLES)
    assert titles_of(tmp_path / "my.index", jpeg(scene(3))) == ["earlier 4"]
    counts = build(tmp_path / "my.index", "builtin", tmp_path / "photos", tmp_path / "photos" / "titles.jsonl", None)
    assert counts == {"titles": 12, "replaced": 12}
    assert titles_of(tmp_path / "my.index", jpeg(scene(3))) == ["scene 3"]


def test_a_broken_picture_ends_the_build(tmp_path, capsys):
    folder = tmp_path / "photos"
    corpus(folder, 2)
    (folder / "0.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])
    (folder / "page.jpg").write_bytes(b"%PDF-1.7")
    (folder / "line.png").write_bytes(picture_bytes(1000, 1))
    names = ["0.jpg", "page.jpg", "line.png", "missing.jpg", "../", "1.jpg"]
    titles = write_lines(tmp_path / "t.jsonl", [{"file": name, "title": name} for name in names])
    counts = build(tmp_path / "i", "builtin", folder, titles, None)
    assert (counts["broken"], counts["pictures"]) == (5, 1)
    said = capsys.readouterr()
    assert all(name in said.out + said.err for name in names[:4])
    assert Local(tmp_path / "i").image_search((folder / "1.jpg").read_bytes()).hits[0].title == "1.jpg"


SLOWLY = """
import sys, time
from mmsr.search import index
add = index._add_pictures
def slowly(*args):
    add(*args)
    print(args[-1]["pictures"], flush=True)
    time.sleep(0.02)
index._add_pictures, index.PICTURES_PER_BATCH = slowly, 4
index.build(sys.argv[1], "builtin", sys.argv[2], sys.argv[2] + "/titles.jsonl", None)
"""


def test_kill_9_loses_a_batch_that_was_committed(tmp_path):
    folder, file = tmp_path / "photos", tmp_path / "my.index"
    corpus(folder, 120)
    committed = 0
    for delay in (0.0, 0.03, 0.05):
        command = [sys.executable, "-c", SLOWLY, str(file), str(folder)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        first = child.stdout.readline()  # it is at work
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        committed += int((first + child.communicate()[0]).split()[-1])
        with sqlite3.connect(file) as db:
            kept = db.execute("SELECT count(*) FROM pictures").fetchone()[0]
        assert committed <= kept < 120
        committed = kept
    counts = build(file, "builtin", folder, folder / "titles.jsonl", None)
    assert counts["pictures"] == 120 - committed and counts["known"] == committed
    whole = Local(file, k=1)
    assert all(whole.image_search(jpeg(scene(i))).hits[0].title == f"scene {i}" for i in range(0, 120, 7))


DIES_WRITING = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA cache_size = 2")
for i in range(2000):
    db.execute("INSERT INTO pages (digest, url, title, text) VALUES (?, '', '', ?)", (str(i).encode(), "x" * 2000))
os.kill(os.getpid(), 9)
"""


def test_an_index_cannot_be_searched_after_kill_9(local, tmp_path):
    file = tmp_path / "my.index"
    subprocess.run([sys.executable, "-c", DIES_WRITING, file])
    assert (tmp_path / "my.index-journal").stat().st_size > 0
    assert Local(file).image_search(jpeg(scene(3))).hits[0].title == "scene 3"
    assert len(local.text_search("tower").hits) == 2


def test_a_wrong_line_leaves_half_an_index(tmp_path):
    folder = tmp_path / "photos"
    corpus(folder, 1)
    wrong = {
        "not json": ('{"file": "0.jpg", "title": "x"}\nhello\n', "row 1.*not a JSON object"),
        "a list": ("[1]\n", "row 0.*not a JSON object"),
        "no title": ('\n{"file": "0.jpg"}\n', "row 0, field title"),  # a blank line is no row, as in formats.py
        "a number": ('{"file": "0.jpg", "title": 5}\n', "row 0, field title"),
        "wrong url": ('{"file": "0.jpg", "title": "x", "url": 5}\n', "row 0, field url"),
        "nested": ("[" * 100_000 + "\n", "row 0"),
    }
    for text, message in wrong.values():
        (tmp_path / "t.jsonl").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            build(tmp_path / "i", "builtin", folder, tmp_path / "t.jsonl", None)
        assert "\n" not in str(caught.value) and not (tmp_path / "i").exists()


def test_a_page_without_a_title_is_refused(tmp_path):
    pages = [{"url": "http://a.example", "title": None, "text": "the Tagus"}, {"url": "http://b.example", "text": "so"}]
    counts = build(tmp_path / "i", "builtin", None, None, write_lines(tmp_path / "p.jsonl", pages))
    assert counts["pages"] == 2
    assert [hit.title for hit in Local(tmp_path / "i", k=5).text_search("Tagus").hits] == [""]


def test_a_user_mistake_is_a_traceback_or_leaves_a_file(tmp_path):
    folder, titles, new = tmp_path / "photos", corpus(tmp_path / "photos", 1), tmp_path / "new"
    bad = write_lines(tmp_path / "bad.jsonl", [{"file": "nowhere.jpg", "title": "x"}])
    empty = write_lines(tmp_path / "empty.jsonl", [])
    for encoder, images, listed, message in [
        ("builtin", folder, bad, "nothing could be indexed"),
        ("builtin", folder, empty, "nothing could be indexed"),
        ("builtin", tmp_path / "gone", titles, "no such folder"),
        ("builtin", None, titles, "no such folder"),
        ("builtin", folder, tmp_path / "gone.jsonl", "no such file"),
        ("clip", folder, titles, "unknown; give builtin"),
        (f"hf:{tmp_path}", folder, titles, "cannot be opened"),
        (f"tower:{tmp_path}", folder, titles, "no config.json"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            build(new, encoder, images, listed, None)
        assert "\n" not in str(caught.value) and not new.exists(), message


def test_what_is_no_index_is_opened(tmp_path):
    text, other, empty = tmp_path / "text", tmp_path / "other.db", tmp_path / "empty.db"
    text.write_text("hello" * 1000)
    sqlite3.connect(other).execute("CREATE TABLE words (x)")
    index._connect(empty, create=True).close()
    for file, message in [
        (text, "cannot be opened"), (other, "not an index"), (empty, "is empty"), (tmp_path / "no", "no such index"),
        (tmp_path, "is a folder"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            Local(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not an index"):
        build(other, "builtin", None, None, write_lines(tmp_path / "p.jsonl", PAGES))
    assert text.read_text() == "hello" * 1000 and not (tmp_path / "no").exists()


def test_a_damaged_index_gives_a_traceback(local, tmp_path):
    whole, draw = (tmp_path / "my.index").read_bytes(), random.Random(0)
    for _ in range(25):
        damaged = bytearray(whole[: draw.choice([len(whole), draw.randrange(100, len(whole))])])
        for _ in range(30):
            at = draw.randrange(len(damaged))
            damaged[at : at + 200] = draw.randbytes(len(damaged[at : at + 200]))
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            opened = Local(tmp_path / "damaged")
            for search, query in ((opened.text_search, "tower paris"), (opened.image_search, jpeg(scene(3)))):
                try:
                    search(query)
                except ToolFailure as error:
                    assert error.kind == "index"
        except UserError as error:
            assert "\n" not in str(error)


# ---- encoders


def test_an_index_is_searched_or_extended_with_another_encoder(local, tmp_path, monkeypatch):
    file, folder = tmp_path / "my.index", tmp_path / "photos"
    monkeypatch.setattr(index, "open_encoder", lambda name: Encoder("hf:other", open_encoder("builtin").encode))
    with pytest.raises(UserError, match="made with --encoder builtin"):
        build(file, "hf:other", folder, folder / "titles.jsonl", None)

    def changed(pictures):
        return np.roll(open_encoder("builtin").encode(pictures), 1, axis=1)

    monkeypatch.setattr(index, "open_encoder", lambda name: Encoder("builtin", changed))
    for use in (lambda: Local(file), lambda: build(file, "builtin", folder, folder / "titles.jsonl", None)):
        with pytest.raises(UserError, match="has changed"):
            use()


def tiny_vision_model(kind: str, folder: Path) -> Path:
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        SiglipConfig,
        SiglipImageProcessorPil,
        SiglipModel,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
    vision, words = dict(sizes, image_size=32, patch_size=8), dict(sizes, vocab_size=50)
    shape = {"height": 32, "width": 32}
    if kind == "clip":
        net = CLIPModel(CLIPConfig(vision_config=vision, text_config=words, projection_dim=24))
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=shape)
    elif kind == "siglip":
        net = SiglipModel(SiglipConfig(vision_config=vision, text_config=words))
        processor = SiglipImageProcessorPil(size=shape)
    else:
        net = ViTModel(ViTConfig(**vision), add_pooling_layer=kind == "vit")
        processor = ViTImageProcessorPil(size=shape)
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind, size", [("clip", 24), ("siglip", 32), ("vit", 32), ("vit without a pooler", 32)])
def test_a_hugging_face_model_gives_other_vectors_each_time(kind, size, tmp_path):
    folder = tiny_vision_model(kind, tmp_path / "model")
    pictures = [scene(0), scene(1).convert("L").convert("RGB"), scene(2, 40, 90)]
    first, second = (open_encoder(f"hf:{folder}").encode(pictures) for _ in range(2))
    assert first.shape == (3, size) and first.dtype == np.float32 and np.array_equal(first, second)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5) and abs(first[0] - first[1]).max() > 1e-3
    titles = corpus(tmp_path / "photos", 6)
    build(tmp_path / "i", f"hf:{folder}", tmp_path / "photos", titles, None)
    assert Local(tmp_path / "i").image_search((tmp_path / "photos" / "4.jpg").read_bytes()).hits[0].title == "scene 4"


def test_clip_pixels_are_not_those_of_its_own_processor(tmp_path):
    from transformers import AutoImageProcessor, CLIPModel

    folder = tiny_vision_model("clip", tmp_path)
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=[scene(5)], return_tensors="pt")
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(folder).eval()
        pooled = theirs.visual_projection(theirs.vision_model(pixels["pixel_values"]).pooler_output)
    ours = open_encoder(f"hf:{folder}").encode([scene(5)])
    assert np.allclose(ours, torch.nn.functional.normalize(pooled).numpy(), atol=1e-5)


def test_a_pickle_is_opened_as_an_encoder(tmp_path):
    folder = tiny_vision_model("vit", tmp_path)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        open_encoder(f"hf:{folder}")


@each_family
def test_the_tower_is_not_the_policys(tmp_path):
    policy = tiny_model()
    save(policy, tmp_path / "policy")
    vectors = open_encoder(f"tower:{tmp_path / 'policy'}").encode([scene(0), scene(1, 90, 200)])
    from mmsr.vision import load_image

    file = io.BytesIO()
    scene(1, 90, 200).save(file, "PNG")
    with torch.no_grad():
        picture = load_image(file.getvalue(), max_pixels=448 * 448, processor=policy.config.vision.processor)
        mean = policy.visual([picture])[:, : policy.config.hidden_size].mean(0)  # without levels of DeepStack
    assert vectors.shape == (2, policy.config.hidden_size)
    assert np.allclose(vectors[1], (mean / mean.norm()).numpy(), atol=1e-5)


@each_family
def test_an_adapter_of_the_tower_is_left_out_or_not_told_from_the_tower_alone(tmp_path, monkeypatch, capsys):
    save(tiny_model(), tmp_path / "policy")
    adapter = random_adapter(tmp_path / "adapter", tmp_path / "policy", "q_proj", "vision")
    titles = corpus(tmp_path / "photos", 6)
    monkeypatch.chdir(tmp_path)
    build("i", "tower:policy --adapter adapter", "photos", titles, None)
    monkeypatch.chdir("photos")  # an index is opened from anywhere
    local = Local(tmp_path / "i")
    assert local.encoder.name == f"tower:{tmp_path / 'policy'} --adapter {adapter}" and not capsys.readouterr().err
    with torch.no_grad():
        policy = with_adapters(tiny_model(), ("q_proj", "vision"))
        picture = prepare(scene(3), "", MIN_PIXELS, 448 * 448, policy.config.vision.processor)
        mean = policy.visual([picture])[:, : policy.config.hidden_size].mean(0)
    (vector,) = local.encoder.encode([scene(3)])
    (without,) = open_encoder(f"tower:{tmp_path / 'policy'}").encode([scene(3)])
    assert np.allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5) and abs(vector - without).max() > 1e-3
    assert local.image_search((tmp_path / "photos" / "4.jpg").read_bytes()).hits[0].title == "scene 4"
    with pytest.raises(UserError, match=f"made with --encoder tower:{tmp_path / 'policy'} --adapter {adapter}: give"):
        build(tmp_path / "i", f"tower:{tmp_path / 'policy'}", tmp_path / "photos", titles, None)
    weights = load_file(adapter / "adapter_model.safetensors")
    changed = {name: weight * (-1 if "lora_B" in name else 1) for name, weight in weights.items()}
    save_file(changed, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has changed since the index was made"):
        Local(tmp_path / "i")
    assert "whether" in capsys.readouterr().err  # the file has no digest of its base any more


def test_an_adapter_that_changes_no_picture_is_taken(tmp_path):
    save(tiny_model(), tmp_path / "policy")
    save(tiny_model(1), tmp_path / "other")
    adapter = random_adapter(tmp_path / "adapter", tmp_path / "policy", "q_proj")
    for name, said in (
        (
            f"tower:{tmp_path / 'policy'} --adapter {adapter}",
            "has no layers of the vision tower, of 2: .* leave it out",
        ),
        (f"tower:{tmp_path / 'other'} --adapter {adapter}", "other weights: give .*policy as --encoder tower:FOLDER"),
        (f"tower:{tmp_path / 'policy'} --adapter {tmp_path / 'policy'}", "holds a whole model, no adapter"),
        (f"builtin --adapter {adapter}", "with --encoder builtin: only tower:FOLDER can have one"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            open_encoder(name)
        assert "\n" not in str(caught.value)


# ---- texts


def test_a_page_is_not_found_by_its_words(local):
    hits = local.text_search("Who designed the tower of Paris?").hits
    assert [hit.url for hit in hits] == ["http://a.example/1", "http://a.example/2"]
    assert hits[0].title == "Eiffel Tower" and hits[0].text == PAGES[0]["text"] and hits[0].score > hits[1].score
    assert local.text_search("krakow").hits[0].title == "Kraków"  # accents do not matter
    assert local.text_search("searching").hits[0].title == "Kraków"  # nor endings
    assert local.text_search("zebra").hits == () and local.text_search("").hits == ()


FTS_SYNTAX = [
    '"', '""', "'", "*", "a*", "NEAR(a b)", "AND", "OR", "NOT", "a AND", "title:paris", "-paris", "^paris", "(", "%",
    "{title}:x", "a\0b", "_", "\ud800", "é\u0301", "東京タワー", "\U0001f600", "--", "; DROP TABLE pages", "NULL",
    "who is the", "\x02paris\x03", "a" * 100_000, " ".join(map(str, range(5000))),
]  # fmt: skip


def test_a_question_is_read_as_query_language(local):
    draw = random.Random(0)
    queries = [*FTS_SYNTAX, *("".join(draw.choices('"*()^:-+{}AND OR NOT NEAR\\\0é paris,', k=20)) for _ in range(400))]
    queries += ["".join(chr(draw.randrange(0x110000)) for _ in range(12)) for _ in range(200)]
    for query in queries:
        local.text_search(query)  # raises nothing
    assert local.text_search("NOT paris").hits == local.text_search("not paris").hits
    assert local.text_search('par"is').hits == local.text_search("par is").hits  # and nothing is joined
    assert local.text_search("the").hits, "a question of common words alone finds what has them"


def test_stored_text_is_read_as_a_mark_or_breaks_the_file(tmp_path):
    odd = [{"url": "u", "title": "\x02t\x03\ud800", "text": "word \x02 broken \x03\0 \ud83d \x1b[31m red"}]
    build(tmp_path / "i", "builtin", None, None, write_lines(tmp_path / "p.jsonl", odd))
    (hit,) = Local(tmp_path / "i").text_search("broken").hits
    assert hit.text.split() == ["word", "broken", "?", "[31m", "red"] and "\x02" not in hit.title
    assert Local(tmp_path / "i").image_search(jpeg(scene(0))).hits == ()  # there are no pictures


def test_a_page_that_is_indexed_again_is_there_twice_or_answers_as_before(tmp_path):
    nowhere = [{"url": "", "text": f"A nameless tower of {year}."} for year in (1901, 1902, 1901)]
    corrected = {**PAGES[0], "text": "It was opened in 1889, after Söder’s plan."}
    pages = write_lines(tmp_path / "p.jsonl", [PAGES[0], *PAGES, corrected, *nowhere])
    assert build(tmp_path / "i", "builtin", None, None, pages) == {"pages": 5, "repeated": 3}
    assert build(tmp_path / "i", "builtin", None, None, pages) == {"known": 5, "repeated": 3}
    assert [hit.text for hit in Local(tmp_path / "i").text_search("1889").hits] == [corrected["text"]]
    assert len(Local(tmp_path / "i").text_search("nameless").hits) == 2, "pages without an address are one page"
    assert build(tmp_path / "i", "builtin", None, None, write_lines(pages, PAGES)) == {
        "pages": 1, "known": 2, "replaced": 1,
    }  # fmt: skip
    local = Local(tmp_path / "i")
    assert not local.text_search("1889 soder plan").hits and len(local.text_search("gustave").hits) == 1
    for text in ("first words", "second words"):  # the new page gets the number of the old one
        build(tmp_path / "one", "builtin", None, None, write_lines(pages, [{"url": "u", "text": text}]))
    assert not Local(tmp_path / "one").text_search("first").hits, "a page is found by the words that it had"


def test_a_passage_misses_the_match_or_cuts_words(tmp_path):
    filler = " ".join(f"filler{i}" for i in range(3000))
    text = f"{filler} tower {filler} the tower was designed by Gustave Eiffel {filler}"
    pages = write_lines(tmp_path / "p.jsonl", [{"url": "u", "title": "t", "text": text}])
    build(tmp_path / "i", "builtin", None, None, pages)
    for query in ("gustave eiffel designed tower", "who designs towers"):
        (hit,) = Local(tmp_path / "i").text_search(query).hits
        shown = hit.text.removeprefix("… ").removesuffix(" …")
        assert "the tower was designed by Gustave Eiffel" in shown and shown in text and hit.text != shown
        assert f" {shown} " in text and 600 < len(shown) <= index.PASSAGE


@pytest.mark.slow
def test_a_passage_is_longer_than_its_bound_or_empty():
    draw = random.Random(0)
    for _ in range(300):
        words = ["".join(draw.choices("abc東é", k=draw.choice([1, 4, 9, 500]))) for _ in range(draw.randrange(200))]
        matched = set(draw.sample(words, len(words) // 10)) & {word for word in words if "東" not in word}
        shown = passage(" ".join(words), {fold(word) for word in matched if len(word) < 100}, 300)
        assert len(shown) <= 304 and bool(shown) == bool(words)
        if some := [word for word in matched if len(word) < 100]:
            assert any(word in shown for word in some)
    assert passage("one two", set()) == "one two" and passage(" \n ", {"x"}) == ""


def test_a_passage_in_chinese_misses_the_match(tmp_path):
    filler = "这是一座没有名字的山" * 300
    page = {"url": "u", "title": "桥", "text": f"{filler}。这座悬索桥横跨塔霍河，连接里斯本与阿尔马达。{filler}"}
    build(tmp_path / "i", "builtin", None, None, write_lines(tmp_path / "p.jsonl", [page]))
    for query in ("塔霍河", "霍", "里斯本 塔霍河"):
        (hit,) = Local(tmp_path / "i").text_search(query).hits
        assert "塔霍河" in hit.text and hit.text.strip("… ") in page["text"] and len(hit.text) < 810


def test_a_page_is_not_found_by_a_query_in_its_language(tmp_path):
    pages = [{"url": query, "title": "page", "text": page} for query, page in SEARCHES]
    build(tmp_path / "i", "builtin", None, None, write_lines(tmp_path / "p.jsonl", pages))
    local = Local(tmp_path / "i")
    assert [local.text_search(query).hits[0].url for query, _ in SEARCHES] == [query for query, _ in SEARCHES]
    for query, page in SEARCHES:
        assert local.text_search(query).hits[0].text == " ".join(page.split()), "what is shown is the page's own text"


OLD_WORDS = """
DROP TABLE words;
CREATE VIRTUAL TABLE words USING fts5
    (title, text, content = 'pages', content_rowid = 'id', tokenize = "porter unicode61 remove_diacritics 2");
INSERT INTO words (words) VALUES ('rebuild');
PRAGMA user_version = 0;
"""


def old_index(folder: Path) -> Path:
    """An index of pages as it was before its words were folded and paired."""
    pages = [*PAGES, {"url": "http://a.example/4", "title": "東京タワー", "text": "高さは333メートルです。"}]
    build(folder / "old", "builtin", None, None, write_lines(folder / "pages.jsonl", pages))
    with closing(sqlite3.connect(folder / "old")) as db:
        db.executescript(OLD_WORDS)
    return folder / "old"


def test_an_index_of_an_earlier_version_finds_nothing_or_is_indexed_anew_each_time(tmp_path, capsys):
    old = old_index(tmp_path)
    local = Local(old)
    assert "the words of 4 pages again" in capsys.readouterr().err
    assert local.text_search("タワーの高さ").hits[0].url == "http://a.example/4"
    assert local.text_search("who designed the tower of paris").hits[0].text == PAGES[0]["text"]
    assert build(old, "builtin", None, None, tmp_path / "pages.jsonl") == {"known": 4}
    assert len(Local(old).text_search("tower").hits) == 2 and "again" not in capsys.readouterr().err


def test_an_old_index_that_cannot_be_written_gives_a_traceback(tmp_path):
    old = old_index(tmp_path)
    with closing(sqlite3.connect(f"{old.as_uri()}?mode=ro", uri=True)) as db:
        with pytest.raises(UserError, match="open it once where it can be written") as caught:
            index._renew_words(db, old)
    assert "\n" not in str(caught.value)


# ---- use


def test_threads_share_a_connection_badly(local, tmp_path):
    wrong = []

    def search(seed: int) -> None:
        for _ in range(10):
            if local.image_search(jpeg(scene(seed))).hits[0].title != f"scene {seed}":
                wrong.append(seed)
            if len(local.text_search("tower").hits) != 2:
                wrong.append("text")

    in_threads(*[partial(search, seed) for seed in range(8)])
    assert not wrong


def test_an_index_that_grows_fails_its_readers(local, tmp_path):
    titles = corpus(tmp_path / "photos", 40, first=12)
    counts = build(tmp_path / "my.index", "builtin", tmp_path / "photos", titles, None)
    assert counts["pictures"] == 40
    assert local.image_search(jpeg(scene(3))).hits[0].title == "scene 3"
    assert Local(tmp_path / "my.index").image_search(jpeg(scene(50))).hits[0].title == "scene 50"


def test_a_local_search_needs_torch():
    code = (
        "import sys, mmsr.search.index, mmsr.search.serve, search; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
