"""One global scale for two linears that had one each: what becomes of the block scales.

    w = e2m1(code) * e4m3(scale) / global     with another divisor d: scale * (d / global), rounded

The shared divisor is the smaller one. So one linear keeps its block scales, and those of the other
only shrink: none can exceed 448. A scale that shrinks stays exact where scale * ratio is an E4M3
number: always for a ratio that is a power of two, unless the product needs more bits than a
subnormal number has; for other ratios seldom. The error of what is rounded is at most 1/17 of the
scale above E4M3's subnormal numbers.

Legend: O out, S spans of inputs that share a scale.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float8e4m3fn
from torch import Tensor

from p48ray.numerics.nvfp4 import E4M3_MIN_SUBNORMAL

MANTISSA_BITS = 4  # the leading one among them


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaled:
    """Block scales under another divisor.

    scale_OS: E4M3, none is zero. num_rounded: spans whose scale is not exact. num_vanished: those
    among them that round to zero: they hold the smallest scale, and their codes have to become
    zero (is_vanished_OS). largest_rounding: |rounded - exact| / exact, at most 1. Spans without a
    code that is not zero are in none of the three, because any scale is exact for them.
    """

    scale_OS: Tensor
    is_vanished_OS: Tensor
    num_rounded: int
    num_vanished: int
    largest_rounding: float


def shared_divisor(one: float, other: float) -> float:
    """The divisor for two linears. Args: both finite and above 0."""
    return min(one, other)


def rescaled(
    scale_OS: Float8e4m3fn[Tensor, "o s"],
    is_used_OS: Bool[Tensor, "o s"],
    divisor: float,
    shared: float,
) -> Rescaled:
    """The nearest E4M3 numbers to scale * (shared / divisor), ties to even.

    In float64 the product with `shared` has 28 bits and is exact; the quotient is rounded once. It
    is an E4M3 number, or lies half-way between two, only where the true one does: else the two are
    2^-30 of it apart.

    Args:
        scale_OS: finite and above 0.
        is_used_OS: spans that hold a code which is not zero.
        divisor: the global scale that they have, a float32.
        shared: the one that they are to have, a float32 that is no larger.
    """
    exact_OS = scale_OS.double() * shared / torch.full_like(scale_OS, divisor, dtype=torch.float64)
    _, exponent_OS = torch.frexp(exact_OS)  # exact = m * 2^exponent with 0.5 <= m < 1
    smallest = torch.full_like(exact_OS, E4M3_MIN_SUBNORMAL)
    step_OS = torch.ldexp(torch.ones_like(exact_OS), exponent_OS - MANTISSA_BITS).maximum(smallest)
    nearest_OS = (exact_OS / step_OS).round_() * step_OS
    rounding_OS = torch.where(is_used_OS, (nearest_OS - exact_OS).abs() / exact_OS, 0.0)
    is_vanished_OS = nearest_OS == 0
    return Rescaled(
        scale_OS=nearest_OS.maximum(smallest).to(torch.float8_e4m3fn),
        is_vanished_OS=is_vanished_OS,
        num_rounded=int((rounding_OS > 0).sum()),
        num_vanished=int((is_vanished_OS & is_used_OS).sum()),
        largest_rounding=float(rounding_OS.max()) if rounding_OS.numel() else 0.0,
    )
