"""Headers: what is read back is what was written, and every false claim is refused with file,
tensor, expected and found."""

import json
import struct
import uuid
from typing import Any

import pytest
import torch
from safetensors.torch import save

from p48ray.checkpoint.header import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    TORCH_DTYPES,
    TensorEntry,
    dtype_name,
    encode_header,
    json_object,
    parse_header,
    torch_dtype,
    unmarked,
)
from p48ray.errors import P48Error, SourceError
from p48ray.store import MemoryStore
from tests.checkpoint.entries import read_entries


def store_with(data: bytes) -> MemoryStore:
    store = MemoryStore(uuid.uuid4().hex)
    store.put("f.safetensors", data)
    return store


def raw_file(header: bytes | dict[str, Any], num_data_bytes: int) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(num_data_bytes)


def record(dtype: str, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_header_of_the_reference_writer_is_read() -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b.c": torch.ones(5, dtype=torch.uint8),
        "s": torch.tensor(7),
    }
    data = save(tensors, metadata={"format": "pt"})
    entries = read_entries(store_with(data), "f.safetensors")
    assert set(entries) == {"a", "b.c", "s"}
    for name, tensor in tensors.items():
        entry = entries[name]
        assert (entry.name, entry.file, entry.shape) == (name, "f.safetensors", tuple(tensor.shape))
        assert torch_dtype(entry.dtype) is tensor.dtype
        assert data[entry.start : entry.start + entry.num_bytes] == tensor.numpy().tobytes()


def test_encoded_header_is_read_back_in_order_with_contiguous_offsets() -> None:
    specs = [
        ("z", "F32", (2, 3)),
        ("a", "F8_E4M3", (5,)),
        ("empty", "BF16", (0, 4)),
        ("scalar", "I64", ()),
        ("ü", "U8", (1,)),
    ]
    header = encode_header(specs)
    assert len(header) % 8 == 0
    entries = read_entries(store_with(header + bytes(24 + 5 + 0 + 8 + 1)), "f.safetensors")
    assert list(entries) == [name for name, _, _ in specs]
    start = len(header)
    for name, dtype, shape in specs:
        num_bytes = torch.Size(shape).numel() * DTYPE_BYTES[dtype]
        assert entries[name] == TensorEntry(name, dtype, shape, "f.safetensors", start, num_bytes)
        start += num_bytes


def test_encoded_header_carries_metadata_that_transformers_asks_for() -> None:
    def metadata(header: bytes) -> object:
        return json.loads(header[8:]).get("__metadata__")

    assert metadata(encode_header([])) == {"format": "pt"}
    assert metadata(encode_header([], {"format": "pt", "made": "x"})) == {
        "format": "pt",
        "made": "x",
    }
    assert metadata(encode_header([], None)) is None


def test_encode_header_refuses_a_repeated_name_and_an_unknown_dtype() -> None:
    with pytest.raises(P48Error, match="'a' only once"):
        encode_header([("a", "F32", ()), ("a", "F32", ())])
    with pytest.raises(P48Error, match="F4"):
        encode_header([("a", "F4", (2,))])


def test_dtype_names_are_those_of_the_reference_writer() -> None:
    for name, dtype in TORCH_DTYPES.items():
        assert dtype_name(dtype) == name
        assert DTYPE_BYTES[name] == dtype.itemsize
        if name != "F8_E8M0":  # safetensors 0.8 reads it and has no torch name for it
            assert (
                json.loads(save({"a": torch.zeros(2).to(dtype)})[8:].split(b"}}")[0] + b"}}")["a"][
                    "dtype"
                ]
                == name
            )
    with pytest.raises(P48Error, match="complex64"):
        dtype_name(torch.complex64)
    with pytest.raises(P48Error, match="F4"):
        torch_dtype("F4")


