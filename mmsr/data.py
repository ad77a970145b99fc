"""Questions from files: the benchmarks' published layouts, one's own JSON lines, and the order they are drawn in.

A layout is an entry of `FORMATS`: which columns hold what. It is told by the columns, or named; `--columns` renames
what differs. A cell is read by its shape: a question is text or chat messages, answers are one value or a list, a
picture is bytes, {bytes, path}, base64 text, or a file's name. A data set's text is checked when it is opened, a row's
picture when the row is used; both errors name file, row and column, and rows count from 0.
"""

from __future__ import annotations

import base64
import binascii
import json
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from . import pictures
from .episode import Example, UserError
from .files import json_file
from .tables import Table, open_table

ENDINGS = ("", ".jpg", ".JPEG", ".jpeg", ".JPG", ".png", ".PNG", ".webp", ".gif")  # "": the name has its own
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "data:image/")  # how the four formats begin in base64


@dataclass(frozen=True)
class Format:
    """Which columns hold what an `Example` needs; a struct's field is `column.field`."""

    id: str
    question: str
    answers: tuple[str, ...]  # the ground truth's column, then those of accepted aliases
    image: str
    category: str = ""  # may be missing in the file
    address: str = "image_url"  # of the picture; may be missing, too
    listed: tuple[str, ...] = ()  # of the answers' columns, those where text is no answer but a JSON list of them
    some_pictureless: bool = False  # rows without a picture are part of the benchmark, but not ours
    details: str = ""  # a JSON file beside the data with the category of each id


# Told in this order: a layout comes before those that ask for fewer columns.
FORMATS = {
    "fvqa": Format(
        "data_id", "prompt", ("reward_model.ground_truth", "reward_model.candidate_answers"), "images", "category",
        listed=("reward_model.candidate_answers",),
    ),
    "infoseek": Format("data_id", "question", ("answer", "answer_eval"), "image_id", "data_split"),
    "mmsearch": Format(
        "sample_id", "query", ("gt_answer", "alternative_gt_answers"), "query_image", "area", some_pictureless=True
    ),
    "livevqa": Format("sample_id", "query", ("gt_answer",), "query_image", "topic", details="qa_detailed.json"),
    "simplevqa": Format("data_id", "question", ("answer",), "image", "vqa_category"),
    "plain": Format("id", "question", ("answers",), "image", "category", listed=("answers",)),
    "civqa": Format("id", "question", ("answer",), "image", "category"),  # gated: its columns are for --columns to say
}  # fmt: skip


def read_examples(path: str | Path, format: str = "", columns: str = "", images: str = "") -> Dataset:
    """The data set in a .parquet, .jsonl or .json file.

    `format` names its layout (empty: told by the columns), `columns` renames some ("question=q,answers=a"), `images` is
    the folder of picture files that it names (empty: its own). Raises UserError for a file that is missing or not in
    its format, lacks columns, or has a row with unusable text, and for unknown names.
    """
    path = Path(path)
    if format and format not in FORMATS:
        raise UserError(f"--format {format}: unknown; give one of {', '.join(FORMATS)}")
    table = open_table(path)
    names = [format] if format else ["plain", *FORMATS] if columns else FORMATS  # any layout fits if all is renamed
    layouts = {name: _renamed(FORMATS[name], columns) for name in names}
    usual = "fvqa" if path.suffix == ".parquet" and not format else format or "plain"
    name = next((name for name, layout in layouts.items() if not _lacking(layout, table)), usual)
    if len(table) and _lacking(layouts[name], table):
        name = min(layouts, key=lambda name: (_share_lacking(layouts[name], table), name != usual))
        wanted, found = ", ".join(_lacking(layouts[name], table)), ", ".join(table.names)
        what = f"row 0, column {wanted}: missing (found {found}; it looks most like {name})"
        raise UserError(f"{path}: {what}; add it, or say what stands for it: --columns question=…,answers=…")
    return Dataset(path, table, name, layouts[name], Path(images) if images else path.parent)


def _renamed(layout: Format, columns: str) -> Format:
    """`layout` with the columns of "question=q,answers=a" in their places."""
    names = [field.name for field in fields(Format)][:6]
    changes: dict[str, Any] = {}
    for part in filter(None, columns.split(",")):
        place, _, column = (side.strip() for side in part.partition("="))
        place = "answers" if place == "answer" else place
        if place not in names or not column:
            raise UserError(f"--columns {part}: give PLACE=COLUMN, where PLACE is {', '.join(names)}")
        changes[place] = column
    if "answers" in changes:
        changes |= {"answers": (changes["answers"],), "listed": ()}
    return replace(layout, **changes)


