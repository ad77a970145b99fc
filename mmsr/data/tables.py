"""Files of rows: Parquet, JSON lines, a JSON array, and CSV. Each row is read when it is used.

Of a Parquet file the text columns stay in memory, and the picture column is read one row group at a time. Of JSON lines
and CSV only the offsets of the rows stay in memory. A JSON array stays as a whole: the published ones hold text and
the names of picture files. Rows count from 0, in errors too.

Trap: a Parquet file of a few kilobytes can expand to terabytes, because a value that many rows share is stored once,
and runs and pages are compressed. Therefore shared values stay shared in memory, and the expanded size is computed for
a column before it is read, and for a row before it is made.
"""

from __future__ import annotations

import csv
import tempfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
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
GROUP_BYTES = 128 << 20  # a picture column with a larger row group is first copied into smaller groups
ROWS_PER_CUT = 16
MOST_COLUMN = 1 << 30  # bytes of a text column, or of a row group of pictures, when every value is counted
MOST_CELL = 256 << 20  # bytes of a row's pictures
MOST_PACKED = 8  # compression ratio: pictures are compressed files, so a column that shrinks further has no pictures
DEEPEST = 8  # levels of fields in fields
# Encodings of texts whose equal values cannot stay shared.
DELTAS = {"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"}
FILES = ".parquet, .jsonl, .json or .csv"
PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".7z", ".tar", ".tgz")
POINTER = b"version https://git-lfs."
WRAPPERS = ("data", "rows", "examples", "questions", "annotations")  # keys under which a JSON object has its rows
DAMAGE = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises on a broken file (ValueError: bad UTF-8)


class Table(Protocol):
    """A file of rows."""

    names: list[str]  # of the columns; in a JSON file, those of the first row
    fields: set[str]  # the names of columns and of the fields inside them, as `column.field.field`

    def __len__(self) -> int: ...

    def keep(self, columns: Iterable[str]) -> None:
        """Load these text columns."""

    def text(self, row: int) -> dict[str, Any]:
        """The values of a row, at least those of the loaded columns."""

    def picture(self, row: int, column: str) -> Any:
        """The row's value in a column of pictures; None where there is no such column."""

    def first(self) -> dict[str, Any]:
        """All of the first row that may be read at once: nothing large."""


def open_table(path: Path) -> Table:
    """The table in a file. Raises UserError for one that is missing, of another kind, or not what its name says."""
    kinds: dict[str, Callable[[Path], Table]] = {".parquet": Parquet, ".pq": Parquet}
    kinds |= dict.fromkeys([".jsonl", ".jsonlines", ".ndjson", ".json"], _json_table)
    kinds |= {".csv": Csv, ".tsv": Csv}
    ending = path.suffix.lower()
    if path.is_dir():
        raise UserError(f"{path}: cannot be read: a folder; name the {FILES} file in it")
    if ending in PACKED:
        raise UserError(f"{path}: a packed file; unpack it, and give the {FILES} file that is in it")
    if ending not in kinds:
        complaint = f"{ending or 'a name without an ending'} tells no kind of data that is read here"
        raise UserError(f"{path}: {complaint}; give a Parquet, JSON lines, JSON or CSV file, named {FILES}")
    with opened(path) as file:
        pointer = file.read(len(POINTER)) == POINTER
    if pointer:
        kind = {".parquet": "Parquet", ".pq": "Parquet", ".csv": "CSV", ".tsv": "CSV"}.get(ending, "JSON")
        complaint = f"not a {kind} file, or cut short: Git LFS's pointer to one; fetch it with: git lfs pull"
        raise UserError(f"{path}: {complaint}")
    return kinds[ending](path)


# ---- fields in fields


