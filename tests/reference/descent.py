"""Block descent one row at a time: every pair_group tries all six patterns by least squares on a
square root of the Hessian."""

from itertools import combinations

import torch
from torch import Tensor


def hessian_sum(x_TI: Tensor, weight_T: Tensor, y_TI: Tensor) -> Tensor:
    """sum_t w_t y_t^T x_t, a token at a time."""
    total = torch.zeros(y_TI.shape[1], x_TI.shape[1], dtype=torch.float64)
    for x, w, y in zip(x_TI.double(), weight_T.double(), y_TI.double(), strict=True):
        total += w * torch.outer(y, x)
    return total


def loss(target_OI: Tensor, values_OI: Tensor, hessian_II: Tensor) -> float:
    delta = target_OI.double() - values_OI.double()
    return float((delta @ hessian_II.double() * delta).sum())


def descend_row(target: Tensor, values: Tensor, hessian_II: Tensor, sweeps: int) -> Tensor:
    """Values of one row after cyclic exact minimisation of (t - q) H (t - q)^T."""
    root = torch.linalg.cholesky(hessian_II.double())  # |(t - q) root|^2 is the loss
    target, values = target.double(), values.double().clone()
    for _ in range(sweeps):
        for start in range(0, len(target), 8):
            outside = values.clone()
            outside[start : start + 8] = 0
            goal = (target - outside) @ root
            best, best_loss = None, float("inf")
            for pairs in combinations(range(4), 2):
                inputs = [start + 2 * p + k for p in pairs for k in (0, 1)]
                fit = torch.linalg.lstsq(root[inputs].T, goal[:, None]).solution[:, 0]
                remaining = float((goal - fit @ root[inputs]).square().sum())
                if remaining < best_loss:
                    best, best_loss = (inputs, fit), remaining
            assert best is not None
            values = outside
            values[best[0]] = best[1]
    return values