GOOD = record("F32", [2], [0, 8])
MALFORMED = {
    "too_short": (b"1234567", r"at least 8 bytes.*found 7"),
    "absurd_length": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        rf"at most {MAX_HEADER_BYTES} bytes, found {MAX_HEADER_BYTES + 1}",
    ),
    "length_beyond_file": (
        struct.pack("<Q", 500) + b"{}",
        r"header of 500 bytes, found a file of 10 bytes",
    ),
    "not_utf8": (raw_file(b'{"\xff": 1}', 0), r"JSON in UTF-8.*0xff"),
    "not_json": (raw_file(b'{"a": ', 0), r"expected JSON"),
    "not_object": (raw_file(b"[1]", 0), r"JSON object, found list"),
    "deep": (raw_file(b"[" * 100_000, 0), r"expected JSON"),
    "metadata_not_text": (
        raw_file({"__metadata__": {"a": 1}}, 0),
        r"__metadata__.*found \{'a': 1\}",
    ),
    "metadata_not_object": (raw_file({"__metadata__": "pt"}, 0), r"__metadata__.*found pt"),
    "duplicate_tensor": (
        raw_file(b'{"t.x": %s, "t.x": %s}' % ((json.dumps(GOOD).encode(),) * 2), 8),
        r"'t\.x' more than once",
    ),
    "duplicate_field": (
        raw_file(
            b'{"t": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}', 8
        ),
        r"'dtype' more than",
    ),
    "record_not_object": (
        raw_file({"t": 5}, 0),
        r"tensor t: expected dtype, shape and data_offsets, found 5",
    ),
    "record_incomplete": (
        raw_file({"t": {"dtype": "F32", "shape": [2]}}, 8),
        r"tensor t: expected dtype, shape and data_offsets",
    ),
    "record_with_more": (
        raw_file({"t": GOOD | {"strides": [1]}}, 8),
        r"tensor t: expected dtype, shape and data_offsets",
    ),
    "unknown_dtype": (
        raw_file({"t": record("F4", [16], [0, 8])}, 8),
        r"tensor t: expected a dtype of .*BF16.*, found 'F4'",
    ),
    "dtype_not_text": (
        raw_file({"t": record(["F32"], [2], [0, 8])}, 8),
        r"tensor t: expected a dtype",
    ),  # type: ignore[arg-type]
    "negative_shape": (
        raw_file({"t": record("F32", [-2], [0, 8])}, 8),
        r"tensor t: expected a shape.*found \[-2\]",
    ),
    "shape_of_floats": (
        raw_file({"t": record("F32", [2.0], [0, 8])}, 8),
        r"tensor t: expected a shape.*found \[2\.0\]",
    ),
    "shape_of_booleans": (
        raw_file({"t": record("F32", [True, 2], [0, 8])}, 8),
        r"tensor t: expected a shape",
    ),
    "shape_missing": (
        raw_file({"t": record("F32", None, [0, 8])}, 8),
        r"tensor t: expected a shape.*found None",
    ),
    "negative_offset": (
        raw_file({"t": record("F32", [2], [-8, 0])}, 8),
        r"tensor t: expected data_offsets.*found \[-8, 0\]",
    ),
    "reversed_offsets": (
        raw_file({"t": record("F32", [2], [8, 0])}, 8),
        r"tensor t: expected data_offsets.*found \[8, 0\]",
    ),
    "three_offsets": (
        raw_file({"t": record("F32", [2], [0, 4, 8])}, 8),
        r"tensor t: expected data_offsets",
    ),
    "too_few_bytes": (
        raw_file({"t": record("F32", [3], [0, 8])}, 8),
        r"tensor t: expected 12 bytes for F32 \[3\], found 8",
    ),
    "too_many_bytes": (
        raw_file({"t": record("BF16", [2], [0, 8])}, 8),
        r"tensor t: expected 4 bytes for BF16 \[2\], found 8",
    ),
    "hole_at_start": (
        raw_file({"t": record("F32", [2], [4, 12])}, 12),
        r"tensor t: expected data at offset 0.*found offset 4 \(hole\)",
    ),
    "hole": (
        raw_file({"a": GOOD, "t": record("F32", [1], [9, 13])}, 13),
        r"tensor t: .*offset 8.*found offset 9 \(hole\)",
    ),
    "overlap": (
        raw_file({"a": GOOD, "t": record("F32", [1], [7, 11])}, 11),
        r"tensor t: .*offset 8.*found offset 7 \(overlap\)",
    ),
    "same_place_twice": (raw_file({"a": GOOD, "b": GOOD}, 8), r"tensor b: .*\(overlap\)"),
    "truncated": (
        raw_file({"t": record("F32", [2], [0, 8])}, 7),
        r"expected \d+ bytes by its header, found a file of \d+ bytes \(truncated",
    ),
    "trailing_bytes": (
        raw_file({"t": record("F32", [2], [0, 8])}, 9),
        r"bytes that belong to no tensor",
    ),
    "data_without_tensors": (raw_file({}, 1), r"bytes that belong to no tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_naming_file_and_fault(case: str) -> None:
    data, message = MALFORMED[case]
    with pytest.raises(SourceError, match=rf"^f\.safetensors: .*{message}"):
        read_entries(store_with(data), "f.safetensors")


@pytest.mark.parametrize(
    "name", ["", "a..b", "../a", "a/b", "/a", "a\\b", "a\0b", "a\nb", "a\x7fb", "\ud800"]
)
def test_tensor_names_that_could_act_as_paths_are_refused(name: str) -> None:
    with pytest.raises(SourceError, match=r"^f\.safetensors: tensor .*expected a name without"):
        read_entries(store_with(raw_file({name: GOOD}, 8)), "f.safetensors")


def test_missing_file_is_named() -> None:
    with pytest.raises(SourceError, match=r"other\.safetensors: .*memory://.*found none"):
        read_entries(store_with(b""), "other.safetensors")


def test_header_is_read_by_two_ranges_and_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(raw_file({"t": record("F32", [1000], [0, 4000])}, 4000))
    ranges: list[tuple[int, int]] = []
    real = MemoryStore.get_range

    def note(self: MemoryStore, key: str, start: int, num_bytes: int) -> bytes:
        ranges.append((start, num_bytes))
        return real(self, key, start, num_bytes)

    monkeypatch.setattr(MemoryStore, "get_range", note)
    read_entries(store, "f.safetensors")
    assert [start for start, _ in ranges] == [0, 8]
    assert sum(num_bytes for _, num_bytes in ranges) < 100


def test_byte_order_mark_is_skipped_in_json_and_refused_in_a_header() -> None:
    mark = b"\xef\xbb\xbf"
    assert json_object("config.json", mark + b'{"a": 1}') == {"a": 1}
    assert unmarked("a.json", mark + b"{}") == unmarked("a.json", b"{}") == b"{}"
    assert unmarked("a.txt", mark + b"words") == mark + b"words"
    with pytest.raises(SourceError, match=r"a\.safetensors: expected JSON that begins with \{"):
        parse_header("a.safetensors", mark + b"{}", 13)
