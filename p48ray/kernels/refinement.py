"""The passes over all weights that a step of numerics.refine makes on a GPU, one launch a linear: Adam's step on the latents, and the values on the grid
that come of it.

Legend: N experts, O out, I in, G scale groups (I/16), P pairs (I/2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p48ray.kernels.rounding import round_to_e2m1

WEIGHTS = 1024  # of a program


@triton.jit
def _adam_step(
    latent, gradient, first, second, values, unit, keep, rate, num_weights, correct_first, correct_second,
    BETA_1: tl.constexpr, BETA_2: tl.constexpr, EPSILON: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    expert = tl.program_id(1).to(tl.int64)
    is_there = index < num_weights
    at = expert * num_weights + index
    kept = tl.load(keep + expert * (num_weights // 2) + index // 2, mask=is_there, other=0).to(tl.float32)
    unit_value = tl.load(unit + expert * (num_weights // 16) + index // 16, mask=is_there, other=1.0)
    value = tl.load(latent + at, mask=is_there, other=0.0)
    g = tl.load(gradient + at, mask=is_there, other=0.0) * kept
    m = tl.load(first + at, mask=is_there, other=0.0)
    m += (1.0 - BETA_1) * (g - m)
    v = tl.load(second + at, mask=is_there, other=0.0)
    v += (1.0 - BETA_2) * (g * g - v)
    tl.store(first + at, m, mask=is_there)
    tl.store(second + at, v, mask=is_there)
    value -= tl.load(rate + expert) * (m / correct_first) / (tl.sqrt(v / correct_second) + EPSILON)
    tl.store(latent + at, value, mask=is_there)
    tl.store(values + at, round_to_e2m1(tl.div_rn(value, unit_value)) * unit_value * kept, mask=is_there)


def adam_step_(
    latent_NOI: Tensor, gradient_NOI: Tensor, first_NOI: Tensor, second_NOI: Tensor, values_NOI: Tensor, unit_NOG: Tensor, keep_NOP: Tensor,
    rate_N: Tensor, betas: tuple[float, float], step: int,
) -> None:  # fmt: skip
    """refine.adam_ on the latents with the gradient at the values, then the values anew; latents, moments and values change in place.

    Args: unit_NOG: value of one E2M1 unit per scale group. keep_NOP: bool. rate_N: of every expert. step: from 1 on. All contiguous.
    """
    num_weights = latent_NOI[0].numel()
    _adam_step[(triton.cdiv(num_weights, WEIGHTS), len(latent_NOI))](
        latent_NOI, gradient_NOI, first_NOI, second_NOI, values_NOI, unit_NOG, keep_NOP.view(torch.uint8), rate_N, num_weights,
        1.0 - betas[0] ** step, 1.0 - betas[1] ** step,
        BETA_1=betas[0], BETA_2=betas[1], EPSILON=1e-12, WEIGHTS=WEIGHTS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
