"""Checks that a checkpoint holds exactly the routed experts that its config announces, before
anything is spent on it.

Only headers are looked at. The first fault is reported with its file and key: a wrong source is
wrong throughout.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from p48ray.checkpoint.fp8 import FP8_DTYPE, FP8_SCALE_DTYPES, scale_shape
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CONFIG_FILE, CheckpointIndex
from p48ray.checkpoint.layout import FOREIGN_STORAGES, PROJECTIONS, ModelLayout
from p48ray.errors import SourceError
from p48ray.numerics.int4 import CODES_PER_WORD

FLOATS = ("BF16", "F16", "F32")
INTEGERS = ("I32", "I64")
OUT_MULTIPLE = 8

INT4_WEIGHTS: Mapping[str, Any] = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "dynamic": False,
}
"""What the decoder can read, in compressed-tensors' words; the group size is the source's."""

FOREIGN_GROUP = 32
"""Inputs that share a scale in a checkpoint that others have made paired-4:8 sparse."""

SCALAR_SHAPES: tuple[tuple[int, ...], ...] = ((), (1,))


class Allowed(NamedTuple):
    """What a tensor may be."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


ExpertEntries = Mapping[tuple[int, int, str], Mapping[str, TensorEntry]]
"""(layer, expert, projection) -> suffix -> entry."""


def check_experts(layout: ModelLayout, found: ExpertEntries) -> None:
    """Raises: SourceError unless every MoE layer has all its experts, with the tensors and shapes
    of
    the storage, and no others."""
    expected_shapes = {projection: _tensor_shapes(layout, projection) for projection in PROJECTIONS}
    for layer in layout.moe_layers:
        for expert in range(layout.num_experts):
            for projection in PROJECTIONS:
                name = layout.expert_linear_name(layer, expert, projection)
                _check_linear(
                    name, found.get((layer, expert, projection), {}), expected_shapes[projection]
                )
    num_expected = len(layout.moe_layers) * layout.num_experts * len(PROJECTIONS)
    if len(found) != num_expected:
        moe_layers = set(layout.moe_layers)
        layer, expert, projection = next(
            key for key in found if key[0] not in moe_layers or key[1] >= layout.num_experts
        )
        entry = next(iter(found[layer, expert, projection].values()))
        raise SourceError(
            f"{entry.file}: tensor {entry.name}: expected {layout.num_experts} experts in"
            f" {len(layout.moe_layers)} layers ({_span(layout.moe_layers)}) by {CONFIG_FILE}, found"
            f" expert {expert} in layer {layer}"
        )


def check_divisibility(layout: ModelLayout, scale_span: int) -> None:
    """Raises: SourceError unless inputs fill whole scale spans (16 or 32) and outputs are a
    multiple
    of 8, naming the first linear."""
    for projection in PROJECTIONS:
        name = layout.expert_linear_name(layout.moe_layers[0], 0, projection)
        out_features, in_features = layout.linear_shape(projection)
        if in_features % scale_span:
            raise SourceError(
                f"{name}: expected in_features divisible by {scale_span} (compression.scale_span),"
                f" found {in_features}"
            )
        if out_features % OUT_MULTIPLE:
            raise SourceError(
                f"{name}: expected out_features divisible by {OUT_MULTIPLE}, found {out_features}"
            )


def int4_group_size(config: Mapping[str, Any], text_config: Mapping[str, Any]) -> int:
    """The group size of the source's INT4 experts, from the quantization_config in its text config
    or at its top level.

    Raises: SourceError if there is none, or if it is not what the decoder can read.
    """
    where = "quantization_config"
    found = text_config.get(where) or config.get(where)
    if not isinstance(found, dict):
        raise SourceError(
            f"{CONFIG_FILE}: expected {where} for experts stored as weight_packed, found {found!r}"
        )
    method, groups = found.get("quant_method"), found.get("config_groups")
    if method != "compressed-tensors" or found.get("format") != "pack-quantized":
        raise SourceError(
            f"{CONFIG_FILE}: {where}: expected compressed-tensors' pack-quantized, found {method!r}"
            f" with format {found.get('format')!r}"
        )
    if not isinstance(groups, dict) or len(groups) != 1:
        names = list(groups) if isinstance(groups, dict) else groups
        raise SourceError(
            f"{CONFIG_FILE}: {where}.config_groups: expected one group, found {names!r}"
        )
    (group_name, group), path = next(iter(groups.items())), f"{where}.config_groups"
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise SourceError(
            f"{CONFIG_FILE}: {path}.{group_name}.weights: expected an object, found {weights!r}"
        )
    for key, expected in INT4_WEIGHTS.items():
        if weights.get(key, False if key == "dynamic" else None) != expected:
            raise SourceError(
                f"{CONFIG_FILE}: {path}.{group_name}.weights.{key}: expected {expected!r}, found"
                f" {weights.get(key)!r}"
            )
    size = weights.get("group_size")
    if type(size) is not int or size <= 0:
        raise SourceError(
            f"{CONFIG_FILE}: {path}.{group_name}.weights.group_size: expected a positive integer,"
            f" found {size!r}"
        )
    return size


