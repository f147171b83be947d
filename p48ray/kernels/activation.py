"""numerics.activation.quantize_activations in one pass over the values, bit for bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from p48ray.kernels.rounding import round_to_e2m1, round_to_e4m3
from p48ray.numerics.e2m1 import E2M1_MAX
from p48ray.numerics.nvfp4 import E4M3_MAX

GROUPS = 64  # of a program


@triton.jit
def _quantize_groups(
    x,
    out,
    divisor_at,
    num_groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    LEVEL_MAX: tl.constexpr,
    SCALE_MAX: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    places = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_there = (groups < num_groups)[:, None]
    value = tl.load(x + places, mask=is_there, other=0.0).to(tl.float32)
    divisor = tl.load(divisor_at)
    amax = tl.max(tl.abs(value), axis=1)
    scale = round_to_e4m3(tl.minimum(divisor * tl.div_rn(amax, amax * 0.0 + LEVEL_MAX), SCALE_MAX))
    unit = tl.div_rn(scale, scale * 0.0 + divisor)
    safe = tl.where(scale == 0.0, 1.0, unit)
    level = round_to_e2m1(tl.div_rn(value, value * 0.0 + safe[:, None]))
    tl.store(out + places, level * unit[:, None], mask=is_there)


def quantize_activations(x: Tensor, divisor: Tensor, group: int) -> Tensor:
    """x^ in float32. divisor: float32 scalar on x's device. Shapes are checked by the caller."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    num_groups = x.numel() // group
    if num_groups:
        _quantize_groups[(triton.cdiv(num_groups, GROUPS),)](
            x,
            out,
            divisor,
            num_groups,
            GROUP=group,
            GROUPS=GROUPS,
            LEVEL_MAX=E2M1_MAX,
            SCALE_MAX=E4M3_MAX,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
