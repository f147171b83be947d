"""Records of a file of texts, one after the other: .jsonl by lines and .parquet by rows, from any
store, whole or a part of the file at a time.

A part is what can be read without the rest: a row group of a .parquet, a span of bytes of a .jsonl
(a line belongs to the part in which it begins).
"""

import io
import json
from collections.abc import Iterator
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
MAX_LINE_BYTES = 64 * 2**20
ROWS_AT_ONCE = 64


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
        if len(buffer) > MAX_LINE_BYTES:
            raise CalibrationError(
                f"{key}: {file.where}: the line at byte {line_start} is longer than"
                f" {MAX_LINE_BYTES} bytes"
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


def _opened(file: TextFile, key: str) -> Any:
    """A pyarrow ParquetFile. Raises: CalibrationError for what is none, or has no column of
    ours."""
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(
            pyarrow.PythonFile(RangeReader(file), mode="r"),
            buffer_size=READ_BYTES,
            pre_buffer=False,
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
    try:
        for batch in parquet.iter_batches(
            ROWS_AT_ONCE, row_groups=[group], columns=wanted, use_threads=False
        ):
            for row in range(batch.num_rows):
                where = f"{key}: {file.where}, row {first + row}"
                yield Row(
                    where, {name: _value(batch.column(name)[row], name, where) for name in wanted}
                )
            first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(
            f"{key}: {file.where}, row group {group}: can not be read: {error}"
        ) from None


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