def check_untouched(index: CheckpointIndex, layout: ModelLayout) -> None:
    """Raises: SourceError if tensors that pass through are packed: the output announces NVFP4 and
    could not say how to read them."""
    for entry in index.outside_experts(layout):
        if entry.name.endswith((".weight_packed", ".weight_sparse_packed")):
            raise SourceError(
                f"{entry.file}: tensor {entry.name}: expected plain weights outside the routed"
                f" experts of layers below {layout.num_layers}, found packed ones; sources"
                " quantized beyond those experts are not built yet"
            )


def _tensor_shapes(layout: ModelLayout, projection: str) -> dict[str, Allowed]:
    """suffix -> what it may be, for one linear. Raises: SourceError if words, groups or spans would
    be cut."""
    out_features, in_features = layout.linear_shape(projection)
    storage = layout.expert_storage
    if storage == "fp8":
        assert layout.fp8_block is not None
        scales = scale_shape((out_features, in_features), layout.fp8_block)
        return {
            "weight": Allowed(((out_features, in_features),), (FP8_DTYPE,)),
            "weight_scale_inv": Allowed((scales,), FP8_SCALE_DTYPES),
        }
    multiples = (
        ((FOREIGN_GROUP, "inputs a scale"),)
        if storage in FOREIGN_STORAGES
        else ((CODES_PER_WORD, "codes a word"), (layout.int4_group_size or 1, "weights a scale"))
        if storage == "int4"
        else ()
    )
    for multiple, what in multiples:
        if in_features % multiple:
            name = layout.expert_linear_name(layout.moe_layers[0], 0, projection)
            raise SourceError(
                f"{name}: expected in_features divisible by {multiple} ({what}), found"
                f" {in_features}"
            )
    if storage in FOREIGN_STORAGES:
        kept = in_features // 4 if storage == "paired48" else in_features // 2
        shapes = {
            "weight_sparse_packed": (out_features, kept),
            "weight_packed": (out_features, kept),
            "weight_sparse_mask": (out_features, in_features // 16),
        }
        arrays = {
            suffix: Allowed((shapes[suffix],), ("U8",))
            for suffix in layout.expert_suffixes
            if suffix in shapes
        }
        return arrays | {
            "weight_scale": Allowed(((out_features, in_features // FOREIGN_GROUP),), ("F8_E4M3",)),
            "weight_global_scale": Allowed(SCALAR_SHAPES, ("F32",)),
            "input_global_scale": Allowed(SCALAR_SHAPES, ("F32",)),
        }
    if layout.int4_group_size is None:
        return {"weight": Allowed(((out_features, in_features),), FLOATS)}
    groups = (out_features, in_features // layout.int4_group_size)
    return {
        "weight_packed": Allowed(((out_features, in_features // CODES_PER_WORD),), ("I32",)),
        "weight_scale": Allowed((groups,), FLOATS),
        "weight_shape": Allowed(((2,),), INTEGERS),
    }


def _check_linear(
    name: str,
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, Allowed],
) -> None:
    """Raises: SourceError unless one linear's tensors are exactly the expected ones."""
    if missing := sorted(expected.keys() - entries.keys()):
        files = ", ".join(sorted({entry.file for entry in entries.values()})) or "no file"
        found = ", ".join(sorted(entries)) or "none"
        raise SourceError(
            f"{files}: tensor {name}.{missing[0]}: expected {', '.join(expected)} for this linear,"
            f" found {found}"
        )
    if extra := sorted(entries.keys() - expected.keys()):
        entry = entries[extra[0]]
        raise SourceError(
            f"{entry.file}: tensor {entry.name}: expected only {', '.join(expected)} for this"
            " linear, found this one as well"
        )
    for suffix, allowed in expected.items():
        entry = entries[suffix]
        if entry.shape not in allowed.shapes or entry.dtype not in allowed.dtypes:
            raise SourceError(
                f"{entry.file}: tensor {entry.name}: expected {' or '.join(allowed.dtypes)}"
                f" {' or '.join(str(list(shape)) for shape in allowed.shapes)} by {CONFIG_FILE},"
                f" found {entry.dtype} {list(entry.shape)}"
            )


def _span(layers: tuple[int, ...]) -> str:
    """(1, 2, 3) -> '1 to 3'."""
    return f"{layers[0]} to {layers[-1]}" if layers else "none"
