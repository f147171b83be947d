"""Tokens' values in nine bits each, for storage: an int8 code, and a bfloat16 scale for every 16
neighbours of a row.

    s  = bf16(amax / 127)        code = round(x / s)
    x~ = code * s, exact in float32                   |x - x~| <= s / 2

The scale is rounded to nearest, and still no code leaves -127..127: amax / s is within 127 (1 +-
2^-8), which rounds to 127. That also makes a second encoding change nothing. 16 is NVFP4's own
scale_group: an outlier coarsens only values that the W4A4 kernel will quantize with it, ten times
as coarsely (E2M1's smallest step is amax / 12). A block of 32 would save a quarter of a bit a value
and let an outlier of one scale_group spoil its neighbour. Gradients span many magnitudes from token
to token, so that no scale of a whole part would do for them.

Legend: T tokens, I values of a token, G blocks of a row (I/16), V values of a block.
"""

import torch
from jaxtyping import BFloat16, Float, Float32, Int8
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics.nvfp4 import SCALE_GROUP

BLOCK = SCALE_GROUP
MAX_CODE = 127
BYTES_PER_VALUE = 1 + 2 / BLOCK
# float32's and bfloat16's smallest normal number; blocks of zeros have it too
MIN_SCALE = 2.0**-126


def encode(x: Float[Tensor, "t i"]) -> tuple[Int8[Tensor, "t i"], BFloat16[Tensor, "t i//16"]]:
    """Codes and scales, on the device of x.

    Raises: NumericsError for values that are not finite, and where 16 does not divide i.
    """
    if x.shape[1] % BLOCK:
        raise NumericsError(
            f"block_int8.encode: expected rows of whole blocks of {BLOCK}, found {x.shape[1]}"
            " values"
        )
    x_TGV = x.float().unflatten(1, (-1, BLOCK))
    amax_TG1 = x_TGV.abs().amax(-1, keepdim=True)
    if not bool(torch.isfinite(amax_TG1).all()):
        raise NumericsError(
            f"block_int8.encode: expected finite values, found {int((~torch.isfinite(x)).sum())} of"
            f" {x.numel()} that are not"
        )
    scale_TG1 = (
        (amax_TG1 / torch.full_like(amax_TG1, MAX_CODE)).clamp_min(MIN_SCALE).to(torch.bfloat16)
    )
    codes_TGV = (x_TGV / scale_TG1.float()).round_().to(torch.int8)
    return codes_TGV.flatten(1), scale_TG1[..., 0]


def decode(
    codes: Int8[Tensor, "t i"], scale: BFloat16[Tensor, "t i//16"]
) -> Float32[Tensor, "t i"]:
    """code * scale."""
    return (codes.unflatten(1, (-1, BLOCK)).float() * scale.float()[..., None]).flatten(1)
