"""Second moments of what a linear sees, and how they are made safe to factor.

    H = sum_t w_t x_t^T x_t / sum_t w_t          X = sum_t w_t y_t^T x_t / sum_t w_t        (rows are tokens)

| paper                      | here                       |
|----------------------------|----------------------------|
| H = 2 X X^T                | `SecondMoment.mean()`: a weighted mean; the factor 2 changes no solution |
| lambda I, there 0.01 mean diag | `damp`, `damp_from_tokens` |

Sources: [Frantar2022gptq] GPTQ, arXiv 2210.17323. Ledoit and Wolf 2004 for shrinking covariances; the constants are the lab's (DESIGN 7).
Deliberate departures: token weights; damping and shrinkage follow from the number of tokens.

Legend: T tokens, I in. `*n` any batch of experts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from p48ray.errors import NumericsError

SLICE_TOKENS = 4096  # tokens per matrix product: float32 sums stay short, the running sum adds slices
DAMP_MIN, DAMP_MAX = 0.01, 0.1
DAMP_TOKENS = 0.6  # damp = 0.6 / tokens per input: 0.1 at 6 (where 0.01 is worse and 0.3 about equal), 0.01 from 60 on

OUTPUT_DAMP_MIN, OUTPUT_DAMP_MAX, OUTPUT_DAMP_TOKENS = 0.05, 0.3, 1.8  # the same for G, per output


@dataclass(slots=True)
class SecondMoment:
    """A running weighted second moment. `weight_total` is float64 on the device, so that adding tokens never waits for it."""

    sum_II: Tensor
    weight_total: Tensor
    num_tokens: int

    @classmethod
    def zeros(cls, num_inputs: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "SecondMoment":
        """No tokens yet. dtype: of the sum and of the products; float32, or float64 for a reference."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        return cls(torch.zeros(num_inputs, num_inputs, dtype=dtype, device=device), total, 0)

    @property
    def weight_sum(self) -> float:
        """Sum of the token weights. Waits for the device."""
        return float(self.weight_total)

    def add_(self, x: Float[Tensor, "t i"], weight: Float[Tensor, "t"] | None, y: Float[Tensor, "t i"] | None = None) -> None:
        """Add tokens: sum += sum_t w_t y_t^T x_t, so sum[j, k] holds y_j x_k. weight None: all 1. y None: x itself."""
        dtype = self.sum_II.dtype
        for start in range(0, len(x), SLICE_TOKENS):
            part = slice(start, start + SLICE_TOKENS)
            x_TI = x[part].to(dtype)
            y_TI = x_TI if y is None else y[part].to(dtype)
            if weight is not None:
                y_TI = y_TI * weight[part].to(dtype)[:, None]
            self.sum_II.addmm_(y_TI.mT, x_TI)
        self.weight_total += len(x) if weight is None else weight.sum(dtype=torch.float64)
        self.num_tokens += len(x)

    def mean(self) -> Float[Tensor, "i i"]:
        """sum / weight_sum, a new tensor; zeros if there is no weight (solvers then fall back and say so).

        Raises: NumericsError if the sum or the weights are not finite.
        """
        weight_sum = self.weight_sum
        mean_II = self.sum_II / weight_sum if weight_sum else torch.zeros_like(self.sum_II)
        if not bool(torch.isfinite(mean_II).all()):
            raise NumericsError(
                f"second moment of {self.num_tokens} tokens with weights adding to {weight_sum}: not finite; check the activations"
            )
        return mean_II


def mean_diagonal(matrix: Float[Tensor, "*n i i"]) -> Float[Tensor, "*n"]:
    """Mean of the diagonal: mean squared input where the matrix is a second moment."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def damp(hessian: Float32[Tensor, "*n i i"], rel: float | Float32[Tensor, "*n"]) -> Float32[Tensor, "*n i i"]:
    """H + rel * mean(diag H) * I, a new tensor. rel: fraction of the mean diagonal (dimensionless), one or one per expert."""
    damped = hessian.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_((rel * mean_diagonal(hessian))[..., None])
    return damped


def shrink_towards(hessian: Float32[Tensor, "*n i i"], pool: Float32[Tensor, "*#n i i"], fraction: float) -> Float32[Tensor, "*n i i"]:
    """(1 - f) H + f * pool * mean_diag(H) / mean_diag(pool): towards the pool's shape at H's own size.

    The pool itself, unscaled, where H is all zero (an expert without tokens) or f is 1; H itself where the pool is zero.
    """
    own, other = mean_diagonal(hessian), mean_diagonal(pool)
    other = other.expand_as(own)
    ratio = own / torch.where(other > 0, other, torch.ones_like(other))
    blended = (1 - fraction) * hessian + (fraction * ratio)[..., None, None] * pool
    is_pool = (own == 0) | (fraction == 1.0)
    is_own = (other == 0) & ~is_pool
    kept = torch.where(is_own[..., None, None], hessian, blended)
    return torch.where(is_pool[..., None, None], pool, kept)


def damp_from_tokens(tokens_per_input: float) -> float:
    """Damping (fraction of the mean diagonal) for a Hessian from this many tokens per input: 0.6 / r within [0.01, 0.1]."""
    return DAMP_MAX if tokens_per_input <= 0 else min(DAMP_MAX, max(DAMP_MIN, DAMP_TOKENS / tokens_per_input))


def output_damp_from_tokens(tokens_per_output: float) -> float:
    """Damping of G from this many tokens per output: 1.8 / r within [0.05, 0.3]; DESIGN 7.3: 0.05 with many tokens, 0.3 with few."""
    return OUTPUT_DAMP_MAX if tokens_per_output <= 0 else min(OUTPUT_DAMP_MAX, max(OUTPUT_DAMP_MIN, OUTPUT_DAMP_TOKENS / tokens_per_output))


def shrinkage_from_tokens(num_tokens: float, half_tokens: float) -> float:
    """Weight of the pool, half / (half + num): 1 without tokens, one half at `half_tokens`. Both in the same unit."""
    return 1.0 if num_tokens <= 0 else half_tokens / (half_tokens + num_tokens)
