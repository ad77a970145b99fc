"""Questions from files: the benchmarks' published layouts, and JSON lines of the user.

A layout is an entry of `FORMATS`: which columns hold what. It is named or detected; `--columns` renames columns. The
form of a cell is detected, too (`cells.py`). Where there is no column of ids, the row numbers are the ids. The text of
a data set is checked when it is opened, a row's picture when it is used. Errors name file, row (from 0) and column.
"""

from __future__ import annotations

import base64
import binascii
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

from mmsr.data import cells
from mmsr.data.columns import likely_columns
from mmsr.data.tables import Csv, Parquet, Table, column_of, inside, open_table
from mmsr.episode import Example
from mmsr.system import images as pictures
from mmsr.system.errors import UserError
from mmsr.system.files import json_file

ENDINGS = ("", ".jpg", ".JPEG", ".jpeg", ".JPG", ".png", ".PNG", ".webp", ".gif")  # tried after a file name
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD")  # of JPEG, PNG, WEBP and GIF in base64
CIPHERED = re.compile(r"(?:[A-Za-z0-9+/]{4}){4,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")  # base64, and no blank
ADDRESSES = ("http://", "https://", "s3://", "gs://")


@dataclass(frozen=True)
class Format:
    """Which columns hold what an `Example` needs. `a|b` is a, or b where a row has nothing in a; `column.field.field`
    is a field inside a column."""

    id: str
    question: str
    answers: tuple[str, ...]  # the ground truth's column, then those of accepted aliases
    image: str
    category: str = ""  # optional in the file
    address: str = "image_url"  # of the picture; optional
    aliases: str = ""  # more accepted answers; optional
    listed: tuple[str, ...] = ()  # the columns of answers whose text is always a list, never one answer
    needs_id: bool = False  # only its column of ids distinguishes it from other layouts
    some_pictureless: bool = False  # the benchmark has rows without a picture, which are left out here
    pictures: str = ""  # a column with the number of a question's pictures: rows with another than 1 are left out
    ciphered: bool = False  # the benchmark is published enciphered, against training on it by accident
    details: str = ""  # a JSON file beside the data with the category of each id


TRUTH, CANDIDATES = "reward_model.ground_truth", "reward_model.candidate_answers"

# Detected in this order: a layout comes before those that need fewer columns.
FORMATS = {
    "fvqa": Format("data_id", "prompt", (TRUTH, CANDIDATES), "images", "category", listed=(CANDIDATES,)),
    "infoseek": Format("data_id", "question", ("answer", "answer_eval"), "image_id", "data_split"),
    "mmsearch": Format("sample_id", "query", ("gt_answer", "alternative_gt_answers"), "query_image", "area",
        some_pictureless=True),
    "mmsearch-plus": Format("id", "question", ("answer",), "img_1", "category", address="", pictures="num_images",
        ciphered=True),
    "hr-mmsearch": Format("sample_id", "query", ("ground_truth",), "query_image", "category"),
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
    "civqa": Format("id", "question", ("answer",), "image", "category", needs_id=True),  # gated, so a guess
}  # fmt: skip


def read_examples(path: str | Path, format: str = "", columns: str = "", images: str = "") -> Dataset:
    """The data set in a Parquet, JSON or CSV file. `format` names its layout (empty: it is detected), `columns`
    renames columns ("question=q,answers=a.b"), `images` is the folder of its picture files (empty: the file's own
    folder). Raises UserError for a file that is missing or not in its format, lacks columns, or has a row with unusable
    text, and for unknown names."""
    path = Path(path)
    if format and format not in FORMATS:
        raise UserError(f"--format {format}: unknown; give one of {', '.join(FORMATS)}")
    table = open_table(path)
    layouts = _layouts(format, columns)
    name = _fitting(layouts, table) or _nearest(layouts, table, format)
    missing = _missing(layouts[name], table)
    if len(table) and missing:
        found = f"found {', '.join(table.names)}"
        if name != "plain":
            found += f"; it looks most like {name}"
        advice = _advice(layouts[name], table, format, columns)
        raise UserError(f"{path}: row 0, column {', '.join(missing)}: missing ({found}); {advice}")
    layout = layouts[name]
    if isinstance(table, Csv):  # all of its cells are text: that of a single answer too
        layout = replace(layout, listed=())
    return Dataset(path, table, name, layout, Path(images) if images else path.parent)


