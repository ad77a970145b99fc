"""Files of rows: Parquet, JSON lines, and a JSON array. Each row is read when it is asked for.

Of a Parquet file the columns of text stay in memory and the pictures' column is read a row group at a time; of a JSON
lines file only the lines' offsets stay. A JSON array stays whole: the published ones hold text and the names of picture
files. Rows count from 0, in errors too.
"""

from __future__ import annotations

import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Callable, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from .episode import UserError
from .files import json_file, json_object, lines, missing, opened

GROUPS_KEPT = 4  # row groups of pictures in memory
GROUP_BYTES = 128 << 20  # a larger row group is cut up first
ROWS_PER_CUT = 16
DAMAGE = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises on a broken file (ValueError: bad UTF-8)


class Table(Protocol):
    """What a data set reads from."""

    names: list[str]  # of the columns; of a JSON file, of its first row
    fields: set[str]  # the same, and fields of structs as `column.field`

    def __len__(self) -> int: ...

    def keep(self, columns: Iterable[str]) -> None:
        """Make ready to read these columns of text."""

    def text(self, row: int) -> dict[str, Any]:
        """The kept columns of a row at least."""

    def picture(self, row: int, column: str) -> Any:
        """What stands in the column of pictures."""


def open_table(path: Path) -> Table:
    """Raises UserError for a file that is missing, of another kind, or not what its name says."""
    kinds: dict[str, Callable[[Path], Table]] = {".parquet": Parquet, ".jsonl": JsonLines, ".json": JsonArray}
    if path.suffix not in kinds:
        raise UserError(f"{path}: cannot tell the data's kind; give --data a file named .parquet, .jsonl or .json")
    return kinds[path.suffix](path)


# ---- Parquet


class Parquet:
    """A Parquet file. Its text is read when columns are kept, a picture when its row is used."""

    def __init__(self, path: Path):
        self.path = path
        self.file = self._open(path)
        self.names = self.file.schema_arrow.names
        self.fields = set(self.names).union(*map(_struct_fields, self.file.schema_arrow))
        if any(group.total_byte_size > GROUP_BYTES for group in self._groups()):
            self.file = self._cut_up()
        self.starts = [0, *accumulate(group.num_rows for group in self._groups())]
        self.pictures = lru_cache(GROUPS_KEPT)(lambda group, column: self._read([group], [column])[column])

    def __len__(self) -> int:
        return self.starts[-1]

    def keep(self, columns: Iterable[str]) -> None:
        self.columns = self._read(range(self.file.num_row_groups), list(columns)).combine_chunks()

    def text(self, row: int) -> dict[str, Any]:
        return {name: self.columns[name][row].as_py() for name in self.columns.column_names}

    def picture(self, row: int, column: str) -> Any:
        group = bisect_right(self.starts, row) - 1
        return self.pictures(group, column)[row - self.starts[group]].as_py()

    def _open(self, source: Path | BinaryIO) -> pq.ParquetFile:
        try:  # without pre-buffering and with a small buffer, batches of a huge row group need little memory
            return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
        except FileNotFoundError:
            raise missing(self.path) from None
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


def _struct_fields(column: pa.Field) -> set[str]:
    kind = column.type
    return (
        {f"{column.name}.{kind.field(i).name}" for i in range(kind.num_fields)} if pa.types.is_struct(kind) else set()
    )


# ---- JSON


class JsonLines:
    """One JSON object a line; blank lines are no rows."""

    def __init__(self, path: Path):
        self.path = path
        self.offsets = array("Q", (offset for offset, _ in lines(path)))
        self.names = list(self.text(0)) if self.offsets else []
        self.fields = _object_fields(self.text(0)) if self.offsets else set()

    def __len__(self) -> int:
        return len(self.offsets)

    def keep(self, columns: Iterable[str]) -> None:
        pass  # a line is read whole

    def text(self, row: int) -> dict[str, Any]:
        with opened(self.path) as file:
            file.seek(self.offsets[row])
            return json_object(self.path, row, file.readline())

    def picture(self, row: int, column: str) -> Any:
        return self.text(row).get(column)


class JsonArray:
    """A file with one array of objects."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = json_file(path)
        if not isinstance(self.rows, list):
            raise UserError(f"{path}: not an array of rows; write [{{…}}, …], or a .jsonl file with one row a line")
        for row, found in enumerate(self.rows):
            if not isinstance(found, dict):
                raise UserError(f"{path}: row {row}: {found!r:.60} is not a JSON object; write one for each question")
        self.names = list(self.rows[0]) if self.rows else []
        self.fields = _object_fields(self.rows[0]) if self.rows else set()

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, columns: Iterable[str]) -> None:
        pass

    def text(self, row: int) -> dict[str, Any]:
        return self.rows[row]

    def picture(self, row: int, column: str) -> Any:
        return self.rows[row].get(column)


def _object_fields(row: dict[str, Any]) -> set[str]:
    inner = {f"{name}.{field}" for name, value in row.items() if isinstance(value, dict) for field in value}
    return {*row, *inner}
