"""Files of rows: Parquet, JSON lines, and a JSON array. Each row is read when it is asked for.

Of a Parquet file the columns of text stay in memory and the pictures' column is read a row group at a time; of a JSON
lines file only the lines' offsets stay. A JSON array stays whole: the published ones hold text and the names of picture
files. Rows count from 0, in errors too.

A trap: a Parquet file of a few kilobytes can stand for terabytes, because a value that many rows have is stored once,
and runs and pages are packed. So such values stay shared here, and what a column would take is summed up before it is
read, and what a row would take before it is made.
"""

from __future__ import annotations

import tempfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, Callable, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmsr.data.cells import parsed
from mmsr.system.errors import UserError
from mmsr.system.files import json_file, json_object, lines, missing, opened

GROUPS_KEPT = 4  # row groups of pictures in memory
GROUP_BYTES = 128 << 20  # a pictures' column with a larger row group is cut up first
ROWS_PER_CUT = 16
MOST_COLUMN = 1 << 30  # bytes of a column of text, or of a row group of pictures, with all that is shared written out
MOST_CELL = 256 << 20  # bytes of a row's pictures
MOST_PACKED = 8  # times: pictures are packed already, so what shrinks further in a file is no pictures
DEEPEST = 8  # names within names
# Texts without what they begin with like the one before, and texts behind all their lengths: neither can stay shared.
DELTAS = {"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"}
PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".7z", ".tar", ".tgz")
POINTER = b"version https://git-lfs."
WRAPPERS = ("data", "rows", "examples", "questions", "annotations")  # a JSON object's names for its rows
DAMAGE = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises on a broken file (ValueError: bad UTF-8)


class Table(Protocol):
    """What a data set reads from."""

    names: list[str]  # of the columns; of a JSON file, of its first row
    fields: set[str]  # the same, and what is inside of them, as `column.field.field`

    def __len__(self) -> int: ...

    def keep(self, columns: Iterable[str]) -> None:
        """Make ready to read these columns of text."""

    def text(self, row: int) -> dict[str, Any]:
        """The kept columns of a row at least."""

    def picture(self, row: int, column: str) -> Any:
        """What stands in the column of pictures; None where there is no such column."""


def open_table(path: Path) -> Table:
    """Raises UserError for a file that is missing, of another kind, or not what its name says."""
    kinds: dict[str, Callable[[Path], Table]] = {".parquet": Parquet, ".pq": Parquet}
    kinds |= dict.fromkeys([".jsonl", ".jsonlines", ".ndjson", ".json"], _json_table)
    ending = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{path}: cannot be read: a folder; name the .parquet, .jsonl or .json file in it")
    if ending in PACKED:
        raise UserError(f"{path}: a packed file; unpack it, and give the .parquet, .jsonl or .json file that is in it")
    if ending not in kinds:
        complaint = f"{ending or 'a name without an ending'} tells no kind of data that is read here"
        raise UserError(
            f"{path}: {complaint}; give a Parquet, JSON lines or JSON file, named .parquet, .jsonl or .json"
        )
    if _begins(path, POINTER):
        kind = "JSON" if kinds[ending] is _json_table else "Parquet"
        complaint = f"not a {kind} file, or cut short: Git LFS's pointer to one; fetch it with: git lfs pull"
        raise UserError(f"{path}: {complaint}")
    return kinds[ending](path)


def _begins(path: Path, with_these: bytes) -> bool:
    with opened(path) as file:
        return file.read(len(with_these)) == with_these


# ---- names within names


def inside(value: Any, name: str) -> Any:
    """What `name` means in a row: a column, or `column.field.field`; None where there is nothing of the name.

    A column may have dots in its name, as tables do that were flattened, and an object may be written as JSON text.
    """
    value = _object(value)
    if not name:  # a column without a name, such as R's of row numbers, is nobody's
        return None
    if name in value:
        return value[name]
    for end, letter in enumerate(name):
        if letter == "." and name[:end] in value:
            found = inside(value[name[:end]], name[end + 1 :])
            if found is not None:
                return found
    return None


