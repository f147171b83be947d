"""NVFP4 activations as a server quantizes them on the fly: a static global scale, a fresh E4M3
scale per 16 (or 32) values of every token.

    s  = e4m3(min(global * (amax / 6), 448))
    x^ = e2m1(clip(x / (s / global), -6, 6)) * (s / global)          s = 0  ->  x^ = 0

Source: [vLLM] `ref_nvfp4_quant` and its NVFP4 emulation; compressed-tensors' dynamic `tensor_group`
quantization is the same up to scales that round to 0. Departure: vLLM multiplies by the reciprocals
of 6, of the global scale and of s; here every quotient is a true division of tensors (as in nvfp4),
as the format is defined. The two differ where a quotient falls within an ulp of a rounding tie.

Legend: T tokens, I inputs, G groups of the scale (I/16 or I/32), V values of a group.
"""

import math

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics.e2m1 import E2M1_MAX, round_to_e2m1
from p48ray.numerics.nvfp4 import (
    E4M3_MAX,
    SCALE_GROUP,
    SCALE_SPANS,
    global_scale_from_amax,
    round_to_e4m3,
)

# relative: the amax that made a global scale is not itself counted as clipped
CLIP_TOLERANCE = 1e-6


def input_global_scale(amax: float) -> float:
    """448 * 6 / amax as a float32 value; 1 for amax 0.

    Raises: NumericsError if amax is negative or not finite.
    """
    if not (math.isfinite(amax) and amax >= 0):
        raise NumericsError(f"input_global_scale: expected a finite amax >= 0, found {amax}")
    return float(global_scale_from_amax(torch.tensor(amax, dtype=torch.float32)))


def quantize_activations(
    x: Float[Tensor, "t i"], global_scale: Float32[Tensor, ""] | float, group: int = SCALE_GROUP
) -> Float32[Tensor, "t i"]:
    """x^, what the W4A4 kernel multiplies with.

    Args:
        global_scale: 448 * 6 / amax of the layer's inputs; larger inputs saturate.
        group: values that share a scale, 16 (stock) or 32 (sparse MMA).
    Raises: NumericsError if group is neither 16 nor 32 or does not divide i.
    """
    if group not in SCALE_SPANS or x.shape[1] % group:
        raise NumericsError(
            f"quantize_activations: expected a group of 16 or 32 that divides the {x.shape[1]}"
            f" inputs, found {group}"
        )
    divisor = _on_device(global_scale, x)
    if x.is_cuda:
        from p48ray.kernels import activation as kernel

        return kernel.quantize_activations(x, divisor, group)
    x_TGV = x.float().unflatten(1, (-1, group))
    amax_TG1 = x_TGV.abs().amax(-1, keepdim=True)
    scale_TG1 = round_to_e4m3(divisor * (amax_TG1 / _on_device(E2M1_MAX, x)))
    is_zero_TG1 = scale_TG1 == 0
    unit_TG1 = scale_TG1 / divisor
    level_TGV = round_to_e2m1(x_TGV / unit_TG1.masked_fill(is_zero_TG1, 1.0))
    return (level_TGV * unit_TG1).flatten(1)


def count_clipped(
    x: Float[Tensor, "t i"], global_scale: Float32[Tensor, ""] | float
) -> Int64[Tensor, ""]:
    """How many |x| exceed what the global scale can represent, 448 * 6 / global, by more than
    rounding. Stays on the device."""
    limit = _on_device(E4M3_MAX * E2M1_MAX, x) / _on_device(global_scale, x)
    return (x.float().abs() > limit * (1 + CLIP_TOLERANCE)).sum()


def _on_device(value: Tensor | float, like: Tensor) -> Tensor:
    """A float32 scalar beside `like`, made there without a copy from the host."""
    if isinstance(value, Tensor):
        return value.to(like.device)
    return torch.full((), value, dtype=torch.float32, device=like.device)