def _lacking(layout: Format, table: Table) -> list[str]:
    return [name for name in (layout.id, layout.question, *layout.answers, layout.image) if name not in table.fields]


def _share_lacking(layout: Format, table: Table) -> float:
    return len(_lacking(layout, table)) / (3 + len(layout.answers))


class Dataset(Sequence):
    """Examples on disk, each read when asked for: `len(data)`, `data[place]`, iteration.

    Places are rows, but for those left out (`rows[place]` is the file's row). `data[place]` raises UserError where the
    row's picture is missing or no JPEG, PNG, WEBP or GIF.
    """

    def __init__(self, path: Path, table: Table, format: str, layout: Format, folder: Path):
        self.path, self.table, self.format, self.layout, self.folder = path, table, format, layout, folder
        columns = [layout.id, layout.question, *layout.answers, layout.category, layout.address]
        self.table.keep(dict.fromkeys(name.partition(".")[0] for name in columns if name in table.fields))
        self.rows = array("Q", self._pictured() if layout.some_pictureless else range(len(table)))
        self.left_out = len(table) - len(self.rows)
        for row in self.rows:
            self.text(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Example:  # type: ignore[override]  # no slices
        row = self.rows[place]
        example_id, question, answers, category, address = self.text(row)
        return Example(example_id, self.picture(row), question, answers, category, address)

    def keep(self, places: Iterable[int]) -> None:
        """Forget all but these, which then have places in this order."""
        self.rows = array("Q", [self.rows[place] for place in places])

    # ---- text

    def text(self, row: int) -> tuple[str, str, tuple[str, ...], str, str]:
        """The row's id, question, answers, category and picture's address."""
        cells, layout = self.table.text(row), self.layout
        example_id = self._cell(cells, row, layout.id)
        if not isinstance(example_id, str | int) or example_id == "":
            self._refuse(row, layout.id, f"there is no id, but {example_id!r:.60}; give text or a whole number")
        question = self._question(row, self._cell(cells, row, layout.question))
        category = _inside(cells, layout.category)
        category = category or self.details.get(str(example_id), "")
        address = _inside(cells, layout.address)
        return str(example_id), question, self._answers(row, cells), str(category or ""), str(address or "")

    def _cell(self, cells: dict[str, Any], row: int, name: str) -> Any:
        column = name.partition(".")[0]
        if column not in cells:
            self._refuse(row, column, f"missing (found {', '.join(cells)}); add it")
        return _inside(cells, name)

    def _question(self, row: int, value: Any) -> str:
        """Text, or the last user message of a conversation; the marker that some exports put for the picture goes."""
        if isinstance(value, list):
            asked = [message.get("content") for message in value if _says(message, "user")]
            value = asked[-1] if asked else None
        question = value.replace("<image>", "").strip() if isinstance(value, str) else ""
        return question or self._refuse(row, self.layout.question, "the question is empty; fill it in or drop the row")

    def _answers(self, row: int, cells: dict[str, Any]) -> tuple[str, ...]:
        """All accepted answers, each once, without blank ones (a blank alias would be matched by an empty answer)."""
        found: list[str] = []
        for name in self.layout.answers:
            value = self._cell(cells, row, name)
            if name in self.layout.listed and isinstance(value, str):
                value = self._list_in(row, name, value)
            values = value if isinstance(value, list) else [] if value is None else [value]
            texts = [self._answer(row, name, each) for each in values]
            found += [text for text in texts if text.strip()]
            if not found:  # aliases of no ground truth are a damaged row
                self._refuse(row, name, "there is no answer; give one or drop the row")
        return tuple(dict.fromkeys(found))

    def _answer(self, row: int, column: str, value: Any) -> str:
        if isinstance(value, dict) and "wikidata" in value:  # InfoSeek's numbers: {"wikidata": 12.0, "range": [11, 13]}
            value = value["wikidata"]
        if isinstance(value, float):
            return "" if value != value else str(int(value)) if value.is_integer() else str(value)
        if not isinstance(value, str | int):
            self._refuse(row, column, f"{value!r:.60} is neither text nor a list of texts; write it as one")
        return str(value)

    def _list_in(self, row: int, column: str, text: str) -> list[Any]:
        try:
            found = json.loads(text or "[]")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list):
            self._refuse(row, column, f'{text!r:.60} is not a JSON list; write one such as ["Tagus"]')
        return found

    @cached_property
    def details(self) -> dict[str, str]:
        """The category of each id, where a file beside the data tells it."""
        path = self.path.parent / (self.layout.details or ".")
        if not path.is_file():
            return {}
        found = json_file(path)
        if isinstance(found, dict):
            found = [{self.layout.id: key, **row} for key, row in found.items() if isinstance(row, dict)]
        rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
        return {str(row.get(self.layout.id)): str(row.get(self.layout.category) or "") for row in rows}

    # ---- pictures

    def picture(self, row: int) -> bytes:
        """The row's encoded picture, checked."""
        picture = self._bytes(row, self.table.picture(row, self.layout.image))
        try:
            pictures.verify(picture)
        except ValueError as error:
            complaint = f"{len(picture)} bytes cannot be decoded; give a JPEG, PNG, WEBP or GIF picture ({error})"
            self._refuse(row, self.layout.image, complaint)
        return picture

    def _bytes(self, row: int, value: Any) -> bytes:
        if isinstance(value, list):
            if len(value) > 1:
                self._refuse(row, self.layout.image, f"{len(value)} pictures; a question has one, drop the others")
            value = value[0] if value else None
        embedded = isinstance(value, dict)
        if embedded:
            value = value.get("bytes")
        if isinstance(value, str) and value.startswith(BASE64_STARTS):
            return self._decoded(row, value)
        if isinstance(value, str) and value.strip() and not embedded:
            return self._file(row, value)
        if not value or not isinstance(value, bytes):
            complaint = "no image bytes; embed the picture itself (paths and URLs are not followed)"
            self._refuse(row, self.layout.image, complaint)
        return value

    def _decoded(self, row: int, text: str) -> bytes:
        try:
            return base64.b64decode(text.rpartition("base64,")[2])
        except (binascii.Error, ValueError):
            self._refuse(row, self.layout.image, f"base64 text of {len(text)} characters is cut short; get it again")

    def _file(self, row: int, name: str) -> bytes:
        """A file of the picture folder, or of a folder right in it; the name may lack its ending."""
        try:
            for folder in self._folders():
                for ending in ENDINGS:
                    for file in (folder / f"{name}{ending}", folder / f"{name.lstrip('/')}{ending}"):
                        if file.is_file():
                            return file.read_bytes()
        except (OSError, ValueError):
            pass
        complaint = f"no readable file {name!r:.200} in {self.folder}; correct it, or name the folder with --images"
        self._refuse(row, self.layout.image, complaint)

    def _folders(self) -> Iterator[Path]:
        yield self.folder
        yield from self._inner_folders  # not looked for until a file is not in the folder itself

    @cached_property
    def _inner_folders(self) -> list[Path]:
        return sorted(entry for entry in self.folder.iterdir() if entry.is_dir()) if self.folder.is_dir() else []

    def _pictured(self) -> list[int]:
        """The rows that have a picture at all."""
        values = (self.table.picture(row, self.layout.image) for row in range(len(self.table)))
        return [row for row, value in enumerate(values) if (value.get("bytes") if isinstance(value, dict) else value)]

    def _refuse(self, row: int, column: str, complaint: str) -> NoReturn:
        raise UserError(f"{self.path}: row {row}, column {column}: {complaint}")


def _inside(cells: dict[str, Any], name: str) -> Any:
    """The value of a column, or of a struct's field."""
    column, _, field = name.partition(".")
    value = cells.get(column)
    return value.get(field) if field and isinstance(value, dict) else None if field else value


def _says(message: Any, role: str) -> bool:
    return isinstance(message, dict) and message.get("role") == role


class Sampler:
    """Endless shuffled epochs over `size` examples, as a pure function of (seed, cursor).

    `cursor`, the number of examples drawn so far, is all the state there is: to resume, set it. Each epoch draws every
    example once; a `take` may reach over its end. Raises `UserError` for an empty data set.
    """

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise UserError("the data set is empty; give one with at least one example")
        self.size, self.seed, self.cursor = size, seed, 0

    def take(self, n: int) -> list[int]:
        """The next n rows."""
        places = [divmod(draw, self.size) for draw in range(self.cursor, self.cursor + n)]
        self.cursor += n
        return [_epoch(self.size, self.seed, epoch)[place] for epoch, place in places]


@lru_cache(2)
def _epoch(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
