"""Records of a file of texts, one after the other, from any store, whole or a part of the file at a
time. The file's name says which form it has.

A part is what can be read without the rest: a row group of Parquet, a span of bytes of JSON lines
(a line belongs to the part in which it begins), the whole of anything else.
"""

from collections.abc import Iterator

from p48ray.texts.json_rows import all_json_rows, num_json_parts, part_of_json_rows
from p48ray.texts.parquet_rows import opened_parquet, rows_of_group
from p48ray.texts.text_file import PARQUET_ENDINGS, Columns, Row, TextFile


def read_rows(file: TextFile, key: str, columns: Columns) -> Iterator[Row]:
    """All records of a file. Args: key: dotted configuration key, for messages. columns: those
    that are read of Parquet. Raises: CalibrationError naming the file and the line or row."""
    if not file.ends_with(*PARQUET_ENDINGS):
        yield from all_json_rows(file, key)
        return
    with opened_parquet(file, key, columns) as parquet:
        for group in range(parquet.num_row_groups):
            yield from rows_of_group(file, parquet, group, key, columns)


def num_parts(file: TextFile, key: str, columns: Columns) -> int:
    """Parts of a file. Reads the end of a .parquet, the beginning of a .json, nothing of others."""
    if not file.ends_with(*PARQUET_ENDINGS):
        return num_json_parts(file, key)
    with opened_parquet(file, key, columns) as parquet:
        return int(parquet.num_row_groups)


def read_part(file: TextFile, part: int, key: str, columns: Columns) -> Iterator[Row]:
    """Records of one part; reads no more of it than is asked for.

    Args:
        file: the file.
        part: its number.
        key, columns: as read_rows takes them.
    """
    if not file.ends_with(*PARQUET_ENDINGS):
        yield from part_of_json_rows(file, part, key)
        return
    with opened_parquet(file, key, columns) as parquet:
        yield from rows_of_group(file, parquet, part, key, columns)
