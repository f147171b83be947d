"""SparseGPT and GPTQ as optimal brain surgery: explicit inverse Hessian, one row and one column at
a time, no Cholesky and no lazy updates.

Fixing input j of a row costs e = (w_j - q_j) / [H^-1]_jj; the free inputs move by -e [H^-1]_:j, and
H^-1 loses row and column j by Gaussian elimination.
"""

import torch
from torch import Tensor

from tests.reference.formats import e2m1, span_scale


def eliminations(hessian_II: Tensor, damp_rel: float) -> list[Tensor]:
    """Row j of H^-1 after inputs 0..j-1 have been eliminated, for every j."""
    size = len(hessian_II)
    damped = hessian_II.double() + damp_rel * hessian_II.double().diagonal().mean() * torch.eye(
        size, dtype=torch.float64
    )
    inverse = torch.linalg.inv(damped)
    rows = []
    for j in range(size):
        rows.append(inverse[j].clone())
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return rows


def best_two_pairs(scores: list[float]) -> list[bool]:
    order = sorted(range(4), key=lambda k: (-scores[k], k))
    return [k in order[:2] for k in range(4)]


def prune_row(row: Tensor, steps: list[Tensor]) -> tuple[list[float], list[bool]]:
    """(values, kept pairs) of one row under SparseGPT alone: kept weights stay what the corrections
    so far made them."""
    w = row.double().clone()
    values, kept = [], [True] * (len(w) // 2)
    for j in range(len(w)):
        if j % 8 == 0:
            scores = [
                sum(float(w[k] ** 2 / steps[k][k]) for k in (j + 2 * p, j + 2 * p + 1))
                for p in range(4)
            ]
            kept[j // 2 : j // 2 + 4] = best_two_pairs(scores)
        q = float(w[j]) if kept[j // 2] else 0.0
        values.append(q)
        w -= (w[j] - q) / steps[j][j] * steps[j]
    return values, kept


def quantize_row(
    row: Tensor,
    steps: list[Tensor],
    global_scale: float,
    span: int,
    keep: list[bool] | None,
    sparse: bool,
) -> tuple[list[float], list[float], list[bool]]:
    """(values, scale per span, kept pairs) of one row."""
    w = row.double().clone()
    size = len(w)
    kept = list(keep) if keep is not None else [True] * (size // 2)
    picks = sparse and keep is None

    def pick(start: int) -> None:
        scores = [
            sum(float(w[j] ** 2 / steps[j][j]) for j in (start + 2 * p, start + 2 * p + 1))
            for p in range(4)
        ]
        kept[start // 2 : start // 2 + 4] = best_two_pairs(scores)

    values, scales, unit = [], [], 0.0
    for j in range(size):
        if j % span == 0:
            for start in range(j, j + span, 8):
                if picks:
                    pick(start)
            scales.append(
                span_scale(
                    [float(w[k]) if kept[k // 2] else 0.0 for k in range(j, j + span)],
                    global_scale,
                    True,
                )
            )
            unit = scales[-1] / global_scale
        elif j % 8 == 0 and picks:
            pick(j)
        q = e2m1(float(w[j]) / unit) * unit if kept[j // 2] else 0.0
        values.append(q)
        w -= (w[j] - q) / steps[j][j] * steps[j]
    return values, scales, kept
