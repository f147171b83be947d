"""Where every byte of the output lies: a pure function of the plan and the source's headers.

Shards are filled layer by layer, tensors outside the layers last. Within a shard the units come
first, each contiguous and in the order of its own shard (so that a unit is one range copy), then
source tensors, widest element first. Every unit is a multiple of 8 bytes, so no tensor is
misaligned. Source tensors are byte ranges of the source, but for weights that it stores in FP8:
these are BF16 here.

Sparse storage (output.storage) changes names, shapes and sizes of the units' tensors, not which
unit or tensor lies in which shard: shards are filled by dense sizes, so that a checkpoint that is
stitched sparse and one that is converted are the same files.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from p48ray.checkpoint.fp8 import PlainTensor, plain_tensors
from p48ray.checkpoint.header import DTYPE_BYTES, TensorEntry
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.checkpoint.modelopt import Form, form_suffixes
from p48ray.checkpoint.sparse_storage import Storage, convert_rows
from p48ray.run.plan import WorkUnit

HeaderRow = tuple[str, str, tuple[int, ...]]
Segment = WorkUnit | PlainTensor
# widest element first
TENSOR_SUFFIXES = ("weight_global_scale", "input_global_scale", "weight_scale", "weight_packed")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShard:
    """One safetensors file of the result: whole units, then source tensors, in file order.
    num_bytes: of its tensors, in their storage."""

    name: str
    segments: tuple[Segment, ...]
    num_bytes: int
    storage: Storage


def unit_rows(layout: ModelLayout, unit: WorkUnit, storage: Storage = "dense") -> list[HeaderRow]:
    """Names, dtypes and shapes of a unit's tensors in shard order. A unit's own shard is always
    dense."""
    rows: list[HeaderRow] = []
    for suffix in TENSOR_SUFFIXES:
        for expert in unit.experts:
            for projection in PROJECTIONS:
                out, inputs = layout.linear_shape(projection)
                dtype, shape = {
                    "weight_packed": ("U8", (out, inputs // 2)),
                    "weight_scale": ("F8_E4M3", (out, inputs // 16)),
                }.get(suffix, ("F32", (1,)))
                rows.append(
                    (
                        f"{layout.expert_linear_name(unit.layer, expert, projection)}.{suffix}",
                        dtype,
                        shape,
                    )
                )
    linears = {
        layout.expert_linear_name(unit.layer, expert, projection)
        for expert in unit.experts
        for projection in PROJECTIONS
    }
    return convert_rows(rows, linears, storage) if storage == "sparse" else rows


def unit_entries(
    layout: ModelLayout, unit: WorkUnit, file: str, start: int
) -> tuple[TensorEntry, ...]:
    """Where a unit's tensors lie in its own shard, in shard order.

    Args:
        layout: of the source.
        unit: whose tensors they are.
        file: key of the shard.
        start: byte of the file at which its first tensor begins.
    """
    entries: list[TensorEntry] = []
    for name, dtype, shape in unit_rows(layout, unit):
        num_bytes = prod(shape) * DTYPE_BYTES[dtype]
        entries.append(TensorEntry(name, dtype, shape, file, start, num_bytes))
        start += num_bytes
    return tuple(entries)


def unit_tensor_names(linears: Sequence[str], form: Form = "dense") -> list[str]:
    """Names of a unit's tensors in shard order, from its linears in theirs."""
    return [
        f"{linear}.{stored}"
        for suffix in TENSOR_SUFFIXES
        for linear in linears
        for stored in form_suffixes(suffix, form)
    ]


def layer_of(layout: ModelLayout, name: str) -> int | None:
    """The decoder layer that a tensor belongs to, None outside the layers."""
    number = name.removeprefix(layout.layer_prefix).partition(".")[0]
    return int(number) if name.startswith(layout.layer_prefix) and number.isdigit() else None