def _layouts(format: str, columns: str) -> dict[str, Format]:
    """The layouts that a file may have, in the order in which they are tried."""
    if format:
        layouts = {format: replace(FORMATS[format], needs_id=False)}
    elif columns:  # with every column renamed any layout fits, so the plain one comes first
        layouts = {"plain": FORMATS["plain"], **FORMATS}
    else:
        layouts = FORMATS
    return {name: _renamed(layout, columns) for name, layout in layouts.items()}


def _advice(layout: Format, table: Table, format: str, columns: str) -> str:
    """What helps a table that lacks columns of `layout`: the --columns with which it would be read, or a part of it."""
    row = table.first()
    places = {"question": layout.question, "id": layout.id, "answers": layout.answers[0], "image": layout.image}
    wanted = []
    asked = layout.question.split("|")
    for place, names in places.items():
        known = [name for name in names.split("|") if name in table.fields]
        if place != "question":  # messages that ask may hold a picture or an answer, and need not
            known = [name for name in known if name not in asked]
        if not known:
            wanted.append(place)
        for name in known:
            row.pop(column_of(name, table.names), None)
    row.pop(layout.category, None)
    plain = "call them id, question, answers, image"
    likely = likely_columns(row, wanted)
    pairs = [f"{place}={likely[place]}" for place in ("id", "question", "answers", "image") if place in likely]
    proposed = ",".join(filter(None, [columns, *pairs]))
    if pairs and _fitting(_layouts(format, proposed), table):
        return f"try --columns {proposed}, or {plain}"
    unknown = [f"{place}=…" for place in wanted if place not in likely and place != "id"]
    proposed = ",".join(filter(None, [columns, *pairs, *unknown]))
    return f"say which columns hold it, --columns {proposed}, or {plain}"


def _fitting(layouts: dict[str, Format], table: Table) -> str:
    """The first layout whose columns the table has; those whose ids it has, too, come first. "" for none."""
    fitting = [name for name, layout in layouts.items() if not _missing(layout, table)]
    with_id = [name for name in fitting if _has(layouts[name].id, table)]
    return next(iter(with_id or fitting), "")


def _nearest(layouts: dict[str, Format], table: Table, format: str) -> str:
    """The layout that lacks the smallest share of its columns; the usual one for an empty table."""
    usual = "fvqa" if isinstance(table, Parquet) and not format else format or "plain"
    if not len(table):
        return usual
    nearest = min(layouts, key=lambda name: (_missing_share(layouts[name], table), name not in (usual, "plain")))
    if "plain" in layouts and _missing_share(layouts[nearest], table) == 1:
        return "plain"
    return nearest


def _renamed(layout: Format, columns: str) -> Format:
    """`layout` with the columns that "question=q,answers=a" names. With "id=" no column has ids."""
    names = [field.name for field in fields(Format)][:6]
    changes: dict[str, Any] = {}
    for part in filter(None, columns.split(",")):
        place, _, column = (side.strip() for side in part.partition("="))
        place = "answers" if place == "answer" else place
        if place not in names or place in changes or not column and part.strip() != "id=":
            raise UserError(f"--columns {part}: give PLACE=COLUMN, each once, where PLACE is {', '.join(names)}")
        changes[place] = column
    if "answers" in changes:
        changes |= {"answers": (changes["answers"],), "aliases": "", "listed": ()}
    needs_id = bool(changes["id"]) if "id" in changes else layout.needs_id
    return replace(layout, **changes, needs_id=needs_id)


def _has(names: str, table: Table) -> bool:
    return any(name and name in table.fields for name in names.split("|"))


def _missing(layout: Format, table: Table) -> list[str]:
    """The columns that a layout needs and the table lacks."""
    needed = [layout.question, *layout.answers, layout.image]
    if layout.needs_id:
        needed = [layout.id, *needed]
    return [names.partition("|")[0] for names in needed if not _has(names, table)]


def _missing_share(layout: Format, table: Table) -> float:
    """The share of missing columns among those that a layout needs; its id does not count."""
    return len(_missing(replace(layout, needs_id=False), table)) / (2 + len(layout.answers))


