"""Readers: FactualVQA and plain JSONL data sets, recorded rollouts, and the order in which examples are drawn.

Nothing here holds a data set in memory: of a Parquet file the text columns stay and pictures are read a row group at a
time, of a JSONL file only the lines' offsets stay. Rows count from 0, in errors too. A data set's text is checked when
it is opened, a row's picture when the row is used.
"""

from __future__ import annotations

import json
import random
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .episode import Example, Hit, Observation, UserError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
TEXT_COLUMNS = ["prompt", "reward_model", "data_id", "category"]
PARQUET_FIELDS = (  # what is read of FactualVQA's schema: columns, fields of structs, and of structs in lists ([])
    "prompt[].content",
    "prompt[].role",
    "images[].bytes",
    "reward_model.candidate_answers",
    "reward_model.ground_truth",
    "data_id",
    "category",
)
GROUPS_KEPT = 4  # row groups of pictures in memory
GROUP_BYTES = 128 << 20  # a larger row group is cut up first
ROWS_PER_CUT = 16
DAMAGE = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises on a broken file (ValueError: bad UTF-8)


def read_examples(path: str | Path) -> Dataset:
    """The data set in a `.parquet` file of FactualVQA's schema or a plain `.jsonl` file.

    A JSONL line is {"id", "image": path relative to the file, "question", "answers": [...], "category": optional}.
    Raises `UserError` for a file that is missing, not in its format, lacks columns, or has a row with unusable text.
    """
    path = Path(path)
    readers = {".parquet": ParquetDataset, ".jsonl": JsonlDataset}
    if path.suffix not in readers:
        raise UserError(f"{path}: cannot tell the data's format; give --data a file named .parquet or .jsonl")
    return readers[path.suffix](path)


class Dataset(Sequence):
    """Examples on disk, each read when asked for: `len(data)`, `data[row]`, iteration.

    `data[row]` raises `UserError` where the row's picture is missing or no JPEG, PNG, WEBP or GIF.
    """

    path: Path
    picture_column: str

    def __getitem__(self, row: int) -> Example:
        row = range(len(self))[row]  # negative rows, and IndexError past the end
        example_id, question, answers, category = self.text(row)
        return Example(example_id, self._checked(row, self.image(row)), question, answers, category)

    def text(self, row: int) -> tuple[str, str, tuple[str, ...], str]:
        """The row's id, question, answers and category."""
        raise NotImplementedError

    def image(self, row: int) -> bytes:
        """The row's encoded picture, unchecked."""
        raise NotImplementedError

    def _checked(self, row: int, picture: bytes) -> bytes:
        try:
            with Image.open(BytesIO(picture), formats=IMAGE_FORMATS) as image:
                image.verify()
        except Exception as error:  # Pillow raises a dozen types on a broken file
            why = str(error) if isinstance(error, Image.DecompressionBombError) else "cannot be decoded"
            self._refuse(row, self.picture_column, f"{len(picture)} bytes {why}; give a JPEG, PNG, WEBP or GIF picture")
        return picture

    def _refuse(self, row: int, column: str, complaint: str) -> NoReturn:
        raise UserError(f"{self.path}: row {row}, column {column}: {complaint}")

    def _id(self, row: int, column: str, value: Any) -> str:
        return self._refuse(row, column, "there is no id; give one") if value in (None, "") else str(value)

    def _question(self, row: int, column: str, value: Any) -> str:
        question = value.strip() if isinstance(value, str) else ""
        return question or self._refuse(row, column, "the question is empty; fill it in or drop the row")

    def _answers(self, row: int, column: str, values: Any) -> tuple[str, ...]:
        """The values as strings, each once, without blank ones (a blank alias would be matched by an empty answer)."""
        if not isinstance(values, list) or not all(isinstance(value, str | int | float) for value in values):
            self._refuse(row, column, f"{values!r:.60} is not a list of strings; write it as one")
        answers = tuple(dict.fromkeys(str(value) for value in values if str(value).strip()))
        return answers or self._refuse(row, column, "there is no answer; give one or drop the row")


