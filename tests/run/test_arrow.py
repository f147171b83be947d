"""Tensors as Arrow files: what comes back is what was written, without a copy, and anything else is
refused by the object's name."""

from collections.abc import Iterator

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from p48ray.errors import ShardCorruptError
from p48ray.run import arrow

WHERE = "residuals/layer-003/part-0001.arrow"


def columns(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(40, 16, generator=generator).to(torch.bfloat16),
        "expert_ids": torch.randint(16, (40, 4), generator=generator, dtype=torch.int16),
        "router_weights": torch.rand(40, 4, generator=generator),
        "token_ids": torch.randint(2048, (40,), generator=generator, dtype=torch.int32),
    }


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def encoded(wanted: dict[str, Tensor], facts: dict[str, str] | None = None) -> bytes:
    return arrow.encode(wanted, facts).to_bytes()


def test_columns_come_back_bit_by_bit_with_their_types_and_shapes() -> None:
    assert_same(arrow.decode(encoded(columns()), WHERE), columns())


@pytest.mark.parametrize("dtype", sorted([*arrow.ARROW_TYPES, *arrow.BITS], key=str))
def test_every_type_that_is_named_comes_back(dtype: torch.dtype) -> None:
    raw = torch.arange(240, dtype=torch.uint8).reshape(3, 80)
    assert_same(
        arrow.decode(encoded({"x": raw.view(dtype), "y": raw.view(dtype)[:, 0]}), WHERE),
        {"x": raw.view(dtype), "y": raw.view(dtype)[:, 0].contiguous()},
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_special_values_are_kept(value: float) -> None:
    special = {"values": torch.full((3, 2), value)}
    assert_same(arrow.decode(encoded(special), WHERE), special)


def test_view_of_a_larger_tensor_is_written_as_what_it_shows() -> None:
    whole_TH = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    assert_same(
        arrow.decode(encoded({"x": whole_TH[2:5, 1:4]}), WHERE),
        {"x": whole_TH[2:5, 1:4].contiguous()},
    )


def test_equal_values_are_equal_bytes() -> None:
    assert encoded(columns()) == encoded(columns()) != encoded(columns(1))


def test_bytes_are_those_that_arrow_itself_writes() -> None:
    """Of the same arrays and metadata, through pyarrow's own memory sink."""
    facts, wanted = {"kind": "activations", "part": "1"}, columns()
    with pa.ipc.open_file(pa.py_buffer(encoded(wanted, facts))) as reader:
        batch, schema = reader.get_batch(0), reader.schema
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    assert sink.getvalue().to_pybytes() == encoded(wanted, facts)


def test_file_is_read_by_arrow_itself() -> None:
    with pa.ipc.open_file(pa.py_buffer(encoded(columns()))) as reader:
        table = reader.read_all()
    assert table.column_names == list(columns())
    assert table["expert_ids"].to_pylist() == columns()["expert_ids"].tolist()


def test_columns_are_handed_on_from_where_they_lie() -> None:
    """No copy of a column: its own memory is what the store is given."""
    wanted = columns()
    file = arrow.encode(wanted)
    assert [piece.data_ptr() for piece in file.pieces if isinstance(piece, Tensor)] == [
        t.data_ptr() for t in wanted.values()
    ]
    assert file.size_bytes == len(file.to_bytes())
    assert file.to_bytes() == file.to_bytes(), "every pass yields the bytes anew"


def test_columns_that_only_the_given_reader_can_read() -> None:
    """As a column on a GPU: `chunks` decides how its bytes come, here in pieces of 7."""

    def in_sevens(tensor: Tensor) -> Iterator[memoryview]:
        whole = tensor.reshape(-1).view(torch.uint8).numpy().data
        yield from (whole[i : i + 7] for i in range(0, len(whole), 7))

    assert arrow.encode(columns(), None, in_sevens).to_bytes() == encoded(columns())


def test_file_says_what_it_is_and_another_is_refused_by_name() -> None:
    data = encoded(columns(), {"kind": "residuals", "layer": "3"})
    arrow.decode(data, WHERE, {"kind": "residuals", "layer": "3"})
    with pytest.raises(ShardCorruptError, match=f"^{WHERE}: layer: expected '4', found '3'"):
        arrow.decode(data, WHERE, {"kind": "residuals", "layer": "4"})
    with pytest.raises(ShardCorruptError, match=f"^{WHERE}: plan: expected 'x', found None"):
        arrow.decode(data, WHERE, {"plan": "x"})


@pytest.mark.parametrize("length", [0, 1, 7, 100, 0.5])
def test_file_that_was_cut_is_refused_by_name(length: float) -> None:
    data = encoded(columns())
    end = round(length * len(data)) if isinstance(length, float) else length
    with pytest.raises(ShardCorruptError, match=f"^{WHERE}: "):
        arrow.decode(data[:end], WHERE)


@pytest.mark.parametrize("data", [b"{}", bytes(4096), b"ARROW1\0\0" + bytes(500) + b"ARROW1"])
def test_file_of_another_kind_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(ShardCorruptError, match=f"^{WHERE}: "):
        arrow.decode(data, WHERE)


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_no_rows_and_many(count: int) -> None:
    wanted = {"a": torch.zeros(count, 4), "b": torch.arange(count)}
    assert_same(arrow.decode(encoded(wanted), WHERE), wanted)
