"""One panel of columns of block descent (numerics.block_descent), one launch: every pair_group's
six 4 x 4 solves in registers, corrections inside the panel.

    grid: (row tiles, experts); a program is one warp, a thread a row, and takes its rows through
    the panel's strips of 32 columns, left to right

    for each strip:   slopes of its 32 columns into registers
        for each of its 4 pair_groups   a = slope + Q_b H_bb; six candidates a_p inv(H_pp), the best
                                        gain, the current pattern wins ties: Q_b and pattern;
                                        slopes of the strip's later columns -= change H_b,later
        at the end                      slopes of the panel's later strips -= change H_strip,later
                                        by tensor cores (TF32, see numerics.products)

Legend: N experts, O out, I in, K pair_groups (I/8), B columns of the slope's column_block, R rows,
S strips (I/32), C columns of a strip; in kernels: j column, r row, c a later column.
"""

import triton
import triton.language as tl
from torch import Tensor

from p48ray.kernels.strips import STRIP, add_product_4, add_product_8, lines_of_rows, load_columns

ROWS = 32  # of a program: a thread a row
PANEL = 256  # columns of a launch


@triton.jit
def _best_pattern(linear, solver, current):
    """(pattern index, its four values) with the largest gain. solver: inverses of the six 4 x 4
    blocks."""
    zero = linear[0] * 0.0
    best_gain = zero - float("inf")
    best = current
    b0, b1, b2, b3 = zero, zero, zero, zero
    pattern = 0
    for first in tl.static_range(3):
        for second in tl.static_range(first + 1, 4):
            a = (
                linear[2 * first],
                linear[2 * first + 1],
                linear[2 * second],
                linear[2 * second + 1],
            )
            v0, v1, v2, v3 = add_product_4(
                (zero, zero, zero, zero), a, solver + pattern * 16, 4, 1.0, 4
            )
            gain = a[0] * v0 + a[1] * v1 + a[2] * v2 + a[3] * v3
            is_better = (gain > best_gain) | ((gain == best_gain) & (current == pattern))
            best_gain = tl.where(is_better, gain, best_gain)
            best = tl.where(is_better, pattern, best)
            b0, b1 = tl.where(is_better, v0, b0), tl.where(is_better, v1, b1)
            b2, b3 = tl.where(is_better, v2, b2), tl.where(is_better, v3, b3)
            pattern += 1
    return best, (b0, b1, b2, b3)


@triton.jit
def _spread(best, four, i: tl.constexpr):
    """Value of input i of the pair_group: its place among the four kept ones, 0 where pattern
    `best` drops its pair. Patterns: 01 02 03 12 13 23."""
    low: tl.constexpr = i % 2
    if i // 2 == 0:
        return tl.where(best <= 2, four[low], 0.0)
    if i // 2 == 1:
        return tl.where(
            best == 0, four[2 + low], tl.where((best == 3) | (best == 4), four[low], 0.0)
        )
    if i // 2 == 2:
        return tl.where(
            (best == 1) | (best == 3), four[2 + low], tl.where(best == 5, four[low], 0.0)
        )
    return tl.where((best == 2) | (best == 4) | (best == 5), four[2 + low], 0.0)