class ParquetDataset(Dataset):
    """FactualVQA's schema: prompt, images, reward_model, data_id, category; other columns are ignored.

    The question is the content of the last user message of `prompt`, without the `<image>` marker that some exports put
    into it; the published rows hold the bare question there, and all instructions are the chat template's affair. The
    answers are `ground_truth`, then the aliases of `candidate_answers` (a JSON list in a string; null is none).
    """

    picture_column = "images"

    def __init__(self, path: Path):
        self.path = path
        self.file = self._open(path)
        self._check_columns()
        if any(group.total_byte_size > GROUP_BYTES for group in self._groups()):
            self.file = self._cut_up()
        self.starts = [0, *accumulate(group.num_rows for group in self._groups())]
        self.columns = self._read(range(self.file.num_row_groups), TEXT_COLUMNS)
        self.pictures = lru_cache(GROUPS_KEPT)(lambda group: self._read([group], ["images"])["images"])
        for row in range(len(self)):
            self.text(row)

    def __len__(self) -> int:
        return self.starts[-1]

    def text(self, row: int) -> tuple[str, str, tuple[str, ...], str]:
        prompt, truth, example_id, category = (self.columns[name][row].as_py() for name in TEXT_COLUMNS)
        asked = [message["content"] for message in prompt or () if message and message["role"] == "user"]
        question = str(asked[-1] or "").replace("<image>", "") if asked else ""
        question = self._question(row, "prompt", question)
        return self._id(row, "data_id", example_id), question, self._truth(row, truth or {}), str(category or "")

    def image(self, row: int) -> bytes:
        group = bisect_right(self.starts, row) - 1
        pictures = self.pictures(group)[row - self.starts[group]].as_py() or [None]
        if len(pictures) > 1:
            self._refuse(row, "images", f"{len(pictures)} pictures; a question has one, drop the others")
        data = pictures[0] and pictures[0]["bytes"]
        if not data or not isinstance(data, bytes):
            self._refuse(row, "images", "no image bytes; embed the picture itself (paths and URLs are not followed)")
        return data

    def _truth(self, row: int, truth: dict[str, Any]) -> tuple[str, ...]:
        encoded = truth.get("candidate_answers")
        try:
            aliases = json.loads(encoded or "[]")
        except (TypeError, ValueError, RecursionError):
            aliases = None
        if not isinstance(aliases, list):
            complaint = f'candidate_answers {encoded!r:.60} is not a JSON list; write one such as ["Tagus"]'
            self._refuse(row, "reward_model", complaint)
        gold = self._answers(row, "reward_model", [truth.get("ground_truth") or ""])
        return self._answers(row, "reward_model", [*gold, *aliases])

    def _open(self, source: Path | BinaryIO) -> pq.ParquetFile:
        try:  # without pre-buffering and with a small buffer, batches of a huge row group need little memory
            return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
        except FileNotFoundError:
            raise _missing(self.path) from None
        except DAMAGE as error:
            raise self._unreadable(error) from error

    def _groups(self) -> list[pq.RowGroupMetaData]:
        return [self.file.metadata.row_group(group) for group in range(self.file.num_row_groups)]

    def _read(self, groups: Iterable[int], columns: list[str]) -> pa.Table:
        try:
            table = self.file.read_row_groups(list(groups), columns=columns)
            table.validate(full=True)  # most writers store no checksums
            return table
        except DAMAGE as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        why = str(error).partition("\n")[0][:100]
        return UserError(f"{self.path}: not a Parquet file, or cut short or damaged ({why}); get it again")

    def _check_columns(self) -> None:
        schema = self.file.schema_arrow
        found = set(schema.names).union(*(_fields(column) for column in schema))
        missing = [name for name in PARQUET_FIELDS if name not in found]
        if missing:
            names = ", ".join(schema.names)
            raise UserError(f"{self.path}: column {', '.join(missing)} missing (found {names}); use FVQA's columns")

    def _cut_up(self) -> pq.ParquetFile:
        """A copy with small row groups in an unnamed temporary file: some writers put all rows into one group."""
        try:
            copy = tempfile.TemporaryFile()
            with pq.ParquetWriter(copy, self.file.schema_arrow) as writer:
                for batch in self.file.iter_batches(ROWS_PER_CUT):
                    writer.write_batch(batch)
        except DAMAGE as error:
            folder, why = tempfile.gettempdir(), str(error).partition("\n")[0][:100]
            complaint = f"cannot cut up its large row groups in {folder} ({why}); free space there or set TMPDIR"
            raise UserError(f"{self.path}: {complaint}") from error
        return self._open(copy)


