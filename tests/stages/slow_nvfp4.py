"""NVFP4 activations the long way: every value is compared with every representable one, from
tables. Nothing here is the project's."""

import torch
from torch import Tensor

from tests.reference import formats

E2M1 = torch.tensor(formats.E2M1, dtype=torch.float64)
E4M3 = torch.tensor(formats.e4m3_values(), dtype=torch.float64)


def nearest(magnitude: Tensor, values: Tensor) -> Tensor:
    """The nearest of `values` (ascending from 0) for every magnitude; of two equally near the one
    with the even index; the last for all above it."""
    above = torch.searchsorted(values, magnitude.contiguous()).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    distance_low, distance_high = magnitude - low, high - magnitude
    takes_high = (distance_high < distance_low) | (
        (distance_high == distance_low) & (above % 2 == 0)
    )
    return torch.where(takes_high, high, low)


def quantize_tokens(x_TI: Tensor, global_scale: float, group: int = 16) -> Tensor:
    """x as a W4A4 kernel sees it: scale per `group` values in E4M3 (448 at most), values in E2M1 of
    it; all zero where the scale rounds to 0.

    Quotients are float32's, as the format has them: inputs in bf16 meet rounding ties often, and
    float64 would break those the other way.
    """
    divisor = torch.tensor(global_scale, dtype=torch.float32)
    x_TGV = x_TI.float().unflatten(-1, (-1, group))
    wanted_TG1 = divisor * (x_TGV.abs().amax(-1, keepdim=True) / torch.tensor(6.0))
    scale_TG1 = nearest(wanted_TG1.double().clamp_max(448.0), E4M3).float()
    unit_TG1 = scale_TG1 / divisor
    ratio_TGV = x_TGV.abs() / torch.where(unit_TG1 > 0, unit_TG1, 1.0)
    level_TGV = nearest(ratio_TGV.double(), E2M1) * x_TGV.sign()
    return (level_TGV * unit_TG1).flatten(-2)


def decode_weights(linear: dict[str, Tensor]) -> Tensor:
    """e2m1 * e4m3 / global of one stored linear (suffix -> tensor), from tables."""
    packed = linear["weight_packed"].int()
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    scale_OG = E4M3[linear["weight_scale"].view(torch.uint8).long()]
    return (
        torch.cat([E2M1, -E2M1])[codes]
        * scale_OG.repeat_interleave(16, 1)
        / linear["weight_global_scale"].double()
    )
