"""Published caches of image searches: both layouts, pictures in a folder or an archive, and what is refused.

No published file was at hand: these are made after the code that loads them.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from contextlib import closing
from pathlib import Path

import PIL.Image
import pytest
from test_formats import parquet, picture, row

import search
from mmsr.config import Options
from mmsr.data.formats import read_examples
from mmsr.data.image_caches import image_cache, is_image_cache
from mmsr.search.backends import import_searches, open_backend
from mmsr.search.cache import Replayed
from mmsr.search.store import Store
from mmsr.system.errors import UserError


def coloured(red: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (40, 30), (red, 100, 255 - red)).save(file, kind)
    return file.getvalue()


PICTURES = {  # by the paths in the folder or archive
    "images/made_0/0.jpg": coloured(0),
    "images/made_1/0.jpg": coloured(80),
    "images/made_1/1.png": coloured(160, "PNG"),
    "images/unused.jpg": coloured(240),
    "images/broken.jpg": b"no picture",
}
HOME = "/home/someone/data/search_cache/images"  # on the machine that made the cache
DEEPEYES = {
    "made_0": {
        "tool_returned_web_title": ["A bridge", "No picture"],
        "cached_images_path": [f"{HOME}/made_0/0.jpg", None],
    },
    "made_1": {
        "tool_returned_web_title": ["First", None, "Broken"],
        "cached_images_path": [f"{HOME}/made_1/0.jpg", f"{HOME}/made_1/1.png", f"{HOME}/broken.jpg"],
    },
    "made_9": {"tool_returned_web_title": [], "cached_images_path": []},
}  # fmt: skip
DEEPRESEARCH = [
    {
        "data_id": "made_0",
        "cached_data": [
            {"cached_title": "A bridge", "cached_images_path": f"{HOME}/made_0/0.jpg"},
            {"cached_title": "No picture"},
        ],
    },
    {
        "data_id": "made_1",
        "cached_data": [
            {"cached_title": "First", "cached_images_path": f"{HOME}/made_1/0.jpg"},
            {"cached_images_path": f"{HOME}/made_1/1.png"},
            {"cached_title": "Broken", "cached_images_path": f"{HOME}/broken.jpg"},
        ],
    },
    {"data_id": "made_9", "cached_data": []},
]
LAYOUTS = {
    "deepeyes.json": json.dumps(DEEPEYES),
    "deepresearch.jsonl": "".join(json.dumps(record) + "\n" for record in DEEPRESEARCH),
    "array.json": json.dumps(DEEPRESEARCH),
    "object.json": json.dumps({record["data_id"]: record for record in DEEPRESEARCH}),
}


def written(folder: Path, name: str) -> Path:
    (folder / name).write_text(LAYOUTS[name])
    return folder / name


def packed(folder: Path, kind: str) -> Path:
    """The pictures in a folder, or in an archive of this kind."""
    target = folder / f"pictures{kind}"
    if not kind:
        for name, data in PICTURES.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
    elif kind == ".zip":
        with zipfile.ZipFile(target, "w") as file:
            for name, data in PICTURES.items():
                file.writestr(name, data)
    else:
        with tarfile.open(target, "w:gz" if kind.endswith("gz") else "w") as file:
            for name, data in PICTURES.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return target


def similar(thumbnail: bytes, original: bytes) -> bool:
    one, other = (PIL.Image.open(io.BytesIO(data)).convert("RGB").resize((8, 8)) for data in (thumbnail, original))
    pairs = zip(one.tobytes(), other.tobytes())
    return sum(abs(a - b) for a, b in pairs) / (8 * 8 * 3) < 4


@pytest.mark.parametrize("kind", ["", ".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_cache_is_not_read(tmp_path, name, kind):
    file = written(tmp_path, name)
    assert is_image_cache(file)
    found = image_cache(file, packed(tmp_path, kind))
    assert list(found) == ["made_0", "made_1", "made_9"]
    assert [[hit.title for hit in seen.hits] for seen in found.values()] == [
        ["A bridge", "No picture"],
        ["First", "", "Broken"],
        [],
    ]
    hits = [*found["made_0"].hits, *found["made_1"].hits]
    assert [hit.image is None for hit in hits] == [False, True, False, False, True], "broken, or without a path"
    for hit, name in ((hits[0], "made_0/0.jpg"), (hits[2], "made_1/0.jpg"), (hits[3], "made_1/1.png")):
        assert similar(hit.image, PICTURES[f"images/{name}"]) and hit.image.startswith(b"\xff\xd8")


def test_of_files_with_one_name_another_folders_is_taken(tmp_path):
    """Also where the archive has other folders above them, and where only one has the name."""
    file = written(tmp_path, "deepeyes.json")
    for names in (("made_0/0.jpg", "made_1/0.jpg"), ("made_1/0.jpg", "made_0/0.jpg")):
        archive = tmp_path / "other.zip"
        with zipfile.ZipFile(archive, "w") as pictures:
            for name in names:
                pictures.writestr(f"a/b/{name}", PICTURES[f"images/{name}"])
            pictures.writestr("1.png", PICTURES["images/made_1/1.png"])
        found = image_cache(file, archive)
        assert similar(found["made_0"].hits[0].image, PICTURES["images/made_0/0.jpg"])
        assert similar(found["made_1"].hits[0].image, PICTURES["images/made_1/0.jpg"])
        assert similar(found["made_1"].hits[1].image, PICTURES["images/made_1/1.png"])


def test_a_picture_is_taken_that_may_be_of_another_result(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as pictures:
        pictures.writestr("images/made_1/0.jpg", PICTURES["images/made_1/0.jpg"])  # the other 0.jpg is missing
        pictures.writestr("0.jpg", coloured(20))
    found = image_cache(written(tmp_path, "deepeyes.json"), tmp_path / "some.zip")
    assert found["made_0"].hits[0].image is None
    assert similar(found["made_1"].hits[0].image, PICTURES["images/made_1/0.jpg"])


def test_a_strangers_picture_is_taken_where_only_its_name_agrees(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as pictures:
        for number in (7, 8):  # of questions that are not in the cache
            pictures.writestr(f"images/made_{number}/1.png", coloured(20))
    found = image_cache(written(tmp_path, "deepeyes.json"), tmp_path / "some.zip")
    assert not any(hit.image for seen in found.values() for hit in seen.hits)


def test_an_import_without_the_questions_succeeds(tmp_path):
    with (
        closing(Store(tmp_path / "searches.sqlite")) as store,
        pytest.raises(UserError, match="none was given: python search.py cache import FILE --data"),
    ):
        import_searches(store, written(tmp_path, "deepeyes.json"), (), packed(tmp_path, ""))


def test_an_import_answers_no_search_of_its_pictures(tmp_path):
    data = parquet(tmp_path, [row(i) for i in range(3)])
    file = written(tmp_path, "deepresearch.jsonl")
    with closing(Store(tmp_path / "searches.sqlite")) as store:
        said = import_searches(store, file, read_examples(data), packed(tmp_path, ".tar.gz"))
        assert said.startswith(
            "image searches of 3 questions, 2 of them in the data, 2 new here; 2 of their 5 hits have no thumbnail ("
        )
        seen = Replayed(store, "error").image_search(picture(1))
        assert [hit.title for hit in seen.hits] == ["First", "", "Broken"] and seen.source == "deepresearch"


def test_the_programs_do_not_know_the_layouts(tmp_path, capsys):
    """`cache import`, with its pictures in an archive; and `replay:`, with its pictures beside it."""
    data = parquet(tmp_path, [row(i) for i in range(3)])
    file, archive = written(tmp_path, "deepeyes.json"), packed(tmp_path, ".zip")
    words = ["cache", "import", file, "--data", data, "--images", archive, "--out", tmp_path / "s.sqlite"]
    assert search.main([str(word) for word in words]) == 0
    assert "2 new here; 2 of their 5 hits have no thumbnail" in capsys.readouterr().out
    packed(tmp_path, "")
    engine = open_backend(Options(search=f"replay:{file}", results=1), read_examples(data)).backend
    hits = engine.image_search(picture(0), "").hits
    assert [hit.title for hit in hits] == ["A bridge"] and hits[0].image


def test_a_cache_of_other_questions_is_imported(tmp_path, capsys):
    data = parquet(tmp_path, [row(i + 5) for i in range(2)])
    file = written(tmp_path, "array.json")
    words = ["cache", "import", file, "--data", data, "--images", packed(tmp_path, ""), "--out", tmp_path / "s.sqlite"]
    assert search.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert "about others (as 'made_0') than the data (as 'made_5')" in said
    assert not (tmp_path / "s.sqlite").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        ("[]", "no searches"),
        ('[{"data_id": "made_1", "cached_data": [{"title": "a"}]}]', "neither cached_title nor .*found title"),
        ('[{"data_id": "made_1", "cached_data": "zzz"}]', "no list cached_data, but 'zzz'"),
    ],
)
def test_a_cache_without_results_or_with_other_names_is_imported(content, said, tmp_path):
    (tmp_path / "cache.json").write_text(content)
    data = parquet(tmp_path, [row(1)])
    with closing(Store(tmp_path / "s.sqlite")) as store, pytest.raises(UserError, match=said):
        import_searches(store, tmp_path / "cache.json", read_examples(data), tmp_path)


def test_an_empty_second_answer_takes_the_place_of_the_first(tmp_path):
    first, second = {"cached_data": [{"cached_title": "a"}]}, {"cached_data": []}
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"data_id": 1, **each}) + "\n" for each in (first, second)))
    assert [hit.title for hit in image_cache(tmp_path / "c.jsonl", tmp_path)["1"].hits] == ["a"]


def test_what_is_no_archive_is_said_in_several_lines(tmp_path):
    (tmp_path / "not.zip").write_bytes(b"PK not an archive")
    with pytest.raises(UserError, match="no folder, zip or tar; name the pictures") as raised:
        image_cache(written(tmp_path, "array.json"), tmp_path / "not.zip")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content, complaint", [
    ("5", "neither an object nor an array"),
    ('{"a": 5}', "entry 0: 5 is not an object"),
    ('[{"cached_data": []}]', "entry 0: there is no data_id"),
    ('{"a": {"title": "x"}}', "entry 0: no list tool_returned_web_title, but only data_id, title"),
    ('{"a": {"tool_returned_web_title": "x", "cached_images_path": []}}', "no list tool_returned_web_title"),
    ('{"a": {"tool_returned_web_title": ["x"], "cached_images_path": []}}', "1 titles and 0 paths"),
    ('[{"data_id": "a", "cached_data": ["x"]}]', "entry 0, cached_data: not a list of objects"),
    ('[{"data_id": "a", "cached_data": [{"cached_title": 3}]}]', "entry 0: 3 is neither text nor null"),
])  # fmt: skip
def test_a_file_of_another_layout_ends_in_a_traceback(tmp_path, content, complaint):
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(UserError, match=complaint):
        image_cache(tmp_path / "cache.json", tmp_path)


def test_damaged_or_missing_pictures_end_in_a_traceback(tmp_path):
    file = written(tmp_path, "deepeyes.json")
    whole = packed(tmp_path, ".tar.gz").read_bytes()
    for name, content in (
        ("cut.tar.gz", whole[: len(whole) // 2]),
        ("text.tar", b"no archive" * 200),
        ("cut.tar.xz", b"\xfd7zXZ\0\0\4" + bytes(200)),
        ("cut.zip", packed(tmp_path, ".zip").read_bytes()[:-10]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: cannot be read, or damaged"):
            image_cache(file, tmp_path / name)
    with pytest.raises(UserError, match="nowhere: no such folder or archive"):
        image_cache(file, tmp_path / "nowhere")


def test_an_archive_writes_files_or_reads_links(tmp_path):
    """A name that leads out of the archive is only a name, and a link is not followed."""
    file = written(tmp_path, "deepeyes.json")
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(coloured(20))
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        link = tarfile.TarInfo("made_0/0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
        info = tarfile.TarInfo("../../made_1/0.jpg")
        info.size = len(coloured(80))
        archive.addfile(info, io.BytesIO(coloured(80)))
    before = sorted(tmp_path.rglob("*"))
    found = image_cache(file, tmp_path / "odd.tar")
    assert found["made_0"].hits[0].image is None and found["made_1"].hits[0].image
    assert sorted(tmp_path.rglob("*")) == before
