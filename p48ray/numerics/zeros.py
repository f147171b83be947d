"""What no solver has anything to choose of: weights that are zero, inputs that are zero, and values
so small that float32 has no squares of what rounding loses of them.

Such a linear is rounded to nearest, which is exact where it is zero. Its outcome is "zero": it is
no fallback, because nothing that a solver could do would be better.

A value of 2^-50 (9e-16) adds nothing to a sum in bf16 with anything that a model computes. What
rounding loses of it squares to 2^-110, and times a second moment to less: float32 ends at 2^-126.

Legend: N experts, O out, I in.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

SMALLEST = 2.0**-50
MAX_ENLARGEMENT = 120  # as a power of two; float32 ends at 2^127
ZERO_WEIGHTS = "its weights are zero, or all below 1e-15"
ZERO_INPUTS = "its inputs are zero for every calibration token"


def largest(values: Float32[Tensor, "n o i"]) -> Float32[Tensor, "n"]:
    """max |w| per expert, without a copy of the values."""
    return torch.maximum(values.amax((1, 2)), -values.amin((1, 2)))


def vanishes(values: Float32[Tensor, "n o i"]) -> Bool[Tensor, "n"]:
    """Whether a linear has no weight of SMALLEST or more. NaN does not vanish."""
    return largest(values) < SMALLEST


def enlargement(values: Float32[Tensor, "n o i"]) -> Float32[Tensor, "n"]:
    """The power of two that brings a linear that vanishes to a size that float32 can square; 1 for
    any other, and for zeros. To multiply with it is exact."""
    amax_N = largest(values)
    _, exponent_N = torch.frexp(amax_N)
    power_N = (-exponent_N).clamp(0, MAX_ENLARGEMENT)
    factor_N = (power_N + 127 << 23).to(torch.int32).view(torch.float32)  # its bits: exact
    return torch.where((amax_N > 0) & (amax_N < SMALLEST), factor_N, 1.0)


def zero_reasons(
    weight: Float32[Tensor, "n o i"], sees_zeros: Sequence[bool] = ()
) -> tuple[str, ...]:
    """Why each linear has nothing to solve; "" where it has something. Waits for the device.

    Args:
        weight: (N, O, I), the original.
        sees_zeros: per expert, whether all its inputs are zero; empty for none.
    """
    inputs = sees_zeros or [False] * len(weight)
    return tuple(
        "; ".join(why for why, holds in ((ZERO_WEIGHTS, w), (ZERO_INPUTS, x)) if holds)
        for w, x in zip(vanishes(weight).tolist(), inputs, strict=True)
    )
