"""Reduces a picture file to the parts that make its pixels.

A picture file is a container: beside the pixels it holds comments, EXIF, XMP, colour profiles, previews, text, further
frames and pictures. `first_frame` copies the parts that make the first frame and drops the rest, without decoding
anything. The result may be sent to another server, and is safer to decode: Pillow joins the blocks of a GIF's comment
in quadratic time, walks thousands of empty segments in Python, and keeps a copy of the data for each entry of an EXIF
directory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MOST_PARTS = 150_000  # of a file: a GIF of 32 MiB has 131,000 blocks of 255 bytes
GIF_PIXELS = 2**26  # of the canvas, which grows if the first frame reaches beyond it

# JPEG: all markers that begin a segment or end the file, but no stuffed zero and no restart marker inside a scan.
MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
SCAN = 0xDA
END = 0xD9
JFIF = 0xE0
EXIF = 0xE1
ADOBE = 0xEE
JPEG_PIXELS = {*range(0xC0, 0xD0), SCAN, 0xDB, 0xDC, 0xDD}  # frame headers, tables, scans

PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")

WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM")
# Flags of the chunk VP8X. The others promise metadata.
WEBP_ALPHA = 0x10
WEBP_ANIMATED = 0x02

# EXIF
ORIENTATION = 0x0112  # a tag
LONG = 4  # a type of value: 4 bytes


@dataclass(frozen=True)
class FirstFrame:
    """The first frame of a picture file, without metadata."""

    format: str  # JPEG, PNG, WEBP or GIF
    data: bytes  # a file of this format with the first frame alone; equal to the whole file if it holds no more
    orientation: int = 1  # EXIF's, 1 to 8; 1 is upright
    scans: int = 1  # of a JPEG; each passes over the whole picture


def image_format(data: bytes) -> str:
    """JPEG, PNG, WEBP or GIF, by a file's first bytes. Raises ValueError for any other."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    raise ValueError("it begins like none of these")


def first_frame(data: bytes) -> FirstFrame:
    """The first frame of a picture file. Raises ValueError for another format, and for more than MOST_PARTS parts.

    Of a file that is truncated or damaged it keeps what there is. Decoding that fails.
    """
    readers = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif}
    return readers[image_format(data)](data)


def _too_many() -> ValueError:
    return ValueError(f"it has over {MOST_PARTS:,} parts")


# ---- JPEG: segments of a marker, a length and a body; a scan is followed by coded pixels


def _jpeg(data: bytes) -> FirstFrame:
    kept = [data[:2]]
    exif = b""
    scans = 0
    at = 2
    marker = 0
    for _ in range(MOST_PARTS):
        found = MARKER.search(data, at)
        start = found.start() if found else len(data)
        if marker == SCAN:
            kept.append(data[at:start])  # the coded pixels
        if found is None:
            return FirstFrame("JPEG", b"".join(kept), orientation(exif), scans)
        marker = data[start + 1]
        if marker == END:
            kept.append(data[start : start + 2])
            return FirstFrame("JPEG", b"".join(kept), orientation(exif), scans)
        body = start + 4
        length = int.from_bytes(data[start + 2 : body])  # of itself and the body
        at = start + 2 + max(2, length)
        if marker == SCAN:
            scans += 1
        if marker in JPEG_PIXELS:
            kept.append(data[start:at])
        elif marker == EXIF and data[body : body + 6] == b"Exif\0\0":
            exif = exif or data[body:at]
        else:
            kept.append(_colour_space(marker, data[body : body + 12]))
    raise _too_many()


def _colour_space(marker: int, body: bytes) -> bytes:
    """A JFIF or Adobe segment, which tells the colour space, without a preview. Empty for any other segment."""
    if marker == JFIF and body.startswith(b"JFIF\0"):
        return b"\xff\xe0\x00\x10" + body + b"\0\0"
    if marker == ADOBE and body.startswith(b"Adobe"):
        return b"\xff\xee\x00\x0e" + body
    return b""


# ---- PNG: chunks of a length, a name, a body and a checksum


def _png(data: bytes) -> FirstFrame:
    kept = [data[:8]]
    exif = b""
    at = 8
    for _ in range(MOST_PARTS):
        size = int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        body = at + 8
        end = body + size + 4
        if name in PNG_PIXELS:
            kept.append(data[at:end])
        elif name == b"eXIf":
            exif = exif or data[body : end - 4]
        at = end
        if name == b"IEND" or at >= len(data):
            return FirstFrame("PNG", b"".join(kept), orientation(exif))
    raise _too_many()


