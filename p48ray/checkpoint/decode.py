"""Source weights as floating-point: INT4 and FP8 through compressed-tensors' own decoders, plain floats as they are.

INT4: w = (code - 8) * scale, rounded to the scale's dtype (BF16): the model that servers of the release run, bit for bit. FP8: w = weight *
weight_scale_inv of its block, in float32 and then rounded to BF16, as the release's own conversion does (see fp8). A copy of the formulas
here would be one more thing to keep equal; the tests hold the decoders to them instead.
"""

from collections.abc import Iterable, Mapping

import torch
from compressed_tensors.compressors import FloatQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from p48ray.checkpoint.experts import CODES_PER_WORD, INT4_WEIGHTS
from p48ray.checkpoint.fp8 import Fp8Weight, PlainTensor
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.checkpoint.tensors import read_tensors
from p48ray.errors import SourceError
from p48ray.store import Store


def read_expert(index: CheckpointIndex, layout: ModelLayout, layer: int, expert: int) -> dict[str, Tensor]:
    """One expert's weights: projection -> (out, in) on the CPU, in the source's float dtype. See read_experts."""
    return read_experts(index, layout, layer, range(expert, expert + 1))[expert]


def read_experts(index: CheckpointIndex, layout: ModelLayout, layer: int, experts: Iterable[int]) -> dict[int, dict[str, Tensor]]:
    """Weights of several experts of a layer: expert -> projection -> (out, in). Reads their tensors only, neighbours in one request.

    Raises: SourceError, naming file and tensor, for weights that are not finite or a weight_shape that contradicts the packed words.
    Cost:   2 bytes a weight for the result, half a byte as stored, and 3 more for the one linear being decoded; 0.2 s a Kimi expert.
    """
    wanted = list(experts)
    tensors = fetch_experts(index, layout, layer, wanted)
    return {expert: decode_expert(index, layout, layer, expert, tensors) for expert in wanted}


def fetch_experts(index: CheckpointIndex, layout: ModelLayout, layer: int, experts: Iterable[int]) -> dict[str, Tensor]:
    """The tensors of several experts as stored, by name: half a byte a weight for INT4."""
    names = [name for expert in experts for name in layout.expert_tensor_names(layer, expert)]
    return read_tensors(index.store, [_entry(index, name) for name in names])


def decode_expert(index: CheckpointIndex, layout: ModelLayout, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One expert's weights out of fetched tensors. See read_experts."""
    linears = {projection: layout.expert_linear_name(layer, expert, projection) for projection in PROJECTIONS}
    return {projection: _decode_named(index, layout, tensors, name) for projection, name in linears.items()}


def decode_linear(tensors: Mapping[str, Tensor], layout: ModelLayout, where: str = "expert linear") -> Tensor:
    """The weight of one linear, (out, in), in its scale's dtype (INT4), in BF16 (FP8) or as stored.

    Args:    tensors: suffix ("weight_packed") -> tensor. where: file and name of the linear, for messages.
    Raises:  SourceError for scales or weights that are not finite, and for a weight_shape other than the packed words have.
    """
    if layout.expert_storage == "fp8":
        assert layout.fp8_block is not None
        return decode_fp8(tensors["weight"], tensors["weight_scale_inv"], layout.fp8_block, f"{where}.weight")
    if layout.int4_group_size is None:
        _check_finite(tensors["weight"], f"{where}.weight")
        return tensors["weight"]
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    expected = [packed.shape[0], packed.shape[1] * CODES_PER_WORD]
    if (found := tensors["weight_shape"].tolist()) != expected:
        raise SourceError(f"{where}.weight_shape: expected {expected}, the shape of the packed words, found {found}")
    expected_scale = [expected[0], expected[1] // layout.int4_group_size]
    if list(scale.shape) != expected_scale:
        raise SourceError(f"{where}.weight_scale: expected shape {expected_scale}, found {list(scale.shape)}")
    _check_finite(scale, f"{where}.weight_scale")
    decoded = PackedQuantizationCompressor.decompress(dict(tensors), int4_scheme(layout.int4_group_size))
    weight: Tensor = decoded["weight"]
    return weight


def int4_scheme(group_size: int) -> QuantizationScheme:
    """The scheme of the source's experts. describe_model has checked that the source's quantization_config says the same."""
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**INT4_WEIGHTS, group_size=group_size))


def read_plain(store: Store, tensors: Iterable[PlainTensor]) -> dict[str, Tensor]:
    """Tensors outside the compressed experts by name, on the CPU: as stored, or as BF16 where that is FP8. Neighbours are read in one request.

    Raises: SourceError, naming file and tensor, for FP8 weights that are not finite.
    """
    wanted = list(tensors)
    entries = [part for tensor in wanted for part in ((tensor.weight, tensor.scale_inv) if isinstance(tensor, Fp8Weight) else (tensor,))]
    found = read_tensors(store, entries)

    def value(tensor: PlainTensor) -> Tensor:
        if not isinstance(tensor, Fp8Weight):
            return found[tensor.name]
        weight, scale_inv = found.pop(tensor.weight.name), found[tensor.scale_inv.name]
        return decode_fp8(weight, scale_inv, tensor.block, f"{tensor.file}: tensor {tensor.name}")

    return {tensor.name: value(tensor) for tensor in wanted}


def decode_fp8(weight: Tensor, scale_inv: Tensor, block: tuple[int, int], where: str = "weight") -> Tensor:
    """(out, in) E4M3 and the scales of its blocks, (out blocks, in blocks) -> (out, in) BF16.

    Raises: SourceError, saying `where`, for weights or scales that are not finite.
    """
    parts = {"weight": weight, "weight_scale": scale_inv.float()}
    decoded: Tensor = FloatQuantizationCompressor.decompress(parts, fp8_scheme(block))["weight"].to(torch.bfloat16)
    _check_finite(decoded, where)
    return decoded


def fp8_scheme(block: tuple[int, int]) -> QuantizationScheme:
    """The scheme of FP8 weights with one scale per block."""
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="block", block_structure=list(block), dynamic=False)
    return QuantizationScheme(targets=["Linear"], weights=args)


def _decode_named(index: CheckpointIndex, layout: ModelLayout, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """One linear out of tensors by their full names."""
    parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in layout.expert_suffixes}
    file = index.tensors[f"{name}.{layout.expert_suffixes[-1]}"].file
    return decode_linear(parts, layout, f"{file}: tensor {name}")


def _entry(index: CheckpointIndex, name: str) -> TensorEntry:
    """Raises: SourceError if the layout was made for another index."""
    if name not in index.tensors:
        raise SourceError(f"tensor {name}: expected in {index.store.uri}, found none")
    return index.tensors[name]


def _check_finite(tensor: Tensor, where: str) -> None:
    num_bad = int((~torch.isfinite(tensor)).sum())
    if num_bad:
        raise SourceError(f"{where}: expected finite values, found {num_bad} of {tensor.numel()} that are not")
