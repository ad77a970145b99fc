"""Strangers' pictures: row 17 of the fault programme, measured in a process of its own."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import PIL.Image
import pytest

from mmsr.pictures import THUMBNAIL_BYTES, decode, jpeg, thumbnail

ROOT = Path(__file__).parent.parent


def one_bit_png(width: int, height: int) -> bytes:
    """A black picture: a megapixel is 125 bytes of the file."""
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(kind: str, size=(300, 200), mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    PIL.Image.effect_noise(size, 90).convert(mode).save(file, kind, **options)
    return file.getvalue()


ATTACKS = {
    "bomb of 100 megapixels": one_bit_png(10_000, 10_000),
    "bomb of 10,000 megapixels": one_bit_png(100_000, 1_000)[:33] + one_bit_png(8, 8)[33:],
    "1 x 1,000,000": one_bit_png(1, 1_000_000),
    "1,000,000 x 1": one_bit_png(1_000_000, 1),
    "as large as may be, truncated": one_bit_png(2000, 2000)[:-60],
    "truncated jpeg": saved("JPEG")[:-5000],
    "truncated png": saved("PNG")[:-5000],
    "truncated webp": saved("WEBP")[:-5000],
    "header alone": saved("JPEG")[:20],
    "bmp": saved("BMP"),
    "tiff": saved("TIFF"),
    "pdf": saved("PDF"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "html": b"<html>not found</html>",
    "nothing": b"",
    "too many bytes": saved("PNG") + bytes(40 * 2**20),
}

MEASURE = """
import json, re, sys, time
from mmsr import pictures
act = {"check": pictures.decode, "thumbnail": pictures.thumbnail}.get(sys.argv[1])
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
    small = thumbnail(saved(kind, (900, 300), mode))
    picture = PIL.Image.open(io.BytesIO(small))
    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (448, 149)) and len(small) <= THUMBNAIL_BYTES


def test_jpeg_keeps_its_limits_and_leaves_its_argument_alone():
    picture = decode(saved("PNG", (1200, 900)))
    file = jpeg(picture, 1600, 50_000)
    assert len(file) <= 50_000 and max(PIL.Image.open(io.BytesIO(file)).size) < 1200 and picture.size == (1200, 900)
    assert PIL.Image.open(io.BytesIO(jpeg(picture.resize((8, 8)), 1600, 100_000))).size == (8, 8)  # never enlarged
