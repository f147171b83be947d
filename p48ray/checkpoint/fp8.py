"""FP8 sources: linears stored as E4M3 with one scale per block, which p48ray reads, runs and writes
as BF16.

    w[o, i] = bfloat16(float32(weight[o, i]) * weight_scale_inv[o // 128, i // 128])

A block at the lower or right edge may be cut. "inv" is historical: the stored number is multiplied.
Source: config.json's quantization_config (quant_method fp8, fmt e4m3, weight_block_size) as
DeepSeek-V3's releases have it. Here is what headers say; the decoder is in decode.

No client reads two quantization methods in one model, so in the output even linears that are not
compressed are BF16 (DESIGN 2.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from p48ray.checkpoint.finite_values import FLOAT_DTYPES
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CONFIG_FILE, CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout
from p48ray.errors import SourceError

FP8_DTYPE = "F8_E4M3"
FP8_SCALE_DTYPES = ("F32", "BF16")
PLAIN_DTYPE = "BF16"
FP8_WEIGHT, FP8_SCALE = ".weight", ".weight_scale_inv"
PLAIN_BYTES = 2


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight outside the compressed experts that the source stores in FP8. Its name, dtype, shape
    and size are those it has as BF16."""

    weight: TensorEntry
    scale_inv: TensorEntry
    block: tuple[int, int]

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def file(self) -> str:
        return self.weight.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> str:
        return PLAIN_DTYPE

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * PLAIN_BYTES


PlainTensor = TensorEntry | Fp8Weight
"""A tensor outside the compressed experts: in the output byte for byte, or as BF16."""


def plain_tensors(index: CheckpointIndex, layout: ModelLayout) -> list[PlainTensor]:
    """Every tensor outside the compressed experts, in the source's order."""
    return [
        tensor
        for entry in index.outside_experts(layout)
        if (tensor := as_plain(index, layout, entry)) is not None
    ]


def stored_floats(index: CheckpointIndex, layout: ModelLayout) -> list[TensorEntry]:
    """What is stored in floats outside the compressed experts, in the source's order: of FP8
    weights both codes and scales."""
    return [entry for entry in index.outside_experts(layout) if entry.dtype in FLOAT_DTYPES]


def as_plain(index: CheckpointIndex, layout: ModelLayout, entry: TensorEntry) -> PlainTensor | None:
    """A stored tensor as the output has it; None for those of compressed experts, and for the
    scales of FP8 weights, which go with these."""
    if layout.is_expert_tensor(entry.name):
        return None
    if layout.fp8_block is None:
        return entry
    if entry.name.endswith(FP8_SCALE):
        return None
    return (
        Fp8Weight(entry, index.tensors[scale_name(entry.name)], layout.fp8_block)
        if entry.dtype == FP8_DTYPE
        else entry
    )


def scale_name(name: str) -> str:
    return name.removesuffix(FP8_WEIGHT) + FP8_SCALE


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks of an (out, in) weight, cut ones included."""
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def check_fp8(index: CheckpointIndex, text_config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size of a source with FP8 weights, None for one without.

    Raises: SourceError, naming file and tensor, for an FP8 tensor or a scale whose other half is
        missing or of another shape, and for FP8 weights that config.json does not announce in a
        form that can be read.
    """
    eights = [entry for entry in index.tensors.values() if entry.dtype.startswith("F8")]
    scales = [entry for name, entry in index.tensors.items() if name.endswith(FP8_SCALE)]
    if not eights and not scales:
        return None
    block = fp8_block(index.config, text_config, (eights or scales)[0])
    for entry in eights:
        _check_weight(index, entry, block)
    for entry in scales:
        weight = entry.name.removesuffix(FP8_SCALE) + FP8_WEIGHT
        if weight not in index.tensors or index.tensors[weight].dtype != FP8_DTYPE:
            found = index.tensors[weight].dtype if weight in index.tensors else "none"
            raise SourceError(
                f"{entry.file}: tensor {entry.name}: expected a weight {weight} in {FP8_DTYPE},"
                f" found {found}"
            )
    return block


def _check_weight(index: CheckpointIndex, entry: TensorEntry, block: tuple[int, int]) -> None:
    where = f"{entry.file}: tensor {entry.name}"
    if entry.dtype != FP8_DTYPE or not entry.name.endswith(FP8_WEIGHT) or len(entry.shape) != 2:
        raise SourceError(
            f"{where}: expected FP8 in matrices called {FP8_WEIGHT}, as {FP8_DTYPE}, found"
            f" {entry.dtype} {list(entry.shape)}"
        )
    scale = index.tensors.get(scale_name(entry.name))
    if scale is None:
        raise SourceError(f"{where}: expected its scales in {scale_name(entry.name)}, found none")
    rows, columns = entry.shape
    expected = scale_shape((rows, columns), block)
    if scale.shape != expected or scale.dtype not in FP8_SCALE_DTYPES:
        raise SourceError(
            f"{scale.file}: tensor {scale.name}: expected {' or '.join(FP8_SCALE_DTYPES)}"
            f" {list(expected)}, one per block of {block[0]} x {block[1]}, found {scale.dtype}"
            f" {list(scale.shape)}"
        )


def fp8_block(
    config: Mapping[str, Any], text_config: Mapping[str, Any], first: TensorEntry
) -> tuple[int, int]:
    """The block size that config.json announces for FP8 weights. Raises: SourceError, naming the
    first such tensor, if it announces none."""
    where = f"{CONFIG_FILE}: quantization_config"
    found = text_config.get("quantization_config") or config.get("quantization_config")
    cause = f"for {first.name} ({first.file}, {first.dtype})"
    if not isinstance(found, dict):
        raise SourceError(f"{where}: expected quant_method 'fp8' {cause}, found {found!r}")
    for key, expected in (("quant_method", "fp8"), ("fmt", "e4m3")):
        if found.get(key) != expected:
            raise SourceError(
                f"{where}.{key}: expected {expected!r} {cause}, found {found.get(key)!r}"
            )
    size = found.get("weight_block_size")
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(type(n) is int and n > 0 for n in size)
    ):
        raise SourceError(
            f"{where}.weight_block_size: expected two positive integers {cause}, found {size!r}"
        )
    return (size[0], size[1])