@triton.jit
def _bring_near(
    strips,
    solver,
    values,
    hessian,
    num_inputs,
    num_rows,
    reach,
    first,
    stop,
    STRIP: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Loads of what the strip at column `first` will read, all at once and a strip early: waiting
    for memory one column at a time took most of the time."""
    columns = first + tl.arange(0, STRIP)
    width = tl.minimum(tl.maximum(stop - first, 0), STRIP)
    return (
        lines_of_rows(strips + first * STRIP, STRIP, 0, width, STRIP),
        lines_of_rows(solver + (first // 8) * 96, STRIP, 0, width // 8 * 3, STRIP),
        tl.load(
            values[None, :] + columns[:, None] * num_rows,
            mask=columns[:, None] < reach[None, :],
            other=0.0,
        ),
        lines_of_rows(hessian + first, num_inputs, first + STRIP, stop, PANEL),
    )


@triton.jit
def _sum_near(near, STRIP: tl.constexpr, PANEL: tl.constexpr):
    """A number that nobody needs, but that needs those loads."""
    return (
        near[0]
        + near[1]
        + tl.sum(near[2], axis=1)
        + tl.sum(tl.reshape(near[3], [PANEL // STRIP, STRIP]), axis=0)
    )


@triton.jit
def _descend_panel(
    slope, change, values, pattern, hessian, strips, solver, num_inputs, num_strips, num_rows,
    slope_stride, start, stop, slope_start, ROWS: tl.constexpr, STRIP: tl.constexpr,
    PANEL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    reach = tl.where(rows < num_rows, stop, 0)  # a row past the last has no columns
    expert = tl.program_id(1).to(tl.int64)
    slope += expert * slope_stride * num_rows + rows
    change += expert * slope_stride * num_rows + rows
    values += expert * num_inputs * num_rows + rows
    pattern += expert * (num_inputs // 8) * num_rows + rows
    hessian += expert * num_inputs * num_inputs
    strips += expert * num_strips * STRIP * STRIP
    solver += expert * num_strips * (STRIP // 8) * 96
    inner = tl.arange(0, STRIP)
    sink = _sum_near(
        _bring_near(
            strips, solver, values, hessian, num_inputs, num_rows, reach, start, stop, STRIP, PANEL
        ),
        STRIP,
        PANEL,
    )
    for first in range(start, stop, STRIP):
        near = _bring_near(
            strips,
            solver,
            values,
            hessian,
            num_inputs,
            num_rows,
            reach,
            first + STRIP,
            stop,
            STRIP,
            PANEL,
        )
        at = first - slope_start
        strip = strips + first * STRIP
        for j in range(first, first + STRIP, 8):
            is_there = reach > j
            old = load_columns(values + j * num_rows, num_rows, j, reach, 8)
            slopes = load_columns(slope + (j - slope_start) * num_rows, num_rows, j, reach, 8)
            own = strip + (j - first) * STRIP + j - first
            linear = add_product_8(slopes, old, own, STRIP, 1.0)
            current = tl.load(pattern + (j // 8) * num_rows, mask=is_there, other=0).to(tl.int32)
            best, four = _best_pattern(linear, solver + (j // 8) * 96, current)
            tl.store(pattern + (j // 8) * num_rows, best.to(tl.uint8), mask=is_there)
            moved = ()
            for i in tl.static_range(8):
                new = _spread(best, four, i)
                moved = moved + (new - old[i],)
                tl.store(values + (j + i) * num_rows, new, mask=is_there)
                tl.store(change + (j - slope_start + i) * num_rows, new - old[i], mask=is_there)
            for c in range(j + 8, first + STRIP, 8):
                place = slope + (c - slope_start) * num_rows
                corrected = add_product_8(
                    load_columns(place, num_rows, c, reach, 8), moved, own + c - j, STRIP, -1.0
                )
                for i in tl.static_range(8):
                    tl.store(place + i * num_rows, corrected[i], mask=reach > c)
        tl.debug_barrier()
        sink += _sum_near(near, STRIP, PANEL)
        delta_CR = tl.load(
            change[None, :] + (at + inner)[:, None] * num_rows,
            mask=(first + inner)[:, None] < reach[None, :],
            other=0.0,
        )
        for later in range(first + STRIP, stop, STRIP):
            columns = later + inner
            factor_CC = tl.load(
                hessian + columns[:, None] * num_inputs + (first + inner)[None, :],
                mask=(columns < stop)[:, None] & (first + inner < stop)[None, :],
                other=0.0,
            )
            places = slope[None, :] + (columns - slope_start)[:, None] * num_rows
            is_later = columns[:, None] < reach[None, :]
            slope_CR = tl.load(places, mask=is_later, other=0.0)
            tl.store(
                places,
                slope_CR - tl.dot(factor_CC, delta_CR, input_precision="tf32"),
                mask=is_later,
            )
        tl.debug_barrier()
    # never; without a use the compiler would drop the early loads
    tl.store(change - rows + inner, sink, mask=sink == float("inf"))


def descend_panel_(
    slope_NBR: Tensor,
    change_NBR: Tensor,
    values_NIR: Tensor,
    pattern_NKR: Tensor,
    hessian_NII: Tensor,
    strips_NSCC: Tensor,
    solver_NK644: Tensor,
    *,
    start: int,
    stop: int,
    slope_start: int,
) -> None:
    """Visit the pair_groups of columns start to stop; changes everything but H and what was made
    from it in place.

    Args:
        slope_NBR: D H of the column_block that begins at slope_start; its columns from stop on are
            left to the caller.
        change_NBR: receives what the values changed by.
        pattern_NKR: uint8.
        strips_NSCC: pack_strips of H.
        solver_NK644: inverses of the 4 x 4 blocks, of 4 pair_groups a strip.
        start and slope_start: multiples of 32. All contiguous.
    """
    n, b, r = slope_NBR.shape
    i = values_NIR.shape[1]
    _descend_panel[(triton.cdiv(r, ROWS), n)](
        slope_NBR, change_NBR, values_NIR, pattern_NKR, hessian_NII, strips_NSCC, solver_NK644, i,
        strips_NSCC.shape[1], r, b, start, stop, slope_start, ROWS=ROWS, STRIP=STRIP, PANEL=PANEL,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
