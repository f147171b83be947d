"""Records of JSON texts: one a line, or in a file whose name ends in .json also as the objects of
one array. Either may be packed with gzip (.gz), and then has one part: it can only be read from its
beginning.
"""

import codecs
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from p48ray.errors import CalibrationError
from p48ray.texts.text_file import (
    MAX_EXPANSION,
    MAX_ROW_BYTES,
    READ_BYTES,
    RangeReader,
    Row,
    TextFile,
)

SPAN_BYTES = 16 * 2**20
SHOWN = 60
"""Bytes or characters of what was found, in messages."""
WHITE = re.compile(r"[ \t\n\r]*")
UNPACK = "unpack it, or pack it with gzip as .jsonl.gz"
OTHER_FORMS = {
    b"PAR1": "Parquet: its name has to end in .parquet or .pq",
    b"\x1f\x8b": "gzip: its name has to end in .gz",
    b"\x28\xb5\x2f\xfd": f"zstd: {UNPACK}",
    b"BZh": f"bzip2: {UNPACK}",
    b"\xfd7zXZ": f"xz: {UNPACK}",
    b"PK\x03\x04": f"zip: {UNPACK}",
}
"""How files begin that are no JSON, and what to do about it."""


def all_json_rows(file: TextFile, key: str) -> Iterator[Row]:
    """All records of a file. Args: key: dotted configuration key, for messages. Raises:
    CalibrationError naming the file and the line or the object's number."""
    if _is_array(file, key):
        yield from _array_rows(file, key)
    else:
        yield from _line_rows(file, 0, sys.maxsize, key)


def num_json_parts(file: TextFile, key: str) -> int:
    """Spans of lines; 1 for an array and for what is packed."""
    if file.ends_with(".gz") or _is_array(file, key):
        return 1
    return -(-file.size_bytes // SPAN_BYTES)


def part_of_json_rows(file: TextFile, part: int, key: str) -> Iterator[Row]:
    """Records of one part; reads no more of it than is asked for."""
    if file.ends_with(".gz") or _is_array(file, key):
        yield from all_json_rows(file, key)
    else:
        yield from _line_rows(file, part * SPAN_BYTES, (part + 1) * SPAN_BYTES, key)


def _is_array(file: TextFile, key: str) -> bool:
    """Data sets give .json to arrays and to lines alike."""
    if not file.ends_with(".json", ".json.gz"):
        return False
    text = _Characters(_decoded(_blocks(file, 0, key), f"{key}: {file.where}"))
    return text.peek() == "["


# Bytes.


def _blocks(file: TextFile, position: int, key: str) -> Iterator[bytes]:
    """The file's bytes from `position` on, of a packed file those that it unpacks to; read as they
    are asked for."""
    if file.ends_with(".gz"):
        assert position == 0, "what is packed is read from its beginning"
        yield from _unpacked(file, key)
        return
    while position < file.size_bytes:
        num_bytes = min(READ_BYTES, file.size_bytes - position)
        yield file.store.get_range(file.key, position, num_bytes)
        position += num_bytes


def _unpacked(file: TextFile, key: str) -> Iterator[bytes]:
    """What unpacks to more than SPAN_BYTES, and to more than MAX_EXPANSION times what was read of
    it, is no text, and a small file may hold hours of it."""
    packed, unpacked_bytes = RangeReader(file), 0
    where = f"{key}: {file.where}"
    try:
        with gzip.GzipFile(fileobj=io.BufferedReader(packed, READ_BYTES)) as stream:
            while data := stream.read(READ_BYTES):
                unpacked_bytes += len(data)
                limit = max(SPAN_BYTES, MAX_EXPANSION * packed.position)
                if unpacked_bytes > limit:
                    raise CalibrationError(
                        f"{where}: expected text that unpacks to at most {MAX_EXPANSION} times what"
                        f" is stored, found {unpacked_bytes} bytes in the first {packed.position}"
                    )
                yield data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(f"{where}: can not be unpacked with gzip: {error}") from None


# Lines.


def _line_rows(file: TextFile, start: int, end: int, key: str) -> Iterator[Row]:
    """Records of the lines that begin in bytes [start, end). Lines are numbered where the file is
    read from its start."""
    for number, (position, line) in enumerate(_lines(file, start, end, key), start=1):
        if line.strip():
            where = (
                f"{key}: {file.where}, line {number}"
                if not start
                else f"{key}: {file.where}, line at byte {position}"
            )
            yield Row(where, _parsed(line, where, is_first=position == 0))


def _lines(file: TextFile, start: int, end: int, key: str) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of lines that begin in [start, end), without their ends, and without the
    byte order mark that some programs begin a file with. A line that begins before `start` is the
    part's before."""
    position = max(0, start - 1)  # the byte before tells whether a line begins at `start`
    buffer, line_start, is_first = b"", position, start > 0
    for data in chain(_blocks(file, position, key), [b""]):
        *lines, buffer = (
            (buffer + data).split(b"\n") if data else ([buffer, b""] if buffer else [b""])
        )
        for line in lines:
            if not is_first and line_start >= end:
                return
            if not is_first:
                yield line_start, line if line_start else line.removeprefix(codecs.BOM_UTF8)
            is_first, line_start = False, line_start + len(line) + 1
        if line_start >= end and not is_first:
            return
        if len(buffer) > MAX_ROW_BYTES:
            raise CalibrationError(
                f"{key}: {file.where}: the line at byte {line_start} is longer than"
                f" {MAX_ROW_BYTES} bytes"
            )


def _parsed(line: bytes, where: str, is_first: bool) -> dict[str, Any]:
    if is_first and (
        found := next((f for start, f in OTHER_FORMS.items() if line.startswith(start)), None)
    ):
        raise CalibrationError(f"{where}: expected JSON in UTF-8, found {found}")
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where}: not UTF-8 (byte {error.start} of the line)") from None
    except (ValueError, RecursionError):
        values = None
    return _record(values, where, line[:SHOWN])


