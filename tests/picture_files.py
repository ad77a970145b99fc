"""Picture files with all that a container holds beside its pixels, hand-made where Pillow does not write it."""

from __future__ import annotations

import io
import struct
import zlib

import PIL.Image
from PIL.PngImagePlugin import PngInfo

SECRET = b"Ada Lovelace, 12 Privet Drive"
TURNS = {  # EXIF's orientation, and how to make a stored picture that it turns upright
    1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
    7: "TRANSVERSE", 8: "ROTATE_270",
}  # fmt: skip


def scene(mode: str = "RGB", size=(48, 32)) -> PIL.Image.Image:
    """Four quarters of different colours: no two of its eight positions look alike."""
    picture = PIL.Image.new("RGB", (2, 2))
    for place, colour in zip(((0, 0), (1, 0), (0, 1), (1, 1)), ("red", "lime", "blue", "yellow")):
        picture.putpixel(place, PIL.Image.new("RGB", (1, 1), colour).getpixel((0, 0)))
    return picture.resize(size, PIL.Image.Resampling.NEAREST).convert(mode)


def saved(picture: PIL.Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int = 1, words: bytes = b"") -> bytes:
    found = PIL.Image.Exif()
    found[0x0112] = orientation
    if words:
        found[0x010E] = words.decode()  # what the picture shows
    return found.tobytes()


def turned(orientation: int, kind: str = "JPEG", size=(48, 32), picture: PIL.Image.Image | None = None) -> bytes:
    """A file of `picture`, or of `scene`, as a telephone stores it: on its side, with the orientation that mends it."""
    picture, turn = picture or scene(size=size), TURNS[orientation]
    picture = picture.transpose(PIL.Image.Transpose[turn]) if turn else picture
    quality = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    return saved(picture, kind, exif=exif(orientation), **quality)


def segment(marker: int, payload: bytes) -> bytes:
    """Of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colours: int, rows: bytes, *more: bytes) -> bytes:
    """`rows` with a filter's byte before each; `colours` is 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    body = [head, *more, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file."""
    parts = [name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def blocks(label: int, data: bytes) -> bytes:
    """An extension of a GIF."""
    parts = [bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255)]
    return b"!" + bytes([label]) + b"".join(parts) + b"\0"


def private(kind: str, words: bytes = SECRET, comment: int = 0) -> tuple[bytes, bytes]:
    """A file of `scene` with `words` in every kind of metadata, and the same file without any.

    `comment` bytes are added to the comment, where the format has one.
    """
    return {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif}[kind](words, words + b"." * comment)


def _jpeg(words: bytes, comment: bytes) -> tuple[bytes, bytes]:
    bare = saved(scene(), "JPEG", progressive=True)
    scan, end = bare.rindex(b"\xff\xda"), len(bare) - 2
    photoshop = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(words)) + words
    parts = [segment(0xFE, piece) for piece in (comment[at : at + 60_000] for at in range(0, len(comment), 60_000))]
    parts += [segment(0xE1, exif(words=words)), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + words)]
    parts += [segment(0xE2, b"ICC_PROFILE\0\1\1" + words), segment(0xE2, b"MPF\0" + words)]
    parts += [segment(0xED, photoshop), segment(0xE0, b"JFXX\0" + words), segment(0xE7, words), b"\0" + words]
    dressed = b"".join(parts)
    return bare[:20] + dressed + bare[20:scan] + segment(0xFE, words) + bare[
        scan:end
    ] + b"\xff\xd9" + words + bare, bare


def _png(words: bytes, comment: bytes) -> tuple[bytes, bytes]:
    bare, text = saved(scene("P"), "PNG", transparency=0), PngInfo()
    text.add_text("Comment", comment.decode())
    text.add_text("Author", words.decode(), zip=True)
    text.add_itxt("XML:com.adobe.xmp", words.decode())
    text.add(b"prVt", words)
    full = saved(scene("P"), "PNG", transparency=0, pnginfo=text, exif=exif(words=words), icc_profile=words)
    return full + words, bare


def _webp(words: bytes, comment: bytes) -> tuple[bytes, bytes]:
    pixels = saved(scene(), "WEBP", lossless=True)[12:]
    image = pixels[:4], pixels[8 : 8 + struct.unpack("<I", pixels[4:8])[0]]
    size = struct.pack("<I", 47)[:3] + struct.pack("<I", 31)[:3]
    more = ((b"EXIF", exif(words=words)), (b"XMP ", words), (b"note", words))
    full = riff((b"VP8X", b"\x2c\0\0\0" + size), (b"ICCP", words), image, *more)
    return full + words, riff((b"VP8X", b"\0\0\0\0" + size), image)


def _gif(words: bytes, comment: bytes) -> tuple[bytes, bytes]:
    bare = saved(scene("P"), "GIF", transparency=3)
    head = 13 + 3 * 2 ** (bare[10] % 8 + 1)
    xmp, notes = blocks(0xFF, b"XMP DataXMP" + words), blocks(0xFE, comment)
    return bare[:head] + notes + xmp + bare[head:-1] + notes + blocks(0x01, words) + b";" + words, bare
