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
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


def decode(data: bytes) -> PIL.Image.Image:
    """The RGB picture of an encoded file; transparency is laid on white, an animation gives its first frame.

    Raises ValueError, in one line, for a file that is too large, broken, or of another format. Size is read from the
    header and refused before any pixel is decoded, so a bomb costs nothing.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"picture file of {len(data):,} bytes is over the limit of {MAX_FILE_BYTES:,}")
    try:
        picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if width * height <= MAX_DECODED_PIXELS:
            return _to_rgb(picture)
    except Exception as error:  # on broken files Pillow raises nearly anything: OSError, SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"not a readable {', '.join(FORMATS)} picture ({len(data):,} bytes): {reason}") from error
    raise ValueError(f"picture of {width} x {height} is over the limit of {MAX_DECODED_PIXELS:,} pixels")


def check_aspect(width: int, height: int) -> None:
    """Raises ValueError when one side is more than 200 times the other."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"picture of {width} x {height} pixels has an aspect ratio over {MAX_ASPECT}")


def check_image(data: bytes) -> PIL.Image.Image:
    """`decode`, and the picture's proportions too: what comes back can be shown to the model. Raises ValueError."""
    picture = decode(data)
    check_aspect(*picture.size)
    return picture


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if "A" not in picture.getbands() and picture.info.get("transparency") is None:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = PIL.Image.new("RGBA", picture.size, "white")
    return PIL.Image.alpha_composite(white, picture).convert("RGB")
