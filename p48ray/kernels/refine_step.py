"""The pass over all kept weights that a step of numerics.refine makes on a GPU, one launch a
linear: Adam's step on the latents, and the values on the grid that come of it. It is bound by
memory, so pruned weights are neither read nor written but for the gradient's neighbours in a cache
line.

Legend: N experts, O out, I in, G scale groups (I/16), P pairs (I/2), K kept weights of a linear.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p48ray.kernels.rounding import round_to_e2m1

WEIGHTS = 1024  # kept ones of a program


@triton.jit
def _adam_step(
    latent, gradient, first, second, grid, unit, scale, keep, rate, num_kept, num_weights,
    gradient_scale, correct_first, correct_second, IS_SPARSE: tl.constexpr, BETA_1: tl.constexpr,
    BETA_2: tl.constexpr, EPSILON: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    expert = tl.program_id(1).to(tl.int64)
    is_there = index < num_kept
    # four kept weights stand for a pair_group of eight: the lower kept pair, then the upper
    if IS_SPARSE:
        four = index // 4
        flags = tl.load(
            (keep + expert * (num_weights // 2)).to(tl.pointer_type(tl.int32)) + four,
            mask=is_there,
            other=257,
        )
        lower = tl.where((flags & 0x1) != 0, 0, tl.where((flags & 0x100) != 0, 1, 2))
        upper = tl.where((flags & 0x1000000) != 0, 3, tl.where((flags & 0x10000) != 0, 2, 1))
        place = four * 8 + tl.where(index % 4 < 2, lower, upper) * 2 + index % 2
    else:
        place = index
    at, at_kept = expert * num_weights + place, expert * num_kept + index
    at_group = expert * (num_weights // 16) + place // 16
    value = tl.load(latent + at_kept, mask=is_there, other=0.0)
    g = tl.load(gradient + at, mask=is_there, other=0.0).to(tl.float32) * gradient_scale
    m = tl.load(first + at_kept, mask=is_there, other=0.0)
    m += (1.0 - BETA_1) * (g - m)
    v = tl.load(second + at_kept, mask=is_there, other=0.0)
    v += (1.0 - BETA_2) * (g * g - v)
    tl.store(first + at_kept, m, mask=is_there)
    tl.store(second + at_kept, v, mask=is_there)
    value -= tl.load(rate + expert) * (m / correct_first) / (tl.sqrt(v / correct_second) + EPSILON)
    tl.store(latent + at_kept, value, mask=is_there)
    level = round_to_e2m1(tl.div_rn(value, tl.load(unit + at_group, mask=is_there, other=1.0)))
    on_grid = level * tl.load(scale + at_group, mask=is_there, other=0.0)
    tl.store(grid + at, on_grid.to(grid.dtype.element_ty), mask=is_there)


def adam_step_(
    state: tuple[Tensor, Tensor, Tensor], gradient_NOI: Tensor, grid_NOI: Tensor,
    scales: tuple[Tensor, Tensor], keep_NOP: Tensor, rate_N: Tensor, betas: tuple[float, float],
    step: int, gradient_scale: float,
) -> None:  # fmt: skip
    """refine.adam_ on the latents with the gradient at the values, then refine.on_grid; state and
    grid change in place.

    Args:
        state: latents and both moments, (N, K) float32.
        grid_NOI: zero where nothing is kept.
        scales: value of one E2M1 unit, and the E4M3 scale in float32, per scale group.
        keep_NOP: bool, two of every four pairs or all.
        rate_N: of every expert.
        step: from 1 on.
        gradient_scale: what the gradient is multiplied with. All contiguous.
    """
    latent_NK, first_NK, second_NK = state
    num_kept, num_weights = latent_NK.shape[1], grid_NOI[0].numel()
    assert num_kept in (num_weights, num_weights // 2)
    _adam_step[(triton.cdiv(num_kept, WEIGHTS), len(latent_NK))](
        latent_NK, gradient_NOI, first_NK, second_NK, grid_NOI, *scales, keep_NOP.view(torch.uint8),
        rate_N, num_kept, num_weights, gradient_scale, 1.0 - betas[0] ** step,
        1.0 - betas[1] ** step, IS_SPARSE=num_kept < num_weights, BETA_1=betas[0], BETA_2=betas[1],
        EPSILON=1e-12, WEIGHTS=WEIGHTS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
