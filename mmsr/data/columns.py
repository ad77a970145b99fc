"""Which columns of an unknown data set may hold what, by their names and the values of a row: for advice alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmsr.data import cells

PICTURE_FILE = re.compile(r".*\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif)|data:image/.*", re.IGNORECASE | re.DOTALL)
# What people call such a column: `hint` or `hint_…`, `…_hint`, and longer hints anywhere in the name.
HINTS = {
    "image": ("image", "img", "pic", "photo", "file", "path"),
    "question": ("question", "quest", "query", "prompt", "problem", "instruction", "input", "text", "ask", "q"),
    "answers": ("answer", "ans", "gold", "label", "target", "truth", "solution", "response", "reply", "output", "a"),
    "id": ("id", "idx", "index", "key", "number", "no", "nr"),
}
# What a value looks like: 0 for what it cannot be, 1 for what it may be with a name that says so, CLEAR without one.
CLEAR = 3


def likely_columns(row: Mapping[str, Any], places: Iterable[str]) -> dict[str, str]:
    """A column of `row` for each of the `places` (image, question, id, answers) that one looks like, none twice."""
    places = [place for place in LOOKS if place in places]  # the clearest first
    found: dict[str, str] = {}
    for place in places:
        points = _points(place, row, found)
        best = max(points, key=lambda name: points[name], default="")
        if best and points[best] >= CLEAR:
            found[place] = best
    for place in places:  # the one column that is left may be what is missing
        points = _points(place, row, found)
        if place not in found and place != "id" and len(points) == 1:
            found[place] = next(iter(points))
    return found


def _points(place: str, row: Mapping[str, Any], taken: Mapping[str, str]) -> dict[str, int]:
    """How much each column looks like `place`, by its value and its name, without those that cannot be it."""
    points = {}
    for name, value in row.items():
        looks = LOOKS[place](value)
        if looks and name not in taken.values():
            points[name] = looks + (CLEAR - 1) * _is_called(name, place)
    return points


def _is_called(name: str, place: str) -> bool:
    name = name.lower()
    words = re.split(r"[^a-z]+", name)
    if place == "id" and name.endswith("id"):
        return True
    return any(hint in words or (len(hint) > 2 and place != "id" and hint in name) for hint in HINTS[place])


def _image(value: Any) -> int:
    try:
        found = cells.picture(value)
    except (cells.Unclear, AttributeError):
        return 0
    if isinstance(found, bytes):
        return CLEAR
    if isinstance(found, str):
        return CLEAR if PICTURE_FILE.fullmatch(found) or len(found) > 1000 else 1
    return 0


def _question(value: Any) -> int:
    try:
        text = cells.question(value)
    except cells.Unclear:
        return 0
    return CLEAR if text.endswith(("?", "？")) else 1


def _answers(value: Any) -> int:
    try:
        found = cells.answers(value)
    except cells.Unclear:
        return 0
    return CLEAR if found and isinstance(value, list) else int(bool(found))


def _id(value: Any) -> int:
    return int(isinstance(value, int | str) and not isinstance(value, bool) and len(str(value)) < 100)


LOOKS: dict[str, Callable[[Any], int]] = {"image": _image, "question": _question, "id": _id, "answers": _answers}