def unit_bytes(layout: ModelLayout, unit: WorkUnit, storage: Storage = "dense") -> int:
    """Data bytes of a unit, headers apart; dense is what its own shard holds."""
    weights = 3 * layout.moe_intermediate_size * layout.hidden_size
    stored = (
        weights // 2 + weights // 16
        if storage == "dense"
        else weights // 4 + weights // 16 + weights // 32
    )
    return unit.num_experts * (stored + 3 * 2 * 4)


def untouched_tensors(index: CheckpointIndex, layout: ModelLayout) -> list[PlainTensor]:
    """Tensors that no unit makes, in output order: the source's byte for byte, or its FP8 weights
    as BF16."""
    outside = layout.num_layers + 10**6

    def order(entry: PlainTensor) -> tuple[int, int, str]:
        layer = layer_of(layout, entry.name)
        return (outside if layer is None else layer, -DTYPE_BYTES[entry.dtype], entry.name)

    return sorted(plain_tensors(index, layout), key=order)


def plan_output(
    units: Sequence[WorkUnit],
    max_shard_bytes: int,
    index: CheckpointIndex,
    layout: ModelLayout,
    storage: Storage = "dense",
) -> tuple[OutputShard, ...]:
    """Fill shards in order up to `max_shard_bytes`; a unit or tensor larger than that gets a shard
    of its own.

    Args:
        units: all of the plan; those of a layer are laid out in this order.
        max_shard_bytes: of tensors in dense storage.
        index, layout: of the source.
        storage: of the shards.
    """
    filled: list[list[Segment]] = [[]]
    sizes = [0]
    for segment in ordered_segments(units, index, layout):
        size = segment_bytes([segment], layout, "dense")
        if filled[-1] and sizes[-1] + size > max_shard_bytes:
            filled.append([])
            sizes.append(0)
        filled[-1].append(segment)
        sizes[-1] += size
    names = shard_names(len(filled))
    return tuple(
        OutputShard(
            name=name,
            segments=aligned(segments),
            num_bytes=segment_bytes(segments, layout, storage),
            storage=storage,
        )
        for name, segments in zip(names, filled, strict=True)
    )


def segment_bytes(segments: Sequence[Segment], layout: ModelLayout, storage: Storage) -> int:
    return sum(
        unit_bytes(layout, s, storage) if isinstance(s, WorkUnit) else s.num_bytes for s in segments
    )


def aligned(segments: list[Segment]) -> tuple[Segment, ...]:
    """Units, then the other tensors by falling element width; otherwise as given."""
    return tuple(
        sorted(segments, key=lambda s: -16 if isinstance(s, WorkUnit) else -DTYPE_BYTES[s.dtype])
    )


def ordered_segments(
    units: Sequence[WorkUnit], index: CheckpointIndex, layout: ModelLayout
) -> list[Segment]:
    by_layer: dict[int, list[WorkUnit]] = {}
    for unit in units:
        by_layer.setdefault(unit.layer, []).append(unit)
    beside: dict[int, list[PlainTensor]] = {}
    last: list[PlainTensor] = []
    for entry in untouched_tensors(index, layout):
        layer = layer_of(layout, entry.name)
        if layer is None or layer >= layout.num_layers:
            last.append(entry)
        else:
            beside.setdefault(layer, []).append(entry)
    segments: list[Segment] = []
    for layer in range(layout.num_layers):
        segments += [*by_layer.get(layer, []), *beside.get(layer, [])]
    return [*segments, *last]


def shard_rows(shard: OutputShard, layout: ModelLayout) -> list[HeaderRow]:
    """Header rows of an output shard, in file order."""
    rows: list[HeaderRow] = []
    for segment in shard.segments:
        rows += (
            unit_rows(layout, segment, shard.storage)
            if isinstance(segment, WorkUnit)
            else [(segment.name, segment.dtype, segment.shape)]
        )
    return rows


def shard_names(count: int) -> list[str]:
    """Files of a checkpoint of so many shards."""
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def shard_count(name: str) -> int:
    """Of how many shards a file says that it is one; 0 for any other file."""
    found = re.fullmatch(r"model-\d{5}-of-(\d{5})\.safetensors", name)
    return int(found[1]) if found else 0