def inside(value: Any, name: str) -> Any:
    """The value of a column, or of a field `column.field.field`, in a row; None where there is none. The name of a
    column may contain dots, as in flattened tables, and an object may be written as JSON text."""
    value = _object(value)
    if not name:  # R writes row numbers into a column without a name, which nobody asks for
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
    """The column of `column.field.field`: the longest prefix that is a column."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        prefix = ".".join(parts[:count])
        if prefix in columns:
            return prefix
    return parts[0]


def names_in(value: Any, prefix: str = "") -> Iterator[str]:
    """All names that `inside` finds in a row."""
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
    """A Parquet file. Text columns are read by `keep`, a picture when its row is used."""

    def __init__(self, path: Path):
        self.path = path
        self.plain = self._open(path)
        self.file = self._open_shared(path, self.plain)
        self.columns: pa.Table = pa.table({})  # of text, loaded by `keep`
        self.names = self.plain.schema_arrow.names
        self.doubled = {name for name, times in Counter(self.names).items() if times > 1}
        self.fields = set(self.names).union(*map(_fields, self.plain.schema_arrow), self._fields_in_text())
        self.sources: dict[str, tuple[pq.ParquetFile, list[int]]] = {}  # by picture column: file, first rows of groups
        self.pictures = lru_cache(GROUPS_KEPT)(self._read_pictures)

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def keep(self, columns: Iterable[str]) -> None:
        names = list(columns)
        groups = range(self.file.num_row_groups)
        for name in names:
            self._require_unique(name)
            self._check_size(name, sum(self._stored_bytes(self.file, name, group) for group in groups))
        empty = pa.table({name: [] for name in names})
        self.columns = self._read(self.file, groups, names) if groups else empty
        for name in names:
            self._check_size(name, _expanded_bytes(self.columns[name]))

    def text(self, row: int) -> dict[str, Any]:
        return {name: self._value(row, name, self.columns[name][row]) for name in self.columns.column_names}

    def picture(self, row: int, column: str) -> Any:
        if column not in self.names:
            return None
        if column not in self.sources:
            self._require_unique(column)
            file = self._in_small_groups(column)
            sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            self.sources[column] = file, [0, *accumulate(sizes)]
        starts = self.sources[column][1]
        group = bisect_right(starts, row) - 1
        cell = self.pictures(group, column).slice(row - starts[group], 1)
        size = _expanded_bytes(cell)
        if size > MOST_CELL:
            complaint = f"{size >> 20:,} MiB of pictures, more than {MOST_CELL >> 20}; give smaller ones"
            raise UserError(f"{self.path}: row {row}, column {column}: {complaint}")
        return cell[0].as_py()

    def first(self) -> dict[str, Any]:
        found = {}
        for name in self.names:
            if self._stored_bytes(self.file, name, 0) <= GROUP_BYTES:
                with suppress(UserError):
                    found[name] = self.picture(0, name)
        return found

    def _require_unique(self, column: str) -> None:
        if column in self.doubled:
            count = self.names.count(column)
            raise UserError(f"{self.path}: {count} columns named {column}; rename or drop all but one")

    def _value(self, row: int, column: str, cell: pa.Scalar) -> Any:
        try:
            return cell.as_py()
        except (ValueError, OverflowError) as error:  # a time in nanoseconds, or beyond the year 9999
            why = str(error).partition("\n")[0][:100]
            raise UserError(f"{self.path}: row {row}, column {column}: not a value of Python's ({why})") from None

    def _read_pictures(self, group: int, column: str) -> pa.ChunkedArray:
        file, _ = self.sources[column]
        self._check_size(column, self._stored_bytes(file, column, group))
        return self._read(file, [group], [column])[column]

    def _open(self, source: Path | BinaryIO, **more: Any) -> pq.ParquetFile:
        try:  # without pre-buffering and with a small buffer, reading a huge row group in batches needs little memory
            return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, **more)
        except FileNotFoundError:
            raise missing(self.path) from None
        except DAMAGE as error:
            raise self._unreadable(error) from error

    def _open_shared(self, source: Path | BinaryIO, plain: pq.ParquetFile) -> pq.ParquetFile:
        """The same file, opened so that a text or picture that many rows share is in memory once (as a dictionary)."""
        groups = [plain.metadata.row_group(group) for group in range(plain.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        texts = {chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"}
        deltas = {chunk.path_in_schema for chunk in chunks if DELTAS & {*chunk.encodings}}
        return self._open(source, metadata=plain.metadata, read_dictionary=list(texts - deltas))

    def _fields_in_text(self) -> set[str]:
        """The names of fields in columns that hold objects as JSON text, taken from the first row."""
        texts = [field.name for field in self.plain.schema_arrow if pa.types.is_string(field.type)]
        try:
            first = next(self.plain.iter_batches(1, columns=texts)).to_pylist() if texts and len(self) else []
        except DAMAGE as error:
            raise self._unreadable(error) from error
        return set(names_in(first[0])) if first else set()

    def _read(self, file: pq.ParquetFile, groups: Iterable[int], columns: list[str]) -> pa.Table:
        try:
            # One group at a time: each has its own dictionaries, which pyarrow cannot join inside lists and structs.
            tables = []
            size = 0
            for group in groups:
                tables.append(self._read_group(file, group, columns, size))
                size += tables[-1].nbytes
            table = pa.concat_tables(tables)
            table.validate(full=True)  # as most writers store no checksums
            return table
        except DAMAGE as error:
            raise self._unreadable(error) from error

    def _read_group(self, file: pq.ParquetFile, group: int, columns: list[str], size: int) -> pa.Table:
        """One row group. Where values cannot stay shared it is read in batches, so that the sum of their sizes and
        `size`, the bytes of the groups before it, can be checked."""
        chunks = [chunk for column in columns for chunk in self._chunks(file, column, group)]
        extended = any("extension<" in str(self.plain.schema_arrow.field(column).type) for column in columns)
        if not extended and not any(DELTAS & {*chunk.encodings} for chunk in chunks):
            return file.read_row_groups([group], columns=columns)
        batches = []
        for batch in file.iter_batches(ROWS_PER_CUT, [group], columns):
            batches.append(batch)
            size += batch.nbytes
            self._check_size(", ".join(columns), size)
        return pa.Table.from_batches(batches)

    def _unreadable(self, error: Exception) -> UserError:
        why = str(error).partition("\n")[0][:100]
        return UserError(f"{self.path}: not a Parquet file, or cut short or damaged ({why}); get it again")

    def _chunks(self, file: pq.ParquetFile, column: str, group: int) -> list[pq.ColumnChunkMetaData]:
        """The metadata of a column in a row group: several chunks where it has fields."""
        found = file.metadata.row_group(group)
        chunks = [found.column(i) for i in range(found.num_columns)]
        return [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]

    def _stored_bytes(self, file: pq.ParquetFile, column: str, group: int) -> int:
        """Bytes that a row group of a column takes when it is read: its decompressed pages, and 8 for each value. A
        value of fixed length takes its length instead of 8, because such values are not shared."""
        schema = file.metadata.schema
        lengths = {leaf.path: max(8, leaf.length or 0) for leaf in map(schema.column, range(len(schema)))}
        chunks = self._chunks(file, column, group)
        return sum(chunk.total_uncompressed_size + lengths[chunk.path_in_schema] * chunk.num_values for chunk in chunks)

    def _check_size(self, column: str, size: int) -> None:
        if size > MOST_COLUMN:
            complaint = f"unpacks to {size / 1e9:.1f} GB, more than {MOST_COLUMN / 1e9:.1f}; cut the file up"
            raise UserError(f"{self.path}: column {column}: {complaint}")

    def _in_small_groups(self, column: str) -> pq.ParquetFile:
        """The file, if its row groups are small; else a copy of the column in small groups, in a temporary file.
        UserError where the column is compressed so much that it cannot contain pictures."""
        unpacked, packed, largest = 0, 0, 0
        for group in range(self.plain.num_row_groups):
            chunks = self._chunks(self.plain, column, group)
            size = sum(chunk.total_uncompressed_size for chunk in chunks)
            largest = max(largest, size)
            unpacked += size
            packed += sum(chunk.total_compressed_size for chunk in chunks)
        if largest <= GROUP_BYTES:
            return self.file
        if unpacked > MOST_PACKED * packed:
            complaint = f"unpacks to {unpacked / 1e9:.1f} GB, over {MOST_PACKED} times of what it takes in the file"
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
        return self._open_shared(copy, self._open(copy))


def _fields(column: pa.Field, prefix: str = "") -> set[str]:
    """The names of a column and of all fields inside it."""
    name = f"{prefix}{column.name}"
    names = {name}
    if pa.types.is_struct(column.type):
        for i in range(column.type.num_fields):
            names |= _fields(column.type.field(i), f"{name}.")
    return names


def _expanded_bytes(array: pa.Array | pa.ChunkedArray) -> int:
    """Bytes that an array would take if no value were shared."""
    kind = array.type
    if isinstance(array, pa.ChunkedArray):
        return sum(map(_expanded_bytes, array.chunks))
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(array.dictionary)
        return pc.sum(lengths.take(array.indices)).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(map(_expanded_bytes, array.flatten()))
    if pa.types.is_map(kind):
        first = array.offsets[0].as_py()
        length = array.offsets[-1].as_py() - first
        return _expanded_bytes(array.keys.slice(first, length)) + _expanded_bytes(array.items.slice(first, length))
    if hasattr(array, "flatten"):  # lists of all kinds
        return 8 * len(array) + _expanded_bytes(array.flatten())
    return array.nbytes


# ---- JSON


def _json_table(path: Path) -> Table:
    """A JSON file by its first characters, not by its name: many `.json` files have one object per line."""
    first = [line.removeprefix(b"\xef\xbb\xbf").lstrip() for _, line in islice(lines(path), 2)]
    array = bool(first) and first[0].startswith(b"[")
    if path.suffix.lower() == ".json" and not array:
        array = len(first) < 2 or not _object(first[0].decode("utf-8", "replace"))
    return JsonArray(path) if array else JsonLines(path)


class JsonLines:
    """A file with one JSON object per line; blank lines are skipped."""

    def __init__(self, path: Path):
        self.path = path
        self.offsets = array("Q", (offset for offset, _ in lines(path)))
        self.names = list(self.text(0)) if self.offsets else []
        self.fields = set(names_in(self.text(0))) if self.offsets else set()

    def __len__(self) -> int:
        return len(self.offsets)

    def keep(self, columns: Iterable[str]) -> None:
        pass  # `text` reads whole lines

    def text(self, row: int) -> dict[str, Any]:
        with opened(self.path) as file:
            file.seek(self.offsets[row])
            return json_object(self.path, row, file.readline())

    def picture(self, row: int, column: str) -> Any:
        return self.text(row).get(column)

    def first(self) -> dict[str, Any]:
        return self.text(0)


class JsonArray:
    """A file with one array of objects."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = json_file(path)
        if isinstance(self.rows, dict):
            lists = [self.rows[name] for name in WRAPPERS if isinstance(self.rows.get(name), list)]
            self.rows = next((rows for rows in lists if rows and isinstance(rows[0], dict)), self.rows)
        one_row = isinstance(self.rows, dict) and not all(isinstance(value, dict) for value in self.rows.values())
        if one_row and len(self.rows) > 2:  # at least question, answer and picture
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

    def first(self) -> dict[str, Any]:
        return dict(self.rows[0])


