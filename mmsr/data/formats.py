"""Questions from files: the benchmarks' published layouts, one's own JSON lines, and the order they are drawn in.

A layout is an entry of `FORMATS`: which columns hold what. It is told by the columns, or named; `--columns` renames
what differs. What a cell holds is told by its shape (`cells.py`). A file without a column of ids has its rows' numbers
for ids. A data set's text is checked when it is opened, a row's picture when the row is used; both errors name file,
row and column, and rows count from 0.
"""

from __future__ import annotations

import base64
import binascii
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from mmsr.data import cells
from mmsr.data.tables import Parquet, Table, column_of, inside, open_table
from mmsr.episode import Example
from mmsr.system import images as pictures
from mmsr.system.errors import UserError
from mmsr.system.files import json_file

ENDINGS = ("", ".jpg", ".JPEG", ".jpeg", ".JPG", ".png", ".PNG", ".webp", ".gif")  # "": the name has its own
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")  # how the four formats begin in base64
ADDRESSES = ("http://", "https://", "s3://", "gs://")


@dataclass(frozen=True)
class Format:
    """Which columns hold what an `Example` needs.

    `a|b` is a, or b where a row has nothing in a; `column.field.field` is inside of a column.
    """

    id: str
    question: str
    answers: tuple[str, ...]  # the ground truth's column, then those of accepted aliases
    image: str
    category: str = ""  # may be missing in the file
    address: str = "image_url"  # of the picture; may be missing, too
    aliases: str = ""  # more accepted answers; may be missing, too
    listed: tuple[str, ...] = ()  # of the answers' columns, those where text is no answer but a list of them
    needs_id: bool = False  # without its id it is not told from others
    some_pictureless: bool = False  # rows without a picture are part of the benchmark, but not ours
    details: str = ""  # a JSON file beside the data with the category of each id


TRUTH, CANDIDATES = "reward_model.ground_truth", "reward_model.candidate_answers"

# Told in this order: a layout comes before those that ask for fewer columns.
FORMATS = {
    "fvqa": Format("data_id", "prompt", (TRUTH, CANDIDATES), "images", "category", listed=(CANDIDATES,)),
    "infoseek": Format("data_id", "question", ("answer", "answer_eval"), "image_id", "data_split"),
    "mmsearch": Format(
        "sample_id", "query", ("gt_answer", "alternative_gt_answers"), "query_image", "area", some_pictureless=True
    ),
    "livevqa": Format("sample_id", "query", ("gt_answer",), "query_image", "topic", details="qa_detailed.json"),
    "simplevqa": Format("data_id", "question", ("answer",), "image", "vqa_category", needs_id=True),
    "verl": Format(
        "extra_info.index|id|index", "extra_info.question|question|prompt", (TRUTH,), "images|image", "data_source",
        aliases=CANDIDATES, listed=(CANDIDATES,),
    ),
    "plain": Format(
        "id|data_id|question_id|sample_id", "question|query",
        ("answers|answer|golden_answers|direct_answers|solution|ground_truth",),
        "image|images|query_image|image_path|file_name", "category", listed=("answers",),
    ),
    "trl": Format("id", "prompt|problem", ("solution|answer|ground_truth|completion",), "image|images|prompt"),
    "openai": Format("id", "messages", ("answers|answer|solution|messages",), "image|images|messages"),
    "sharegpt": Format("id", "conversations", ("answers|answer|conversations",), "image|images|conversations"),
    "civqa": Format("id", "question", ("answer",), "image", "category", needs_id=True),  # gated: for --columns to say
}  # fmt: skip


def read_examples(path: str | Path, format: str = "", columns: str = "", images: str = "") -> Dataset:
    """The data set in a .parquet, .jsonl or .json file.

    `format` names its layout (empty: told by the columns), `columns` renames some ("question=q,answers=a.b"), `images`
    is the folder of picture files that it names (empty: its own). Raises UserError for a file that is missing or not in
    its format, lacks columns, or has a row with unusable text, and for unknown names.
    """
    path = Path(path)
    if format and format not in FORMATS:
        raise UserError(f"--format {format}: unknown; give one of {', '.join(FORMATS)}")
    table = open_table(path)
    names = [format] if format else ["plain", *FORMATS] if columns else FORMATS  # any layout fits if all is renamed
    layouts = {name: FORMATS[name] for name in names}
    if format:
        layouts[format] = replace(layouts[format], needs_id=False)
    layouts = {name: _renamed(layout, columns) for name, layout in layouts.items()}
    name = _told(layouts, table)
    if not name:
        usual = "fvqa" if isinstance(table, Parquet) and not format else format or "plain"
        name = (
            usual
            if not len(table)
            else min(layouts, key=lambda name: (_share(layouts[name], table), name not in (usual, "plain")))
        )
    if len(table) and (lacking := _lacking(layouts[name], table)):
        what = (
            f"row 0, column {', '.join(lacking)}: missing (found {', '.join(table.names)}; it looks most like {name})"
        )
        raise UserError(f"{path}: {what}; add it, or say what stands for it: --columns question=…,answers=…")
    return Dataset(path, table, name, layouts[name], Path(images) if images else path.parent)


