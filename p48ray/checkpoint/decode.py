"""Source weights as floating-point: INT4 as compressed-tensors decodes it, FP8 through its own
decoder, plain floats as they are.

INT4: w = (code - 8) * scale, rounded to the scale's dtype (BF16): the model that servers of the
release run, bit for bit (numerics.int4). FP8: w = weight * weight_scale_inv of its block, in
float32 and then rounded to BF16, as the release's own conversion does (see fp8).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from p48ray.checkpoint.foreign import read_linear, weight_values
from p48ray.checkpoint.fp8 import Fp8Weight, PlainTensor
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import FOREIGN_STORAGES, PROJECTIONS, ModelLayout
from p48ray.checkpoint.tensors import read_tensors
from p48ray.errors import SourceError
from p48ray.numerics.int4 import CODES_PER_WORD, decode_int4
from p48ray.store import Store


def read_expert(
    index: CheckpointIndex, layout: ModelLayout, layer: int, expert: int
) -> dict[str, Tensor]:
    """One expert's weights: projection -> (out, in) on the CPU, in the source's float dtype.

    Args:
        index, layout, layer: as read_experts takes them.
        expert: its number in the layer.
    Raises: as read_experts.
    """
    return read_experts(index, layout, layer, range(expert, expert + 1))[expert]


def read_experts(
    index: CheckpointIndex, layout: ModelLayout, layer: int, experts: Iterable[int]
) -> dict[int, dict[str, Tensor]]:
    """Weights of several experts of a layer: expert -> projection -> (out, in). Reads their tensors
    only, neighbours in one request.

    Args:
        index: of the source.
        layout: made for that index.
        layer: its number in the model.
        experts: their numbers in the layer.
    Raises: SourceError, naming file and tensor, for weights that are not finite or a weight_shape
        that contradicts the packed words.
    Cost: 2 bytes a weight for the result, half a byte as stored, and 3 more for the one linear
        being decoded; 0.2 s a Kimi expert.
    """
    wanted = list(experts)
    tensors = fetch_experts(index, layout, layer, wanted)
    return {expert: decode_expert(index, layout, layer, expert, tensors) for expert in wanted}


def fetch_experts(
    index: CheckpointIndex, layout: ModelLayout, layer: int, experts: Iterable[int]
) -> dict[str, Tensor]:
    """The tensors of several experts as stored, by name: half a byte a weight for INT4.

    Args:
        index, layout, layer, experts: as read_experts takes them.
    """
    return read_tensors(index.store, expert_entries(index, layout, layer, experts))


def expert_entries(
    index: CheckpointIndex, layout: ModelLayout, layer: int, experts: Iterable[int]
) -> list[TensorEntry]:
    """Where several experts' tensors lie, in the order of the experts.

    Args:
        index, layout, layer, experts: as read_experts takes them.
    Raises: SourceError if the layout was made for another index.
    """
    return [
        _entry(index, name)
        for expert in experts
        for name in layout.expert_tensor_names(layer, expert)
    ]


def decode_expert_on(
    device: torch.device,
    index: CheckpointIndex,
    layout: ModelLayout,
    layer: int,
    expert: int,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """decode_expert on another device, out of tensors on the CPU that travel as stored. INT4 is
    checked on the CPU, where its few scales lie, so that nothing waits for the device; other forms
    are checked there.

    Args:
        device: of the result.
        index, layout, layer, expert: as read_expert takes them.
        tensors: by their full names, on the CPU; those of other experts are left alone.
    Raises: SourceError as read_experts.
    """
    is_int4 = layout.int4_group_size is not None and layout.expert_storage != "fp8"
    if is_int4:
        check_expert(index, layout, layer, expert, tensors)
    there = {name: tensors[name].to(device) for name in layout.expert_tensor_names(layer, expert)}
    if not is_int4:
        return decode_expert(index, layout, layer, expert, there)
    linears = {
        projection: layout.expert_linear_name(layer, expert, projection)
        for projection in PROJECTIONS
    }
    return {
        projection: decode_checked(_named(index, layout, there, name)[0], layout)
        for projection, name in linears.items()
    }


def decode_expert(
    index: CheckpointIndex,
    layout: ModelLayout,
    layer: int,
    expert: int,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """One expert's weights out of fetched tensors, on their device. See read_experts.

    Args:
        index, layout, layer, expert: as read_expert takes them.
        tensors: by their full names; those of other experts are left alone.
    """
    linears = {
        projection: layout.expert_linear_name(layer, expert, projection)
        for projection in PROJECTIONS
    }
    return {
        projection: decode_linear(*_named(index, layout, tensors, name))
        for projection, name in linears.items()
    }


def decode_linear(
    tensors: Mapping[str, Tensor], layout: ModelLayout, where: str = "expert linear"
) -> Tensor:
    """The weight of one linear, (out, in): in its scale's dtype (INT4), in BF16 (FP8), in float32
    (of a checkpoint that others have compressed) or as stored.

    Args:
        tensors: suffix ("weight_packed") -> tensor.
        where: file and name of the linear, for messages.
    Raises: SourceError for scales or weights that are not finite, and for a weight_shape other than
        the packed words have.
    """
    if layout.expert_storage in FOREIGN_STORAGES:
        return weight_values(read_linear(tensors, layout.expert_storage, where))
    check_linear(tensors, layout, where)
    return decode_checked(tensors, layout)


def check_linear(tensors: Mapping[str, Tensor], layout: ModelLayout, where: str) -> None:
    """Raises: SourceError as decode_linear does."""
    if layout.expert_storage == "fp8":
        _check_finite(tensors["weight"].float(), f"{where}.weight")
        _check_finite(tensors["weight_scale_inv"], f"{where}.weight_scale_inv")
        return
    if layout.int4_group_size is None:
        _check_finite(tensors["weight"], f"{where}.weight")
        return
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    expected = [packed.shape[0], packed.shape[1] * CODES_PER_WORD]
    if (found := tensors["weight_shape"].tolist()) != expected:
        raise SourceError(
            f"{where}.weight_shape: expected {expected}, the shape of the packed words, found"
            f" {found}"
        )
    expected_scale = [expected[0], expected[1] // layout.int4_group_size]
    if list(scale.shape) != expected_scale:
        raise SourceError(
            f"{where}.weight_scale: expected shape {expected_scale}, found {list(scale.shape)}"
        )
    _check_finite(scale, f"{where}.weight_scale")


def decode_checked(
    tensors: Mapping[str, Tensor], layout: ModelLayout, out: Tensor | None = None
) -> Tensor:
    """The weight of one linear out of tensors that check_linear has let pass, on their device; in
    `out` where that is given."""
    if layout.expert_storage == "fp8":
        assert layout.fp8_block is not None
        weight = fp8_values(tensors["weight"], tensors["weight_scale_inv"], layout.fp8_block)
        return weight if out is None else out.copy_(weight)
    if layout.int4_group_size is None:
        return tensors["weight"] if out is None else out.copy_(tensors["weight"])
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    if out is not None and out.dtype != scale.dtype:
        return out.copy_(decode_int4(packed, scale))
    return decode_int4(packed, scale, out)


def read_plain(store: Store, tensors: Iterable[PlainTensor]) -> dict[str, Tensor]:
    """Tensors outside the compressed experts by name, on the CPU: as stored, or as BF16 where that
    is FP8. Neighbours are read in one request.

    Raises: SourceError, naming file and tensor, for FP8 weights that are not finite.
    """
    wanted = list(tensors)
    entries = [
        part
        for tensor in wanted
        for part in (
            (tensor.weight, tensor.scale_inv) if isinstance(tensor, Fp8Weight) else (tensor,)
        )
    ]
    return decode_plain(read_tensors(store, entries), wanted)


def decode_plain(stored: Mapping[str, Tensor], tensors: Iterable[PlainTensor]) -> dict[str, Tensor]:
    """The same out of tensors by their stored names."""

    def value(tensor: PlainTensor) -> Tensor:
        if not isinstance(tensor, Fp8Weight):
            return stored[tensor.name]
        where = f"{tensor.file}: tensor {tensor.name}"
        return decode_fp8(
            stored[tensor.weight.name], stored[tensor.scale_inv.name], tensor.block, where
        )

    return {tensor.name: value(tensor) for tensor in tensors}


def decode_fp8(
    weight: Tensor, scale_inv: Tensor, block: tuple[int, int], where: str = "weight"
) -> Tensor:
    """A weight of blocks with a scale each -> (out, in) BF16.

    Args:
        weight: (out, in) E4M3.
        scale_inv: (out blocks, in blocks), what values are multiplied with.
        block: outputs and inputs of a block.
        where: file and name of the tensor, for messages.
    Raises: SourceError, saying `where`, for weights or scales that are not finite.
    """
    decoded = fp8_values(weight, scale_inv, block)
    _check_finite(decoded, where)
    return decoded


def fp8_values(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """decode_fp8 without its check, on the device of its arguments."""
    # three seconds: only where a source is FP8
    from compressed_tensors.compressors import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=8,
        type="float",
        symmetric=True,
        strategy="block",
        block_structure=list(block),
        dynamic=False,
    )
    parts = {"weight": weight, "weight_scale": scale_inv.float()}
    decoded: Tensor = FloatQuantizationCompressor.decompress(
        parts, QuantizationScheme(targets=["Linear"], weights=args)
    )["weight"]
    return decoded.to(torch.bfloat16)


def check_expert(
    index: CheckpointIndex,
    layout: ModelLayout,
    layer: int,
    expert: int,
    tensors: Mapping[str, Tensor],
) -> None:
    """Look at tensors that are decoded later on another device.

    Args:
        index, layout, layer, expert: as read_expert takes them.
        tensors: by their full names; those of other experts are left alone.
    Raises: SourceError as read_experts.
    """
    for projection in PROJECTIONS:
        check_linear(
            *_named(index, layout, tensors, layout.expert_linear_name(layer, expert, projection))
        )


def _named(
    index: CheckpointIndex, layout: ModelLayout, tensors: Mapping[str, Tensor], name: str
) -> tuple[dict[str, Tensor], ModelLayout, str]:
    """One linear's tensors by suffix out of tensors by their full names, the layout, and where they
    lie, for messages."""
    parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in layout.expert_suffixes}
    file = index.tensors[f"{name}.{layout.expert_suffixes[-1]}"].file
    return parts, layout, f"{file}: tensor {name}"


def _entry(index: CheckpointIndex, name: str) -> TensorEntry:
    """Raises: SourceError if the layout was made for another index."""
    if name not in index.tensors:
        raise SourceError(f"tensor {name}: expected in {index.store.uri}, found none")
    return index.tensors[name]


def _check_finite(tensor: Tensor, where: str) -> None:
    num_bad = int((~torch.isfinite(tensor)).sum())
    if num_bad:
        raise SourceError(
            f"{where}: expected finite values, found {num_bad} of {tensor.numel()} that are not"
        )
