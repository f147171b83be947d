"""Records of a Parquet file by row groups, within memory: a row that decodes to too much is refused
before its pages are decoded."""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from p48ray.errors import CalibrationError
from p48ray.texts.text_file import (
    MAX_EXPANSION,
    MAX_ROW_BYTES,
    READ_BYTES,
    Columns,
    RangeReader,
    Row,
    TextFile,
)

LARGE_BYTES = 512 * 2**20
"""A row group that decodes to more, and to more than MAX_EXPANSION times what is stored, is not
decoded to find out that it is no text."""
ROWS_AT_ONCE = 64
MAX_LISTED_VALUES = 2**26
"""Of a row group's lists: their levels take memory whether or not there is text in them."""


def opened_parquet(
    file: TextFile, key: str, columns: Columns, dictionaries: Sequence[str] = ()
) -> Any:
    """A pyarrow ParquetFile.

    Args:
        file: the file.
        key: dotted configuration key, for messages.
        columns: of which it has to have one with documents.
        dictionaries: leaves whose values are kept once however often they are named.
    Raises: CalibrationError for what is none, or has no such column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(
            pyarrow.PythonFile(RangeReader(file), mode="r"),
            buffer_size=READ_BYTES,
            pre_buffer=False,
            read_dictionary=list(dictionaries),
            # Arrow's JSON would not be read as a dictionary: to it, it is a text like others then
            arrow_extensions_enabled=not dictionaries,
        )
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{key}: {file.where}: not a Parquet file: {error}") from None
    names = opened.schema_arrow.names
    if not any(name in names for name in columns.documents):
        opened.close()
        raise CalibrationError(
            f"{key}: {file.where}: expected a column {columns}, found {', '.join(names) or 'none'}"
        )
    return opened


def rows_of_group(
    file: TextFile, parquet: Any, group: int, key: str, columns: Columns
) -> Iterator[Row]:
    """Rows of one row group, numbered from 1 in the file; pages are read as they are needed.

    Args:
        file: the file.
        parquet: the same, as opened_parquet gives it.
        group: number of the row group.
        key: dotted configuration key, for messages.
        columns: those that are read.
    Raises: CalibrationError naming the row.
    """
    import pyarrow

    schema = parquet.schema_arrow
    wanted = [name for name in columns.all if name in schema.names]
    first = 1 + sum(parquet.metadata.row_group(i).num_rows for i in range(group))
    expected = _Group.of(parquet, group, wanted)
    expected.check(f"{key}: {file.where}", first)
    try:
        with (
            opened_parquet(file, key, columns, expected.lists)
            if expected.lists
            else nullcontext(parquet) as read
        ):
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
                    # types as the file has them, with Arrow's JSON
                    values = {
                        n: _value(one.column(n)[0], schema.field(n).type, n, where) for n in wanted
                    }
                    yield Row(where, values)
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
            self.num_bytes > LARGE_BYTES and self.num_bytes > MAX_EXPANSION * self.num_stored
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
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _decoded_bytes(array.storage)
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


def _value(scalar: Any, kind: Any, column: str, where: str) -> Any:
    try:
        return _plain(scalar.as_py(), kind)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where}: {column!r} is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where}: {column!r} is not JSON: {error}") from None


def _plain(value: Any, kind: Any) -> Any:
    """What as_py gave, as the writer meant it: Arrow's JSON is read, wherever it stands, and a
    field that is null is absent, because a struct has all fields that any row has."""
    from pyarrow import BaseExtensionType, types

    if value is None:
        return None
    if isinstance(kind, BaseExtensionType):
        is_json = kind.extension_name == "arrow.json"
        return json.loads(value) if is_json else _plain(value, kind.storage_type)
    if types.is_dictionary(kind):
        return _plain(value, kind.value_type)
    if types.is_struct(kind):
        found = {field.name: _plain(value[field.name], field.type) for field in kind}
        return {name: inner for name, inner in found.items() if inner is not None}
    if types.is_map(kind):
        return {name: _plain(inner, kind.item_type) for name, inner in value}
    if isinstance(value, list):
        return [_plain(inner, kind.value_type) for inner in value]
    return value