def _told(layouts: dict[str, Format], table: Table) -> str:
    """The first layout that the table's columns fit, one with its id before one without."""
    fitting = [name for name, layout in layouts.items() if not _lacking(layout, table)]
    whole = [name for name in fitting if _there(layouts[name].id, table)]
    return next(iter(whole or fitting), "")


def _renamed(layout: Format, columns: str) -> Format:
    """`layout` with the columns of "question=q,answers=a" in their places."""
    names = [field.name for field in fields(Format)][:6]
    changes: dict[str, Any] = {}
    for part in filter(None, columns.split(",")):
        place, _, column = (side.strip() for side in part.partition("="))
        place = "answers" if place == "answer" else place
        if place not in names or not column or place in changes:
            raise UserError(f"--columns {part}: give PLACE=COLUMN, each once, where PLACE is {', '.join(names)}")
        changes[place] = column
    if "answers" in changes:
        changes |= {"answers": (changes["answers"],), "aliases": "", "listed": ()}
    return replace(layout, **changes, needs_id=layout.needs_id or "id" in changes)


def _there(names: str, table: Table) -> bool:
    return any(name and name in table.fields for name in names.split("|"))


def _lacking(layout: Format, table: Table) -> list[str]:
    needed = [layout.id] * layout.needs_id + [layout.question, *layout.answers, layout.image]
    return [names.partition("|")[0] for names in needed if not _there(names, table)]


def _share(layout: Format, table: Table) -> float:
    """Of the columns that a layout needs beside ids, those that the table lacks."""
    return len(_lacking(replace(layout, needs_id=False), table)) / (2 + len(layout.answers))