# ---- CSV

csv.field_size_limit(MOST_CELL)  # pictures may be in cells, in base64


class Csv:
    """A file with the names of its columns in the first row: .csv with commas, semicolons or tabs, .tsv with tabs.
    Every cell is text; an empty one is None. Raises UserError for a row with more or fewer cells than columns."""

    def __init__(self, path: Path):
        self.path = path
        with opened(path) as file:
            first = file.readline()
        separators = [b"\t"] if path.suffix.lower() == ".tsv" else [b",", b";", b"\t"]
        self.separator = next((each for each in separators if each in first), separators[0]).decode()
        records = self._records(0)
        _, self.names = next(records, (0, []))
        doubled = [name for name, times in Counter(self.names).items() if times > 1]
        if doubled:
            raise UserError(f"{path}: several columns named {doubled[0]!r:.40}; rename or drop all but one")
        self.offsets = array("Q")
        for row, (offset, cells) in enumerate(records):
            if len(cells) != len(self.names):
                complaint = f"{len(cells)} cells under {len(self.names)} columns"
                raise UserError(f"{path}: row {row}: {complaint}; write text that holds {self.separator!r} in quotes")
            self.offsets.append(offset)
        self.fields = set(names_in(self.text(0))) if self.offsets else set()

    def __len__(self) -> int:
        return len(self.offsets)

    def keep(self, columns: Iterable[str]) -> None:
        pass

    def text(self, row: int) -> dict[str, Any]:
        _, cells = next(self._records(self.offsets[row]))
        return {name: cell or None for name, cell in zip(self.names, cells)}

    def picture(self, row: int, column: str) -> Any:
        return self.text(row).get(column)

    def first(self) -> dict[str, Any]:
        return self.text(0)

    def _records(self, start: int) -> Iterator[tuple[int, list[str]]]:
        """The cells of each row from the offset `start` on, and the row's offset. Blank lines are skipped."""
        place = start

        def taken() -> Iterator[str]:  # the reader takes as many lines as a row has
            nonlocal place
            for line in file:
                place += len(line)
                yield line.decode().removeprefix("\ufeff")

        with opened(self.path) as file:
            file.seek(start)
            rows = csv.reader(taken(), delimiter=self.separator, strict=True)
            while True:
                offset = place
                try:
                    cells = next(rows, None)
                except UnicodeDecodeError:
                    raise UserError(f"{self.path}: not UTF-8 text; save it as UTF-8") from None
                except csv.Error as error:
                    raise UserError(f"{self.path}: not a CSV file at byte {offset} ({error}); mend it there") from None
                if cells is None:
                    return
                if cells:
                    yield offset, cells
