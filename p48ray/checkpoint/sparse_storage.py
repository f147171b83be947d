"""The two storages of compressed experts, and how names, headers, tensors, config and index go from
one to the other, each way without loss.

    dense   weight_packed [out, in/2]
            weight_scale [out, in/16]                                      stock loaders
    sparse  weight_sparse_packed [out, in/4], weight_sparse_mask [out, in/16]
            weight_scale [out, in/32]                                      kernels for paired-4:8

Global scales are the same in both. The sparse one is what the public paired48 backend of vLLM reads
(layout "pair-bitmask", version 1): its kernels apply one scale per 32 inputs, to weights and
activations, so only scale span 32 can be stored like that.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from p48ray.checkpoint.index import CONFIG_KEY
from p48ray.errors import NumericsError, SourceError
from p48ray.numerics import paired48

Storage = Literal["dense", "sparse"]
TensorRow = tuple[str, str, tuple[int, ...]]

PACKED, KEPT, MASK, SCALE = (
    "weight_packed",
    "weight_sparse_packed",
    "weight_sparse_mask",
    "weight_scale",
)
MARKER_KEY = "paired48_sparse"
MARKER: Mapping[str, Any] = MappingProxyType({"layout": "pair-bitmask", "version": 1})
GROUP_SIZE: Mapping[Storage, int] = MappingProxyType({"dense": 16, "sparse": 32})
QUANTIZERS = ("weights", "input_activations")


def storage_of(config: Mapping[str, Any]) -> Storage:
    """Which storage a checkpoint's config.json announces. Raises: SourceError for a sparse one that
    is not this layout and version."""
    quantization = config.get(CONFIG_KEY)
    marker = quantization.get(MARKER_KEY) if isinstance(quantization, dict) else None
    if marker is None:
        return "dense"
    if marker != MARKER:
        raise SourceError(
            f"config.json: {CONFIG_KEY}.{MARKER_KEY}: expected {dict(MARKER)}, found {marker!r}"
        )
    return "sparse"


def stored_suffixes(suffix: str, storage: Storage) -> tuple[str, ...]:
    """A dense tensor's suffix as the suffixes that hold it."""
    return (KEPT, MASK) if storage == "sparse" and suffix == PACKED else (suffix,)


def linear_form(
    packed_shape: tuple[int, ...], storage: Storage
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of a linear's codes, masks and scales, by suffix, from the shape of
    weight_packed or weight_sparse_packed."""
    out, width = (*packed_shape, 0, 0)[:2]
    if storage == "dense":
        return {PACKED: ("U8", (out, width)), SCALE: ("F8_E4M3", (out, width // 8))}
    return {
        KEPT: ("U8", (out, width)),
        MASK: ("U8", (out, width // 4)),
        SCALE: ("F8_E4M3", (out, width // 8)),
    }


def convert_rows(
    rows: Iterable[TensorRow], linears: Collection[str], to: Storage
) -> list[TensorRow]:
    """A file's header rows in the other storage, in the same order; a linear's mask directly
    follows its kept bytes.

    Args:
        linears: names of the linears to convert; every other tensor stays.
    """
    return [new for row in rows for new in _convert_row(row, linears, to)]


def _convert_row(row: TensorRow, linears: Collection[str], to: Storage) -> list[TensorRow]:
    linear, _, suffix = row[0].rpartition(".")
    if linear not in linears or suffix not in (PACKED, KEPT, MASK, SCALE):
        return [row]
    if suffix == MASK:
        return []
    dtype, (out, width) = row[1], row[2]
    if suffix == SCALE:
        return [(row[0], dtype, (out, width // 2 if to == "sparse" else width * 2))]
    if to == "dense":
        return [(f"{linear}.{PACKED}", dtype, (out, width * 2))]
    return [
        (f"{linear}.{KEPT}", dtype, (out, width // 2)),
        (f"{linear}.{MASK}", dtype, (out, width // 8)),
    ]


def sparse_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compressed linears' dense tensors, by full name, in sparse storage.

    Raises: SourceError, naming the tensor, for a pattern that is not paired-4:8, or two scales that
        differ within 32 inputs.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, suffix = name.rpartition(".")
        if suffix == PACKED:
            found[f"{linear}.{KEPT}"], found[f"{linear}.{MASK}"] = _named(
                name, paired48.pack_sparse, tensor
            )
        elif suffix == SCALE:
            found[name] = _halved(name, tensor)
        else:
            found[name] = tensor
    return found


def dense_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of sparse_tensors. Raises: SourceError, naming the tensor, for a mask that is
    none."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, suffix = name.rpartition(".")
        if suffix == KEPT:
            mask = f"{linear}.{MASK}"
            found[f"{linear}.{PACKED}"] = _named(
                mask, paired48.unpack_sparse, tensor, tensors[mask]
            )
        elif suffix == SCALE:
            found[name] = doubled(tensor)
        elif suffix != MASK:
            found[name] = tensor
    return found


def doubled(scale: Tensor) -> Tensor:
    """One scale per 32 inputs, (out, in/32), as one per 16: the same for both halves."""
    return scale.view(torch.uint8).repeat_interleave(2, dim=-1).view(scale.dtype)


def _named(name: str, act: Callable[..., Any], *tensors: Tensor) -> Any:
    try:
        return act(*tensors)
    except NumericsError as error:
        raise SourceError(f"{name}: {error}") from error


def _halved(name: str, scale: Tensor) -> Tensor:
    if scale.shape[-1] % 2:
        raise SourceError(
            f"{name}: expected scales for whole groups of 32 inputs, found {scale.shape[-1]} a row,"
            " one per 16"
        )
    first, second = scale.view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    if num_differing := int((first != second).sum()):
        raise SourceError(
            f"{name}: expected the two scales of every 32 inputs to be equal"
            f" (compression.scale_span: 32), found {num_differing} pairs that differ; sparse"
            " storage has one scale for them"
        )
    return first.contiguous().view(scale.dtype)


def convert_config(config: Mapping[str, Any], to: Storage) -> dict[str, Any]:
    """A checkpoint's config.json in the other storage: marker and group sizes. Raises: SourceError
    for groups of another size."""
    found = copy.deepcopy(dict(config))
    quantization = found[CONFIG_KEY]
    if to == "sparse":
        quantization[MARKER_KEY] = dict(MARKER)
    else:
        del quantization[MARKER_KEY]
    before = GROUP_SIZE["dense" if to == "sparse" else "sparse"]
    for group, scheme in quantization.get("config_groups", {}).items():
        for quantizer in QUANTIZERS:
            if (size := scheme[quantizer].get("group_size")) != before:
                raise SourceError(
                    f"config.json: {CONFIG_KEY}.config_groups.{group}.{quantizer}.group_size:"
                    f" expected {before}, found {size!r}"
                )
            scheme[quantizer]["group_size"] = GROUP_SIZE[to]
    return found


def convert_index(
    index: Mapping[str, Any], linears: Collection[str], to: Storage, total_bytes: int
) -> dict[str, Any]:
    """model.safetensors.index.json in the other storage.

    Args:
        index: the parsed file in the storage it has.
        linears: names of the compressed linears, without suffixes.
        to: the storage of the result.
        total_bytes: of all tensors in that storage.
    """
    weight_map: dict[str, str] = {}
    for name, file in index["weight_map"].items():
        linear, _, suffix = name.rpartition(".")
        is_codes = linear in linears and suffix in (PACKED, KEPT, MASK)
        names = [f"{linear}.{s}" for s in stored_suffixes(PACKED, to)] if is_codes else [name]
        weight_map |= dict.fromkeys(names, file)
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
