"""Where output bytes lie: every tensor once, units whole, nothing misaligned."""

import pytest

from p48ray.checkpoint.header import DTYPE_BYTES, encode_header, parse_header
from p48ray.config.load import load_config
from p48ray.run.output_layout import (
    plan_output,
    shard_rows,
    unit_bytes,
    unit_entries,
    unit_rows,
    untouched_tensors,
)
from p48ray.run.plan import WorkUnit
from p48ray.stages.prepare import Prepared, prepare
from tests.conftest import REPO


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.chdir(REPO)
    return prepare(
        load_config(REPO / "configs" / "tiny.yaml", ("run.experts_per_unit=3",), "memory://layout")
    )


def row_bytes(row: tuple[str, str, tuple[int, ...]]) -> int:
    total = DTYPE_BYTES[row[1]]
    for size in row[2]:
        total *= size
    return total


@pytest.mark.parametrize("limit", [1, 10**5, 2 * 10**6, 10**9])
def test_every_tensor_lies_in_one_shard_at_an_aligned_offset(
    prepared: Prepared, limit: int
) -> None:
    shards = plan_output(prepared.plan.units, limit, prepared.source, prepared.layout)
    names = []
    for shard in shards:
        offset = 0
        for row in shard_rows(shard, prepared.layout):
            assert offset % DTYPE_BYTES[row[1]] == 0, row
            offset += row_bytes(row)
            names.append(row[0])
        assert offset == shard.num_bytes
        assert offset <= limit or len(shard.segments) == 1
    untouched = {e.name for e in untouched_tensors(prepared.source, prepared.layout)}
    compressed = {
        name for unit in prepared.plan.units for name, _, _ in unit_rows(prepared.layout, unit)
    }
    assert len(names) == len(set(names))
    assert set(names) == untouched | compressed
    assert len(compressed) == 4 * 16 * 3 * 4


def test_shards_are_numbered_from_one(prepared: Prepared) -> None:
    shards = plan_output(prepared.plan.units, 2 * 10**6, prepared.source, prepared.layout)
    assert [s.name for s in shards][:1] == [f"model-00001-of-{len(shards):05d}.safetensors"]
    assert len(shards) > 1


def test_untouched_tensors_are_all_but_the_experts(prepared: Prepared) -> None:
    names = {e.name for e in untouched_tensors(prepared.source, prepared.layout)}
    assert "language_model.model.layers.1.mlp.shared_experts.down_proj.weight" in names
    assert "vision_tower.patch_embed.proj.weight" in names
    assert not any(".experts." in name for name in names)
    assert len(names) == len(prepared.source.tensors) - 4 * 16 * 3 * 3


def test_unit_bytes_are_those_of_its_rows(prepared: Prepared) -> None:
    for unit in (
        WorkUnit(layer=1, first_expert=0, num_experts=1),
        WorkUnit(layer=2, first_expert=3, num_experts=5),
    ):
        rows = unit_rows(prepared.layout, unit)
        assert sum(map(row_bytes, rows)) == unit_bytes(prepared.layout, unit)
        assert unit_bytes(prepared.layout, unit) % 8 == 0


def test_sparse_storage_changes_sizes_and_not_which_shard_holds_what(prepared: Prepared) -> None:
    for limit in (10**5, 2 * 10**6):
        dense, sparse = (
            plan_output(prepared.plan.units, limit, prepared.source, prepared.layout, s)
            for s in ("dense", "sparse")
        )
        assert [(s.name, s.segments) for s in sparse] == [(s.name, s.segments) for s in dense]
        for shard in sparse:
            rows, offset = shard_rows(shard, prepared.layout), 0
            for row in rows:
                assert offset % DTYPE_BYTES[row[1]] == 0, row
                offset += row_bytes(row)
            assert offset == shard.num_bytes
    for unit in prepared.plan.units:
        rows = unit_rows(prepared.layout, unit, "sparse")
        assert sum(map(row_bytes, rows)) == unit_bytes(prepared.layout, unit, "sparse")
        assert unit_bytes(prepared.layout, unit, "sparse") % 8 == 0


def test_entries_of_a_units_own_shard_are_where_its_header_says(prepared: Prepared) -> None:
    unit = prepared.plan.units[1]
    rows = unit_rows(prepared.layout, unit)
    header = encode_header(rows)
    data = header + bytes(unit_bytes(prepared.layout, unit))
    expected = parse_header("unit.safetensors", header[8:], len(data))
    assert {
        e.name: e for e in unit_entries(prepared.layout, unit, "unit.safetensors", len(header))
    } == expected