class Dataset(Sequence):
    """Examples on disk, each read when it is used: `len(data)`, `data[index]`, iteration. `rows[index]` is the row in
    the file; indices differ from rows where some rows are left out. `notes` are lines about what the user may have
    meant otherwise. `data[index]` raises UserError where the row's picture is missing or not a JPEG, PNG, WEBP or GIF
    file."""

    def __init__(self, path: Path, table: Table, format: str, layout: Format, folder: Path):
        self.path, self.table, self.format, self.layout, self.folder = path, table, format, layout, folder
        self.notes: dict[str, None] = {}  # an ordered set
        columns = [layout.id, layout.question, *layout.answers, layout.aliases, layout.category, layout.address]
        columns.append(layout.pictures)
        names = [name for column in columns for name in column.split("|") if name in table.fields]
        self.table.keep(dict.fromkeys(column_of(name, table.names) for name in names))
        self.numbered = len(table) > 0 and not self._has_ids()
        if self.numbered:
            what = "the column of ids is empty" if _has(layout.id, table) else "there is no column of ids"
            self.notes[f"{what}, so its rows' numbers are the ids"] = None
        rows: Iterable[int] = range(len(table))
        if layout.some_pictureless:
            rows = [row for row in rows if self._picture_cell(row)[1] is not None]
        if layout.pictures:
            rows = [row for row in rows if inside(table.text(row), layout.pictures) == 1]
        self.rows = array("Q", rows)
        self.left_out = len(table) - len(self.rows)
        self._check_texts()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        row = self.rows[index]
        example_id, question, answers, category, address = self.text(row)
        return Example(example_id, self.picture(row), question, answers, category, address)

    def keep(self, indices: Iterable[int]) -> None:
        """Keep only these examples, in this order."""
        self.rows = array("Q", [self.rows[index] for index in indices])

    def _check_texts(self) -> None:
        """Raises UserError for a row with unusable text, and where several questions have one id: recorded
        searches and conversations are found by ids. A question may be repeated."""
        first_rows: dict[str, int] = {}  # by id
        clashes = []
        for row in self.rows:
            text = self.text(row)
            first = first_rows.setdefault(text[0], row)
            if first != row and (self.text(first), self._picture_cell(first)) != (text, self._picture_cell(row)):
                clashes.append(f"{text[0]!r:.60} in rows {first} and {row}")
        if clashes:
            told = "; ".join(clashes[:3]) + (f" and {len(clashes) - 3} more" if len(clashes) > 3 else "")
            advice = "give each its own, or number the rows: --columns id="
            raise UserError(f"{self.path}: an id stands for several questions: {told}; {advice}")

    def _has_ids(self) -> bool:
        """Whether any row has an id. True where --columns names the column: then every row must have one."""
        if self.layout.needs_id:
            return True
        names = [name for name in self.layout.id.split("|") if name in self.table.fields]
        if not names:
            return False
        records = (self.table.text(row) for row in range(len(self.table)))
        return any(inside(record, name) is not None for record in records for name in names)

    # ---- text

    def text(self, row: int) -> tuple[str, str, tuple[str, ...], str, str]:
        """The row's id, question, answers, category, and the picture's address."""
        record = self.table.text(row)
        example_id = str(row) if self.numbered else self._id(row, record)
        question = self._question(row, record)
        category = inside(record, self.layout.category) or self.details.get(example_id, "")
        address = inside(record, self.layout.address)
        return example_id, question, self._answers(row, record), str(category or ""), str(address or "")

    def _cell(self, row: int, record: dict[str, Any], names: str) -> tuple[str, Any]:
        """The first of the names `a|b` that has a value in this row, and the value."""
        known = [name for name in names.split("|") if column_of(name, record) in record]
        if not known:
            column = column_of(names.partition("|")[0], self.table.names)
            self._refuse(row, column, f"missing (found {', '.join(record)}); add it")
        found = [(name, inside(record, name)) for name in known]
        return next((pair for pair in found if pair[1] is not None), found[0])

    def _id(self, row: int, record: dict[str, Any]) -> str:
        name, value = self._cell(row, record, self.layout.id)
        if isinstance(value, float) and value.is_integer():  # pandas makes floats of integers with missing values
            value = int(value)
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            self._refuse(row, name, f"there is no id, but {value!r:.60}; give text or a whole number")
        return str(value)

    def _question(self, row: int, record: dict[str, Any]) -> str:
        name, value = self._cell(row, record, self.layout.question)
        if self.layout.ciphered and isinstance(value, str) and CIPHERED.fullmatch(value):
            how = "decipher it as its card says, and save that with .to_parquet(…)"
            self._refuse(row, name, f"{value!r:.40} is enciphered; {how}")
        try:
            if cells.instructs(value):
                self.notes[f"column {name}: system messages are left out; --prompts says what the model is told"] = None
            return cells.question(value)
        except cells.Unclear as error:
            self._refuse(row, name, str(error))

    def _answers(self, row: int, record: dict[str, Any]) -> tuple[str, ...]:
        """All accepted answers, each once, without blank ones (an empty answer would match a blank alias)."""
        found: list[str] = []
        more = [self.layout.aliases] if _has(self.layout.aliases, self.table) else []
        for names in [*self.layout.answers, *more]:
            name, value = self._cell(row, record, names)
            try:
                found += cells.answers(value, listed=name in self.layout.listed)
            except cells.Unclear as error:
                self._refuse(row, name, str(error))
            if not found:  # aliases without a ground truth mean a damaged row
                self._refuse(row, name, "there is no answer; give one or drop the row")
        return tuple(dict.fromkeys(found))

    @cached_property
    def details(self) -> dict[str, str]:
        """The category of each id, from the layout's file of details; empty where there is none."""
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
        """The row's picture file, checked."""
        name, value = self._picture_cell(row)
        picture = value if isinstance(value, bytes) else self._read_picture(row, name, value)
        try:
            pictures.verify(picture)
        except ValueError as error:
            complaint = f"cannot be decoded: {error}; give another picture"
            self._refuse(row, name, complaint)
        return picture

    def _picture_cell(self, row: int) -> tuple[str, bytes | str | None]:
        """The first of the picture columns that has a value in this row, and the value."""
        names = self.layout.image.split("|")
        questions = self.layout.question.split("|")
        for name in names:
            column = column_of(name, self.table.names)
            value = inside({column: self.table.picture(row, column)}, name)
            if name in questions and cells.conversation(value) is None:
                continue  # chat messages of the question may contain the picture; its plain text does not
            try:
                found = cells.picture(value)
            except cells.Unclear as error:
                self._refuse(row, name, str(error))
            if found is not None:
                return name, found
        return next((name for name in names if name in self.table.fields), names[0]), None

    def _read_picture(self, row: int, column: str, text: str | None) -> bytes:
        """The picture that a text represents, in base64 or by its file's name."""
        if not text:
            self._refuse(row, column, "no image bytes; embed the picture itself, or name its file")
        if text.startswith(BASE64_STARTS) or text[:5].lower() == "data:":
            return self._decoded(row, column, text)
        if text.lower().startswith(ADDRESSES):
            complaint = f"{text!r:.100} is an address, which is not followed; download it and name its file"
            self._refuse(row, column, complaint)
        return self._file(row, column, unquote(text[7:]) if text.startswith("file://") else text)

    def _decoded(self, row: int, column: str, text: str) -> bytes:
        try:
            return base64.b64decode(text.rpartition("base64,")[2].translate({ord("-"): "+", ord("_"): "/"}))
        except (binascii.Error, ValueError):
            self._refuse(row, column, f"base64 text of {len(text)} characters is cut short; get it again")

    def _file(self, row: int, column: str, name: str) -> bytes:
        """A file in the picture folder or in one of its subfolders; the name may lack its ending."""
        try:
            for folder in self._folders():
                for ending in ENDINGS:
                    for variant in dict.fromkeys((name, name.lstrip("/"), name.replace("\\", "/"))):
                        file = folder / f"{variant}{ending}"
                        if file.is_file():
                            return file.read_bytes()
        except (OSError, ValueError):
            pass
        complaint = f"no readable file {name!r:.200} in {self.folder}; correct it, or name the folder with --images"
        self._refuse(row, column, complaint)

    def _folders(self) -> Iterator[Path]:
        yield self.folder
        yield from self._subfolders  # listed only when a file is not in the folder itself

    @cached_property
    def _subfolders(self) -> list[Path]:
        return sorted(entry for entry in self.folder.iterdir() if entry.is_dir()) if self.folder.is_dir() else []

    def _refuse(self, row: int, column: str, complaint: str) -> NoReturn:
        raise UserError(f"{self.path}: row {row}, column {column}: {complaint}")
