"""What a compressed linear costs: errors of weights and of outputs, per expert.

Sums over whole matrices of weights run in float64, so that two devices agree on a claim to many
digits. Ratios are of squares; 0 / 0 is 0. Weights too small for float32 to square are enlarged by a
power of two first, with what became of them: the ratio is the same.

Legend: N experts, O out, I in.
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from p48ray.numerics.products import tensor_float_32
from p48ray.numerics.zeros import enlargement


def hessian_loss(
    delta: Float32[Tensor, "n o i"], hessian: Float32[Tensor, "n i i"]
) -> Float32[Tensor, "n"]:
    """tr(D H D^T): with H a mean of x^T x, the mean squared output error, summed over outputs
    (GPTQ's objective, arXiv 2210.17323)."""
    with tensor_float_32():
        return ((delta @ hessian) * delta).sum((1, 2), dtype=torch.float64).float()


def relative_weight_error(
    w: Float32[Tensor, "n o i"], q: Float32[Tensor, "n o i"]
) -> Float32[Tensor, "n"]:
    """|w - q|^2 / |w|^2 (a ratio of squares)."""
    factor_N11 = enlargement(w)[:, None, None]
    return _ratio(
        (w - q).mul_(factor_N11).square_().sum((1, 2), dtype=torch.float64),
        (w * factor_N11).square_().sum((1, 2), dtype=torch.float64),
    )


def relative_output_error(
    w: Float32[Tensor, "n o i"], q: Float32[Tensor, "n o i"], hessian: Float32[Tensor, "n i i"]
) -> Float32[Tensor, "n"]:
    """tr((w - q) H (w - q)^T) / tr(w H w^T): mean squared output error over mean squared output."""
    factor_N11 = enlargement(w)[:, None, None]
    return _ratio(
        hessian_loss((w - q).mul_(factor_N11), hessian), hessian_loss(w * factor_N11, hessian)
    )


def _ratio(error_N: Tensor, reference_N: Tensor) -> Tensor:
    """error / reference in float32; where the reference is 0: 0 for no error, else infinity."""
    exact_N = torch.where(error_N == 0, 0.0, torch.inf)
    return torch.where(reference_N == 0, exact_N, error_N / reference_N).float()
