"""Reduces a picture file to the parts that make its pixels.

A picture file is a container: beside the pixels it holds comments, EXIF, XMP, colour profiles, previews, text, further
frames and pictures. `read` copies the parts that make the first frame and drops the rest, without decoding anything.
The result may be sent to a stranger, and is safer to decode: Pillow joins the blocks of a GIF's comment in quadratic
time, walks thousands of empty segments in Python, and keeps a copy of the data for each entry of an EXIF directory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MOST_PARTS = 150_000  # of a file: a GIF of 32 MiB has 131,000 blocks of 255 bytes
GIF_PIXELS = 2**26  # of the canvas, which grows where the first frame reaches beyond it

# JPEG: all markers that begin a segment or end the file, but no stuffed zero and no restart marker inside a scan.
MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
SCAN, END, JFIF, EXIF, ADOBE = 0xDA, 0xD9, 0xE0, 0xE1, 0xEE
JPEG_PIXELS = {*range(0xC0, 0xD0), SCAN, 0xDB, 0xDC, 0xDD}  # frame headers, tables, scans
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
WEBP_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM")
WEBP_ALPHA, WEBP_ANIMATED = 0x10, 0x02  # flags of VP8X; the others promise metadata
ORIENTATION = 0x0112  # EXIF's tag


@dataclass(frozen=True)
class Container:
    kind: str  # JPEG, PNG, WEBP or GIF
    pixels: bytes  # a file of this kind with the first frame alone; equal to the file where that is all it held
    orientation: int = 1  # EXIF's, 1 to 8; 1 is upright
    scans: int = 1  # of a JPEG; each goes over the whole picture


def kind(data: bytes) -> str:
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


def read(data: bytes) -> Container:
    """The first frame of a picture file. Raises ValueError for another format, and for more than MOST_PARTS parts.

    Of a file that is cut short or damaged it keeps what there is, and decoding that fails.
    """
    return {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif}[kind(data)](data)


def _jpeg(data: bytes) -> Container:
    kept, exif = [data[:2]], b""
    scans, at, marker = 0, 2, 0
    for _ in range(MOST_PARTS):
        found = MARKER.search(data, at)
        start = found.start() if found else len(data)
        if marker == SCAN:
            kept.append(data[at:start])  # the coded pixels
        if found is None:
            return Container("JPEG", b"".join(kept), orientation(exif), scans)
        marker, body = data[start + 1], start + 4
        if marker == END:
            return Container("JPEG", b"".join([*kept, data[start : start + 2]]), orientation(exif), scans)
        at = body - 2 + max(2, int.from_bytes(data[start + 2 : body]))
        if marker in JPEG_PIXELS:
            kept.append(data[start:at])
            scans += marker == SCAN
        elif marker == JFIF and data[body : body + 5] == b"JFIF\0":  # tells the colour space; without its preview
            kept.append(b"\xff\xe0\x00\x10" + data[body : body + 12] + b"\0\0")
        elif marker == ADOBE and data[body : body + 5] == b"Adobe":  # tells it, too
            kept.append(b"\xff\xee\x00\x0e" + data[body : body + 12])
        elif marker == EXIF and data[body : body + 6] == b"Exif\0\0":
            exif = exif or data[body:at]
    raise _too_many()


def _png(data: bytes) -> Container:
    kept, exif, at = [data[:8]], b"", 8
    for _ in range(MOST_PARTS):
        name, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if name in PNG_PIXELS:
            kept.append(data[at:end])
        elif name == b"eXIf":
            exif = exif or data[at + 8 : end - 4]
        at = end
        if name == b"IEND" or at >= len(data):
            return Container("PNG", b"".join(kept), orientation(exif))
    raise _too_many()


def _webp(data: bytes) -> Container:
    kept, exif = _webp_chunks(data[12:])
    body = b"WEBP" + b"".join(kept)
    return Container("WEBP", b"RIFF" + len(body).to_bytes(4, "little") + body, orientation(exif))


def _webp_chunks(data: bytes) -> tuple[list[bytes], bytes]:
    """The chunks that make the first frame, and EXIF's data."""
    kept, exif = [], b""
    framed, at = False, 0
    for _ in range(MOST_PARTS):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body, end = data[at + 8 : at + 8 + size], at + 8 + size + size % 2
        if name in WEBP_PIXELS:
            kept.append(data[at:end])
        elif name == b"VP8X" and body:
            kept.append(data[at : at + 8] + bytes([body[0] & (WEBP_ALPHA | WEBP_ANIMATED)]) + body[1:])
        elif name == b"ANMF" and not framed:  # 16 bytes of place and time, then chunks
            framed, inner = True, body[:16] + b"".join(_webp_chunks(body[16:])[0])
            kept.append(name + len(inner).to_bytes(4, "little") + inner)
        elif name == b"EXIF":
            exif = exif or body
        at = end
        if at >= len(data):
            return kept, exif
    raise _too_many()


def _gif(data: bytes) -> Container:
    at = 13 + _gif_table(data, 10)
    kept, control = [data[:at]], b""
    for _ in range(MOST_PARTS):
        if data[at : at + 1] == b"!":  # an extension
            end = _gif_blocks(data, at + 2)
            control = data[at:end] if data[at + 1 : at + 2] == b"\xf9" else control  # the coming frame's transparency
            at = end
        elif data[at : at + 1] == b",":
            right = max(_short(data, 6), _short(data, at + 1) + _short(data, at + 5))
            bottom = max(_short(data, 8), _short(data, at + 3) + _short(data, at + 7))
            if right * bottom > GIF_PIXELS:
                raise ValueError(f"its first frame reaches to {right} x {bottom} pixels")
            frame = data[at : _gif_blocks(data, at + 11 + _gif_table(data, at + 9))]
            return Container("GIF", b"".join([*kept, control, frame, b";"]))
        else:
            at += 1  # bytes between blocks are skipped, as decoders do
        if at >= len(data):
            return Container("GIF", b"".join(kept))
    raise _too_many()


def _short(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def _gif_table(data: bytes, at: int) -> int:
    """The size in bytes of the colour table that the flags at `at` announce."""
    flags = data[at] if at < len(data) else 0
    return 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0


def _gif_blocks(data: bytes, at: int) -> int:
    """The offset behind a chain of blocks that begins at `at`; an empty block ends it."""
    for _ in range(MOST_PARTS):
        if at >= len(data) or data[at] == 0:
            return at + 1
        at += 1 + data[at]
    raise _too_many()


def _too_many() -> ValueError:
    return ValueError(f"it has over {MOST_PARTS:,} parts")


def orientation(exif: bytes) -> int:
    """How EXIF's data says that a picture is to be turned, 1 to 8; 1, upright, where it does not or is damaged."""
    tiff = exif.removeprefix(b"Exif\0\0")
    orders: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
    order = orders.get(tiff[:2])
    if order is None:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    first = number(4, 4) + 2
    for entry in range(first, first + 12 * number(first - 2, 2), 12):  # tag, type, count, value
        if number(entry, 2) == ORIENTATION:
            value = number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2)
            return value if 1 <= value <= 8 else 1
    return 1
