"""From the loss's gradient at a mixture's routed output to the gradients at the outputs of one
expert's linears.

    y = w D h,   h = silu(a) * b,   a = x A^T,   b = x B^T
    (A gate, B up, D down, w the router's weight of the token)

    at down's output           g = w delta
    at the intermediate        g_h = g D
    at gate's and up's outputs g_a = g_h * b * silu'(a),   g_b = g_h * silu(a)
                               silu'(a) = s (1 + a (1 - s)),   s = sigmoid(a)

So an expert recovers every gradient it needs from x, delta, w and its own original weights; nothing
of it is ever stored.

Source: the chain rule; SwiGLU is Shazeer 2020, "GLU Variants Improve Transformer", equation 6.

Legend: T tokens, H hidden size, F intermediate size, Z = 2 F (gate's outputs, then up's).
"""

import torch
from jaxtyping import Float32
from torch import Tensor


def expert_gradients(
    x: Float32[Tensor, "t h"],
    delta: Float32[Tensor, "t h"],
    router_weight: Float32[Tensor, "t"],
    gate: Float32[Tensor, "f h"],
    up: Float32[Tensor, "f h"],
    down: Float32[Tensor, "h f"],
) -> tuple[Float32[Tensor, "t z"], Float32[Tensor, "t h"]]:
    """Gradients at the outputs of gate and up (stacked, z = 2 f) and of down, a row per token.

    Args:
        x: (T, H), the expert's inputs.
        delta: (T, H), gradient at the mixture's routed output.
        router_weight: (T,), of this expert for each token.
        gate, up: (F, H), the original weights.
        down: (H, F), the original weight.
    Cost: 6 T H F multiply-adds.
    """
    g_TH = delta * router_weight[:, None]
    g_TF = g_TH @ down
    a_TF, b_TF = x @ gate.mT, x @ up.mT
    s_TF = torch.sigmoid(a_TF)
    slope_TF = s_TF * (1 + a_TF * (1 - s_TF))
    return torch.cat([g_TF * b_TF * slope_TF, g_TF * a_TF * s_TF], dim=1), g_TH


def norm_weights(gradient_norm: Float32[Tensor, "t"], clip: float) -> Float32[Tensor, "t"]:
    """Token weights from gradient norms: |g| over its mean, at most `clip`. All ones where every
    gradient is zero.

    Source: DESIGN 7, w = |g| / mean |g|, at most 20: tokens on which the loss reacts strongly count
    more, and no single one dominates.
    """
    mean = gradient_norm.mean()
    safe = torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.where(
        mean > 0, (gradient_norm / safe).clamp_max(clip), torch.ones_like(gradient_norm)
    )
