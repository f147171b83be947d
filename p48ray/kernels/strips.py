"""What the panel kernels share. A strip is 32 columns: a thread holds its row's 32 values in
registers and reads the strip's own 32 x 32 block of H or U as uniform 8-byte loads, from a packed
copy, so that a strip's block is 4 KiB in one piece and not 32 pieces of a matrix that no cache
holds.

Legend: N experts, I in, S strips (I/32, rounded up), C columns of a strip.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIP = 32


def pack_strips(matrix_NII: Tensor, beyond: float) -> Tensor:
    """The diagonal 32 x 32 blocks, (N, S, 32, 32), contiguous. Past the last column: zeros,
    `beyond` on the diagonal."""
    n, i, _ = matrix_NII.shape
    strips = -(-i // STRIP)
    packed_NSCC = torch.zeros(n, strips, STRIP, STRIP, device=matrix_NII.device)
    whole = i // STRIP
    blocks = (
        matrix_NII[:, : whole * STRIP, : whole * STRIP]
        .unflatten(2, (-1, STRIP))
        .unflatten(1, (-1, STRIP))
        if whole
        else None
    )
    if blocks is not None:
        packed_NSCC[:, :whole] = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    if whole < strips:
        rest = i - whole * STRIP
        packed_NSCC[:, -1].diagonal(dim1=-2, dim2=-1).fill_(beyond)
        packed_NSCC[:, -1, :rest, :rest] = matrix_NII[:, whole * STRIP :, whole * STRIP :]
    return packed_NSCC


@triton.jit
def uniform_2(place):
    """Two consecutive values, the same for every row, as scalars: one 8-byte load. `place` must be
    a multiple of 8 bytes."""
    both = tl.load(place.to(tl.pointer_type(tl.int64)))
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(
        tl.float32, bitcast=True
    )


@triton.jit
def uniform_4(place):
    """Four consecutive values."""
    first, second = uniform_2(place)
    third, fourth = uniform_2(place + 2)
    return first, second, third, fourth


@triton.jit
def load_columns(place, stride, first, reach, COUNT: tl.constexpr):
    """COUNT columns of every row, from column `first` on; 0 from column `reach` of a row on."""
    columns = ()
    for i in tl.static_range(COUNT):
        columns = columns + (tl.load(place + i * stride, mask=reach > first + i, other=0.0),)
    return columns


@triton.jit
def lines_of_rows(place, stride, first, last, COUNT: tl.constexpr):
    """One value of each of COUNT matrix rows from `first` on, as far as row `last`: brings the
    lines that hold them near before they are needed."""
    index = first + tl.arange(0, COUNT)
    return tl.load(place + index * stride, mask=index < last, other=0.0)


@triton.jit
def add_product_4(total, factors, place, stride, SIGN: tl.constexpr, COUNT: tl.constexpr):
    """total (4 columns) + SIGN * sum over k of factors[k] * matrix[k, 4 columns]."""
    t0, t1, t2, t3 = total[0], total[1], total[2], total[3]
    for k in tl.static_range(COUNT):
        u0, u1, u2, u3 = uniform_4(place + k * stride)
        factor = factors[k] * SIGN
        t0 += factor * u0
        t1 += factor * u1
        t2 += factor * u2
        t3 += factor * u3
    return t0, t1, t2, t3


@triton.jit
def add_product_8(total, factors, place, stride, SIGN: tl.constexpr):
    """total (8 columns) + SIGN * factors (8) times the 8 x 8 matrix at `place`."""
    low, high = (total[0], total[1], total[2], total[3]), (total[4], total[5], total[6], total[7])
    return add_product_4(low, factors, place, stride, SIGN, 8) + add_product_4(
        high, factors, place + 4, stride, SIGN, 8
    )
