"""Tensors as Arrow files: what comes back is what was written, and anything else is refused by the object's name."""

import random
import re
import subprocess
import sys
import uuid

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from p48ray.errors import ShardCorruptError
from p48ray.stages import arrow
from p48ray.store import MemoryStore
from tests.conftest import REPO

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


def test_columns_come_back_bit_by_bit_with_their_types_and_shapes() -> None:
    assert_same(arrow.decode(arrow.encode(columns()), WHERE), columns())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_special_values_are_kept(value: float) -> None:
    special = {"residual": torch.full((3, 2), value)}
    assert_same(arrow.decode(arrow.encode(special), WHERE), special)


def test_view_of_a_larger_tensor_is_written_as_what_it_shows() -> None:
    whole_TH = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    assert_same(arrow.decode(arrow.encode({"x": whole_TH[2:5, 1:4]}), WHERE), {"x": whole_TH[2:5, 1:4].contiguous()})


def test_equal_values_are_equal_bytes() -> None:
    assert arrow.encode(columns()) == arrow.encode(columns()) != arrow.encode(columns(1))


def test_file_is_read_by_arrow_itself_and_says_its_digest() -> None:
    with pa.ipc.open_file(pa.py_buffer(arrow.encode(columns()))) as reader:
        table = reader.read_all()
    assert table.column_names == list(columns())
    assert table["expert_ids"].to_pylist() == columns()["expert_ids"].tolist()
    assert len(stated_digest(arrow.encode(columns()))) == 64


def stated_digest(data: bytes) -> bytes:
    """In the schema's metadata, as hexadecimal text."""
    with pa.ipc.open_file(pa.py_buffer(data)) as reader:
        return re.findall(rb"[0-9a-f]{64}", reader.schema.metadata[b"seal"])[0]


def places_of(data: bytes, value: bytes) -> list[int]:
    return [i for i in range(len(data)) if data.startswith(value, i)]


@pytest.mark.parametrize("name", ["hidden", "expert_ids", "router_weights", "token_ids"])
@pytest.mark.parametrize("row", [0, 17, 39])
def test_flipped_bit_in_any_column_is_refused_by_name(name: str, row: int) -> None:
    data = arrow.encode(columns())
    raw = columns()[name].view(torch.uint8).numpy().tobytes()
    (start,) = places_of(data, raw)
    at = start + row * len(raw) // 40
    for bit in range(8):
        with pytest.raises(ShardCorruptError, match=f"^{WHERE}: .*SHA-256"):
            arrow.decode(flipped(data, at, bit), WHERE)


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_digest_that_was_changed_is_refused() -> None:
    data = arrow.encode(columns())
    last = places_of(data, stated_digest(data))[-1]  # the footer's, which is what readers go by
    with pytest.raises(ShardCorruptError, match=f"^{WHERE}: "):
        arrow.decode(flipped(data, last + 5, 0), WHERE)


def test_file_without_a_digest_is_refused() -> None:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([pa.array([1, 2])], names=["x"])
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ShardCorruptError, match=f"^{WHERE}: .*SHA-256"):
        arrow.decode(sink.getvalue().to_pybytes(), WHERE)


@pytest.mark.parametrize("length", [0, 1, 7, 100, 0.5, 0.99, -1])
def test_file_that_was_cut_is_refused_by_name(length: float) -> None:
    data = arrow.encode(columns())
    end = round(length * len(data)) if isinstance(length, float) else length
    with pytest.raises(ShardCorruptError, match=f"^{WHERE}: "):
        arrow.decode(data[:end], WHERE)


@pytest.mark.parametrize("data", [b"{}", bytes(4096), b"ARROW1\0\0" + bytes(500) + b"ARROW1"])
def test_file_of_another_kind_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(ShardCorruptError, match=f"^{WHERE}: "):
        arrow.decode(data, WHERE)


# Each flip in a fork of its own, because Arrow ends the process on some.
FLIPS = """
import os, sys
import torch
from p48ray.errors import ShardCorruptError
from p48ray.stages import arrow

wanted = {"residual": torch.arange(40.0).reshape(5, 8)}
data = arrow.encode(wanted)

def verdict(at, bit):
    broken = bytearray(data)
    broken[at] ^= 1 << bit
    try:
        found = arrow.decode(bytes(broken), "the part")
    except ShardCorruptError as error:
        return 0 if str(error).startswith("the part: ") else 3
    same = list(found) == list(wanted) and found["residual"].dtype == torch.float32 and torch.equal(found["residual"], wanted["residual"])
    return 0 if same else 4

os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
for at, bit in (map(int, text.split(":")) for text in sys.argv[1:]):
    child = os.fork()
    if not child:
        try:
            os._exit(verdict(at, bit))
        except BaseException:
            os._exit(5)
    status = os.waitpid(child, 0)[1]
    if status:
        print(at, bit, os.waitstatus_to_exitcode(status))
"""


def test_flipped_bit_in_what_describes_the_values_is_refused_or_harms_nothing() -> None:
    """Names, types, widths, counts and offsets: boundaries have no manifest whose digest covers them."""
    data = arrow.encode({"residual": torch.arange(40.0).reshape(5, 8)})
    (start,) = places_of(data, torch.arange(40.0).numpy().tobytes())
    described = [at for at in range(len(data)) if not start <= at < start + 160]
    chance = random.Random(3)
    picked = [f"{at}:{chance.randrange(8)}" for at in sorted(chance.sample(described, 120))]
    picked += ["551:7", "1071:7"]  # lengths that turn negative
    ended = subprocess.run([sys.executable, "-c", FLIPS, *picked], cwd=REPO, capture_output=True, text=True, check=True)
    assert ended.stdout == "", "position, bit, and how it ended (3 not by name, 4 other values, 5 another exception, negative: killed)"


# Stored once.


def test_first_writers_bytes_count_for_everybody() -> None:
    store = MemoryStore(uuid.uuid4().hex)
    ours, theirs = arrow.encode(columns(0)), arrow.encode(columns(1))
    assert arrow.store_once(store, WHERE, theirs) == theirs
    assert arrow.store_once(store, WHERE, ours) == theirs
    assert store.get(WHERE) == theirs
