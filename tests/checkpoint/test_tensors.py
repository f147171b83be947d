"""Bytes to tensors and back, and which ranges are read for them."""

import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from p48ray.checkpoint import tensors as tensors_module
from p48ray.checkpoint.header import TORCH_DTYPES, TensorEntry, dtype_name
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.tensors import (
    from_bytes,
    merge_ranges,
    read_tensors,
    read_together,
    tensor_bytes,
)
from p48ray.errors import P48Error, ShardCorruptError
from p48ray.store import LocalStore, MemoryStore
from tests.checkpoint.entries import read_entries, serialize


def same(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and tensor_bytes(left) == tensor_bytes(right)
    )


def entry(name: str, start: int, num_bytes: int, file: str = "f") -> TensorEntry:
    return TensorEntry(name, "U8", (num_bytes,), file, start, num_bytes)


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=TORCH_DTYPES.keys())
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 5)])
def test_every_dtype_survives_the_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    raw = bytes(
        index % 2 if dtype == torch.bool else index * 37 % 256 for index in range(num_bytes)
    )
    tensor = from_bytes(raw, dtype_name(dtype), shape)
    assert tensor.dtype == dtype
    assert tuple(tensor.shape) == shape
    assert tensor_bytes(tensor) == raw


def test_tensor_bytes_of_views_are_those_of_the_values() -> None:
    matrix = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    assert tensor_bytes(matrix.T) == matrix.T.contiguous().numpy().tobytes()
    assert tensor_bytes(matrix[1:, ::2]) == matrix[1:, ::2].contiguous().numpy().tobytes()


def test_from_bytes_owns_its_memory_and_refuses_wrong_sizes() -> None:
    raw = bytes(8)
    tensor = from_bytes(raw, "F32", (2,))
    tensor.fill_(1)
    assert raw == bytes(8)
    with pytest.raises(ShardCorruptError, match=r"expected 12 bytes for F32 \[3\], found 8"):
        from_bytes(raw, "F32", [3])


def test_serialized_file_is_read_by_the_reference_reader_and_ours() -> None:
    tensors = {
        "z": torch.randn(4, 6, dtype=torch.bfloat16),
        "a": torch.randint(0, 256, (3, 5), dtype=torch.uint8),
        "scale": torch.rand(3).to(torch.float8_e4m3fn),
        "global": torch.tensor([3.5]),
        "empty": torch.empty(0, 2),
    }
    data = serialize(tensors)
    reference = load(data)
    assert all(same(reference[name], tensor) for name, tensor in tensors.items())
    store = MemoryStore(uuid.uuid4().hex)
    store.put("f.safetensors", data)
    entries = read_entries(store, "f.safetensors")
    assert list(entries) == list(tensors)
    read = read_tensors(store, entries.values())
    assert all(same(read[name], tensor) for name, tensor in tensors.items())


def test_serialize_refuses_a_dtype_that_files_do_not_hold() -> None:
    with pytest.raises(P48Error, match="complex64"):
        serialize({"a": torch.zeros(1, dtype=torch.complex64)})


def test_every_tensor_of_the_sample_equals_the_reference_readers(
    tiny: CheckpointIndex, tiny_tensors: dict[str, Tensor]
) -> None:
    read = read_tensors(tiny.store, tiny.tensors.values())
    assert read.keys() == tiny_tensors.keys()
    assert all(same(read[name], tensor) for name, tensor in tiny_tensors.items())


def test_neighbours_are_read_together_and_far_or_foreign_ones_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensors_module, "MAX_GAP_BYTES", 10)
    entries = [
        entry("b", 20, 5),
        entry("a", 0, 10),
        entry("far", 36, 4),
        entry("other", 40, 4, file="g"),
        entry("empty", 40, 0),
    ]
    assert [[one.name for one in run] for run in merge_ranges(entries)] == [
        ["a", "b"],
        ["far", "empty"],
        ["other"],
    ]


def test_range_inside_another_does_not_end_the_run_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "MAX_GAP_BYTES", 10)
    entries = [entry("outer", 0, 100), entry("inner", 10, 5), entry("next", 105, 5)]
    assert [[one.name for one in run] for run in merge_ranges(entries)] == [
        ["outer", "inner", "next"]
    ]


def test_merged_reads_stay_bounded() -> None:
    entries = [
        entry("a", 0, 60),
        entry("b", 60, 40),
        entry("c", 100, 1),
        entry("huge", 101, 500),
        entry("d", 601, 1),
    ]
    assert [[one.name for one in run] for run in merge_ranges(entries, 100)] == [
        ["a", "b"],
        ["c"],
        ["huge"],
        ["d"],
    ]


def test_read_tensors_keeps_the_callers_order_and_cuts_merged_reads_right() -> None:
    store = MemoryStore(uuid.uuid4().hex)
    store.put("f", bytes(range(100)))
    read = read_tensors(
        store,
        [
            entry("late", 50, 3),
            entry("early", 10, 2),
            entry("inside", 51, 1),
            entry("early", 10, 2),
        ],
    )
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        "late": [50, 51, 52],
        "early": [10, 11],
        "inside": [51],
    }
    assert list(read) == ["late", "early", "inside"]


def test_read_of_nothing_is_nothing() -> None:
    assert read_tensors(MemoryStore("nothing-here"), []) == {}


def test_data_that_ends_early_is_reported_with_its_file() -> None:
    store = MemoryStore(uuid.uuid4().hex)
    store.put("f", bytes(20))
    with pytest.raises(ShardCorruptError, match=r"f: asked for 15 bytes from byte 10 on.*found 20"):
        read_tensors(store, [entry("a", 10, 15)])


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_tensors_that_share_a_read_are_the_same_wherever_they_begin(
    tmp_path: Path, kind: str
) -> None:
    """At odd offsets as well, where a view of the bytes would not be aligned."""
    store = LocalStore(tmp_path) if kind == "local" else MemoryStore("read-together")
    data = bytes(range(256)) * 20
    store.put("a", data)
    entries = [
        TensorEntry("words", "I32", (2, 3), "a", 8, 24),
        TensorEntry("odd", "BF16", (4,), "a", 33, 8),
        TensorEntry("none", "F32", (0, 3), "a", 41, 0),
        TensorEntry("bytes", "U8", (5,), "a", 41, 5),
        TensorEntry("far", "F8_E4M3", (2, 2), "a", 5000, 4),
    ]
    expected, found = read_tensors(store, entries), read_together(store, entries)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert tensor_bytes(found[name]) == tensor_bytes(tensor), name
        assert serialize({name: found[name]}) == serialize({name: tensor}), name
    with pytest.raises(ShardCorruptError, match=r"a: asked for .* found 5120 bytes"):
        read_together(store, [*entries, TensorEntry("beyond", "U8", (9,), "a", 5115, 9)])