class Dataset(Sequence):
    """Examples on disk, each read when asked for: `len(data)`, `data[place]`, iteration.

    Places are rows, but for those left out (`rows[place]` is the file's row). `notes` are lines about what was read
    otherwise than it may have been meant. `data[place]` raises UserError where the row's picture is missing or no JPEG,
    PNG, WEBP or GIF.
    """

    def __init__(self, path: Path, table: Table, format: str, layout: Format, folder: Path):
        self.path, self.table, self.format, self.layout, self.folder = path, table, format, layout, folder
        self.notes: dict[str, None] = {}  # a set that keeps its order
        columns = [layout.id, layout.question, *layout.answers, layout.aliases, layout.category, layout.address]
        names = [name for column in columns for name in column.split("|") if name in table.fields]
        self.table.keep(dict.fromkeys(column_of(name, table.names) for name in names))
        self.numbered = len(table) > 0 and not self._has_ids()
        if self.numbered:
            what = "the column of ids is empty" if _there(layout.id, table) else "there is no column of ids"
            self.notes[f"{what}, so its rows' numbers are the ids"] = None
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

    def _has_ids(self) -> bool:
        """Whether any row has an id. Where --columns names its column, every row must have one."""
        names = [name for name in self.layout.id.split("|") if name in self.table.fields]
        rows = (self.table.text(row) for row in range(len(self.table)) if names)
        return self.layout.needs_id or any(inside(there, name) is not None for there in rows for name in names)

    # ---- text

    def text(self, row: int) -> tuple[str, str, tuple[str, ...], str, str]:
        """The row's id, question, answers, category and picture's address."""
        there, layout = self.table.text(row), self.layout
        example_id = str(row) if self.numbered else self._id(row, there)
        question = self._question(row, there)
        category = inside(there, layout.category) or self.details.get(example_id, "")
        address = inside(there, layout.address)
        return example_id, question, self._answers(row, there), str(category or ""), str(address or "")

    def _cell(self, row: int, there: dict[str, Any], names: str) -> tuple[str, Any]:
        """The first of the names `a|b` that has something in this row, and what it has."""
        known = [name for name in names.split("|") if column_of(name, there) in there]
        if not known:
            column = column_of(names.partition("|")[0], self.table.names)
            self._refuse(row, column, f"missing (found {', '.join(there)}); add it")
        found = [(name, inside(there, name)) for name in known]
        return next((pair for pair in found if pair[1] is not None), found[0])

    def _id(self, row: int, there: dict[str, Any]) -> str:
        name, value = self._cell(row, there, self.layout.id)
        if isinstance(value, float) and value.is_integer():  # whole numbers, some of which were missing
            value = int(value)
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            self._refuse(row, name, f"there is no id, but {value!r:.60}; give text or a whole number")
        return str(value)

    def _question(self, row: int, there: dict[str, Any]) -> str:
        name, value = self._cell(row, there, self.layout.question)
        try:
            if cells.instructs(value):
                self.notes[f"column {name}: system messages are left out; --prompts says what the model is told"] = None
            return cells.question(value)
        except cells.Unclear as error:
            self._refuse(row, name, str(error))

    def _answers(self, row: int, there: dict[str, Any]) -> tuple[str, ...]:
        """All accepted answers, each once, without blank ones (a blank alias would be matched by an empty answer)."""
        found: list[str] = []
        more = [self.layout.aliases] if _there(self.layout.aliases, self.table) else []
        for names in [*self.layout.answers, *more]:
            name, value = self._cell(row, there, names)
            try:
                found += cells.answers(value, listed=name in self.layout.listed)
            except cells.Unclear as error:
                self._refuse(row, name, str(error))
            if not found:  # aliases of no ground truth are a damaged row
                self._refuse(row, name, "there is no answer; give one or drop the row")
        return tuple(dict.fromkeys(found))

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
        name, value = self._picture_cell(row)
        picture = value if isinstance(value, bytes) else self._fetched(row, name, value)
        try:
            pictures.verify(picture)
        except ValueError as error:
            complaint = f"{len(picture)} bytes cannot be decoded; give a JPEG, PNG, WEBP or GIF picture ({error})"
            self._refuse(row, name, complaint)
        return picture

    def _picture_cell(self, row: int) -> tuple[str, bytes | str | None]:
        """The first of the pictures' columns that has one in this row, and what it has."""
        names, asked = self.layout.image.split("|"), self.layout.question.split("|")
        for name in names:
            column = column_of(name, self.table.names)
            value = inside({column: self.table.picture(row, column)}, name)
            if name in asked and cells.conversation(value) is None:
                continue  # a question's text names no picture, its messages may hold one
            try:
                found = cells.picture(value)
            except cells.Unclear as error:
                self._refuse(row, name, str(error))
            if found is not None:
                return name, found
        return next((name for name in names if name in self.table.fields), names[0]), None

    def _fetched(self, row: int, column: str, text: str | None) -> bytes:
        """The picture that a text stands for."""
        if not text:
            self._refuse(row, column, "no image bytes; embed the picture itself, or name its file")
        if text.startswith(BASE64_STARTS) or text[:5].lower() == "data:":
            return self._decoded(row, column, text)
        if text.lower().startswith(ADDRESSES):
            self._refuse(row, column, f"{text!r:.100} is an address, which is not followed; embed the picture itself")
        return self._file(row, column, unquote(text[7:]) if text.startswith("file://") else text)

    def _decoded(self, row: int, column: str, text: str) -> bytes:
        try:
            return base64.b64decode(text.rpartition("base64,")[2].translate({ord("-"): "+", ord("_"): "/"}))
        except (binascii.Error, ValueError):
            self._refuse(row, column, f"base64 text of {len(text)} characters is cut short; get it again")

    def _file(self, row: int, column: str, name: str) -> bytes:
        """A file of the picture folder, or of a folder right in it; the name may lack its ending."""
        try:
            for folder in self._folders():
                for ending in ENDINGS:
                    for spelled in dict.fromkeys((name, name.lstrip("/"), name.replace("\\", "/"))):
                        file = folder / f"{spelled}{ending}"
                        if file.is_file():
                            return file.read_bytes()
        except (OSError, ValueError):
            pass
        complaint = f"no readable file {name!r:.200} in {self.folder}; correct it, or name the folder with --images"
        self._refuse(row, column, complaint)

    def _folders(self) -> Iterator[Path]:
        yield self.folder
        yield from self._inner_folders  # not looked for until a file is not in the folder itself

    @cached_property
    def _inner_folders(self) -> list[Path]:
        return sorted(entry for entry in self.folder.iterdir() if entry.is_dir()) if self.folder.is_dir() else []

    def _pictured(self) -> list[int]:
        """The rows that have a picture at all."""
        return [row for row in range(len(self.table)) if self._picture_cell(row)[1] is not None]

    def _refuse(self, row: int, column: str, complaint: str) -> NoReturn:
        raise UserError(f"{self.path}: row {row}, column {column}: {complaint}")
