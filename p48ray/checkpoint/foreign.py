"""Checkpoints that others have made paired-4:8 sparse, as the authors of MoESQ release them, and
their experts in the dense storage of this package.

                         theirs                                    dense storage here
    codes                weight_sparse_packed, weight_sparse_mask  weight_packed
                         (or weight_packed)
    weight_scale         [out, in/32]                              [out, in/16], each one twice
    weight_global_scale  gate's and up's own, [] or [1]            gate's and up's shared, [1]
    input_global_scale   1.0, [] or [1]                            the same number, [1]
    minus zero           a code like others                        zero

config.json targets all linears in groups of 32 and names what stays plain. Servers fuse gate and up
and take one global scale for both, so here they share the smaller one, and the other linear's block
scales shrink by the ratio (numerics.shared_scale): whatever that changes is recorded, and nothing
else does.

Source: https://github.com/IST-DASLab/MoESQ, save_model.py and src/compression (paired48_sparse,
quant/nvfp4), 2026-11; layout "pair-bitmask", version 1.

Legend: O out, S spans (32 inputs), B packed bytes (two inputs each), K pair_groups (4 bytes).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from p48ray.checkpoint.expert_checks import FOREIGN_GROUP
from p48ray.checkpoint.index import CONFIG_FILE, CONFIG_KEY
from p48ray.checkpoint.layout import ExpertStorage
from p48ray.checkpoint.modelopt import INPUT_DIVISOR, WEIGHT_DIVISOR
from p48ray.checkpoint.output_config import NVFP4_FORMAT
from p48ray.checkpoint.sparse_storage import (
    KEPT,
    MARKER_KEY,
    MASK,
    PACKED,
    QUANTIZERS,
    SCALE,
    doubled,
    storage_of,
)
from p48ray.errors import NumericsError, SourceError
from p48ray.numerics import nvfp4, paired48
from p48ray.numerics.shared_scale import rescaled, shared_divisor

COMMON: Mapping[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": FOREIGN_GROUP,
    "symmetric": True,
}
DYNAMIC: Mapping[str, Any] = {"weights": False, "input_activations": "local"}
MINUS_ZERO = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLinear:
    """One linear's tensors as they are decoded. packed: (out, in/2) U8 without minus zero. scale:
    (out, in/32) E4M3, finite and above 0. The divisors are finite and above 0."""

    packed: Tensor
    scale: Tensor
    weight_divisor: float
    input_divisor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """What sharing a global scale has done to a linear's block scales: times `ratio`, rounded to
    E4M3. num_groups: spans of 32 inputs; the rest as numerics.shared_scale.Rescaled has it."""

    ratio: float
    num_groups: int
    num_rounded: int
    num_vanished: int
    largest_rounding: float


def is_foreign(config: Mapping[str, Any]) -> bool:
    """Whether config.json speaks of NVFP4 in groups of 32, or of sparse storage; whether of a form
    that can be read, `foreign_storage` says."""
    quantization = config.get(CONFIG_KEY)
    if not isinstance(quantization, Mapping) or quantization.get("format") != NVFP4_FORMAT:
        return False
    groups = quantization.get("config_groups")
    schemes = groups.values() if isinstance(groups, Mapping) else ()
    return quantization.get(MARKER_KEY) is not None or any(
        isinstance(scheme, Mapping)
        and isinstance(weights := scheme.get("weights"), Mapping)
        and weights.get("group_size") == FOREIGN_GROUP
        for scheme in schemes
    )


def foreign_storage(config: Mapping[str, Any]) -> ExpertStorage:
    """How the experts are stored, by config.json.

    Raises: SourceError, naming the key, for what is not 4-bit floats in groups of 32, weights and
        activations, and for another sparse layout or version.
    """
    quantization = config.get(CONFIG_KEY)
    groups = quantization.get("config_groups") if isinstance(quantization, Mapping) else None
    if not isinstance(groups, Mapping) or len(groups) != 1:
        found = list(groups) if isinstance(groups, Mapping) else groups
        raise SourceError(
            f"{CONFIG_FILE}: {CONFIG_KEY}.config_groups: expected one group, found {found!r}"
        )
    (name, scheme), path = next(iter(groups.items())), f"{CONFIG_KEY}.config_groups"
    for quantizer in QUANTIZERS:
        stated = scheme.get(quantizer) if isinstance(scheme, Mapping) else None
        if not isinstance(stated, Mapping):
            raise SourceError(
                f"{CONFIG_FILE}: {path}.{name}.{quantizer}: expected an object, because weights and"
                f" activations are NVFP4 here, found {stated!r}"
            )
        for key, expected in {**COMMON, "dynamic": DYNAMIC[quantizer]}.items():
            if (value := stated.get(key)) != expected:
                raise SourceError(
                    f"{CONFIG_FILE}: {path}.{name}.{quantizer}.{key}: expected {expected!r} in a"
                    f" paired-4:8 checkpoint without a p48ray.json, found {value!r}"
                )
    return "paired48" if storage_of(config) == "sparse" else "paired48-dense"


def read_linear(tensors: Mapping[str, Tensor], storage: ExpertStorage, where: str) -> ForeignLinear:
    """Check and decode one linear's tensors.

    Args:
        tensors: suffix -> tensor, of the shapes that expert_checks demands.
        storage: one of FOREIGN_STORAGES.
        where: file and name of the linear, for messages.
    Raises: SourceError, naming the tensor, for a mask or pattern that is not paired-4:8, and for
        scales that are not finite and above 0.
    """
    divisors = {suffix: float(tensors[suffix]) for suffix in (WEIGHT_DIVISOR, INPUT_DIVISOR)}
    for suffix, value in divisors.items():
        if not (math.isfinite(value) and value > 0):
            raise SourceError(f"{where}.{suffix}: expected finite and above 0, found {value}")
    values_OS = tensors[SCALE].float()
    is_bad_OS = ~(torch.isfinite(values_OS) & (values_OS > 0))
    if num_bad := int(is_bad_OS.sum()):
        first = tuple(is_bad_OS.nonzero()[0].tolist())
        raise SourceError(
            f"{where}.{SCALE}: expected finite values above 0, found {num_bad} of"
            f" {values_OS.numel()} that are not, the first at {first}: {float(values_OS[first])}"
        )
    codes = PACKED if storage == "paired48-dense" else MASK
    try:
        packed = (
            tensors[PACKED]
            if storage == "paired48-dense"
            else paired48.unpack_sparse(tensors[KEPT], tensors[MASK])
        )
    except NumericsError as error:
        raise SourceError(f"{where}.{codes}: {error}") from error
    packed = without_minus_zero(packed)
    is_illegal_OK = paired48.find_illegal(packed)
    if num_illegal := int(is_illegal_OK.sum()):
        first = tuple(is_illegal_OK.nonzero()[0].tolist())
        raise SourceError(
            f"{where}.{codes}: expected 2 of 4 pairs kept in every 8 inputs (paired-4:8), found"
            f" {num_illegal} groups of 8 with more, the first at {first}"
        )
    return ForeignLinear(
        packed=packed,
        scale=tensors[SCALE],
        weight_divisor=divisors[WEIGHT_DIVISOR],
        input_divisor=divisors[INPUT_DIVISOR],
    )


def without_minus_zero(packed: Tensor) -> Tensor:
    """The same values (out, in/2) with code 0 for every zero."""
    low, high = packed & 0x0F, packed & 0xF0
    low = torch.where(low == MINUS_ZERO, torch.zeros_like(low), low)
    return low | torch.where(high == MINUS_ZERO << 4, torch.zeros_like(high), high)


def weight_values(linear: ForeignLinear) -> Tensor:
    """(out, in) float32, as a server of that checkpoint has it."""
    divisor = torch.tensor([linear.weight_divisor], device=linear.packed.device)
    return nvfp4.dequantize_packed(linear.packed[None], doubled(linear.scale)[None], divisor)[0]


def shared_expert(
    linears: Mapping[str, ForeignLinear], where: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Folding]]:
    """One expert in dense storage.

    Args:
        linears: projection -> what read_linear found.
        where: projection -> file and name, for messages.
    Returns: projection -> suffix -> tensor; and projection -> what became of its block scales, of
        the one whose global scale was the larger, if the two differ.
    Raises: SourceError if gate and up, which have the same inputs, scale them differently.
    """
    gate, up = linears["gate_proj"], linears["up_proj"]
    if gate.input_divisor != up.input_divisor:
        raise SourceError(
            f"{where['up_proj']}.{INPUT_DIVISOR}: expected gate's {gate.input_divisor}, because the"
            f" two have the same inputs, found {up.input_divisor}"
        )
    shared = shared_divisor(gate.weight_divisor, up.weight_divisor)
    dense: dict[str, dict[str, Tensor]] = {}
    foldings: dict[str, Folding] = {}
    for projection, linear in linears.items():
        packed, scale, divisor = linear.packed, linear.scale, linear.weight_divisor
        if projection != "down_proj" and divisor != shared:
            packed, scale, foldings[projection] = folded(linear, shared)
            divisor = shared
        dense[projection] = {
            WEIGHT_DIVISOR: torch.tensor([divisor], dtype=torch.float32),
            INPUT_DIVISOR: torch.tensor([linear.input_divisor], dtype=torch.float32),
            SCALE: doubled(scale),
            PACKED: packed,
        }
    return dense, foldings


def folded(linear: ForeignLinear, shared: float) -> tuple[Tensor, Tensor, Folding]:
    """Codes and block scales (out, in/32) of a linear under a smaller divisor, and what that has
    changed."""
    spans_OSB = linear.packed.unflatten(-1, (-1, FOREIGN_GROUP // 2))
    is_used_OS = (spans_OSB != 0).any(-1)
    found = rescaled(linear.scale, is_used_OS, linear.weight_divisor, shared)
    packed = torch.where(
        found.is_vanished_OS[..., None], torch.zeros_like(spans_OSB), spans_OSB
    ).flatten(-2)
    return (
        packed,
        found.scale_OS,
        Folding(
            ratio=shared / linear.weight_divisor,
            num_groups=linear.scale.numel(),
            num_rounded=found.num_rounded,
            num_vanished=found.num_vanished,
            largest_rounding=found.largest_rounding,
        ),
    )