def column_of(name: str, columns: Container[str]) -> str:
    """The column that `column.field.field` is in."""
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in columns), parts[0])


def names_in(value: Any, prefix: str = "") -> Iterator[str]:
    """All names that `inside` knows in a row."""
    for name, inner in _object(value).items():
        yield f"{prefix}{name}"
        if prefix.count(".") < DEEPEST:
            yield from names_in(inner, f"{prefix}{name}.")


def _object(value: Any) -> dict[str, Any]:
    """An object that may be written as text, in JSON or as Python prints it; an empty one for anything else."""
    value = parsed(value)
    return value if isinstance(value, dict) else {}


# ---- Parquet


class Parquet:
    """A Parquet file. Its text is read when columns are kept, a picture when its row is used."""

    def __init__(self, path: Path):
        self.path = path
        self.plain = self._open(path)
        self.file = self._shared(path, self.plain)
        self.names = self.plain.schema_arrow.names
        self.doubled = {name for name, times in Counter(self.names).items() if times > 1}
        self.fields = set(self.names).union(*map(_fields, self.plain.schema_arrow), self._fields_in_text())
        self.sources: dict[str, tuple[pq.ParquetFile, list[int]]] = {}
        self.pictures = lru_cache(GROUPS_KEPT)(self._group)

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def keep(self, columns: Iterable[str]) -> None:
        names, groups = list(columns), range(self.file.num_row_groups)
        for name in names:
            self._once(name)
            self._bound(name, sum(self._weight(self.file, name, group) for group in groups))
        empty = pa.table({name: [] for name in names})
        self.columns = self._read(self.file, groups, names) if groups else empty
        for name in names:
            self._bound(name, _written_out(self.columns[name]))

    def text(self, row: int) -> dict[str, Any]:
        return {name: self._value(row, name, self.columns[name][row]) for name in self.columns.column_names}

    def picture(self, row: int, column: str) -> Any:
        if column not in self.names:
            return None
        if column not in self.sources:
            self._once(column)
            file = self._in_small_groups(column)
            sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            self.sources[column] = file, [0, *accumulate(sizes)]
        starts = self.sources[column][1]
        group = bisect_right(starts, row) - 1
        cell = self.pictures(group, column).slice(row - starts[group], 1)
        if (size := _written_out(cell)) > MOST_CELL:
            complaint = f"{size >> 20:,} MiB of pictures, more than {MOST_CELL >> 20}; give smaller ones"
            raise UserError(f"{self.path}: row {row}, column {column}: {complaint}")
        return cell[0].as_py()

    def _once(self, column: str) -> None:
        if column in self.doubled:
            raise UserError(
                f"{self.path}: {self.names.count(column)} columns named {column}; rename or drop all but one"
            )

    def _value(self, row: int, column: str, cell: pa.Scalar) -> Any:
        try:
            return cell.as_py()
        except (ValueError, OverflowError) as error:  # a time in nanoseconds, or beyond the year 9999
            why = str(error).partition("\n")[0][:100]
            raise UserError(f"{self.path}: row {row}, column {column}: not a value of Python's ({why})") from None

    def _group(self, group: int, column: str) -> pa.ChunkedArray:
        file, _ = self.sources[column]
        self._bound(column, self._weight(file, column, group))
        return self._read(file, [group], [column])[column]

    def _open(self, source: Path | BinaryIO, **more: Any) -> pq.ParquetFile:
        try:  # without pre-buffering and with a small buffer, batches of a huge row group need little memory
            return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, **more)
        except FileNotFoundError:
            raise missing(self.path) from None
        except DAMAGE as error:
            raise self._unreadable(error) from error

    def _shared(self, source: Path | BinaryIO, plain: pq.ParquetFile) -> pq.ParquetFile:
        """The same file, opened so that a text or picture that many rows have stands in memory once."""
        groups = [plain.metadata.row_group(group) for group in range(plain.num_row_groups)]
        chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
        texts = {chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"}
        deltas = {chunk.path_in_schema for chunk in chunks if DELTAS & {*chunk.encodings}}
        return self._open(source, metadata=plain.metadata, read_dictionary=list(texts - deltas))

    def _fields_in_text(self) -> set[str]:
        """Names in the columns that hold objects as JSON text, as the first row has them."""
        texts = [field.name for field in self.plain.schema_arrow if pa.types.is_string(field.type)]
        try:
            first = next(self.plain.iter_batches(1, columns=texts)).to_pylist() if texts and len(self) else []
        except DAMAGE as error:
            raise self._unreadable(error) from error
        return set(names_in(first[0])) if first else set()

    def _read(self, file: pq.ParquetFile, groups: Iterable[int], columns: list[str]) -> pa.Table:
        try:
            # one by one: each has dictionaries of its own, which pyarrow does not join inside of lists and structs
            tables, size = [], 0
            for group in groups:
                tables.append(self._read_group(file, group, columns, size))
                size += tables[-1].nbytes
            table = pa.concat_tables(tables)
            table.validate(full=True)  # most writers store no checksums
            return table
        except DAMAGE as error:
            raise self._unreadable(error) from error

    def _read_group(self, file: pq.ParquetFile, group: int, columns: list[str], size: int) -> pa.Table:
        """`size`: bytes of the groups before it. What does not stay shared is read little by little, and bounded."""
        chunks = [chunk for column in columns for chunk in self._chunks(file, column, group)]
        extended = any("extension<" in str(self.plain.schema_arrow.field(column).type) for column in columns)
        if not extended and not any(DELTAS & {*chunk.encodings} for chunk in chunks):
            return file.read_row_groups([group], columns=columns)
        batches = []
        for batch in file.iter_batches(ROWS_PER_CUT, [group], columns):
            batches.append(batch)
            size += batch.nbytes
            self._bound(", ".join(columns), size)
        return pa.Table.from_batches(batches)

    def _unreadable(self, error: Exception) -> UserError:
        why = str(error).partition("\n")[0][:100]
        return UserError(f"{self.path}: not a Parquet file, or cut short or damaged ({why}); get it again")

    def _chunks(self, file: pq.ParquetFile, column: str, group: int) -> list[pq.ColumnChunkMetaData]:
        found = file.metadata.row_group(group)
        chunks = (found.column(place) for place in range(found.num_columns))
        return [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]

    def _weight(self, file: pq.ParquetFile, column: str, group: int) -> int:
        """Bytes that a row group of a column takes when it is read: its pages, unpacked, and 8 for each value.

        Values of a fixed length take that, as they do not stay shared.
        """
        schema = file.metadata.schema
        lengths = {leaf.path: max(8, leaf.length or 0) for leaf in map(schema.column, range(len(schema)))}
        chunks = self._chunks(file, column, group)
        return sum(chunk.total_uncompressed_size + lengths[chunk.path_in_schema] * chunk.num_values for chunk in chunks)

    def _bound(self, column: str, size: int) -> None:
        if size > MOST_COLUMN:
            complaint = f"unpacks to {size / 1e9:.1f} GB, more than {MOST_COLUMN / 1e9:.1f}; cut the file up"
            raise UserError(f"{self.path}: column {column}: {complaint}")

    def _in_small_groups(self, column: str) -> pq.ParquetFile:
        """The file; or, where all rows are in one group, the column's copy in small ones, in an unnamed temporary file.

        UserError where what is to be copied is no pictures.
        """
        groups = [self._chunks(self.plain, column, group) for group in range(self.plain.num_row_groups)]
        unpacked = [sum(chunk.total_uncompressed_size for chunk in chunks) for chunks in groups]
        if max(unpacked, default=0) <= GROUP_BYTES:
            return self.file
        if sum(unpacked) > MOST_PACKED * sum(chunk.total_compressed_size for chunks in groups for chunk in chunks):
            complaint = (
                f"unpacks to {sum(unpacked) / 1e9:.1f} GB, over {MOST_PACKED} times of what it takes in the file"
            )
            raise UserError(f"{self.path}: column {column}: {complaint}: no pictures do; get it again")
        try:
            copy = tempfile.TemporaryFile()
            with pq.ParquetWriter(copy, pa.schema([self.plain.schema_arrow.field(column)])) as writer:
                for batch in self.plain.iter_batches(ROWS_PER_CUT, columns=[column]):
                    writer.write_batch(batch)
        except DAMAGE as error:
            folder, why = tempfile.gettempdir(), str(error).partition("\n")[0][:100]
            complaint = f"cannot cut up its large row groups in {folder} ({why}); free space there or set TMPDIR"
            raise UserError(f"{self.path}: {complaint}") from error
        return self._shared(copy, self._open(copy))


def _fields(column: pa.Field, prefix: str = "") -> set[str]:
    """The names of a struct's fields, and of structs within."""
    kind, name = column.type, f"{prefix}{column.name}"
    inner = [kind.field(place) for place in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    return {name}.union(*(_fields(field, f"{name}.") for field in inner))


def _written_out(array: pa.Array | pa.ChunkedArray) -> int:
    """Bytes that an array would take without anything shared."""
    kind = array.type
    if isinstance(array, pa.ChunkedArray):
        return sum(map(_written_out, array.chunks))
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        return pc.sum(lengths.take(array.indices)).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(map(_written_out, array.flatten()))
    if pa.types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return sum(_written_out(inner.slice(first, last - first)) for inner in (array.keys, array.items))
    if hasattr(array, "flatten"):  # lists of all kinds
        return 8 * len(array) + _written_out(array.flatten())
    return array.nbytes


# ---- JSON


def _json_table(path: Path) -> Table:
    """Told by how it begins, not by its name: many a `.json` holds an object a line."""
    first = [line.removeprefix(b"\xef\xbb\xbf").lstrip() for _, line in islice(lines(path), 2)]
    array = bool(first) and first[0].startswith(b"[")
    if path.suffix.lower() == ".json" and not array:
        array = len(first) < 2 or not _object(first[0].decode("utf-8", "replace"))
    return JsonArray(path) if array else JsonLines(path)


class JsonLines:
    """One JSON object a line; blank lines are no rows."""

    def __init__(self, path: Path):
        self.path = path
        self.offsets = array("Q", (offset for offset, _ in lines(path)))
        self.names = list(self.text(0)) if self.offsets else []
        self.fields = set(names_in(self.text(0))) if self.offsets else set()

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
        if isinstance(self.rows, dict):
            lists = [self.rows[name] for name in WRAPPERS if isinstance(self.rows.get(name), list)]
            self.rows = next((rows for rows in lists if rows and isinstance(rows[0], dict)), self.rows)
        if isinstance(self.rows, dict) and len(self.rows) > 2:  # a question, an answer and a picture: a single row
            self.rows = [self.rows]
        if not isinstance(self.rows, list):
            raise UserError(f"{path}: not an array of rows; write [{{…}}, …], or a .jsonl file with one row a line")
        for row, found in enumerate(self.rows):
            if not isinstance(found, dict):
                raise UserError(f"{path}: row {row}: {found!r:.60} is not a JSON object; write one for each question")
        self.names = list(self.rows[0]) if self.rows else []
        self.fields = set(names_in(self.rows[0])) if self.rows else set()

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, columns: Iterable[str]) -> None:
        pass

    def text(self, row: int) -> dict[str, Any]:
        return self.rows[row]

    def picture(self, row: int, column: str) -> Any:
        return self.rows[row].get(column)
