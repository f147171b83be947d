"""The column loop of numerics.sparsegpt for one panel of columns, one launch: masks, scales, codes
and the error feedback inside the panel.

    grid: (row tiles, experts); a program is one warp, a thread a row, and takes its rows through
    all columns of the panel

    for each strip of 32 columns:
        at a span's first column   masks of its pair_groups, provisional; the scale: the candidate
                                   with the least squared error
        for each pair_group        its mask again; its 8 columns in registers: code, error, feedback
                                   to the strip's later columns
        at the end                 feedback of the strip's errors to the panel's later columns by
                                   tensor cores (TF32, see numerics.products)

Legend: N experts, O out, I in, P pairs (I/2), S spans, C columns of a column_block, R rows
of a program; in kernels: j column, r row.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from p48ray.kernels.rounding import e2m1_code, round_to_e2m1, round_to_e4m3
from p48ray.kernels.strips import (
    STRIP,
    add_product_8,
    lines_of_rows,
    load_columns,
    pack_strips,
    uniform_2,
)
from p48ray.numerics.nvfp4 import E4M3_MAX, E4M3_MIN_SUBNORMAL, SCALE_FACTORS
from p48ray.numerics.products import tensor_float_32

ROWS = 32  # of a program: one warp, a thread a row
PANEL = 128  # columns of a launch
COLUMN_BLOCK = 512  # columns whose errors reach all later ones in one product


@triton.jit
def _pair_score(w0, w1, sharpness):
    """Sum over a pair of w^2 / U_jj^2; what is not a number ranks highest."""
    s0, s1 = uniform_2(sharpness)
    score = w0 * w0 * s0 + w1 * w1 * s1
    return tl.where(score == score, score, float("inf"))


@triton.jit
def _pick_masks(w, sharpness):
    """Which of four pairs to keep, as 0 or 1: the 2 with the highest scores, the lower index of
    equals."""
    s0, s1 = _pair_score(w[0], w[1], sharpness), _pair_score(w[2], w[3], sharpness + 2)
    s2, s3 = _pair_score(w[4], w[5], sharpness + 4), _pair_score(w[6], w[7], sharpness + 6)
    b01, b02, b03 = (s0 >= s1).to(tl.int32), (s0 >= s2).to(tl.int32), (s0 >= s3).to(tl.int32)
    b12, b13, b23 = (s1 >= s2).to(tl.int32), (s1 >= s3).to(tl.int32), (s2 >= s3).to(tl.int32)
    k0, k1 = (b01 + b02 + b03 >= 2).to(tl.float32), (1 - b01 + b12 + b13 >= 2).to(tl.float32)
    return (
        k0,
        k1,
        (2 - b02 - b12 + b23 >= 2).to(tl.float32),
        (3 - b03 - b13 - b23 >= 2).to(tl.float32),
    )


@triton.jit
def _store_masks(keep, stride, kept, is_there):
    for p in tl.static_range(4):
        tl.store(keep + p * stride, kept[p].to(tl.uint8), mask=is_there)


@triton.jit
def _best_scale(
    work, keep, factors, global_scale, j, stride, reach, SPAN: tl.constexpr, FACTORS: tl.constexpr,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """The E4M3 scale of the span at column j, searched as nvfp4.choose_scales does, but by products
    with 1 / unit."""
    columns = j + tl.arange(0, SPAN)[:, None]
    is_there = columns < reach[None, :]
    size = tl.abs(tl.load(work[None, :] + columns * stride, mask=is_there, other=0.0))
    size = tl.where(
        tl.load(keep[None, :] + (columns // 2) * stride, mask=is_there, other=0) != 0, size, 0.0
    )
    largest = tl.max(size, axis=0)
    base = tl.div_rn(largest, largest * 0.0 + 6.0) * global_scale
    best_error = largest * 0.0 + float("inf")
    best = largest * 0.0 + SMALLEST
    for f in range(FACTORS):
        scale = round_to_e4m3(
            tl.minimum(tl.maximum(base * tl.load(factors + f), SMALLEST), LARGEST)
        )
        unit = tl.div_rn(scale, scale * 0.0 + global_scale)
        delta = (
            round_to_e2m1(size * tl.div_rn(unit * 0.0 + 1.0, unit)[None, :]) * unit[None, :] - size
        )
        error = tl.sum(delta * delta, axis=0)
        best = tl.where(error < best_error, scale, best)
        best_error = tl.minimum(error, best_error)
    return best


@triton.jit
def _quantize_8(
    w, kept, unit, strip, out, errors, stride, is_there, STRIP: tl.constexpr, ROUNDS: tl.constexpr
):
    """The eight columns of a pair_group, each correcting those after it. Stores codes and errors;
    returns the errors."""
    all_errors = ()
    for j in tl.static_range(8):
        if ROUNDS:
            level = round_to_e2m1(tl.div_rn(w[j], unit)) * kept[j // 2] + 0.0
            tl.store(out + j * stride, e2m1_code(level), mask=is_there)
            left = w[j] - level * unit
        else:
            tl.store(out + j * stride, w[j] * kept[j // 2], mask=is_there)
            left = w[j] - w[j] * kept[j // 2]
        row = strip + j * STRIP
        error = tl.div_rn(left, left * 0.0 + tl.load(row + j))
        tl.store(errors + j * stride, error, mask=is_there)
        all_errors = all_errors + (error,)
        corrected = ()
        for c in tl.static_range(8):
            if c > j:
                corrected = corrected + (w[c] - tl.load(row + c) * error,)
            else:
                corrected = corrected + (w[c],)
        w = corrected
    return all_errors


@triton.jit
def _quantize_panel(
    work, out, keep, scales, errors, upper, strips, sharpness, global_scales, factors, num_inputs,
    num_strips, num_outputs, error_stride, start, stop, error_start, SPAN: tl.constexpr,
    PICKS: tl.constexpr, ROUNDS: tl.constexpr, FACTORS: tl.constexpr, SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr, ROWS: tl.constexpr, STRIP: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    reach = tl.where(rows < num_outputs, stop, 0)  # a row past the last has no columns
    expert = tl.program_id(1).to(tl.int64)
    work += expert * num_inputs * num_outputs + rows
    out += expert * num_inputs * num_outputs + rows
    keep += expert * (num_inputs // 2) * num_outputs + rows
    scales += expert * (num_inputs // SPAN) * num_outputs + rows
    errors += expert * error_stride * num_outputs + rows
    upper += expert * num_inputs * num_inputs
    strips += expert * num_strips * STRIP * STRIP
    sharpness += expert * num_strips * STRIP
    global_scale = tl.load(global_scales + expert)
    inner = tl.arange(0, STRIP)
    sink = tl.zeros([STRIP], tl.float32)
    for first in range(start, stop, STRIP):
        strip = strips + first * STRIP
        # What the strip will read, asked for at once: waiting for memory one column at a time took
        # most of the time.
        near_strip = lines_of_rows(strip, STRIP, 0, STRIP, STRIP)
        near_work = tl.load(
            work[None, :] + (first + inner)[:, None] * num_outputs,
            mask=(first + inner)[:, None] < reach[None, :],
            other=0.0,
        )
        unit = global_scale + tl.zeros([ROWS], tl.float32)
        for j in range(first, min(first + STRIP, stop), 8):
            is_there = reach > j
            if j % SPAN == 0:
                if PICKS:
                    for g in range(j, j + SPAN, 8):
                        w = load_columns(work + g * num_outputs, num_outputs, g, reach, 8)
                        _store_masks(
                            keep + (g // 2) * num_outputs,
                            num_outputs,
                            _pick_masks(w, sharpness + g),
                            is_there,
                        )
                    tl.debug_barrier()
                if ROUNDS:
                    scale = _best_scale(
                        work,
                        keep,
                        factors,
                        global_scale,
                        j,
                        num_outputs,
                        reach,
                        SPAN,
                        FACTORS,
                        SMALLEST,
                        LARGEST,
                    )
                    tl.store(scales + (j // SPAN) * num_outputs, scale, mask=is_there)
                    unit = tl.div_rn(scale, scale * 0.0 + global_scale)
            w = load_columns(work + j * num_outputs, num_outputs, j, reach, 8)
            if PICKS:
                kept = _pick_masks(w, sharpness + j)
                _store_masks(keep + (j // 2) * num_outputs, num_outputs, kept, is_there)
            else:
                kept = load_columns(
                    keep + (j // 2) * num_outputs, num_outputs, j // 2, reach // 2, 4
                )
                kept = (
                    kept[0].to(tl.float32),
                    kept[1].to(tl.float32),
                    kept[2].to(tl.float32),
                    kept[3].to(tl.float32),
                )
            own = strip + (j - first) * STRIP + j - first
            error_place = errors + (j - error_start) * num_outputs
            error = _quantize_8(
                w,
                kept,
                unit,
                own,
                out + j * num_outputs,
                error_place,
                num_outputs,
                is_there,
                STRIP,
                ROUNDS,
            )
            for c in range(j + 8, first + STRIP, 8):
                place = work + c * num_outputs
                corrected = add_product_8(
                    load_columns(place, num_outputs, c, reach, 8), error, own + c - j, STRIP, -1.0
                )
                for i in tl.static_range(8):
                    tl.store(place + i * num_outputs, corrected[i], mask=reach > c)
            tl.debug_barrier()
        sink += near_strip + tl.sum(near_work, axis=1)
        error_CR = tl.load(
            errors[None, :] + (first - error_start + inner)[:, None] * num_outputs,
            mask=(first + inner)[:, None] < reach[None, :],
            other=0.0,
        )
        for later in range(first + STRIP, stop, STRIP):
            columns = later + inner
            factor_CC = tl.load(
                upper + (first + inner)[:, None] * num_inputs + columns[None, :],
                mask=(first + inner < stop)[:, None] & (columns < stop)[None, :],
                other=0.0,
            )
            places = work[None, :] + columns[:, None] * num_outputs
            is_later = columns[:, None] < reach[None, :]
            work_CR = tl.load(places, mask=is_later, other=0.0)
            tl.store(
                places,
                work_CR - tl.dot(tl.trans(factor_CC), error_CR, input_precision="tf32"),
                mask=is_later,
            )
        tl.debug_barrier()
    # never; without a use the compiler would drop the early loads
    tl.store(errors - rows + inner, sink, mask=sink == float("inf"))


@functools.cache
def _scale_factors(device: torch.device) -> Tensor:
    return torch.tensor(SCALE_FACTORS, device=device)


def quantize_panel_(
    work_NIO: Tensor,
    out_NIO: Tensor,
    keep_NPO: Tensor,
    scale_NSO: Tensor,
    error_NCO: Tensor,
    upper_NII: Tensor,
    strips_NSCC: Tensor,
    sharpness_NI: Tensor,
    global_scale_N: Tensor,
    *,
    start: int,
    stop: int,
    error_start: int,
    span: int,
    picks_masks: bool,
    rounds: bool,
) -> None:
    """Quantize columns start to stop of every row; buffers as in sparsegpt, changed in place.

    Args:
        out_NIO: codes (uint8) where `rounds`, else values.
        keep_NPO: uint8.
        error_NCO: errors of a column_block that begins at column error_start.
        strips_NSCC: pack_strips of U.
        start and error_start: multiples of 32. All contiguous.
    """
    n, i, o = work_NIO.shape
    factors = _scale_factors(work_NIO.device)
    _quantize_panel[(triton.cdiv(o, ROWS), n)](
        work_NIO, out_NIO, keep_NPO, scale_NSO, error_NCO, upper_NII, strips_NSCC, sharpness_NI,
        global_scale_N, factors, i, strips_NSCC.shape[1], o, error_NCO.shape[1], start, stop,
        error_start, SPAN=span, PICKS=picks_masks, ROUNDS=rounds, FACTORS=len(SCALE_FACTORS),
        SMALLEST=E4M3_MIN_SUBNORMAL, LARGEST=E4M3_MAX, ROWS=ROWS, STRIP=STRIP, PANEL=PANEL,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def pass_(
    work_NIO: Tensor,
    keep_NPO: Tensor,
    upper_NII: Tensor,
    sharpness_NI: Tensor,
    global_scale_N: Tensor,
    *,
    span: int,
    picks_masks: bool,
    rounds: bool,
) -> tuple[Tensor, Tensor]:
    """The whole pass of sparsegpt over its buffers, which are changed in place: panels inside
    column_blocks, so that the product that reaches all later columns comes once a column_block.

    Returns: out_NIO, codes (uint8) where `rounds`, else values; and scale_NSO, float32.
    """
    n, i, o = work_NIO.shape
    out_NIO = torch.empty(
        n, i, o, dtype=torch.uint8 if rounds else torch.float32, device=work_NIO.device
    )
    scale_NSO = torch.empty(n, i // span, o, device=work_NIO.device)
    keep_bytes_NPO = keep_NPO.view(torch.uint8)
    upper_NII, strips_NSCC = upper_NII.contiguous(), pack_strips(upper_NII, beyond=1.0)
    sharpness_NI = F.pad(sharpness_NI, (0, strips_NSCC.shape[1] * STRIP - i))
    with tensor_float_32():
        for block_start in range(0, i, COLUMN_BLOCK):
            block_stop = min(block_start + COLUMN_BLOCK, i)
            error_NCO = torch.empty(n, block_stop - block_start, o, device=work_NIO.device)
            for start in range(block_start, block_stop, PANEL):
                stop = min(start + PANEL, block_stop)
                quantize_panel_(
                    work_NIO, out_NIO, keep_bytes_NPO, scale_NSO, error_NCO, upper_NII, strips_NSCC,
                    sharpness_NI, global_scale_N, start=start, stop=stop, error_start=block_start,
                    span=span, picks_masks=picks_masks, rounds=rounds,
                )  # fmt: skip
                if stop < block_stop:
                    panel_NPO = error_NCO[:, start - block_start : stop - block_start]
                    work_NIO[:, stop:block_stop].baddbmm_(
                        upper_NII[:, start:stop, stop:block_stop].mT, panel_NPO, alpha=-1
                    )
            if block_stop < i:
                work_NIO[:, block_stop:].baddbmm_(
                    upper_NII[:, block_start:block_stop, block_stop:].mT, error_NCO, alpha=-1
                )
    return out_NIO, scale_NSO
