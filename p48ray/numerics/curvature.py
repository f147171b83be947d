"""Second moments of what a linear sees, and how they are made safe to factor.

    H = sum_t w_t x_t^T x_t / sum_t w_t        (rows are tokens)
    X = sum_t w_t y_t^T x_t / sum_t w_t

| paper                      | here                       |
|----------------------------|----------------------------|
| H = 2 X X^T                | `SecondMoment.mean()`, a weighted mean: 2 changes no solution |
| lambda I, there 0.01 mean diag | `damp`, `damp_from_tokens` |

Sources: [Frantar2022gptq] GPTQ, arXiv 2210.17323. Ledoit and Wolf 2004 for shrinking covariances;
the constants were best with a prototype (DESIGN 7.6). Deliberate departures: token weights; damping
and shrinkage follow from the number of tokens.

Legend: T tokens, I in. `*n` any batch of experts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from p48ray.errors import NumericsError

# tokens per matrix product: float32 sums stay short, the running sum adds slices
SLICE_TOKENS = 4096
GPU_SLICE_TOKENS = 3584  # the same on a GPU: fewer cost time, more cost digits
TRIANGLE_BLOCK = 1024  # columns of a block of the lower triangle there
DAMP_MIN, DAMP_MAX = 0.01, 0.1
# damp = 0.6 / tokens per input: 0.1 at 6 (where 0.01 is worse and 0.3 about equal), 0.01 from 60 on
DAMP_TOKENS = 0.6

OUTPUT_DAMP_MIN, OUTPUT_DAMP_MAX, OUTPUT_DAMP_TOKENS = 0.05, 0.3, 1.8  # the same for G, per output


class GpuSums:
    """How a GPU adds tokens to a sum: operands in bf16, products and sums in float32,
    GPU_SLICE_TOKENS at a time, however few tokens a call brings.

    A quantized activation times its global scale is an E2M1 value times an E4M3 scale: 6 bits,
    exact in bf16, so `x_scale` should be that global scale. Without it the few values of the grid
    are rounded the same way every time, which does not average out: 1e-4 to 2.5e-3 of the moment
    was measured. Anything else has an independent relative error of 2^-9 a value, which averages
    out over tokens.

    Where both sides are the same tokens the operand is sqrt(w) x on both, only the lower block
    triangle is computed, and it is mirrored when the sum is read.
    """

    def __init__(self, sum_II: Tensor) -> None:
        self.sum_II, self.is_symmetric = sum_II, True
        self.x_scale: float | None = None
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.num_waiting = 0

    @property
    def unit(self) -> float:
        """What sum_II holds instead of 1."""
        return (self.x_scale or 1.0) ** (2 if self.is_symmetric else 1)

    def add_(self, x: Tensor, weight: Tensor | None, y: Tensor | None, x_scale: float) -> None:
        """Add tokens; nothing is multiplied before GPU_SLICE_TOKENS wait.

        Args:
            x, weight: as SecondMoment.add_ takes them.
            y: likewise; all calls for one sum have one, or none has.
            x_scale: likewise; the same in all calls for one sum.
        Raises: NumericsError where y or x_scale are not as before.
        """
        if self.x_scale is None:
            self.is_symmetric, self.x_scale = y is None, x_scale
        if (self.is_symmetric, self.x_scale) != (y is None, x_scale):
            raise NumericsError(
                f"second moment: expected x_scale {self.x_scale} and y"
                f" {'absent' if self.is_symmetric else 'present'} as before, found x_scale"
                f" {x_scale}"
            )
        scaled_TI = x.float() * x_scale
        if y is None:
            right_TI = left_TI = (
                scaled_TI if weight is None else scaled_TI * weight.sqrt()[:, None]
            ).to(torch.bfloat16)
        else:
            right_TI, left_TI = (
                scaled_TI.to(torch.bfloat16),
                (y if weight is None else y * weight[:, None]).to(torch.bfloat16),
            )
        self.waiting.append((left_TI, right_TI))
        self.num_waiting += len(x)
        if self.num_waiting >= GPU_SLICE_TOKENS:
            self._add_waiting_()

    def _add_waiting_(self) -> None:
        left_TI, right_TI = (
            torch.cat(side) if len(side) > 1 else side[0]
            for side in zip(*self.waiting, strict=True)
        )
        self.waiting, self.num_waiting = [], 0
        width = TRIANGLE_BLOCK if self.is_symmetric else len(self.sum_II)
        for start in range(0, len(left_TI), GPU_SLICE_TOKENS):
            part = slice(start, start + GPU_SLICE_TOKENS)
            for first in range(0, len(self.sum_II), width):
                columns, rows = (
                    slice(first, first + width),
                    slice(first if self.is_symmetric else 0, None),
                )
                into = self.sum_II[rows, columns]
                torch.addmm(
                    into,
                    left_TI[part, rows].mT,
                    right_TI[part, columns],
                    out_dtype=torch.float32,
                    out=into,
                )

    def finish_(self) -> None:
        """Bring sum_II up to date and, where it is symmetric, its upper triangle too."""
        if self.waiting:
            self._add_waiting_()
        if self.is_symmetric:
            self.sum_II.tril_().add_(self.sum_II.tril(-1).mT)


@dataclass(slots=True)
class SecondMoment:
    """A running weighted second moment. `weight_total` is float64 on the device, so that adding
    tokens never waits for it. On a GPU `sum_II` is up to date after `mean` only."""

    sum_II: Tensor
    weight_total: Tensor
    num_tokens: int
    on_gpu: "GpuSums | None" = None

    @classmethod
    def zeros(
        cls, num_inputs: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> "SecondMoment":
        """No tokens yet. dtype: of the sum and of the products; float32, or float64 for a
        reference."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        sum_II = torch.zeros(num_inputs, num_inputs, dtype=dtype, device=device)
        return cls(
            sum_II, total, 0, GpuSums(sum_II) if sum_II.is_cuda and dtype == torch.float32 else None
        )

    @property
    def weight_sum(self) -> float:
        """Sum of the token weights. Waits for the device."""
        return float(self.weight_total)

    def add_(
        self,
        x: Float[Tensor, "t i"],
        weight: Float[Tensor, "t"] | None,
        y: Float[Tensor, "t i"] | None = None,
        x_scale: float = 1.0,
    ) -> None:
        """Add tokens: sum += sum_t w_t y_t^T x_t, so sum[j, k] holds y_j x_k.

        Args:
            x: (T, I).
            weight: (T,), >= 0; None for all 1.
            y: (T, I); None for x itself.
            x_scale: a factor under which x is exact in bf16, for quantized activations their global
                scale. It changes nothing but rounding on a GPU (GpuSums).
        """
        if self.on_gpu is not None:
            self.on_gpu.add_(x, weight, y, x_scale)
        else:
            self._add_slices_(x, weight, y)
        self.weight_total += len(x) if weight is None else weight.sum(dtype=torch.float64)
        self.num_tokens += len(x)

    def _add_slices_(self, x: Tensor, weight: Tensor | None, y: Tensor | None) -> None:
        dtype = self.sum_II.dtype
        for start in range(0, len(x), SLICE_TOKENS):
            part = slice(start, start + SLICE_TOKENS)
            x_TI = x[part].to(dtype)
            y_TI = x_TI if y is None else y[part].to(dtype)
            if weight is not None:
                y_TI = y_TI * weight[part].to(dtype)[:, None]
            self.sum_II.addmm_(y_TI.mT, x_TI)

    def mean(self) -> Float[Tensor, "i i"]:
        """sum / weight_sum, a new tensor; zeros if there is no weight (solvers then fall back and
        say so).

        Raises: NumericsError if the sum or the weights are not finite.
        """
        weight_sum = self.weight_sum
        if self.on_gpu is not None:
            self.on_gpu.finish_()
            weight_sum *= self.on_gpu.unit
        mean_II = self.sum_II / weight_sum if weight_sum else torch.zeros_like(self.sum_II)
        if not bool(torch.isfinite(mean_II).all()):
            raise NumericsError(
                f"second moment of {self.num_tokens} tokens with weights adding to {weight_sum}:"
                " not finite; check the activations"
            )
        return mean_II


