"""Block descent under curvature on both sides: minimise f(Q) = tr(G D H D^T), D = T - Q, the
Kronecker-factored Fisher of the model's own loss.

With G = I the rows are independent and this is block_descent. Otherwise rows couple, and they are
visited in random row groups r. Changing the rows of one group by E changes f by

       -2 tr(E H (G D)_r^T) + tr(G_rr E H E^T)
    <= -2 tr(E H (G D)_r^T) + sum_k c_k E_k H E_k^T,        c_k = sum over k' in r of |G_kk'|

because diag(c) - G_rr is diagonally dominant, so positive semidefinite, and H is too. The bound
separates into rows; row k's part is that of a one-sided problem whose target is

    T'_k = Q_k + (G D)_k / c_k

so a row group is one ordinary sweep of block descent with that target, and f never rises. Without
the bound, groups of O/8 rows diverged on down_proj (DESIGN 7.3).

| DESIGN 7.3              | here                    |
|-------------------------|-------------------------|
| G                       | `output_hessian_NOO`    |
| c_r                     | `bound_NR`              |

Sources: Martens and Grosse 2015 (K-FAC); YAQA, Tseng et al. 2025, for quantization; the majorised
row groups are this project's.

Legend: N experts, O out, I in, P pairs (I/2), R rows of a row group, K pair_groups.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from p48ray.numerics.block_descent import (
    DESCENT_BLOCK,
    check_inputs,
    kept_pairs,
    six_inverses,
    start_descent,
    sweep_,
)
from p48ray.numerics.paired48 import pattern_index
from p48ray.numerics.products import tensor_float_32

# more groups: a tighter bound and more matrix products; 8 to 32 made no difference on the small
# models
ROW_GROUPS = 16


def two_sided_descent(
    target: Float32[Tensor, "n o i"],
    start_values: Float32[Tensor, "n o i"],
    start_keep: Bool[Tensor, "n o i//2"],
    hessian_damped: Float32[Tensor, "n i i"],
    output_hessian_damped: Float32[Tensor, "n o o"],
    sweeps: int,
    row_groups: int = ROW_GROUPS,
    column_block: int = DESCENT_BLOCK,
) -> tuple[Float32[Tensor, "n o i"], Bool[Tensor, "n o i//2"]]:
    """Descend from a start; returns (values, kept pairs), new tensors. Values are not on any grid
    yet.

    Args:
        target: T, (N, O, I).
        start_values: (N, O, I), zero where start_keep is False.
        start_keep: (N, O, P), exactly 2 of 4 pairs.
        hessian_damped: H, (N, I, I), symmetric positive definite.
        output_hessian_damped: G, (N, O, O), likewise.
        sweeps: visits of every row.
        row_groups: groups a sweep; the rows of a group are drawn anew each sweep from a fixed seed.
        column_block: as block_descent takes it.
    Cost: O I^2 + O^2 I multiply-adds an expert and sweep.
    """
    if target.is_cuda:
        return _descend_by_kernel(
            target,
            start_values,
            start_keep,
            hessian_damped,
            output_hessian_damped,
            sweeps,
            row_groups,
        )
    state = start_descent(target, start_values, start_keep, hessian_damped)
    for rows_R in row_partitions(target.shape[1], row_groups, sweeps, target.device):
        group = state.rows(
            rows_R, majorised_target(target, state.values_NOI, output_hessian_damped, rows_R)
        )
        sweep_(group, column_block)
        state.values_NOI[:, rows_R], state.pattern_NOK[:, rows_R] = (
            group.values_NOI,
            group.pattern_NOK,
        )
    return state.values_NOI, state.keep()


def _descend_by_kernel(
    target: Tensor,
    start_values: Tensor,
    start_keep: Tensor,
    hessian_damped: Tensor,
    output_hessian_damped: Tensor,
    sweeps: int,
    row_groups: int,
) -> tuple[Tensor, Tensor]:
    """two_sided_descent on a GPU."""
    from p48ray.kernels import descent as kernel

    check_inputs(target)
    groups = list(row_partitions(target.shape[1], row_groups, sweeps, target.device))
    per_sweep = len(groups) // max(1, sweeps)
    values_NOI, pattern_NOK = kernel.two_sided_descent(
        target,
        start_values,
        pattern_index(start_keep),
        hessian_damped,
        six_inverses(hessian_damped),
        output_hessian_damped,
        [groups[k * per_sweep : (k + 1) * per_sweep] for k in range(sweeps)],
    )
    return values_NOI, kept_pairs(pattern_NOK)


def row_partitions(
    num_rows: int, row_groups: int, sweeps: int, device: torch.device
) -> Iterator[Tensor]:
    """Index tensors of random row groups, all rows once a sweep; the same for every call with the
    same arguments.

    Args:
        num_rows: O.
        row_groups: groups a sweep, at most: they are of equal size, but for the last.
        sweeps: how often all rows come.
        device: of the index tensors.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(sweeps):
        yield from torch.randperm(num_rows, generator=generator).to(device).chunk(row_groups)


def majorised_target(
    target: Float32[Tensor, "n o i"],
    values: Float32[Tensor, "n o i"],
    output_hessian: Float32[Tensor, "n o o"],
    rows: Tensor,
) -> Float32[Tensor, "n r i"]:
    """T' of some rows: the one-sided target under which their step minimises the bound on f.

    Args:
        target: T, (N, O, I).
        values: Q, (N, O, I).
        output_hessian: G, (N, O, O), damped.
        rows: indices, (R,).
    Returns: (N, R, I).
    """
    coupling_NRO = output_hessian[:, rows]
    bound_NR1 = coupling_NRO[:, :, rows].abs().sum(-1, keepdim=True)
    return values[:, rows] + (coupling_NRO @ (target - values)) / bound_NR1


def two_sided_loss(
    delta: Float32[Tensor, "n o i"],
    hessian: Float32[Tensor, "n i i"],
    output_hessian: Float32[Tensor, "n o o"],
) -> Float32[Tensor, "n"]:
    """tr(G D H D^T)."""
    with tensor_float_32():
        return (
            ((output_hessian @ delta) * (delta @ hessian)).sum((1, 2), dtype=torch.float64).float()
        )
