"""Safetensors headers: reading them by range, checking every claim they make, and writing them.

Layout of a file: 8 bytes little-endian length n, n bytes of JSON (name -> dtype, shape,
data_offsets), then the data. Offsets count from the end of the header. Source:
https://github.com/huggingface/safetensors, "Format". Departures: names that could act as paths are
refused, because sources are other people's files; sub-byte types (F4, F6) are not known, because no
source or output here holds them.
"""

import json
import re
import struct
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from p48ray.errors import P48Error, SourceError
from p48ray.store import Store

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own limit."""

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)  # fmt: skip
DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}
)
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

PT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""transformers refuses files whose metadata does not say which framework wrote them."""

_BAD_NAME = re.compile(r"\.\.|[/\\\x00-\x1f\x7f\ud800-\udfff]")
_METADATA_KEY = "__metadata__"
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one stored tensor lies. `dtype` is safetensors' name ("BF16"), `start` counts from the
    start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    num_bytes: int


def torch_dtype(name: str) -> torch.dtype:
    """'BF16' -> torch.bfloat16. Raises: P48Error for an unknown name."""
    if name not in TORCH_DTYPES:
        raise P48Error(f"unknown safetensors dtype {name!r}; known are {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'BF16'. Raises: P48Error for a dtype that files here do not hold."""
    if dtype not in _DTYPE_NAMES:
        raise P48Error(
            f"{dtype} has no safetensors name here; known are {', '.join(map(str, _DTYPE_NAMES))}"
        )
    return _DTYPE_NAMES[dtype]


def read_header_bytes(store: Store, file: str) -> tuple[bytes, int]:
    """The header's JSON as stored, and the size of the whole file. Raises: SourceError if they
    cannot belong to a safetensors file."""
    info = store.head(file)
    if info is None:
        raise SourceError(f"{file}: expected a safetensors file in {store.uri}, found none")
    if info.size_bytes < _LENGTH_BYTES:
        raise SourceError(
            f"{file}: expected at least {_LENGTH_BYTES} bytes (the header's length), found"
            f" {info.size_bytes}: truncated?"
        )
    (length,) = struct.unpack("<Q", store.get_range(file, 0, _LENGTH_BYTES))
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"{file}: expected a header of at most {MAX_HEADER_BYTES} bytes, found {length}: not a"
            " safetensors file?"
        )
    if length > info.size_bytes - _LENGTH_BYTES:
        raise SourceError(
            f"{file}: expected a header of {length} bytes, found a file of {info.size_bytes} bytes:"
            " truncated?"
        )
    return store.get_range(file, _LENGTH_BYTES, length), info.size_bytes


def parse_header(file: str, raw: bytes, size_bytes: int) -> dict[str, TensorEntry]:
    """The tensors that the header's JSON describes, checked against each other and the file's size.
    Raises: SourceError."""
    if raw.startswith(BOM_UTF8):  # which other JSON may have, and this format may not
        raise SourceError(f"{file}: expected JSON that begins with {{, found {raw[:20]!r}")
    records = json_object(file, raw)
    metadata = records.pop(_METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise SourceError(
            f"{file}: expected {_METADATA_KEY} to map text to text, found {str(metadata)[:200]}"
        )
    data_start = _LENGTH_BYTES + len(raw)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    entries = {
        name: _entry(file, name, record, data_start, shapes) for name, record in records.items()
    }
    _check_coverage(file, entries.values(), data_start, size_bytes)
    return entries


def json_object(file: str, raw: bytes, *, unique_keys: bool = True) -> dict[str, Any]:
    """Parses a file's JSON, which may begin with a byte order mark. Raises: SourceError unless it
    is UTF-8, JSON, an object, and (if asked) says nothing twice."""
    try:
        found = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_refuse_duplicates if unique_keys else None
        )
    # ValueError: UnicodeDecodeError, JSONDecodeError and our own
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: expected JSON in UTF-8, found {error}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def unmarked(file: str, raw: bytes) -> bytes:
    """The same without the byte order mark that some programs begin JSON with, and that its other
    readers refuse; any other file as it is."""
    return raw.removeprefix(BOM_UTF8) if file.endswith(".json") else raw


def encode_header(
    entries: Sequence[tuple[str, str, Sequence[int]]],
    metadata: Mapping[str, str] | None = PT_METADATA,
) -> bytes:
    """The start of a file that holds the tensors (name, dtype, shape) in the given order without
    gaps; data follows directly.

    The JSON is padded with spaces so that data starts at a multiple of 8. The order is the
    caller's; readers that map files want each tensor at a multiple of its item size, hence wide
    types first where sizes are odd. Raises: P48Error for a repeated name.
    """
    header: dict[str, Any] = {_METADATA_KEY: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in entries:
        if name in header or name == _METADATA_KEY:
            raise P48Error(f"a safetensors header can hold {name!r} only once")
        start, end = end, end + prod(shape) * torch_dtype(dtype).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated!r} more than once")
    return found


def _entry(
    file: str,
    name: str,
    record: object,
    data_start: int,
    shapes: dict[tuple[int, ...], tuple[int, ...]],
) -> TensorEntry:
    """One tensor's record, checked by itself. `shapes` makes equal shapes one object: a large model
    has 200,000 tensors of few shapes."""
    if not name or _BAD_NAME.search(name):
        raise SourceError(
            f"{file}: tensor {name!r}: expected a name without '..', '/', '\\' and control"
            " characters"
        )
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise SourceError(
            f"{file}: tensor {name}: expected dtype, shape and data_offsets, found"
            f" {str(record)[:200]}"
        )
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise SourceError(
            f"{file}: tensor {name}: expected a dtype of {', '.join(DTYPE_BYTES)}, found {dtype!r}"
        )
    if not _are_sizes(shape):
        raise SourceError(
            f"{file}: tensor {name}: expected a shape of integers >= 0, found {shape!r}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SourceError(
            f"{file}: tensor {name}: expected data_offsets [start, end] with 0 <= start <= end,"
            f" found {offsets!r}"
        )
    start, end = offsets
    expected_bytes = prod(shape) * DTYPE_BYTES[dtype]
    if end - start != expected_bytes:
        raise SourceError(
            f"{file}: tensor {name}: expected {expected_bytes} bytes for {dtype} {shape}, found"
            f" {end - start} ({offsets})"
        )
    shape = tuple(shape)
    return TensorEntry(
        name, dtype, shapes.setdefault(shape, shape), file, data_start + start, end - start
    )


def _are_sizes(values: object) -> bool:
    """JSON's true is an int to Python, hence the exact type."""
    if not isinstance(values, list) or not {*map(type, values)} <= {int}:
        return False
    return min(values, default=0) >= 0


def _check_coverage(
    file: str, entries: Iterable[TensorEntry], data_start: int, size_bytes: int
) -> None:
    """Raises: SourceError unless the tensors cover the data exactly: no hole, no overlap, and the
    end
    is the file's end."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.num_bytes)):
        if entry.start != position:
            kind = "hole" if entry.start > position else "overlap"
            raise SourceError(
                f"{file}: tensor {entry.name}: expected data at offset {position - data_start},"
                f" where the one before it ends, found offset {entry.start - data_start} ({kind})"
            )
        position += entry.num_bytes
    if position != size_bytes:
        kind = (
            "truncated; download it again"
            if position > size_bytes
            else "bytes that belong to no tensor"
        )
        raise SourceError(
            f"{file}: expected {position} bytes by its header, found a file of {size_bytes} bytes"
            f" ({kind})"
        )
