"""Picture files of unknown origin: what is opened, what is refused before it does harm, what may be sent on.

Pillow by itself opens a 20 kB file into a gigabyte of pixels, and formats whose decoders few have looked at. Here bytes
are counted before anything is read, pixels before any is decoded, and only four formats are opened. Pillow sees the
parts that make the first frame and no others (`containers.py`). So damaged metadata makes no picture unreadable, and no
metadata leaves with a picture (Pillow by itself writes comments and colour profiles into new files). This module
imports no torch: a search server and a command line that show a picture start at once.

A camera that is held on its side stores the picture on its side, and EXIF tells how to turn it. `decode` turns it for
all that people and search engines see. Only `vision.load_image` does not turn a question's picture: the published
processor does not either, so the model has learned from pictures as they are stored.
"""

from __future__ import annotations

import io
from typing import Callable

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from mmsr.system.containers import ORIENTATION, FirstFrame, first_frame, image_format

MAX_ASPECT = 200
MAX_FILE_BYTES = 32 * 2**20
MAX_DECODED_PIXELS = 50_000_000  # 150 MB as RGB
# Of a JPEG. Usual files have 1 scan or 10, and each passes over the whole picture.
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 20 * MAX_DECODED_PIXELS
# Of a search result, as it is downloaded, and as it is kept.
THUMBNAIL_FILE_BYTES = 4 * 2**20
THUMBNAIL_DECODED_PIXELS = 4_000_000
THUMBNAIL_SIDE = 448
THUMBNAIL_BYTES = 64 * 1024
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")

# Not PIL.Image.open, which warns of large pictures on stderr before we can refuse them.
DECODERS: dict[str, Callable[[io.BytesIO], PIL.Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
}


def decode(
    data: bytes,
    max_bytes: int = MAX_FILE_BYTES,
    max_pixels: int = MAX_DECODED_PIXELS,
    upright: bool = True,
) -> PIL.Image.Image:
    """The RGB picture of an encoded file, without metadata, turned as its EXIF says.

    Transparency is laid on white, an animation gives its first frame, 16 bits a channel become 8. With `upright=False`
    the picture is left as it is stored, and its `info` keeps the orientation as EXIF, so that
    `PIL.ImageOps.exif_transpose` can turn it, or any part of it, later.

    Raises ValueError, in one line, for a file that is too large, too elongated, broken, or of another format. The size
    is read from the header and refused before any pixel is decoded.
    """
    picture, frame = _open(data, max_bytes, max_pixels)
    try:
        picture = to_rgb(picture)
    except Exception as error:  # on broken files Pillow raises nearly anything: OSError, SyntaxError, struct.error, ...
        raise _unreadable(data, error) from error
    picture.info = {}
    if frame.orientation == 1:
        return picture
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = frame.orientation
    picture.info["exif"] = exif.tobytes()
    if upright:
        picture = PIL.ImageOps.exif_transpose(picture)
        picture.info = {}
    return picture


def stored_size(data: bytes) -> tuple[int, int]:
    """Width and height as stored, not turned, from the header alone. Raises ValueError for what `decode` refuses."""
    picture, _ = _open(data)
    return picture.size


def verify(data: bytes) -> None:
    """Raises ValueError for what `decode` refuses by the header, and for damage that shows without decoding."""
    picture, _ = _open(data)
    try:
        picture.verify()
    except Exception as error:
        raise _unreadable(data, error) from error


def _open(
    data: bytes,
    max_bytes: int = MAX_FILE_BYTES,
    max_pixels: int = MAX_DECODED_PIXELS,
) -> tuple[PIL.Image.Image, FirstFrame]:
    """The picture, not decoded yet, and the first frame's file that it is read from."""
    if len(data) > max_bytes:
        raise ValueError(f"picture file of {len(data):,} bytes is over the limit of {max_bytes:,}")
    try:
        frame = first_frame(data)
        picture = DECODERS[frame.format](io.BytesIO(frame.data))
    except Exception as error:
        raise _unreadable(data, error) from error
    width, height = picture.size
    pixels = width * height
    if pixels > max_pixels:
        raise ValueError(f"not a readable picture: {width} x {height} is over the limit of {max_pixels:,} pixels")
    if frame.scans > MAX_SCANS or frame.scans * pixels > MAX_SCANNED_PIXELS:
        raise ValueError(f"picture of {width} x {height} in {frame.scans:,} scans takes too long to decode")
    check_aspect(width, height)
    return picture, frame


def _unreadable(data: bytes, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"not a readable {', '.join(FORMATS)} picture ({len(data):,} bytes): {reason}")


def check_aspect(width: int, height: int) -> None:
    """Raises ValueError when one side is more than 200 times the other."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"picture of {width} x {height} pixels has an aspect ratio over {MAX_ASPECT}")


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Transparency is laid on white; 16-bit grey is scaled to 8 bits."""
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _eight_bits(picture: PIL.Image.Image) -> PIL.Image.Image:
    """16-bit grey as 8-bit: the upper byte, which Pillow takes of 16-bit colours. The mode I holds 16 bits, too.

    Of grey, Pillow and so the published processor cut off all that is over 255, and a photograph turns white.
    """
    values = np.asarray(picture).clip(0, 65535)  # (h, w)
    upper = (values >> 8).astype(np.uint8)  # (h, w)
    grey = PIL.Image.fromarray(upper)
    clear = picture.info.get("transparency")
    if clear is not None:
        alpha = np.where(values == clear, 0, 255).astype(np.uint8)  # (h, w)
        grey.putalpha(PIL.Image.fromarray(alpha))
    return grey


def jpeg(picture: PIL.Image.Image, side: int, max_bytes: int, quality: int = 85) -> bytes:
    """The picture as a JPEG without metadata, at most `side` pixels along a side and `max_bytes` bytes long.

    Raises ValueError if not even a single pixel is so short (about 700 bytes).
    """
    side = min(side, max(picture.size))
    while side:
        smaller = picture.copy()
        smaller.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
        smaller.info = {}  # Pillow would write a comment into the file, and future versions perhaps more
        file = io.BytesIO()
        smaller.save(file, "JPEG", quality=quality)
        if file.tell() <= max_bytes:
            return file.getvalue()
        picture = smaller
        side = side * 3 // 4
    raise ValueError(f"no JPEG has {max_bytes:,} bytes or fewer")


def thumbnail(data: bytes) -> bytes:
    """A downloaded picture file as a small JPEG. Raises ValueError if it is no picture, or too large a one."""
    picture = decode(data, THUMBNAIL_FILE_BYTES, THUMBNAIL_DECODED_PIXELS)
    return jpeg(picture, THUMBNAIL_SIDE, THUMBNAIL_BYTES)


def without_metadata(data: bytes) -> bytes:
    """A picture file that may be shown to others: the first frame's pixels, upright, and nothing else.

    The parts of the file are copied, so a file that holds no more stays as it is, byte for byte. Only a picture that is
    to be turned is encoded again, as JPEG. A colour profile goes as well: it may name its owner's screen, and nothing
    here uses it. Raises ValueError for what is no picture.
    """
    try:
        frame = first_frame(data)
    except ValueError as error:
        raise _unreadable(data, error) from error
    if frame.orientation == 1:
        return frame.data
    picture = decode(data)
    return jpeg(picture, max(picture.size), MAX_FILE_BYTES, quality=95)


def media_type(data: bytes) -> str:
    """image/jpeg, image/png, image/webp or image/gif. Raises ValueError for another format."""
    return f"image/{image_format(data).lower()}"
