"""Picture files: what is opened of strangers' files, what is refused before it can do harm, what is sent of one's own.

Pillow by itself opens a 20 kB file into a gigabyte of pixels, and formats whose decoders few have looked at. Here the
bytes are counted before anything is read, the pixels before any is decoded, and four formats are known. Pillow sees the
parts that make the first frame and no others (`containers.py`): damaged metadata makes no picture unreadable, and none
can leave with a picture, as Pillow by itself writes comments and colour profiles into new files. This module imports no
torch: a search server and a command line that show a picture start at once.

A camera that is held on its side stores the picture on its side, and EXIF tells how to turn it. `decode` turns it for
all that people and search engines see. Only `vision.load_image` does not, of a question's picture: the published
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

from mmsr.system.containers import ORIENTATION, Container, kind, read

MAX_ASPECT = 200
MAX_FILE_BYTES = 32 * 2**20
MAX_DECODED_PIXELS = 50_000_000  # 150 MB as RGB
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 20 * MAX_DECODED_PIXELS  # of a JPEG, whose usual scans are 1 or 10
THUMBNAIL_FILE_BYTES, THUMBNAIL_DECODED_PIXELS = 4 * 2**20, 4_000_000  # of a search result, as it comes
THUMBNAIL_SIDE, THUMBNAIL_BYTES = 448, 64 * 1024  # as it is kept
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")

# Not PIL.Image.open, which warns of large pictures on stderr before we can refuse them.
DECODERS: dict[str, Callable[[io.BytesIO], PIL.Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
}


def decode(
    data: bytes, max_bytes: int = MAX_FILE_BYTES, max_pixels: int = MAX_DECODED_PIXELS, upright: bool = True
) -> PIL.Image.Image:
    """The RGB picture of an encoded file, without metadata. Transparency is laid on white, an animation gives its first
    frame, 16 bits a channel become 8. It is turned as its EXIF says; with `upright=False` it is left as it is stored,
    and its EXIF says nothing but how it is to be turned, as `PIL.ImageOps.exif_transpose` does with any part of it.

    Raises ValueError, in one line, for a file that is too large, too elongated, broken, or of another format. Size is
    read from the header and refused before any pixel is decoded, so a bomb costs nothing.
    """
    picture, container = _open(data, max_bytes, max_pixels)
    try:
        picture = to_rgb(picture)
    except Exception as error:  # on broken files Pillow raises nearly anything: OSError, SyntaxError, struct.error, ...
        raise _unreadable(data, error) from error
    picture.info = {}
    if container.orientation == 1:
        return picture
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = container.orientation
    picture.info["exif"] = exif.tobytes()
    if upright:
        picture = PIL.ImageOps.exif_transpose(picture)
        picture.info = {}
    return picture


def stored_size(data: bytes) -> tuple[int, int]:
    """Width and height as stored, not turned, from the header alone. Raises ValueError for what `decode` refuses."""
    return _open(data, MAX_FILE_BYTES, MAX_DECODED_PIXELS)[0].size


def verify(data: bytes) -> None:
    """Raises ValueError for what `decode` refuses by the header, and for damage that shows without decoding."""
    picture, _ = _open(data, MAX_FILE_BYTES, MAX_DECODED_PIXELS)
    try:
        picture.verify()
    except Exception as error:
        raise _unreadable(data, error) from error


def _open(data: bytes, max_bytes: int, max_pixels: int) -> tuple[PIL.Image.Image, Container]:
    """The picture, not decoded yet, and what it was read from."""
    if len(data) > max_bytes:
        raise ValueError(f"picture file of {len(data):,} bytes is over the limit of {max_bytes:,}")
    try:
        container = read(data)
        picture = DECODERS[container.kind](io.BytesIO(container.pixels))
    except Exception as error:
        raise _unreadable(data, error) from error
    width, height = picture.size
    if width * height > max_pixels:
        raise ValueError(f"not a readable picture: {width} x {height} is over the limit of {max_pixels:,} pixels")
    if container.scans > MAX_SCANS or container.scans * width * height > MAX_SCANNED_PIXELS:
        raise ValueError(f"picture of {width} x {height} in {container.scans:,} scans takes too long to decode")
    check_aspect(width, height)
    return picture, container


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
    """16-bit grey as 8-bit: the upper byte, which Pillow takes of 16-bit colours. Of grey it, and with it the published
    processor, cuts off all that is over 255, and a photograph turns white. The mode I holds 16 bits, too."""
    values = np.asarray(picture).clip(0, 65535)
    grey = PIL.Image.fromarray((values >> 8).astype(np.uint8))
    clear = picture.info.get("transparency")
    if clear is not None:
        grey.putalpha(PIL.Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def jpeg(picture: PIL.Image.Image, side: int, max_bytes: int, quality: int = 85) -> bytes:
    """The picture as a JPEG without metadata, at most `side` pixels along a side and `max_bytes` bytes long.

    Raises ValueError where not even a single pixel is so short (about 700 bytes).
    """
    side = min(side, max(picture.size))
    while side:
        smaller = picture.copy()
        smaller.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
        smaller.info = {}  # Pillow would write a comment, and more as its versions go
        file = io.BytesIO()
        smaller.save(file, "JPEG", quality=quality)
        if file.tell() <= max_bytes:
            return file.getvalue()
        picture, side = smaller, side * 3 // 4
    raise ValueError(f"no JPEG has {max_bytes:,} bytes or fewer")


def thumbnail(data: bytes) -> bytes:
    """A stranger's picture file as a small JPEG. Raises ValueError where it is no picture, or too much of one."""
    return jpeg(decode(data, THUMBNAIL_FILE_BYTES, THUMBNAIL_DECODED_PIXELS), THUMBNAIL_SIDE, THUMBNAIL_BYTES)


def without_metadata(data: bytes) -> bytes:
    """A picture file that may be shown to others: the first frame's pixels, upright, and nothing else.

    The parts of the file are copied, so one that holds no more stays as it is, byte for byte; only one that is to be
    turned is encoded anew, as JPEG. A colour profile goes as well: it may name its owner's screen, and nothing here
    heeds it. Raises ValueError for what is no picture.
    """
    try:
        container = read(data)
    except ValueError as error:
        raise _unreadable(data, error) from error
    if container.orientation == 1:
        return container.pixels
    picture = decode(data)
    return jpeg(picture, max(picture.size), MAX_FILE_BYTES, quality=95)


def media_type(data: bytes) -> str:
    """image/jpeg, image/png, image/webp or image/gif. Raises ValueError for another format."""
    return f"image/{kind(data).lower()}"
