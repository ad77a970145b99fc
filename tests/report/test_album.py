"""The pictures of a run's rollouts, as files."""

import PIL.Image
from helpers import picture_bytes
from picture_files import SECRET, private, turned

from mmsr.episode import Episode, Example, Hit, Observation, Turn, digest
from mmsr.report import album
from mmsr.report.album import Album

WIDE, SMALL = picture_bytes(600, 300), picture_bytes(40, 40, mode="RGBA")


def episode(image, *thumbnails) -> Episode:
    made = Episode(Example("e", image, "q", ("a",)), 0, 0)
    seen = Observation(tuple(Hit("title", image=thumbnail) for thumbnail in thumbnails))
    made.turns.append(Turn("tool", "", 0, 0, "image_search", observation=seen))
    return made


def test_each_picture_is_kept_once_small_and_under_the_name_in_the_rollout_line(tmp_path):
    made = [episode(WIDE, SMALL, None), episode(WIDE)]
    found = Album(tmp_path / "images")
    pictures = found.new(made)
    assert len(pictures) == 2 and not found.new(made)
    found.add(pictures)
    line = made[0].record()
    names = [line["image"], line["turns"][0]["observation"]["thumbnails"][0]]
    assert names == [digest(WIDE), digest(SMALL)] and line["turns"][0]["observation"]["thumbnails"][1] is None
    files = {file.stem: PIL.Image.open(file) for file in (tmp_path / "images").iterdir()}
    assert set(files) == set(names) and {file.format for file in files.values()} == {"JPEG"}
    assert files[names[0]].size == (256, 128) and files[names[1]].size == (40, 40)


def test_the_report_shows_a_picture_on_its_side_or_its_private_words(tmp_path):
    found = Album(tmp_path / "images")
    found.add(found.new([episode(turned(6, size=(90, 60)), private("JPEG")[0], private("GIF")[0])]))
    files = list((tmp_path / "images").iterdir())
    assert sorted(PIL.Image.open(file).size for file in files) == [(48, 32), (48, 32), (90, 60)]
    assert not any(SECRET in file.read_bytes() for file in files)


def test_broken_picture_is_left_out(tmp_path):
    found = Album(tmp_path / "images")
    assert found.new([episode(WIDE, b"<svg onload=alert(1)>")])[0][0] == digest(WIDE)
    assert len(found.new([episode(WIDE, WIDE[:99])])) == 0


def test_what_is_there_after_a_resume_is_not_written_again_and_counts(tmp_path, monkeypatch):
    first = Album(tmp_path / "images")
    first.add(first.new([episode(SMALL)]))
    (file,) = (tmp_path / "images").iterdir()
    written = file.stat().st_mtime_ns
    monkeypatch.setattr(album, "MOST_BYTES", file.stat().st_size + 10)
    again = Album(tmp_path / "images")
    again.add(again.new([episode(SMALL, WIDE)]))
    assert list((tmp_path / "images").iterdir()) == [file] and file.stat().st_mtime_ns == written
    assert again.room == 10
