"""The target of a linear whose inputs already changed: fit the ORIGINAL output W h from the inputs
h^ that the compressed model delivers.

    min over W'  sum_t w_t |W h_t - W' h^_t|^2 + lambda |W' - W|^2
    W' = W (X + lambda I) (H + lambda I)^-1 = W + W (X - H) (H + lambda I)^-1

with H = sum w h^^T h^ (`gram`) and X = sum w h^T h^ (`cross`). The ridge pulls towards W, not
towards 0: a plain ridge shrinks an expert with few tokens to nothing. The right-hand form is the
one computed: it returns W exactly where the inputs did not change.

Source: GPTAQ, Li et al. 2025 (arXiv 2504.02692) for the asymmetric objective. Departure: solved
once for the target, before any mask or rounding.

Legend: N experts, O out, I in.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from p48ray.numerics.curvature import damp, mean_diagonal

RIDGE_REL = 0.01


def compensated_target(
    weight: Float32[Tensor, "n o i"],
    gram: Float32[Tensor, "n i i"],
    cross: Float32[Tensor, "n i i"],
    ridge_rel: float = RIDGE_REL,
) -> Float32[Tensor, "n o i"]:
    """W (X + lambda I) (H + lambda I)^-1 per expert, lambda = ridge_rel * mean(diag H).

    Args:
        weight: W, (N, O, I), the original.
        gram: H, (N, I, I), symmetric.
        cross: X, (N, I, I), rows belong to the original inputs. A sum or a mean, as gram is.
        ridge_rel: lambda as a fraction of the mean diagonal of H.
    Returns: (N, O, I), a new tensor. W itself for an expert whose gram is zero, not finite or not
        positive definite even with the ridge, or whose cross moment is not finite; nothing waits
        for the device.
    """
    finite_N = torch.isfinite(gram).all(-1).all(-1) & torch.isfinite(cross).all(-1).all(-1)
    is_usable_N = finite_N & (mean_diagonal(gram) > 0)
    eye_II = torch.eye(gram.shape[-1], device=gram.device)
    ridged_NII = torch.where(is_usable_N[:, None, None], damp(gram, ridge_rel), eye_II)
    lower_NII, info_N = torch.linalg.cholesky_ex(ridged_NII)
    change_NOI = torch.cholesky_solve((weight @ (cross - gram)).mT, lower_NII).mT
    is_solved_N = is_usable_N & (info_N == 0) & torch.isfinite(change_NOI).all(-1).all(-1)
    return torch.where(is_solved_N[:, None, None], weight + change_NOI, weight)
