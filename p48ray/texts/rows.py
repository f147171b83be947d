"""Records of a file of texts, one after the other: .jsonl by lines and .parquet by rows, from any
store, whole or a part of the file at a time.

A part is what can be read without the rest: a row group of a .parquet, a span of bytes of a .jsonl
(a line belongs to the part in which it begins).
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from p48ray.errors import CalibrationError
from p48ray.store.base import Store

COLUMNS = ("text", "messages", "conversations")
"""Of these the first that a record has is its document."""
EXTRA_COLUMNS = ("system",)
"""Read beside `conversations`."""
SPAN_BYTES = 16 * 2**20
READ_BYTES = 2**20
MAX_ROW_BYTES = 64 * 2**20
"""Of a line, and of what a row of a .parquet decodes to."""
ROWS_AT_ONCE = 64
MAX_LISTED_VALUES = 2**26
"""Of a row group's lists: their levels take memory whether or not there is text in them."""
LARGE_GROUP_BYTES, MAX_EXPANSION = 512 * 2**20, 100
"""A row group that decodes to more than the first, and to more than so many times what is stored,
is no text: its pages are not decoded to find that out."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file of records. `where`: how messages name it."""

    store: Store
    key: str
    size_bytes: int
    where: str

    @property
    def is_parquet(self) -> bool:
        return self.key.endswith(".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One record, and how messages name its place."""

    where: str
    values: dict[str, Any]


def read_rows(file: TextFile, key: str) -> Iterator[Row]:
    """All records of a file. Args: key: dotted configuration key, for messages. Raises:
    CalibrationError naming the file and the line or row."""
    if not file.is_parquet:
        yield from _jsonl_rows(file, 0, file.size_bytes, key)
        return
    with _opened(file, key) as parquet:
        for group in range(parquet.num_row_groups):
            yield from _group_rows(file, parquet, group, key)


def num_parts(file: TextFile, key: str) -> int:
    """Parts of a file. Reads the end of a .parquet, nothing of a .jsonl."""
    if not file.is_parquet:
        return -(-file.size_bytes // SPAN_BYTES)
    with _opened(file, key) as parquet:
        return int(parquet.num_row_groups)


def read_part(file: TextFile, part: int, key: str) -> Iterator[Row]:
    """Records of one part; reads no more of it than is asked for."""
    if not file.is_parquet:
        yield from _jsonl_rows(
            file, part * SPAN_BYTES, min(file.size_bytes, (part + 1) * SPAN_BYTES), key
        )
        return
    with _opened(file, key) as parquet:
        yield from _group_rows(file, parquet, part, key)


def _jsonl_rows(file: TextFile, start: int, end: int, key: str) -> Iterator[Row]:
    """Records of the lines that begin in bytes [start, end). Lines are numbered where the file is
    read from its start."""
    for number, (position, line) in enumerate(_lines(file, start, end, key), start=1):
        if line.strip():
            where = (
                f"{key}: {file.where}, line {number}"
                if not start
                else f"{key}: {file.where}, line at byte {position}"
            )
            yield Row(where, _parsed(line, where))


def _lines(file: TextFile, start: int, end: int, key: str) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of lines that begin in [start, end), without their ends. A line that
    begins before `start` is the part's before."""
    position = max(0, start - 1)  # the byte before tells whether a line begins at `start`
    buffer, line_start, is_first = b"", position, start > 0
    while True:
        data = (
            file.store.get_range(file.key, position, min(READ_BYTES, file.size_bytes - position))
            if position < file.size_bytes
            else b""
        )
        position += len(data)
        *lines, buffer = (
            (buffer + data).split(b"\n") if data else ([buffer, b""] if buffer else [b""])
        )
        for line in lines:
            if not is_first and line_start >= end:
                return
            if not is_first:
                yield line_start, line
            is_first, line_start = False, line_start + len(line) + 1
        if not data or (line_start >= end and not is_first):
            return
        if len(buffer) > MAX_ROW_BYTES:
            raise CalibrationError(
                f"{key}: {file.where}: the line at byte {line_start} is longer than"
                f" {MAX_ROW_BYTES} bytes"
            )


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where}: not UTF-8 (byte {error.start} of the line)") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not any(name in values for name in COLUMNS):
        raise CalibrationError(
            f"{where}: expected a JSON object with a 'text', found {line[:60]!r} (or with"
            " 'messages' or 'conversations')"
        )
    return values


def _opened(file: TextFile, key: str, dictionaries: Sequence[str] = ()) -> Any:
    """A pyarrow ParquetFile. `dictionaries`: leaves whose values are kept once however often they
    are named. Raises: CalibrationError for what is none, or has no column of ours."""
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(
            pyarrow.PythonFile(RangeReader(file), mode="r"),
            buffer_size=READ_BYTES,
            pre_buffer=False,
            read_dictionary=list(dictionaries),
        )
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{key}: {file.where}: not a Parquet file: {error}") from None
    names = opened.schema_arrow.names
    if not any(name in names for name in COLUMNS):
        opened.close()
        raise CalibrationError(
            f"{key}: {file.where}: expected a column 'text', 'messages' or 'conversations', found"
            f" {', '.join(names) or 'none'}"
        )
    return opened


def _group_rows(file: TextFile, parquet: Any, group: int, key: str) -> Iterator[Row]:
    """Rows of one row group, numbered from 1 in the file; pages are read as they are needed."""
    import pyarrow

    names = parquet.schema_arrow.names
    column = next(name for name in COLUMNS if name in names)
    wanted = [column, *(n for n in EXTRA_COLUMNS if n in names and column == "conversations")]
    first = 1 + sum(parquet.metadata.row_group(i).num_rows for i in range(group))
    expected = _Group.of(parquet, group, wanted)
    expected.check(f"{key}: {file.where}", first)
    try:
        with _opened(file, key, expected.lists) if expected.lists else nullcontext(parquet) as read:
            for batch in read.iter_batches(
                expected.rows_at_once, row_groups=[group], columns=wanted, use_threads=False
            ):
                for row in range(batch.num_rows):
                    where = f"{key}: {file.where}, row {first + row}"
                    one = batch.slice(row, 1)
                    if (found := sum(map(_decoded_bytes, one.columns))) > MAX_ROW_BYTES:
                        raise CalibrationError(
                            f"{where}: expected at most {MAX_ROW_BYTES} bytes, found {found}"
                        )
                    yield Row(
                        where, {name: _value(one.column(name)[0], name, where) for name in wanted}
                    )
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(
            f"{key}: {file.where}, row group {group}: can not be read: {error}"
        ) from None


@dataclass(frozen=True, slots=True)
class _Group:
    """What the file's end says of the columns of a row group that are read.

    `num_bytes` are those of the decoded pages, `num_stored` of the pages as they lie in the file.
    `lists`: leaves inside lists, where a row may name a value of the page's dictionary any number
    of times.
    """

    num_rows: int
    num_bytes: int
    num_stored: int
    num_values: int
    lists: tuple[str, ...]

    @classmethod
    def of(cls, parquet: Any, group: int, wanted: Sequence[str]) -> "_Group":
        """Args: parquet: a ParquetFile. group: its number. wanted: columns."""
        held = parquet.metadata.row_group(group)
        leaves = [
            (held.column(i), parquet.schema.column(i).max_repetition_level)
            for i in range(held.num_columns)
            if held.column(i).path_in_schema.split(".")[0] in wanted
        ]
        return cls(
            num_rows=held.num_rows,
            num_bytes=sum(leaf.total_uncompressed_size for leaf, _ in leaves),
            num_stored=sum(leaf.total_compressed_size for leaf, _ in leaves),
            num_values=sum(leaf.num_values for leaf, level in leaves if level),
            lists=tuple(leaf.path_in_schema for leaf, level in leaves if level),
        )

    @property
    def rows_at_once(self) -> int:
        """As many as have MAX_ROW_BYTES together: on average where dictionaries are kept, else
        though all were the largest that there can be."""
        if self.lists:
            return max(1, self.num_rows * MAX_ROW_BYTES // max(self.num_bytes, MAX_ROW_BYTES))
        return max(1, min(ROWS_AT_ONCE, MAX_ROW_BYTES // max(self.num_bytes, 1)))

    def check(self, where: str, first: int) -> None:
        """Raises: CalibrationError where a row must be too large, before a page is decoded.

        Args:
            where: names key and file.
            first: number of the first row.
        """
        last = first + self.num_rows - 1
        rows = f"{where}, row {first}" if self.num_rows == 1 else f"{where}, rows {first} to {last}"
        is_no_text = (
            self.num_bytes > LARGE_GROUP_BYTES and self.num_bytes > MAX_EXPANSION * self.num_stored
        )
        if self.num_bytes > 2 * MAX_ROW_BYTES * self.num_rows or is_no_text:
            raise CalibrationError(
                f"{rows}: expected at most {MAX_ROW_BYTES} bytes a row, found {self.num_bytes} in"
                f" {self.num_rows}, which are stored in {self.num_stored}"
            )
        if self.num_values > MAX_LISTED_VALUES:
            raise CalibrationError(
                f"{rows}: expected at most {MAX_LISTED_VALUES} values in lists, found"
                f" {self.num_values}"
            )


def _decoded_bytes(array: Any) -> int:
    """Bytes of an array's texts, each counted as often as it is named."""
    import pyarrow
    from pyarrow import compute, types

    kind = array.type
    if types.is_list(kind) or types.is_large_list(kind):
        return _decoded_bytes(array.flatten())
    if types.is_struct(kind):
        return sum(map(_decoded_bytes, array.flatten()))
    if types.is_dictionary(kind):
        lengths = compute.binary_length(array.dictionary).cast(pyarrow.int64())
        return compute.sum(lengths.take(array.indices)).as_py() or 0
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind):
        return compute.sum(compute.binary_length(array).cast(pyarrow.int64())).as_py() or 0
    return int(array.nbytes)


def _value(scalar: Any, column: str, where: str) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where}: {column!r} is not UTF-8 (byte {error.start})") from None


class RangeReader(io.RawIOBase):
    """A file of a store as Python's file object, read by ranges."""

    def __init__(self, file: TextFile) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size_bytes}[
            whence
        ]
        self.position = base + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.file.size_bytes - self.position)
        num_bytes = left if size is None or size < 0 else min(size, left)
        data = (
            self.file.store.get_range(self.file.key, self.position, num_bytes) if num_bytes else b""
        )
        self.position += len(data)
        return data
