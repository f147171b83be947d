"""Code descent: masks, codes and scales of a quantized paired-4:8 linear by exact one-dimensional
and small combinatorial steps under tr(G D H D^T).

GPTQ rounds once, left to right, under H alone and towards values that descent had left free. This
looks at every choice again, on the grid, with the rest fixed, and under G too. For one pair_group b
of one row, with a the linear term of block_descent, the objective falls by

    gain(v) = 2 a v^T - v H_bb v^T        for values v on the grid (codes times the scale)

Candidates: for each of the 6 patterns its free optimum, rounded; and the current codes. Each
candidate is polished by one pass of coordinate descent over its inputs: with the others fixed, the
best grid point is the nearest to the one-dimensional optimum. The candidate with the largest gain
is taken; the current one is among them, so no step raises the objective.

At the start of a span its scale is reconsidered with the codes fixed: along v the gain is a
parabola in the scale, and the E4M3 value nearest to its top is taken if it beats the current one.

With G, rows are visited in random groups under the majorised target of two_sided; without, all at
once.

Source: this project's. Coordinate descent after GPTQ is known from QuantEase (Behdin et al. 2023);
masks, scales and G are added here.

Legend: N experts, O out, I in, G scale groups (I/16), P pairs, K pair_groups, R rows of a group, S
= 16 or 32 inputs of a span, C candidates (7, the 6 patterns first; of a slope: columns of a
column_block), 8 inputs of a pair_group, 6 patterns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float8e4m3fn, Float32, UInt8
from torch import Tensor

from p48ray.numerics import e2m1, nvfp4
from p48ray.numerics.block_descent import DESCENT_BLOCK, Descent, start_descent
from p48ray.numerics.e2m1 import round_to_e2m1
from p48ray.numerics.nvfp4 import E4M3_MIN_SUBNORMAL, SCALE_GROUP, round_to_e4m3
from p48ray.numerics.paired48 import INPUTS_IN_GROUP, PATTERNS, pairs_to_inputs
from p48ray.numerics.two_sided import majorised_target, row_partitions

CODE_ROW_GROUPS = 8


@dataclass(slots=True, kw_only=True)
class _Grid:
    """A descent whose values stay on the grid: values = level * unit, unit = scale / global."""

    descent: Descent
    level_NOI: Tensor
    scale_NOG: Tensor  # float32, E4M3 values
    global_scale_N: Tensor
    span: int
    keep_C8: Tensor  # masks of the six patterns

    def unit(self, group: int) -> Tensor:
        return self.scale_NOG[:, :, group] / self.global_scale_N[:, None]


def code_descent(
    target: Float32[Tensor, "n o i"],
    codes: UInt8[Tensor, "n o i"],
    scale: Float8e4m3fn[Tensor, "n o g"],
    global_scale: Float32[Tensor, "n"],
    keep: Bool[Tensor, "n o p"],
    hessian_damped: Float32[Tensor, "n i i"],
    output_hessian_damped: Float32[Tensor, "n o o"] | None,
    *,
    span: int,
    sweeps: int,
) -> tuple[UInt8[Tensor, "n o i"], Float8e4m3fn[Tensor, "n o g"], Bool[Tensor, "n o p"]]:
    """Improve quantized weights; returns (codes, scale, keep), new tensors. The global scale stays.

    Args:
        target: T, (N, O, I).
        codes: E2M1 codes to start from, (N, O, I), 0 where keep is False.
        scale: E4M3, (N, O, G); equal for the two groups of a span of 32.
        global_scale: (N,), the divisor.
        keep: (N, O, P), exactly 2 of 4 pairs.
        hessian_damped: H, (N, I, I), symmetric positive definite.
        output_hessian_damped: G, (N, O, O), likewise; None for the identity.
        span: inputs that share a scale, 16 or 32.
        sweeps: visits of every row.
    Cost: about eight times a sweep of block descent.
    """
    values = nvfp4.dequantize(codes, scale, global_scale)
    state = _Grid(
        descent=start_descent(target, values, keep, hessian_damped),
        level_NOI=e2m1.decode(codes),
        scale_NOG=scale.float(),
        global_scale_N=global_scale,
        span=span,
        keep_C8=pairs_to_inputs(torch.tensor(PATTERNS, device=target.device)).float(),
    )
    if output_hessian_damped is None:
        for _ in range(sweeps):
            _sweep_(state)
    else:
        for rows_R in row_partitions(target.shape[1], CODE_ROW_GROUPS, sweeps, target.device):
            _sweep_rows_(
                state,
                rows_R,
                majorised_target(target, state.descent.values_NOI, output_hessian_damped, rows_R),
            )
    return (
        e2m1.encode(state.level_NOI),
        state.scale_NOG.to(torch.float8_e4m3fn),
        state.descent.keep(),
    )


def _sweep_rows_(state: _Grid, rows_R: Tensor, target_NRI: Tensor) -> None:
    """A sweep of some rows with a target of their own."""
    group = _Grid(
        descent=state.descent.rows(rows_R, target_NRI),
        level_NOI=state.level_NOI[:, rows_R],
        scale_NOG=state.scale_NOG[:, rows_R],
        global_scale_N=state.global_scale_N,
        span=state.span,
        keep_C8=state.keep_C8,
    )
    _sweep_(group)
    state.descent.values_NOI[:, rows_R], state.descent.pattern_NOK[:, rows_R] = (
        group.descent.values_NOI,
        group.descent.pattern_NOK,
    )
    state.level_NOI[:, rows_R], state.scale_NOG[:, rows_R] = group.level_NOI, group.scale_NOG


def _sweep_(state: _Grid) -> None:
    num_inputs = state.level_NOI.shape[2]
    for start in range(0, num_inputs, DESCENT_BLOCK):
        stop = min(start + DESCENT_BLOCK, num_inputs)
        descent = state.descent
        slope_NOC = (descent.target_NOI - descent.values_NOI) @ descent.hessian_NII[
            :, :, start:stop
        ]
        for j in range(start, stop, INPUTS_IN_GROUP):
            if j % state.span == 0:
                _rescale_span_(state, slope_NOC, start, stop, j)
            _choose_codes_(state, slope_NOC, start, stop, j)


def _move_(
    state: _Grid, slope_NOC: Tensor, start: int, stop: int, j: int, new_values: Tensor
) -> None:
    """Store new values of the columns from j on and correct the slope from there to the end of the
    column_block: what lies before is not read again."""
    values_NOI, end = state.descent.values_NOI, j + new_values.shape[2]
    change = new_values - values_NOI[:, :, j:end]
    values_NOI[:, :, j:end] = new_values
    slope_NOC[:, :, j - start :].baddbmm_(
        change, state.descent.hessian_NII[:, j:end, j:stop], alpha=-1
    )


def _rescale_span_(state: _Grid, slope_NOC: Tensor, start: int, stop: int, j: int) -> None:
    """The best of the current scale and the E4M3 values beside the optimum along the current
    codes."""
    end, group = j + state.span, j // SCALE_GROUP
    values_NOS = state.descent.values_NOI[:, :, j:end]
    curved_NOS = values_NOS @ state.descent.hessian_NII[:, j:end, j:end]
    curvature_NO = (curved_NOS * values_NOS).sum(-1)
    linear_NO = ((slope_NOC[:, :, j - start : end - start] + curved_NOS) * values_NOS).sum(-1)
    is_flat_NO = curvature_NO <= 0
    best_NO = linear_NO / torch.where(is_flat_NO, 1.0, curvature_NO)
    current_NO = state.scale_NOG[:, :, group]
    optimum_NO = torch.where(is_flat_NO, 1.0, best_NO) * current_NO
    scale_NO = round_to_e4m3(optimum_NO).clamp_min(E4M3_MIN_SUBNORMAL)
    factor_NO = scale_NO / current_NO
    gain_NO = (factor_NO - 1) * (2 * linear_NO - (factor_NO + 1) * curvature_NO)
    scale_NO = torch.where(gain_NO > 0, scale_NO, current_NO)
    state.scale_NOG[:, :, group : group + state.span // SCALE_GROUP] = scale_NO[:, :, None]
    _move_(
        state,
        slope_NOC,
        start,
        stop,
        j,
        state.level_NOI[:, :, j:end] * state.unit(group)[:, :, None],
    )


def _choose_codes_(state: _Grid, slope_NOC: Tensor, start: int, stop: int, j: int) -> None:
    """The best of seven candidates for one pair_group of every row."""
    descent, k, end = state.descent, j // INPUTS_IN_GROUP, j + INPUTS_IN_GROUP
    hessian_N88 = descent.hessian_NII[:, j:end, j:end]
    unit_NO11 = state.unit(j // SCALE_GROUP)[:, :, None, None]
    linear_NO8 = (
        slope_NOC[:, :, j - start : end - start] + descent.values_NOI[:, :, j:end] @ hessian_N88
    )
    free_NO68 = (linear_NO8 @ descent.solver_NK848[:, k]).unflatten(
        2, (len(PATTERNS), INPUTS_IN_GROUP)
    )
    level_NOC8 = torch.cat(
        [round_to_e2m1(free_NO68 / unit_NO11), state.level_NOI[:, :, None, j:end]], dim=2
    )
    pattern_NO = descent.pattern_NOK[:, :, k]
    keep_NOC8 = torch.cat(
        [state.keep_C8.expand(*pattern_NO.shape, -1, -1), state.keep_C8[pattern_NO][:, :, None]],
        dim=2,
    )
    _polish_(level_NOC8, keep_NOC8, linear_NO8, hessian_N88, unit_NO11)
    values_NOC8 = level_NOC8 * unit_NO11
    gain_NOC = (
        values_NOC8
        * (
            2 * linear_NO8[:, :, None]
            - (values_NOC8.flatten(1, 2) @ hessian_N88).view_as(values_NOC8)
        )
    ).sum(-1)
    best_gain_NO, best_NO = gain_NOC[:, :, :-1].max(-1)
    is_better_NO = best_gain_NO > gain_NOC[:, :, -1]
    descent.pattern_NOK[:, :, k] = torch.where(is_better_NO, best_NO, pattern_NO)
    choice_NO18 = torch.where(is_better_NO, best_NO, len(PATTERNS))[:, :, None, None].expand(
        -1, -1, 1, INPUTS_IN_GROUP
    )
    state.level_NOI[:, :, j:end] = level_NOC8.gather(2, choice_NO18)[:, :, 0]
    _move_(state, slope_NOC, start, stop, j, values_NOC8.gather(2, choice_NO18)[:, :, 0])


def _polish_(
    level_NOC8: Tensor,
    keep_NOC8: Tensor,
    linear_NO8: Tensor,
    hessian_N88: Tensor,
    unit_NO11: Tensor,
) -> None:
    """One pass of coordinate descent over the 8 inputs of every candidate."""
    residue_NOC8 = linear_NO8[:, :, None] - (
        (level_NOC8 * unit_NO11).flatten(1, 2) @ hessian_N88
    ).view_as(level_NOC8)
    unit_NO1 = unit_NO11[..., 0]
    for i in range(INPUTS_IN_GROUP):
        pivot_N11 = hessian_N88[:, i, i, None, None]
        optimum_NOC = level_NOC8[..., i] + residue_NOC8[..., i] / (pivot_N11 * unit_NO1)
        new_NOC = round_to_e2m1(optimum_NOC) * keep_NOC8[..., i]
        change_NOC = (new_NOC - level_NOC8[..., i]) * unit_NO1
        level_NOC8[..., i] = new_NOC
        residue_NOC8.addcmul_(change_NOC[..., None], hessian_N88[:, None, None, i], value=-1)