def _fields(column: pa.Field) -> set[str]:
    """A column's fields as `PARQUET_FIELDS` writes them."""
    in_list = hasattr(column.type, "value_type")
    kind = column.type.value_type if in_list else column.type
    return {f"{column.name}{'[]' * in_list}.{kind.field(index).name}" for index in range(kind.num_fields)}


class JsonlDataset(Dataset):
    """One {"id", "image", "question", "answers", "category"} a line; blank lines are no rows."""

    picture_column = "image"

    def __init__(self, path: Path):
        self.path = path
        self.offsets = array("Q", (offset for offset, _ in _lines(path)))
        for row in range(len(self)):
            self.text(row)

    def __len__(self) -> int:
        return len(self.offsets)

    def text(self, row: int) -> tuple[str, str, tuple[str, ...], str]:
        line = self._line(row)
        question = self._question(row, "question", line["question"])
        answers = self._answers(row, "answers", line["answers"])
        return self._id(row, "id", line["id"]), question, answers, str(line.get("category") or "")

    def image(self, row: int) -> bytes:
        name = self._line(row)["image"]
        try:
            return (self.path.parent / name).read_bytes()
        except (OSError, TypeError, ValueError):
            self._refuse(row, "image", f"no readable file {name!r:.200} beside the data; correct the path")

    def _line(self, row: int) -> dict[str, Any]:
        with _opened(self.path) as file:
            file.seek(self.offsets[row])
            line = _json_object(self.path, row, file.readline())
        for column in ("id", "image", "question", "answers"):
            if column not in line:
                self._refuse(row, column, f"missing (found {', '.join(line)}); add it")
        return line


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its offset."""
    offset = 0
    with _opened(path) as file:
        for line in file:
            if line.strip():
                yield offset, line
            offset += len(line)


def _missing(path: Path) -> UserError:
    return UserError(f"{path}: no such file; check the path")


def _json_object(path: Path, row: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: row {row}: {line[:60]!r} is not a JSON object; write one a line")
    return found


class Sampler:
    """Endless shuffled epochs over `size` examples, as a pure function of (seed, cursor).

    `cursor`, the number of examples drawn so far, is all the state there is: to resume, set it. Each epoch draws every
    example once; a `take` may reach over its end. Raises `UserError` for an empty data set.
    """

    def __init__(self, size: int, seed: int, cursor: int = 0):
        if size < 1:
            raise UserError("the data set is empty; give one with at least one example")
        self.size, self.seed, self.cursor = size, seed, cursor

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


@dataclass(frozen=True)
class RecordedTurn:
    """What a model said in a recorded rollout and, where it searched, what came back."""

    response: str
    action: str | None  # "answer", "image_search", "text_search", or None
    query: str | None
    observation: Observation | None


def recorded_turns(path: str | Path) -> dict[str, list[RecordedTurn]]:
    """The turns of each example id in a transcripts file such as `mmsearch_r1_7b_transcripts.jsonl`.

    Thumbnails are recorded as addresses, which are not followed: an image search gives titles only. A page without a
    summary gives its snippet. Of an id that recurs the last line counts. Raises `UserError` for a missing or ill-formed
    file.
    """
    path, recorded = Path(path), {}
    for row, (_, line) in enumerate(_lines(path)):
        transcript = _json_object(path, row, line)
        for column in ("data_id", "turns"):
            if column not in transcript:
                raise UserError(f"{path}: row {row}, column {column}: missing; give a transcripts file")
        try:
            recorded[str(transcript["data_id"])] = [_recorded_turn(turn) for turn in transcript["turns"]]
        except (KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: row {row}, column turns: not as recorded ({what}); mend the line") from None
    return recorded


def _recorded_turn(turn: dict[str, Any]) -> RecordedTurn:
    result = turn.get("tool_result")
    observation = None if result is None else Observation(_recorded_hits(result), source="replay", cached=True)
    return RecordedTurn(turn["response"], turn.get("action"), turn.get("query"), observation)


def _recorded_hits(result: dict[str, Any]) -> tuple[Hit, ...]:
    if "titles" in result:
        return tuple(Hit(title or "") for title in result["titles"])
    summaries = {page["rank"]: page.get("summary") for page in result["summaries"]}
    return tuple(
        Hit(page.get("title") or "", page.get("url") or "", summaries.get(page["rank"]) or page.get("snippet") or "")
        for page in result["documents"]
    )
