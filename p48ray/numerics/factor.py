"""The factor of an inverse Hessian that the column loops read: U upper triangular with inv(H +
damp) = U^T U.

One Cholesky and one triangular inverse instead of the papers' three steps (Cholesky, inverse,
Cholesky of the inverse). With J the reversal of rows:

    J H J = L L^T   (L lower)
    so  H = R R^T with R = J L J upper
    so  inv(H) = R^-T R^-1 = U^T U with U = R^-1 = J L^-1 J

U is unique (positive diagonal), so it is the papers' factor. U_jj^-2 is the curvature of input j
when those after it are free to compensate.

| paper ([Frantar2022gptq] algorithm 1) | here |
|----------------------------------------|------|
| Cholesky(H^-1)^T                       | `Factor.upper_NII` |
| lambda = 0.01 mean diag                | `damp_rel`, times ten per rung where Cholesky fails |

Source: [Frantar2022gptq] GPTQ, arXiv 2210.17323. Departure: the damping ladder; an expert that
exhausts it is reported, never patched over.

Legend: N experts, I in, L leaves on the diagonal, C columns of a leaf.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from p48ray.numerics.curvature import damp, mean_diagonal
from p48ray.numerics.products import tensor_float_32

DAMP_RUNGS = 4  # dampings tried: rel, 10 rel, 100 rel, 1000 rel
DAMP_STEP = 10.0
_TRIANGULAR_LEAF = 256  # below this, one triangular solve is as fast as products of halves


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """U per expert. Where `failed`, U is the identity and `damp_rel` the last value tried (0 for a
    Hessian that is zero or not finite)."""

    upper_NII: Tensor
    damp_rel: tuple[float, ...]
    failed: tuple[bool, ...]


def inverse_factor(hessian: Float32[Tensor, "n i i"], damp_rel: float | Sequence[float]) -> Factor:
    """U with inv(H + damp_rel * mean(diag H) * I) = U^T U, for every expert of the batch.

    Args:
        hessian: symmetric, (N, I, I).
        damp_rel: fraction of the mean diagonal, one for all or one per expert.
    Returns: the factor, the damping that was needed and who failed all DAMP_RUNGS.
    Cost: I^3 / 3 for Cholesky, as much for the inverse, per rung (later rungs only for those that
        failed). One wait for the device per rung.
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
        flags = []
        # One by one on a GPU: large factorizations gain nothing from a batch there, and its
        # temporaries are several times the batch.
        for together in [[k] for k in pending] if hessian.is_cuda else [pending]:
            rel_N = torch.tensor([used[k] for k in together], device=hessian.device)
            index_N = torch.tensor(together, device=hessian.device)
            candidate_NII, is_good_N = _factor(damp(hessian[index_N], rel_N), eye_II)
            upper_NII[index_N] = torch.where(is_good_N[:, None, None], candidate_NII, eye_II)
            flags.append(is_good_N)
        pending = [k for k, ok in zip(pending, torch.cat(flags).tolist(), strict=True) if not ok]
    for k in pending:
        failed[k] = True
    return Factor(upper_NII=upper_NII, damp_rel=tuple(used), failed=tuple(failed))


def _factor(damped_NII: Tensor, eye_II: Tensor) -> tuple[Tensor, Tensor]:
    """(U, whether it exists and is finite), with U arbitrary where it does not."""
    lower_NII, info_N = torch.linalg.cholesky_ex(damped_NII.flip(-2, -1))
    is_positive_N = info_N == 0
    upper_NII = (
        invert_lower(torch.where(is_positive_N[:, None, None], lower_NII, eye_II))
        .flip(-2, -1)
        .contiguous()
    )
    return upper_NII, is_positive_N & torch.isfinite(upper_NII).all(-1).all(-1)


def invert_lower(lower: Float32[Tensor, "n i i"]) -> Float32[Tensor, "n i i"]:
    """Inverse of lower triangular matrices, by halves, so that nearly all work is matrix products.

    [ A  0 ]^-1   [    A^-1       0   ]
    [ B  C ]    = [ -C^-1 B A^-1  C^-1 ]
    """
    if lower.is_cuda:
        return _invert_lower_in_place(lower)
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


def _invert_lower_in_place(lower_NII: Tensor) -> Tensor:
    """The same on a GPU: all leaves in one batched solve, every product into its place, in TF32
    (numerics.products)."""
    size, leaf = lower_NII.shape[-1], _TRIANGULAR_LEAF
    inverse_NII = torch.zeros_like(lower_NII)
    for first, last in ((0, size // leaf * leaf), (size // leaf * leaf, size)):
        if first < last:
            width = min(leaf, last - first)
            blocks = [
                t[:, first:last, first:last].unflatten(2, (-1, width)).unflatten(1, (-1, width))
                for t in (lower_NII, inverse_NII)
            ]
            lower_NLCC, inverse_NLCC = (
                b.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2) for b in blocks
            )
            eye_CC = torch.eye(width, device=lower_NII.device, dtype=lower_NII.dtype)
            inverse_NLCC.copy_(
                torch.linalg.solve_triangular(
                    lower_NLCC.contiguous(), eye_CC.expand_as(lower_NLCC), upper=False
                )
            )
    with tensor_float_32():
        _join_inverses_(lower_NII, inverse_NII, 0, size)
    return inverse_NII


def _join_inverses_(lower_NII: Tensor, inverse_NII: Tensor, first: int, last: int) -> None:
    """Fill in what lies below the leaves of columns and rows first to last."""
    if last - first <= _TRIANGULAR_LEAF:
        return
    middle = first + (-(-(last - first) // _TRIANGULAR_LEAF) + 1) // 2 * _TRIANGULAR_LEAF
    _join_inverses_(lower_NII, inverse_NII, first, middle)
    _join_inverses_(lower_NII, inverse_NII, middle, last)
    left = torch.bmm(
        lower_NII[:, middle:last, first:middle], inverse_NII[:, first:middle, first:middle]
    )
    inverse_NII[:, middle:last, first:middle].baddbmm_(
        inverse_NII[:, middle:last, middle:last], left, beta=0, alpha=-1
    )