def _record(values: object, where: str, shown: bytes | str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CalibrationError(f"{where}: expected a JSON object, found {shown!r}")
    return values


# Arrays.


def _array_rows(file: TextFile, key: str) -> Iterator[Row]:
    """The objects of an array, one in memory at a time."""
    text = _Characters(_decoded(_blocks(file, 0, key), f"{key}: {file.where}"))
    text.take("[")
    number = 0
    while number or text.peek() != "]":
        number += 1
        where = f"{key}: {file.where}, object {number} of the array"
        shown = text.shown()
        yield Row(where, _record(text.value(where), where, shown))
        if not text.take(","):
            break
    if not text.take("]") or text.peek():
        raise CalibrationError(
            f"{key}: {file.where}: expected the array to end after object {number} and the file"
            f" with it, or a comma, found {text.shown()!r}"
        )


def _decoded(blocks: Iterable[bytes], where: str) -> Iterator[str]:
    decoder, position = codecs.getincrementaldecoder("utf-8-sig")(), 0
    for data in chain(blocks, [b""]):
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = position + len(data) - len(error.object) + error.start
            raise CalibrationError(f"{where}: not UTF-8 (byte {at})") from None
        position += len(data)


class _Characters:
    """Text that is read as it is needed. What lies before `at` has been used."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces, self.text, self.at = pieces, "", 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Read as much again as is held, so that a long value is parsed a few times only. False at
        the end."""
        held = [self.text[self.at :]]
        wanted = len(held[0]) + 1
        while wanted > 0 and (piece := next(self.pieces, None)) is not None:
            held.append(piece)
            wanted -= len(piece)
        has_more = any(held[1:])
        self.text, self.at = "".join(held), 0
        return has_more

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            found = WHITE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, expected: str) -> bool:
        """Whether the next character is this one; it is used then."""
        is_there = self.peek() == expected
        self.at += is_there
        return is_there

    def shown(self) -> str:
        """What comes next, for messages."""
        self.peek()
        return self.text[self.at : self.at + SHOWN]

    def value(self, where: str) -> object:
        """The object that comes next.

        Args:
            where: names its place.
        Raises: CalibrationError for what is none, or larger than MAX_ROW_BYTES.
        """
        while self.peek() == "{":
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
            except RecursionError:
                return None
            except ValueError:  # or it is not all here yet
                if len(self.text) - self.at > MAX_ROW_BYTES:
                    raise CalibrationError(
                        f"{where}: expected a JSON object of at most {MAX_ROW_BYTES} characters,"
                        f" found {self.shown()!r} and no end"
                    ) from None
                if not self.more():
                    return None
            else:
                return value
        return None
