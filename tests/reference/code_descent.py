"""Code descent one row at a time in float64, every choice by trying all values; and the best codes
of one pair_group by trying them all."""

from itertools import product

import torch
from torch import Tensor

from tests.reference.formats import E2M1, e2m1, e4m3_values
from tests.reference.two_sided import SIX

LEVELS = [-v for v in E2M1[:0:-1]] + E2M1  # 15
MASKS = torch.tensor(SIX).repeat_interleave(2, dim=1)  # (6, 8)


def row_loss(target_I: Tensor, level_I: Tensor, unit_I: Tensor, hessian_II: Tensor) -> float:
    delta = target_I - level_I * unit_I
    return float(delta @ hessian_II @ delta)


def descend_row(
    target_I: Tensor,
    level_I: Tensor,
    scale_G: Tensor,
    global_scale: float,
    keep_P: Tensor,
    hessian_II: Tensor,
    span: int,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(levels, scale per scale_group, kept pairs)."""
    target, level, hessian = target_I.double(), level_I.double().clone(), hessian_II.double()
    scale, keep = scale_G.double().clone(), keep_P.clone()

    def loss(candidate: Tensor, scales: Tensor) -> float:
        return row_loss(target, candidate, scales.repeat_interleave(16) / global_scale, hessian)

    for _ in range(sweeps):
        for start in range(0, len(target), 8):
            if start % span == 0:
                groups = slice(start // 16, (start + span) // 16)
                scale = min([scale, *with_each_scale(scale, groups)], key=lambda s: loss(level, s))
            unit = float(scale[start // 16]) / global_scale
            current = next(
                p for p in range(6) if SIX[p] == keep[start // 2 : start // 2 + 4].tolist()
            )
            candidates: list[tuple[float, Tensor, int]] = []
            for pattern in (current, *range(6)):
                levels = level.clone()
                if candidates:
                    levels[start : start + 8] = rounded_fit(
                        target, level, scale / global_scale, hessian, start, pattern, unit
                    )
                for i in (start + MASKS[pattern].nonzero()[:, 0]).tolist():
                    levels = min(with_each_level(levels, i), key=lambda x: loss(x, scale))
                candidates.append((loss(levels, scale), levels, pattern))
            _, level, pattern = min(candidates, key=lambda c: c[0])
            keep[start // 2 : start // 2 + 4] = torch.tensor(SIX[pattern])
    return level, scale, keep


def with_each_scale(scale_G: Tensor, groups: slice) -> list[Tensor]:
    found = []
    for value in e4m3_values()[1:]:
        found.append(scale_G.clone())
        found[-1][groups] = value
    return found


def with_each_level(level_I: Tensor, i: int) -> list[Tensor]:
    """The present one first, so that it wins ties."""
    found = [level_I]
    for value in LEVELS:
        found.append(level_I.clone())
        found[-1][i] = value
    return found


def rounded_fit(
    target: Tensor,
    level: Tensor,
    unit_G: Tensor,
    hessian: Tensor,
    start: int,
    pattern: int,
    unit: float,
) -> Tensor:
    """Levels of a pair_group next to its least-squares optimum under a pattern."""
    outside = level * unit_G.repeat_interleave(16)
    outside[start : start + 8] = 0
    kept = start + MASKS[pattern].nonzero()[:, 0]
    fit = torch.linalg.solve(hessian[kept][:, kept], (hessian @ (target - outside))[kept])
    levels = torch.zeros(8, dtype=torch.float64)
    levels[kept - start] = torch.tensor([e2m1(float(v) / unit) for v in fit], dtype=torch.float64)
    return levels


def best_codes(target_N8: Tensor, unit_N: Tensor, hessian_N88: Tensor) -> Tensor:
    """The least loss of each problem over 6 patterns x 15^4 codes at a fixed scale, (N,)."""
    every_C4 = torch.tensor(list(product(LEVELS, repeat=4)))
    best = torch.full((len(target_N8),), torch.inf, dtype=torch.float64)
    for mask in MASKS:
        inner_N44 = hessian_N88[:, mask][:, :, mask]
        slope_N4 = (hessian_N88 @ target_N8[:, :, None])[:, mask, 0]
        values_NC4 = every_C4 * unit_N[:, None, None]
        gain_NC = (values_NC4 * (2 * slope_N4[:, None] - values_NC4 @ inner_N44)).sum(-1)
        whole_N = (target_N8[:, None] @ hessian_N88 @ target_N8[:, :, None])[:, 0, 0]
        best = torch.minimum(best, (whole_N - gain_NC.max(1).values).double())
    return best