def mean_diagonal(matrix: Float[Tensor, "*n i i"]) -> Float[Tensor, "*n"]:
    """Mean of the diagonal: mean squared input where the matrix is a second moment."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def damp(
    hessian: Float32[Tensor, "*n i i"], rel: float | Float32[Tensor, "*n"]
) -> Float32[Tensor, "*n i i"]:
    """H + rel * mean(diag H) * I, a new tensor. rel: fraction of the mean diagonal (dimensionless),
    one or one per expert."""
    damped = hessian.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_((rel * mean_diagonal(hessian))[..., None])
    return damped


def shrink_towards(
    own: SecondMoment,
    pool: SecondMoment,
    fraction: float,
    by: tuple[SecondMoment, SecondMoment] | None = None,
) -> Float[Tensor, "i i"]:
    """(1 - f) M + f * pool * mean_diag(M) / mean_diag(pool): towards the pool's shape at M's own
    size.

    Args:
        own: M, the expert's own.
        pool: what is borrowed from.
        fraction: f, weight of the pool, 0 to 1.
        by: the two moments that say the sizes, where M is not symmetric; None for M and the pool.
    Returns: a new tensor; the pool as it is where M has no tokens, M where the pool is zero. A
        moment of zeros with tokens (which all weigh nothing) stays zero, and its solver says so.
    Raises: NumericsError if a moment is not finite.
    """
    if own.num_tokens == 0:
        return pool.mean()
    own_II = own.mean()
    if fraction == 0:
        return own_II
    pool_II = pool.mean()
    sizes = (own_II, pool_II) if by is None else (by[0].mean(), by[1].mean())
    own_size, pool_size = (m.diagonal().mean() for m in sizes)
    if not bool(pool_size > 0):
        return own_II
    return (1 - fraction) * own_II + fraction * (own_size / pool_size) * pool_II


def damp_from_tokens(tokens_per_input: float) -> float:
    """Damping (fraction of the mean diagonal) for a Hessian from this many tokens per input: 0.6 /
    r within [0.01, 0.1]."""
    return (
        DAMP_MAX
        if tokens_per_input <= 0
        else min(DAMP_MAX, max(DAMP_MIN, DAMP_TOKENS / tokens_per_input))
    )


def output_damp_from_tokens(tokens_per_output: float) -> float:
    """Damping of G from this many tokens per output: 1.8 / r within [0.05, 0.3] (DESIGN 7.6)."""
    return (
        OUTPUT_DAMP_MAX
        if tokens_per_output <= 0
        else min(OUTPUT_DAMP_MAX, max(OUTPUT_DAMP_MIN, OUTPUT_DAMP_TOKENS / tokens_per_output))
    )


def shrinkage_from_tokens(num_tokens: float, half_tokens: float) -> float:
    """Weight of the pool, half / (half + num): 1 without tokens, one half at `half_tokens`. Both in
    the same unit."""
    return 1.0 if num_tokens <= 0 else half_tokens / (half_tokens + num_tokens)
