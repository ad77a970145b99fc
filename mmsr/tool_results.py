"""What a tool returned, as an `Observation` of plain Python values, or a TypeError that names the wrong field.

A user's tool returns what its libraries give: a PIL image, NumPy numbers, a generator. Where the meaning is clear, it
is accepted. The rest is refused here, where it is known which tool it came from. Later it would end the run: when a
rollout line is written, or when ranks exchange their episodes after an update.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from mmsr.episode import Hit, Observation
from mmsr.system.images import to_rgb

MOST_HITS = 1000  # of one result: a generator may have no end
MOST_TEXT = 1_000_000  # characters of a field: no model's context holds as much, and every rollout line contains it
MOST_ERROR = 1000  # characters of an error
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # of PIL images; others are saved as RGB


def as_observation(tool: str, found: object) -> Observation:
    """What the tool of this name returned, as an Observation of plain values. Raises TypeError that names the field."""
    if isinstance(found, str):
        found = Observation((Hit(text=found),), source=tool)
    if not isinstance(found, Observation):
        raise TypeError(f"tool {tool} returned {_kind(found)}, not text or an Observation")
    if not isinstance(found.hits, (tuple, list, Iterator)):
        raise _wrong("hits", found.hits, "a tuple of Hit")
    hits = tuple(islice(found.hits, MOST_HITS + 1))
    if len(hits) > MOST_HITS:
        raise TypeError(f"hits are more than {MOST_HITS:,}; return the best ones")
    return Observation(
        hits=tuple(_hit(f"hits[{rank}]", hit) for rank, hit in enumerate(hits)),
        ok=_flag("ok", found.ok),
        error=None if found.error is None else shortened(_text("error", found.error)),
        source=_text("source", found.source),
        seconds=_seconds(found.seconds),
        cached=_flag("cached", found.cached),
    )


def shortened(error: str) -> str:
    """An error's text, short enough for every rollout line."""
    return error if len(error) <= MOST_ERROR else f"{error[:MOST_ERROR]}… ({len(error):,} characters)"


def _hit(name: str, hit: object) -> Hit:
    if not isinstance(hit, Hit):
        raise _wrong(name, hit, "a Hit")
    return Hit(
        title=_words(f"{name}.title", hit.title),
        url=_words(f"{name}.url", hit.url),
        text=_words(f"{name}.text", hit.text),
        image=_picture(f"{name}.image", hit.image),
        score=_score(f"{name}.score", hit.score),
    )


def _text(name: str, value: Any) -> str:
    """A text field. Lone surrogates stay: JSON has them, and where text is encoded, UTF-8's lack of them is handled."""
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return str.__str__(value)  # the characters of a subclass, not what its own __str__ gives


def _words(name: str, value: Any) -> str:
    """A text of a hit."""
    words = _text(name, value)
    if len(words) > MOST_TEXT:
        raise TypeError(f"{name} has {len(words):,} characters, more than {MOST_TEXT:,}; return the part that matters")
    return words


def _flag(name: str, value: Any) -> bool:
    value = _single(value)
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")
    return value


def _seconds(value: Any) -> float:
    seconds = _number("seconds", value)
    if not 0 <= seconds < math.inf:
        raise TypeError(f"seconds is {seconds}; give a number from 0, or leave it out and it is measured")
    return seconds


def _score(name: str, value: Any) -> float | None:
    """A hit's score. None for one that is not finite: it says nothing, and JSON cannot hold it."""
    if value is None:
        return None
    score = _number(name, value)
    return score if math.isfinite(score) else None


def _number(name: str, value: Any) -> float:
    value = _single(value)
    if not isinstance(value, Real | Decimal) or isinstance(value, bool):
        raise _wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError:  # a whole number beyond floats
        return math.inf
    except ValueError:  # a Decimal's signalling NaN
        return math.nan


def _single(value: Any) -> Any:
    """The Python value of a NumPy number, and of an array or tensor that holds one; any other value unchanged."""
    return value.item() if getattr(value, "shape", None) == () else value


def _picture(name: str, value: Any) -> bytes | None:
    """An encoded file; a PIL image becomes a PNG, upright and without its metadata."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if value is None:
        return None
    if not isinstance(value, PIL.Image.Image):
        raise _wrong(name, value, "the bytes of a picture file, a PIL image or None")
    file = io.BytesIO()
    try:
        picture = PIL.ImageOps.exif_transpose(value)
        picture = picture if picture.mode in PNG_MODES else _rgb(picture)
        picture.save(file, "PNG", compress_level=1, exif=b"", icc_profile=None)
    except Exception as error:  # an empty crop, a file that is closed or broken
        raise TypeError(f"{name} is a PIL image that cannot be saved ({type(error).__name__}: {error})") from error
    return file.getvalue()


def _rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as RGB. 16 bits and fractions of 1 are scaled: Pillow would clip at 255, and take 0.9 for 0."""
    if picture.mode[0] in "IF":  # integers or floats
        largest = np.asarray(picture).max()
        if picture.mode == "F" and largest <= 1:
            picture = picture.point(lambda value: value * 255 + 0)  # the form that Pillow takes for these modes
        elif picture.mode != "F" and largest > 255:
            return to_rgb(picture)
    return picture.convert("RGB")


def _wrong(name: str, value: object, wanted: str) -> TypeError:
    return TypeError(f"{name} is {_kind(value)}; give {wanted}")


def _kind(value: object) -> str:
    return type(value).__name__
