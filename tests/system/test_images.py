"""Strangers' pictures: row 17 of the fault programme, measured in a process of its own."""

import io
import json
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pytest
from picture_files import SECRET, chunk, exif, png, private, saved, scene, segment, turned

from mmsr.system.images import (
    THUMBNAIL_BYTES,
    decode,
    jpeg,
    media_type,
    stored_size,
    thumbnail,
    verify,
    without_metadata,
)

KINDS = ("JPEG", "PNG", "WEBP", "GIF")

ROOT = Path(__file__).parents[2]


def one_bit_png(width: int, height: int) -> bytes:
    """A black picture: a megapixel is 125 bytes of the file."""
    return png(width, height, 1, 0, bytes((width + 7) // 8 + 1) * height)


def noise(kind: str, size=(300, 200), mode="RGB") -> bytes:
    return saved(PIL.Image.effect_noise(size, 90).convert(mode), kind)


def many_scans(side: int, more: int) -> bytes:
    """A progressive JPEG of 10 scans, the last of which, 15 bytes of it, comes `more` times again."""
    file = saved(PIL.Image.new("RGB", (side, side)), "JPEG", progressive=True)
    return file[:-2] + file[file.rindex(b"\xff\xda") : -2] * more + file[-2:]


ATTACKS = {
    "bomb of 100 megapixels": one_bit_png(10_000, 10_000),
    "bomb of 10,000 megapixels": one_bit_png(100_000, 1_000)[:33] + one_bit_png(8, 8)[33:],
    "1 x 1,000,000": one_bit_png(1, 1_000_000),
    "1,000,000 x 1": one_bit_png(1_000_000, 1),
    "as large as may be, truncated": one_bit_png(2000, 2000)[:-60],
    "truncated jpeg": noise("JPEG")[:-5000],
    "truncated png": noise("PNG")[:-5000],
    "truncated webp": noise("WEBP")[:-5000],
    "header alone": noise("JPEG")[:20],
    "bmp": noise("BMP"),
    "tiff": noise("TIFF"),
    "pdf": noise("PDF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "html": b"<html>not found</html>",
    "nothing": b"",
    "6,000 scans in 100 kB": many_scans(2000, 6000),
    "too many bytes": noise("PNG") + bytes(40 * 2**20),
}

MEASURE = """
import json, re, sys, time
from mmsr.system import images
act = {"check": images.decode, "thumbnail": images.thumbnail}.get(sys.argv[1])
if act is None:
    import io, PIL.Image
    act = lambda data: PIL.Image.open(io.BytesIO(data)).convert("RGB")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
data = sys.stdin.buffer.read()
start, before = time.perf_counter(), peak()
try:
    act(data)
    said = ""
except ValueError as error:
    said = str(error)
print(json.dumps([said, time.perf_counter() - start, peak() - before]))
"""


# Not ru_maxrss: that begins at the size of the process that started this one.
measurable = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak memory from")


def measured(act: str, data: bytes) -> tuple[str, float, float]:
    """What it said, the seconds and the MiB that it took."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, act]
    done = subprocess.run(command, input=data, capture_output=True, cwd=ROOT, check=True, timeout=60)
    return json.loads(done.stdout)


@pytest.mark.first_is_quick
@measurable
@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_picture_is_refused_at_once_and_in_little_memory(name):
    said, seconds, mebibytes = measured("thumbnail", ATTACKS[name])
    assert said and "\n" not in said
    assert seconds < 1 and mebibytes < 200, (seconds, mebibytes)


@measurable
@pytest.mark.parametrize("name", ["bomb of 100 megapixels", "1 x 1,000,000"])
def test_question_pictures_are_guarded_too(name):
    said, seconds, mebibytes = measured("check", ATTACKS[name])
    assert said and seconds < 1 and mebibytes < 200


@pytest.mark.slow
@measurable
def test_without_the_guard_the_bomb_goes_off():
    bomb = ATTACKS["bomb of 100 megapixels"]
    _, _, mebibytes = measured("Pillow alone", bomb)
    assert len(bomb) < 20_000 and mebibytes > 200


def test_picture_of_odd_proportions_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(PIL.Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="aspect"):
        decode(one_bit_png(1, 1_000_000))


@pytest.mark.parametrize(
    "kind, mode", [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"), ("GIF", "L")]
)
def test_good_picture_becomes_a_small_jpeg(kind, mode):
    small = thumbnail(noise(kind, (900, 300), mode))
    picture = PIL.Image.open(io.BytesIO(small))
    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (448, 149)) and len(small) <= THUMBNAIL_BYTES


def test_jpeg_keeps_its_limits_and_leaves_its_argument_alone():
    picture = decode(noise("PNG", (1200, 900)))
    file = jpeg(picture, 1600, 50_000)
    assert len(file) <= 50_000 and max(PIL.Image.open(io.BytesIO(file)).size) < 1200 and picture.size == (1200, 900)
    assert PIL.Image.open(io.BytesIO(jpeg(picture.resize((8, 8)), 1600, 100_000))).size == (8, 8)  # never enlarged


@pytest.mark.parametrize("side", [1, 300])
def test_a_limit_that_no_picture_keeps_is_tried_for_ever(side):
    assert len(jpeg(scene(), 1600, 700)) <= 700
    with pytest.raises(ValueError, match="100 bytes"):
        jpeg(scene(size=(side, side)), 1600, 100)


# ---- what a file says beside its pixels


@pytest.mark.parametrize("kind", KINDS)
def test_private_words_leave_with_a_picture(kind):
    """Also a comment that is longer than all of the thumbnail may be: it made the loop divide by zero."""
    full, bare = private(kind, comment=150_000)
    assert decode(full).info == {} and decode(full).tobytes() == decode(bare).tobytes()
    assert thumbnail(full) == thumbnail(bare) and SECRET not in thumbnail(full)
    assert without_metadata(full) == bare == without_metadata(bare)


def test_jpeg_writes_what_a_picture_carries():
    """A caller's own picture may come from Pillow, with all that it keeps for the next file."""
    picture = scene()
    picture.info = {"comment": SECRET, "exif": exif(words=SECRET), "xmp": SECRET, "icc_profile": SECRET}
    assert SECRET not in jpeg(picture, 100, 10_000)
    assert picture.info["comment"], "the argument is left alone"


# What Pillow takes for a reason to refuse the picture, or to warn on stderr.
DAMAGED = {
    "exif": segment(0xE1, b"Exif\0\0MM\0*" + b"\xff" * 40),
    "multi-picture": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\3" + b"\xb0" * 40),
    "photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x04"),
    "profile": segment(0xE2, b"ICC_PROFILE\0"),
    "adobe": segment(0xEE, b"Ado"),
    "jfif": segment(0xE0, b"JFIF\0\1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_metadata_makes_a_picture_unreadable(name):
    file = saved(scene(), "JPEG")
    damaged = file[:20] + DAMAGED[name] + file[20:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify(damaged)
        assert decode(damaged).tobytes() == decode(file).tobytes() and stored_size(damaged) == (48, 32)


def test_a_png_is_refused_for_its_long_text():
    plain = one_bit_png(9, 9)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))
    verify(plain[:33] + text + plain[33:])
    assert decode(plain[:33] + text + plain[33:]).size == (9, 9)


def test_a_telephones_jpeg_is_announced_as_a_format_of_its_own():
    several = saved(scene(), "MPO", save_all=True, append_images=[scene()])
    assert PIL.Image.open(io.BytesIO(several)).get_format_mimetype() == "image/mpo"
    assert media_type(several) == "image/jpeg" and decode(several).size == (48, 32)
    assert len(without_metadata(several)) <= len(saved(scene(), "JPEG")), "one picture, and no list of others"
    assert {media_type(noise(kind)) for kind in KINDS} == {"image/jpeg", "image/png", "image/webp", "image/gif"}


# ---- which side is up


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_telephones_picture_lies_on_its_side(orientation, kind):
    file = turned(orientation, kind)
    stored = PIL.Image.open(io.BytesIO(file))
    assert unlike(decode(file), scene()) < 30 and unlike(decode(thumbnail(file)), scene()) < 30
    sent = PIL.Image.open(io.BytesIO(without_metadata(file)))
    assert unlike(sent.convert("RGB"), scene()) < 30 and not sent.getexif()
    as_stored = decode(file, upright=False)
    assert stored_size(file) == as_stored.size == stored.size and as_stored.tobytes() == stored.convert("RGB").tobytes()
    part = PIL.ImageOps.exif_transpose(as_stored.crop((0, 0, *as_stored.size)))
    assert part.tobytes() == decode(file).tobytes(), "a part of the stored picture can be turned"


def unlike(one: PIL.Image.Image, other: PIL.Image.Image) -> float:
    """The largest mean difference of a quarter."""
    if one.size != other.size:
        return 255.0
    difference = abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).reshape(2, 16, 2, 24, 3)
    return difference.mean((1, 3)).max()


# ---- modes


WHITE = [255, 255, 255]
RAMP, COLOURS = [[0, 1, 2], [3, 4, 5], [6, 7, 8]], chunk(b"PLTE", bytes(range(9)))
RGBA = b"\x10\0\x80\0\xff\xff\xff\xff" + bytes(8) + b"\0\0\0\0\0\0\x80\0"
MODES = {  # PNG: depth, colour type, rows, further chunks; and the pixels by hand
    "grey 16": (16, 0, b"\0\xff\x80\0\xff\xff", [], [[0] * 3, [128] * 3, WHITE]),
    "grey 16, one clear": (16, 0, b"\0\xff\x80\0\x80\1", [chunk(b"tRNS", b"\x80\0")], [[0] * 3, WHITE, [128] * 3]),
    "grey and alpha 16": (16, 4, b"\x40\0\xff\xff" + bytes(6) + b"\x80\0", [], [[64] * 3, WHITE, [127] * 3]),
    "RGB 16": (16, 2, b"\x10\xff\x80\0\xff\xff" * 3, [], [[16, 128, 255]] * 3),
    "RGBA 16": (16, 6, RGBA, [], [[16, 128, 255], WHITE, [127] * 3]),
    "one bit": (1, 0, b"\x40", [], [[0] * 3, WHITE, [0] * 3]),
    "grey 4": (4, 0, b"\x08\xf0", [], [[0] * 3, [136] * 3, WHITE]),
    "palette": (8, 3, b"\0\1\2", [COLOURS], RAMP),
    "palette, one clear": (8, 3, b"\0\1\2", [COLOURS, chunk(b"tRNS", b"\xff\0")], [RAMP[0], WHITE, RAMP[2]]),
    "RGB, one clear": (8, 2, bytes(range(9)), [chunk(b"tRNS", b"\0\3\0\4\0\5")], [RAMP[0], WHITE, RAMP[2]]),
}


@pytest.mark.parametrize("name", MODES)
def test_a_colour_mode_is_read_as_another_picture(name):
    """16-bit grey turned white: Pillow cuts off what is over 255."""
    depth, colours, body, more, pixels = MODES[name]
    found = np.asarray(decode(png(3, 1, depth, colours, b"\0" + body, *more)))
    assert found.shape == (1, 3, 3) and abs(found[0].astype(int) - pixels).max() <= 1


def test_adobes_cmyk_is_inverted():
    found = np.asarray(decode(saved(scene("CMYK"), "JPEG", quality=95)))
    assert abs(found[::31, ::47].astype(int) - np.asarray(scene())[::31, ::47]).max() < 20


# ---- scans


def test_a_jpeg_of_many_scans_is_decoded(monkeypatch):
    decode(many_scans(16, 80))
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda picture: pytest.fail("decoded"))
    for file in (many_scans(16, 91), many_scans(4000, 60)):  # too many, or too many of such a size
        with pytest.raises(ValueError, match="scans"):
            decode(file)
