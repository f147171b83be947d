"""The factor of an inverse Hessian that the column loops read: U upper triangular with inv(H + damp) = U^T U.

One Cholesky and one triangular inverse instead of the papers' three steps (Cholesky, inverse, Cholesky of the inverse). With J the reversal
of rows:

    J H J = L L^T   (L lower)      so  H = R R^T with R = J L J upper      so  inv(H) = R^-T R^-1 = U^T U with U = R^-1 = J L^-1 J

U is unique (positive diagonal), so it is the papers' factor. U_jj^-2 is the curvature of input j when those after it are free to
compensate.

| paper ([Frantar2022gptq] algorithm 1) | here |
|----------------------------------------|------|
| Cholesky(H^-1)^T                       | `Factor.upper_NII` |
| lambda = 0.01 mean diag                | `damp_rel`, raised tenfold per rung where Cholesky fails |

Source: [Frantar2022gptq] GPTQ, arXiv 2210.17323. Departure: the damping ladder; an expert that exhausts it is reported, never patched over.

Legend: N experts, I in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from p48ray.numerics.curvature import damp, mean_diagonal

DAMP_RUNGS = 4  # dampings tried: rel, 10 rel, 100 rel, 1000 rel
DAMP_STEP = 10.0
_TRIANGULAR_LEAF = 256  # below this, one triangular solve is as fast as products of halves


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """U per expert. Where `failed`, U is the identity and `damp_rel` the last value tried (0 for a Hessian that is zero or not finite)."""

    upper_NII: Tensor
    damp_rel: tuple[float, ...]
    failed: tuple[bool, ...]


def inverse_factor(hessian: Float32[Tensor, "n i i"], damp_rel: float | Sequence[float]) -> Factor:
    """U with inv(H + damp_rel * mean(diag H) * I) = U^T U, for every expert of the batch.

    Args:    hessian: symmetric, (N, I, I). damp_rel: fraction of the mean diagonal, one for all or one per expert.
    Returns: the factor, the damping that was needed and who failed all DAMP_RUNGS.
    Cost:    I^3 / 3 for Cholesky, as much for the inverse, per rung (later rungs only for those that failed). One wait for the device per
             rung.
    """
    n, i, _ = hessian.shape
    wanted = [damp_rel] * n if isinstance(damp_rel, int | float) else list(damp_rel)
    eye_II = torch.eye(i, device=hessian.device)
    upper_NII = eye_II.repeat(n, 1, 1)
    is_usable = torch.isfinite(hessian).all(-1).all(-1) & (mean_diagonal(hessian) > 0)
    pending = [k for k, ok in enumerate(is_usable.tolist()) if ok]
    used = [wanted[k] if k in pending else 0.0 for k in range(n)]
    failed = [k not in pending for k in range(n)]
    for rung in range(DAMP_RUNGS):
        if not pending:
            break
        for k in pending:
            used[k] = wanted[k] * DAMP_STEP**rung
        rel_N = torch.tensor([used[k] for k in pending], device=hessian.device)
        index_N = torch.tensor(pending, device=hessian.device)
        candidate_NII, is_good_N = _factor(damp(hessian[index_N], rel_N), eye_II)
        upper_NII[index_N] = torch.where(is_good_N[:, None, None], candidate_NII, eye_II)
        pending = [k for k, ok in zip(pending, is_good_N.tolist(), strict=True) if not ok]
    for k in pending:
        failed[k] = True
    return Factor(upper_NII=upper_NII, damp_rel=tuple(used), failed=tuple(failed))


def _factor(damped_NII: Tensor, eye_II: Tensor) -> tuple[Tensor, Tensor]:
    """(U, whether it exists and is finite), with U arbitrary where it does not."""
    lower_NII, info_N = torch.linalg.cholesky_ex(damped_NII.flip(-2, -1))
    is_positive_N = info_N == 0
    upper_NII = invert_lower(torch.where(is_positive_N[:, None, None], lower_NII, eye_II)).flip(-2, -1).contiguous()
    return upper_NII, is_positive_N & torch.isfinite(upper_NII).all(-1).all(-1)


def invert_lower(lower: Float32[Tensor, "n i i"]) -> Float32[Tensor, "n i i"]:
    """Inverse of lower triangular matrices, by halves, so that nearly all work is matrix products.

    [ A  0 ]^-1   [    A^-1       0   ]
    [ B  C ]    = [ -C^-1 B A^-1  C^-1 ]
    """
    size = lower.shape[-1]
    if size <= _TRIANGULAR_LEAF:
        eye = torch.eye(size, device=lower.device, dtype=lower.dtype).expand_as(lower)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = size // 2
    first, second = invert_lower(lower[:, :half, :half]), invert_lower(lower[:, half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[:, :half, :half], inverse[:, half:, half:] = first, second
    inverse[:, half:, :half] = -(second @ (lower[:, half:, :half] @ first))
    return inverse
