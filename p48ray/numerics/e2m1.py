"""E2M1, the 4-bit float of NVFP4: sign, two exponent bits, one mantissa bit; no infinities, no NaN.

Source: [OCP MX v1.0], FP4. A code is sign << 3 | index into E2M1_VALUES, so the index's last bit is
the mantissa bit and "ties to even code" is IEEE round-to-nearest-even. Departure: minus zero (code
8) is never produced, because readers of the paired-4:8 layout tell pruned pairs by zero bytes.

    value   0   0.5   1   1.5   2   3   4   6
    index   0    1    2    3    4   5   6   7

Legend: I inputs, B packed bytes (I/2).
"""

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from p48ray.errors import NumericsError

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
SIGN_BIT = 8
_FLOAT32_EXPONENT_BITS = 0x7F800000


def round_to_e2m1(x: Float[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The nearest E2M1 value, ties to the even code, saturating at +-6. Zero is always +0. NaN
    stays NaN.

    The spacing of E2M1 is half the power of two below |x|, and 0.5 under 1: the exponent bits of
    max(|x|, 1) in float32 are that power of two. All products and quotients with it are exact, so
    the only rounding is torch.round's (half to even).
    """
    clipped = x.float().clamp(-E2M1_MAX, E2M1_MAX)
    power = (clipped.abs().clamp_min_(1.0).view(torch.int32) & _FLOAT32_EXPONENT_BITS).view(
        torch.float32
    )
    spacing = power.mul_(0.5)
    return (clipped / spacing).round_().mul_(spacing).add_(0.0)  # -0 + 0 is +0


def encode(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Codes 0-7 and 9-15 of the nearest E2M1 values; whatever rounds to zero is code 0. `x` must
    not hold NaN."""
    value = round_to_e2m1(x)
    halves = (value.abs() * 2).to(torch.uint8)  # 0 1 2 3 4 6 8 12
    index = halves.clamp_max(4) + (halves >= 6) + (halves >= 8) + (halves >= 12)
    return index + (value < 0).to(torch.uint8) * SIGN_BIT


def decode(codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Values of codes 0-15; code 8 is -0, as every decoder has it."""
    values = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=codes.device)
    return values[codes.int()]


def pack(codes: UInt8[Tensor, "*n i"]) -> UInt8[Tensor, "*n b"]:
    """Two codes a byte, the lower index in the low nibble.

    Raises: NumericsError if the number of codes is odd.
    """
    if codes.shape[-1] % 2:
        raise NumericsError(
            f"pack: expected an even number of codes in the last dimension, found {codes.shape[-1]}"
        )
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Tensor, "*n b"]) -> UInt8[Tensor, "*n i"]:
    """Inverse of `pack`."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def decode_packed(packed: UInt8[Tensor, "*n b"]) -> Float32[Tensor, "*n i"]:
    """`decode` of `unpack`, a byte at a time."""
    values = E2M1_VALUES + tuple(-v for v in E2M1_VALUES)
    both = torch.tensor([(low, high) for high in values for low in values], device=packed.device)
    return both[packed.int()].flatten(-2)
