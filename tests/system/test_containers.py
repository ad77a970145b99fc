"""What a picture file is made of: the pixels' parts are kept byte for byte, all others go."""

import io
import struct
import time

import PIL.Image
import pytest
from picture_files import SECRET, blocks, chunk, exif, private, saved, scene, segment

from mmsr.system.containers import first_frame, orientation

KINDS = ("JPEG", "PNG", "WEBP", "GIF")


@pytest.mark.parametrize("kind", KINDS)
def test_words_stay_in_a_file_or_its_pixels_change(kind):
    full, bare = private(kind)
    assert full.count(SECRET) >= 3
    found = first_frame(full)
    assert (found.format, found.orientation, found.data) == (kind, 1, bare)
    assert first_frame(bare).data == bare, "what holds nothing else is the same file"


@pytest.mark.parametrize(
    "picture, kind, options",
    [
        (scene("L"), "JPEG", {}), (scene("CMYK"), "JPEG", {"progressive": True}), (scene(), "JPEG", {"quality": 95}),
        (scene(), "JPEG", {"restart_marker_blocks": 1}), (scene("1"), "PNG", {}), (scene("LA"), "PNG", {}),
        (scene("RGBA"), "PNG", {}), (scene("RGBA"), "WEBP", {}), (scene(), "WEBP", {}), (scene("L"), "GIF", {}),
    ],
)  # fmt: skip
def test_a_file_without_metadata_is_changed(picture, kind, options):
    file = saved(picture, kind, **options)
    assert first_frame(file).data == file


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_later_frame_is_kept(kind):
    first = scene()
    file = saved(first, kind, save_all=True, append_images=[first.rotate(180)] * 3)
    pixels = first_frame(file).data
    with PIL.Image.open(io.BytesIO(file)) as full, PIL.Image.open(io.BytesIO(pixels)) as alone:
        assert full.n_frames > 1 and getattr(alone, "n_frames", 1) == 1 and len(pixels) < len(file)
        assert full.convert("RGB").tobytes() == alone.convert("RGB").tobytes()


def test_junk_or_a_hundred_thousand_parts_take_minutes():
    """Pillow alone takes seconds to minutes for each of these."""
    jpeg, png, gif = saved(scene(), "JPEG"), saved(scene(), "PNG"), saved(scene("P"), "GIF", optimize=False)
    table = 13 + 3 * 2 ** (gif[10] % 8 + 1)
    start = time.perf_counter()
    for junk in (bytes(3_000_000), b"\xff" * 3_000_000 + b"\0"):
        assert first_frame(jpeg[:20] + junk + jpeg[20:]).data == jpeg
    assert first_frame(gif[:table] + blocks(0xFE, b"c" * 4_000_000) + gif[table:]).data == gif
    for many in (jpeg[:20] + segment(0xFE, b"") * 150_000 + jpeg[20:], png[:33] + chunk(b"teXt", b"") * 150_000):
        with pytest.raises(ValueError, match="over 150,000 parts"):
            first_frame(many)
    assert time.perf_counter() - start < 20


def test_the_scans_of_a_jpeg_are_miscounted():
    assert first_frame(saved(scene(), "JPEG")).scans == 1
    assert first_frame(saved(scene(), "JPEG", progressive=True)).scans == 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_escapes_as_another_error(kind):
    full, _ = private(kind)
    for length in range(0, len(full), 7):
        try:
            first_frame(full[:length])
        except ValueError:
            pass


def test_an_orientation_is_read_wrongly_or_a_broken_one_raises():
    def tiff(order: str, kind: int, value: bytes) -> bytes:
        head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
        entries = (
            struct.pack(order + "HHI", 0x0100, 3, 1) + bytes(4),
            struct.pack(order + "HHI", 0x0112, kind, 1) + value,
        )
        return head + struct.pack(order + "H", 2) + b"".join(entries)

    for value in range(1, 9):
        assert orientation(exif(value)) == orientation(exif(value).removeprefix(b"Exif\0\0")) == value
        for order in "<>":
            assert orientation(tiff(order, 3, struct.pack(order + "HH", value, 0))) == value
            assert orientation(tiff(order, 4, struct.pack(order + "I", value))) == value
    for broken in (
        b"",
        b"II",
        b"Exif\0\0",
        b"MM\0*\xff\xff\xff\xff",
        exif(6)[:20],
        tiff("<", 3, b"\x09\0\0\0"),
        b"x" * 99,
    ):
        assert orientation(broken) == 1
