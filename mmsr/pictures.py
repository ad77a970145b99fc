"""Strangers' picture files: what is opened, and what is refused before it can do harm.

Pillow by itself opens a 20 kB file into a gigabyte of pixels, and formats whose decoders few have looked at. Here the
bytes are counted before the header is read, the pixels before any is decoded, and four formats are known. This module
imports no torch: a search server and a command line that show a picture start at once.
"""

from __future__ import annotations

import io

import PIL.Image

MAX_ASPECT = 200
MAX_FILE_BYTES = 32 * 2**20
MAX_DECODED_PIXELS = 50_000_000  # 150 MB as RGB
THUMBNAIL_FILE_BYTES, THUMBNAIL_DECODED_PIXELS = 4 * 2**20, 4_000_000  # of a search result, as it comes
THUMBNAIL_SIDE, THUMBNAIL_BYTES = 448, 64 * 1024  # as it is kept
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


def decode(data: bytes, max_bytes: int = MAX_FILE_BYTES, max_pixels: int = MAX_DECODED_PIXELS) -> PIL.Image.Image:
    """The RGB picture of an encoded file; transparency is laid on white, an animation gives its first frame.

    Raises ValueError, in one line, for a file that is too large, too elongated, broken, or of another format. Size is
    read from the header and refused before any pixel is decoded, so a bomb costs nothing.
    """
    if len(data) > max_bytes:
        raise ValueError(f"picture file of {len(data):,} bytes is over the limit of {max_bytes:,}")
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # on broken files Pillow raises nearly anything: OSError, SyntaxError, struct.error, ...
        raise _unreadable(data, error) from error
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"picture of {width} x {height} is over the limit of {max_pixels:,} pixels")
    check_aspect(width, height)
    try:
        return _to_rgb(picture)
    except Exception as error:
        raise _unreadable(data, error) from error


def _unreadable(data: bytes, error: Exception) -> ValueError:
    known = not isinstance(error, PIL.UnidentifiedImageError)  # whose text is a Python object's address
    reason = (" ".join(str(error).split()) or type(error).__name__) if known else "it begins like none of these"
    return ValueError(f"not a readable {', '.join(FORMATS)} picture ({len(data):,} bytes): {reason}")


def check_aspect(width: int, height: int) -> None:
    """Raises ValueError when one side is more than 200 times the other."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"picture of {width} x {height} pixels has an aspect ratio over {MAX_ASPECT}")


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if "A" not in picture.getbands() and picture.info.get("transparency") is None:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = PIL.Image.new("RGBA", picture.size, "white")
    return PIL.Image.alpha_composite(white, picture).convert("RGB")


def jpeg(picture: PIL.Image.Image, side: int, max_bytes: int) -> bytes:
    """The picture as a JPEG without metadata, at most `side` pixels along a side and `max_bytes` bytes long."""
    while True:
        picture = picture.copy()
        picture.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        if file.tell() <= max_bytes:
            return file.getvalue()
        side = side * 3 // 4


def thumbnail(data: bytes) -> bytes:
    """A stranger's picture file as a small JPEG. Raises ValueError where it is no picture, or too much of one."""
    return jpeg(decode(data, THUMBNAIL_FILE_BYTES, THUMBNAIL_DECODED_PIXELS), THUMBNAIL_SIDE, THUMBNAIL_BYTES)
