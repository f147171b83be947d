"""E2M1 and E4M3 rounding inside a kernel; the definitions are numerics.e2m1 and numerics.nvfp4."""

import triton
import triton.language as tl


@triton.jit
def round_to_e2m1(x):
    """Nearest E2M1 value, ties to the even code, saturating at 6: adding and taking away 1.5 * 2^23
    spacings leaves a multiple. -0 becomes +0."""
    clipped = tl.minimum(tl.maximum(x, -6.0), 6.0)
    power = (tl.maximum(tl.abs(clipped), 1.0).to(tl.int32, bitcast=True) & 0x7F800000).to(
        tl.float32, bitcast=True
    )
    return (clipped + power * 6291456.0) - power * 6291456.0  # the spacing is power / 2


@triton.jit
def round_to_e4m3(x):
    """Nearest E4M3 value of 0 <= x <= 448, ties to even. Under 2^-6 the spacing stays 2^-9."""
    power = (tl.maximum(x, 0.015625).to(tl.int32, bitcast=True) & 0x7F800000).to(
        tl.float32, bitcast=True
    )
    return (x + power * 1572864.0) - power * 1572864.0  # the spacing is power / 8


@triton.jit
def e2m1_code(level):
    """Code of an E2M1 value; 0 for zero."""
    size = tl.abs(level)
    index = tl.where(size <= 2.0, size * 2.0, tl.where(size <= 4.0, size + 2.0, 7.0))
    return (index + tl.where(level < 0, 8.0, 0.0)).to(tl.uint8)