# ---- WebP: chunks of a name, a length and a body, padded to an even length


def _webp(data: bytes) -> FirstFrame:
    chunks, exif = _webp_chunks(data[12:])
    body = b"WEBP" + chunks
    file = b"RIFF" + _four_bytes(len(body)) + body
    return FirstFrame("WEBP", file, orientation(exif))


def _webp_chunks(data: bytes) -> tuple[bytes, bytes]:
    """The chunks that make the first frame, joined, and EXIF's data."""
    kept = []
    exif = b""
    frames = 0
    at = 0
    for _ in range(MOST_PARTS):
        name = data[at : at + 4]
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + size]
        end = at + 8 + size + size % 2
        if name in WEBP_PIXELS:
            kept.append(data[at:end])
        elif name == b"VP8X" and body:
            flags = body[0] & (WEBP_ALPHA | WEBP_ANIMATED)
            kept.append(data[at : at + 8] + bytes([flags]) + body[1:])
        elif name == b"ANMF":
            frames += 1
            if frames == 1:
                kept.append(_webp_frame(body))
        elif name == b"EXIF":
            exif = exif or body
        at = end
        if at >= len(data):
            return b"".join(kept), exif
    raise _too_many()


def _webp_frame(body: bytes) -> bytes:
    """A frame of an animation: 16 bytes of place and time, then chunks."""
    chunks, _ = _webp_chunks(body[16:])
    frame = body[:16] + chunks
    return b"ANMF" + _four_bytes(len(frame)) + frame


def _four_bytes(number: int) -> bytes:
    return number.to_bytes(4, "little")


# ---- GIF: a screen with a colour table, then extensions ("!") and frames (",")


def _gif(data: bytes) -> FirstFrame:
    at = 13 + _gif_table(data, 10)
    kept = [data[:at]]
    control = b""  # the extension with the transparency of the frame that follows
    for _ in range(MOST_PARTS):
        label = data[at : at + 1]
        if label == b"!":
            end = _gif_blocks(data, at + 2)
            if data[at + 1 : at + 2] == b"\xf9":
                control = data[at:end]
            at = end
        elif label == b",":
            kept += [control, _gif_frame(data, at), b";"]
            return FirstFrame("GIF", b"".join(kept))
        else:
            at += 1  # bytes between blocks are skipped, as decoders do
        if at >= len(data):
            return FirstFrame("GIF", b"".join(kept))
    raise _too_many()


def _gif_frame(data: bytes, at: int) -> bytes:
    """The frame that begins at `at`: place and size, flags, a colour table, a byte, blocks of coded pixels."""
    left = _short(data, at + 1)
    top = _short(data, at + 3)
    right = left + _short(data, at + 5)
    bottom = top + _short(data, at + 7)
    width = max(_short(data, 6), right)
    height = max(_short(data, 8), bottom)
    if width * height > GIF_PIXELS:
        raise ValueError(f"its first frame reaches to {width} x {height} pixels")
    table = _gif_table(data, at + 9)
    end = _gif_blocks(data, at + 11 + table)
    return data[at:end]


def _short(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def _gif_table(data: bytes, at: int) -> int:
    """The size in bytes of the colour table that the flags at `at` announce."""
    flags = data[at] if at < len(data) else 0
    if not flags & 0x80:
        return 0
    colours = 2 ** (flags % 8 + 1)
    return 3 * colours


def _gif_blocks(data: bytes, at: int) -> int:
    """The offset behind a chain of blocks that begins at `at`; an empty block ends it."""
    for _ in range(MOST_PARTS):
        if at >= len(data) or data[at] == 0:
            return at + 1
        at += 1 + data[at]
    raise _too_many()


# ---- EXIF: a TIFF file with directories of entries (tag, type, count, value) of 12 bytes


def orientation(exif: bytes) -> int:
    """How EXIF says that a picture is to be turned, 1 to 8. 1, upright, if it does not say or is damaged."""
    tiff = exif.removeprefix(b"Exif\0\0")
    orders: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
    order = orders.get(tiff[:2])
    if order is None:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    directory = number(4, 4)
    entries = number(directory, 2)
    for i in range(entries):
        entry = directory + 2 + 12 * i
        if number(entry, 2) == ORIENTATION:
            size = 4 if number(entry + 2, 2) == LONG else 2
            value = number(entry + 8, size)
            return value if 1 <= value <= 8 else 1
    return 1
