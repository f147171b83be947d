"""The two-sided objective as one quadratic form in all values of a linear, in float64, and its
minimum by trying every mask."""

from itertools import combinations, product

import torch
from torch import Tensor

SIX = [[p in pair for p in range(4)] for pair in combinations(range(4), 2)]


def loss(delta_OI: Tensor, hessian_II: Tensor, output_hessian_OO: Tensor) -> float:
    """vec(D) (G kron H) vec(D)^T, rows of D one after another."""
    vec = delta_OI.double().flatten()
    return float(vec @ torch.kron(output_hessian_OO.double(), hessian_II.double()) @ vec)


def every_mask(num_outputs: int, num_inputs: int) -> Tensor:
    """Kept pairs (M, O, P) of all 6^(O I / 8) legal masks."""
    places = num_outputs * num_inputs // 8
    return torch.tensor(list(product(SIX, repeat=places))).view(-1, num_outputs, num_inputs // 2)


def best_values(
    target_OI: Tensor, keep_MOP: Tensor, hessian_II: Tensor, output_hessian_OO: Tensor
) -> tuple[Tensor, Tensor]:
    """(values (M, O, I), losses (M,)) of the least-squares optimum under each mask, float64; every
    mask keeps half of all inputs."""
    form = torch.kron(output_hessian_OO.double(), hessian_II.double())
    target = target_OI.double().flatten()
    is_kept_MV = keep_MOP.repeat_interleave(2, dim=-1).flatten(1)
    kept_MS = is_kept_MV.nonzero()[:, 1].view(len(keep_MOP), -1)
    inner_MSS = form[kept_MS[:, :, None], kept_MS[:, None, :]]
    values_MS = torch.linalg.solve(inner_MSS, (form @ target)[kept_MS])
    values_MV = torch.zeros(is_kept_MV.shape, dtype=torch.float64).scatter(1, kept_MS, values_MS)
    delta_MV = target - values_MV
    return values_MV.view(-1, *target_OI.shape), (delta_MV @ form * delta_MV).sum(1)


def descend(
    target_OI: Tensor,
    values_OI: Tensor,
    hessian_II: Tensor,
    output_hessian_OO: Tensor,
    rows: list[int],
) -> Tensor:
    """Values after exact minimisation over one pair_group at a time: those of the first of `rows`
    from left to right, then the next's."""
    values = values_OI.double()
    for row in rows:
        for start in range(0, values.shape[1], 8):
            values = min(
                refits(target_OI, values, hessian_II, output_hessian_OO, row, start),
                key=lambda v: loss(target_OI - v, hessian_II, output_hessian_OO),
            )
    return values


def refits(
    target_OI: Tensor,
    values_OI: Tensor,
    hessian_II: Tensor,
    output_hessian_OO: Tensor,
    row: int,
    start: int,
) -> list[Tensor]:
    """All six least-squares fits of one pair_group with the rest as it is, float64."""
    form = torch.kron(output_hessian_OO.double(), hessian_II.double())
    found = []
    for pattern in SIX:
        values = values_OI.double().clone()
        values[row, start : start + 8] = 0
        kept = (
            row * values.shape[1]
            + start
            + torch.tensor(pattern).repeat_interleave(2).nonzero()[:, 0]
        )
        slope = (form @ (target_OI.double() - values).flatten())[kept]
        values.view(-1)[kept] = torch.linalg.solve(form[kept][:, kept], slope)
        found.append(values)
    return found
