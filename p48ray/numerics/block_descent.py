"""Block descent: masks and values of a paired-4:8 linear by exact minimisation over one pair_group
at a time.

Minimise f(Q) = tr(D H D^T), D = T - Q, over Q with 2 of every 4 pairs nonzero. With everything
outside pair_group b fixed, every row is on its own:

    f = const - 2 a q_b^T + q_b H_bb q_b^T        a = (D H)_b + Q_b H_bb
    pattern p (4 inputs kept):   q_p = a_p inv(H_pp),   f falls by a_p inv(H_pp) a_p^T = a . v
    with v = q_p put back among 8 inputs, zeros elsewhere

All six: inv(H_pp) embedded in 8 x 8 zeros, side by side 8 x 48, so one product of a (N, O, 8) with
it holds the six candidates. The best pattern is taken with its values; the current one wins ties.
No step can raise f, and only rounding (1e-7 of its terms) can hide that.

    sweep:  [ column_block 0 ][ column_block 1 ] ...
              b0 b1 b2 ...

(D H) of a column_block is recomputed from T and Q, so nothing drifts; inside it, every step
corrects the columns to its right.

| DESIGN 7.2        | here            |
|-------------------|-----------------|
| W, Q, D = W - Q   | `target`, `values`, their difference |
| A = D H           | `slope_NOC`     |
| a                 | `linear_NO8`    |

Sources: the method is this project's (DESIGN 7.2); block coordinate descent, Bertsekas 1999 section
2.7.

Legend: N experts, O out, I in, P pairs (I/2), K pair_groups (I/8), C columns of a column_block, R
some of the rows, 8 inputs of a pair_group, 6 patterns, 48 = 6 * 8.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics.paired48 import INPUTS_IN_GROUP, PATTERNS, pairs_to_inputs, pattern_index
from p48ray.numerics.relative_errors import hessian_loss

DESCENT_BLOCK = 128


@dataclass(slots=True, kw_only=True)
class Descent:
    """Buffers of a descent: `values_NOI` and `pattern_NOK` change under way; H and the 4 x 4
    solvers made from it do not."""

    target_NOI: Tensor
    values_NOI: Tensor
    pattern_NOK: Tensor
    hessian_NII: Tensor
    solver_NK848: Tensor

    def rows(self, rows_R: Tensor, target_NRI: Tensor) -> "Descent":
        """Some rows as a descent of their own, with copies of their values and another target."""
        return replace(
            self,
            target_NOI=target_NRI,
            values_NOI=self.values_NOI[:, rows_R],
            pattern_NOK=self.pattern_NOK[:, rows_R],
        )

    def keep(self) -> Tensor:
        """Kept pairs (N, O, P)."""
        return kept_pairs(self.pattern_NOK)


def kept_pairs(pattern_NOK: Tensor) -> Tensor:
    """Kept pairs (N, O, P) of pattern indices."""
    return torch.tensor(PATTERNS, device=pattern_NOK.device)[pattern_NOK].flatten(2)


def check_inputs(target: Tensor) -> None:
    """Raises: NumericsError if the inputs are not a multiple of 8."""
    if target.shape[2] % INPUTS_IN_GROUP:
        raise NumericsError(
            f"block_descent: expected {target.shape[2]} inputs to be a multiple of"
            f" {INPUTS_IN_GROUP}"
        )


def start_descent(
    target: Tensor, start_values: Tensor, start_keep: Tensor, hessian_damped: Tensor
) -> Descent:
    """Fresh buffers and the solvers of every pair_group.

    Args:
        target, hessian_damped: as block_descent takes them; held, and not changed.
        start_values, start_keep: as block_descent takes them; copied.
    Raises: NumericsError if the inputs are not a multiple of 8.
    """
    check_inputs(target)
    return Descent(
        target_NOI=target,
        values_NOI=start_values.clone(),
        pattern_NOK=pattern_index(start_keep).long(),
        hessian_NII=hessian_damped,
        solver_NK848=_six_solvers(hessian_damped),
    )


def block_descent(
    target: Float32[Tensor, "n o i"],
    start_values: Float32[Tensor, "n o i"],
    start_keep: Bool[Tensor, "n o i//2"],
    hessian_damped: Float32[Tensor, "n i i"],
    sweeps: int,
    column_block: int = DESCENT_BLOCK,
    min_relative_gain: float = 0.0,
) -> tuple[Float32[Tensor, "n o i"], Bool[Tensor, "n o i//2"]]:
    """Descend from a start; returns (values, kept pairs), new tensors. Values are not on any grid
    yet.

    Args:
        target: T, (N, O, I).
        start_values: (N, O, I), zero where start_keep is False.
        start_keep: (N, O, P), exactly 2 of 4 pairs.
        hessian_damped: H, (N, I, I), symmetric positive definite.
        sweeps: passes over all columns.
        column_block: columns whose slope is recomputed together; a GPU's kernel has its own.
        min_relative_gain: stop after a sweep that lowered the summed loss by less than this
            fraction; 0 runs all sweeps and never waits for the device.
    Raises: NumericsError if i or column_block is not a multiple of 8.
    Cost: O I^2 multiply-adds an expert and sweep.
    """
    if target.is_cuda:
        check_inputs(target)
        return _descend_by_kernel(
            target, start_values, start_keep, hessian_damped, sweeps, min_relative_gain
        )
    state = start_descent(target, start_values, start_keep, hessian_damped)
    loss = (
        float(hessian_loss(target - start_values, hessian_damped).sum())
        if min_relative_gain > 0
        else 0.0
    )
    for _ in range(sweeps):
        sweep_(state, column_block)
        if min_relative_gain > 0:
            previous, loss = (
                loss,
                float(hessian_loss(target - state.values_NOI, hessian_damped).sum()),
            )
            if previous - loss < min_relative_gain * previous:
                break
    return state.values_NOI, state.keep()


def sweep_(state: Descent, column_block: int) -> None:
    """One visit to every pair_group of every row.

    Raises: NumericsError if column_block is not a multiple of 8.
    """
    if column_block % INPUTS_IN_GROUP:
        raise NumericsError(
            f"block_descent: expected column_block {column_block} to be a multiple of"
            f" {INPUTS_IN_GROUP}"
        )
    num_inputs = state.target_NOI.shape[2]
    for start in range(0, num_inputs, column_block):
        _descend_columns_(state, start, min(start + column_block, num_inputs))


def _six_solvers(hessian_NII: Tensor) -> Tensor:
    """inv(H_pp) of all pair_groups and patterns, embedded in zeros: (N, K, 8, 48)."""
    size, kept_64 = INPUTS_IN_GROUP, _kept_inputs(hessian_NII.device)
    pattern_611 = torch.arange(len(PATTERNS), device=kept_64.device)[:, None, None]
    inverse_NK644 = six_inverses(hessian_NII)
    embedded_NK688 = torch.zeros(
        *inverse_NK644.shape[:2], len(PATTERNS), size, size, device=hessian_NII.device
    )
    embedded_NK688[:, :, pattern_611, kept_64[:, :, None], kept_64[:, None, :]] = inverse_NK644
    return embedded_NK688.transpose(2, 3).flatten(3)


def six_inverses(hessian_NII: Tensor) -> Tensor:
    """inv(H_pp) of all pair_groups and patterns: (N, K, 6, 4, 4), taken in float64, rounded to
    float32."""
    size, kept_64 = INPUTS_IN_GROUP, _kept_inputs(hessian_NII.device)
    diagonal_NK88 = (
        hessian_NII.unflatten(2, (-1, size))
        .unflatten(1, (-1, size))
        .diagonal(dim1=1, dim2=3)
        .permute(0, 3, 1, 2)
    )
    return torch.linalg.inv_ex(
        diagonal_NK88[:, :, kept_64[:, :, None], kept_64[:, None, :]].double()
    ).inverse.float()


def _kept_inputs(device: torch.device) -> Tensor:
    """The four inputs that each pattern keeps, (6, 4)."""
    return torch.stack([k.nonzero()[:, 0] for k in pairs_to_inputs(torch.tensor(PATTERNS))]).to(
        device
    )


def _descend_by_kernel(
    target: Tensor,
    start_values: Tensor,
    start_keep: Tensor,
    hessian_damped: Tensor,
    sweeps: int,
    min_relative_gain: float,
) -> tuple[Tensor, Tensor]:
    """block_descent on a GPU."""
    from p48ray.kernels import descent as kernel

    values_NOI, pattern_NOK = kernel.block_descent(
        target,
        start_values,
        pattern_index(start_keep),
        hessian_damped,
        six_inverses(hessian_damped),
        sweeps,
        min_relative_gain,
    )
    return values_NOI, kept_pairs(pattern_NOK)


def _descend_columns_(state: Descent, start: int, stop: int) -> None:
    """One visit to every pair_group of a column_block, left to right."""
    values_NOI, hessian_NII = state.values_NOI, state.hessian_NII
    slope_NOC = (state.target_NOI - values_NOI) @ hessian_NII[:, :, start:stop]
    for j in range(start, stop, INPUTS_IN_GROUP):
        end, k = j + INPUTS_IN_GROUP, j // INPUTS_IN_GROUP
        old_NO8 = values_NOI[:, :, j:end].clone()
        linear_NO8 = (
            slope_NOC[:, :, j - start : end - start] + old_NO8 @ hessian_NII[:, j:end, j:end]
        )
        new_NO8, state.pattern_NOK[:, :, k] = _best_pattern(
            linear_NO8, state.solver_NK848[:, k], state.pattern_NOK[:, :, k]
        )
        values_NOI[:, :, j:end] = new_NO8
        if end < stop:
            slope_NOC[:, :, end - start :].baddbmm_(
                new_NO8 - old_NO8, hessian_NII[:, j:end, end:stop], alpha=-1
            )


def _best_pattern(
    linear_NO8: Tensor, solver_N848: Tensor, current_NO: Tensor
) -> tuple[Tensor, Tensor]:
    """(values (N, O, 8), pattern index (N, O)) with the largest gain for every row; the current
    pattern wins ties."""
    candidates_NO68 = (linear_NO8 @ solver_N848).unflatten(2, (len(PATTERNS), INPUTS_IN_GROUP))
    gain_NO6 = (candidates_NO68 * linear_NO8[:, :, None]).sum(-1)
    best_gain_NO, best_NO = gain_NO6.max(-1)
    is_better_NO = best_gain_NO > gain_NO6.gather(2, current_NO[:, :, None])[:, :, 0]
    choice_NO = torch.where(is_better_NO, best_NO, current_NO)
    index_NO18 = choice_NO[:, :, None, None].expand(-1, -1, 1, INPUTS_IN_GROUP)
    return candidates_NO68.gather(2, index_NO18)[:, :, 0], choice_NO
