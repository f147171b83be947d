"""Refinement: the values of an expert's three linears together, masks and scales fixed, by gradient
steps through SwiGLU and every quantizer.

Block descent works on one linear at a time. Here the error of the whole expert is lowered, measured
as the loss feels it:

    minimise  L = sum_t w_t e_t M e_t^T / sum_t w_t y_t M y_t^T
              e = E_Q(x^) - y,   y = E(x),   E(x) = down(silu(gate x) * up x)

with the metric M, G of down's output (without it, refinement undid part of what two-sided descent
had gained on the small model, DESIGN 7.5). Rounding of weights and of the intermediate passes
gradients straight through:

    d = dL/de = 2 w e M / (sum_t ...)
    dDown = d^T h^           dh = d Down
    da = dh b silu'(a)       db = dh silu(a)
    dGate = da^T x^          dUp = db^T x^

Some tokens of each expert are held out; their loss is taken before the first step and now and then
after; the best state counts, the start among them, so that no expert ends worse on them than it
began.

Operands of the quantized expert are code values times E4M3 scales, six bits, global scales apart:
exact in bf16, so that on a GPU, where all operands are bf16 and sums float32, its own outputs have
no error but that of the sums. What is rounded there are y's inputs and intermediate, M, and the
gradients.

Sources: straight-through estimator, Bengio et al. 2013; Adam, Kingma and Ba 2015.

Legend: N experts, T tokens of a batch, H hidden size, F intermediate size, Z = 2 F (gate's rows,
then up's), O out, I in, G scale groups, V values of a scale group, P pairs (I/2), K kept weights of
a linear, S steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float32
from torch import Tensor

from p48ray.numerics import e2m1, nvfp4
from p48ray.numerics.activation import quantize_activations
from p48ray.numerics.e2m1 import round_to_e2m1
from p48ray.numerics.nvfp4 import SCALE_GROUP, effective_scale
from p48ray.numerics.refine_tokens import (
    MIN_TOKENS,
    Batch,
    ExpertTokens,
    TokenTable,
)

# of the root mean square of a linear's kept values: 2e-4 on weights of about 0.04
LEARNING_RATE_REL = 0.005
BETAS = (0.9, 0.95)
CHECKS = 10  # held-out losses taken on the way


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLinear:
    """One linear of a batch of experts: codes (N, O, I), E4M3 scales (N, O, G), global scales (N,),
    kept pairs (N, O, P)."""

    codes_NOI: Tensor
    scale_NOG: Tensor
    global_scale_N: Tensor
    keep_NOP: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScales:
    """Input global scales of gate and up, and of down; None for inputs that are not quantized.
    group: values that share an activation scale."""

    gate_up: float | None
    down: float | None
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """Refined linears, and the held-out loss of every expert before and after, relative to the mean
    loss of a zero output."""

    gate_up: QuantizedLinear
    down: QuantizedLinear
    loss_before: tuple[float, ...]
    loss_after: tuple[float, ...]


class Gradients(NamedTuple):
    """With respect to the values of gate and up (N, Z, H) and of down (N, H, F), each to be divided
    by its input scale (or 1); of the operands' type."""

    gate_up_NZH: Tensor
    down_NHF: Tensor


def refine(
    tokens: Sequence[ExpertTokens],
    gate_up_original: Float32[Tensor, "n z h"],
    down_original: Float32[Tensor, "n h f"],
    gate_up: QuantizedLinear,
    down: QuantizedLinear,
    output_hessian: Float32[Tensor, "n h h"],
    scales: InputScales,
    steps: int,
) -> Refined:
    """Refine a batch of experts.

    Args:
        tokens: one entry per expert; one with fewer than MIN_TOKENS keeps its start.
        gate_up_original: (N, Z, H), gate above up.
        down_original: (N, H, F).
        gate_up, down: the start; their masks and scales stay.
        output_hessian: G of down, (N, H, H), damped, symmetric.
        scales: of the inputs, as the server will quantize them.
        steps: of Adam, 256 tokens of each expert each, cosine rate.
    Cost: 10 H F + 2 H^2 multiply-adds a token and step (original and quantized forward, gradients,
        the metric), and one pass over all weights a step.
    """
    problem = _Refinement(
        tokens, gate_up_original, down_original, gate_up, down, output_hessian, scales
    )
    return problem.run(steps)


class ExpertLoss:
    """L and its gradient for a batch of experts, from operands as they are multiplied: bf16 on a
    GPU, float32 (or what they are) elsewhere."""

    def __init__(
        self,
        originals: Sequence[Tensor],
        metric: Tensor,
        divisors: Sequence[Tensor],
        scales: InputScales,
    ) -> None:
        """Takes the operands that do not change.

        Args:
            originals: gate and up (N, Z, H), down (N, H, F).
            metric: M, (N, H, H), symmetric.
            divisors: global scales of both quantized linears, (N,) each.
            scales: of both inputs.
        """
        self.dtype = torch.bfloat16 if metric.is_cuda else metric.dtype
        self.gate_up_NZH, self.down_NHF = (self.operand(w) for w in originals)
        self.metric_NHH, self.scales = self.operand(metric), scales
        unit = (scales.gate_up or 1.0, scales.down or 1.0)
        # of 1 in a product of operands
        self.value_N11 = [1.0 / (d * u)[:, None, None] for d, u in zip(divisors, unit, strict=True)]
        self.down_value_N11 = 1.0 / divisors[1][:, None, None]

    def operand(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)

    def quantized(self, x_NTI: Tensor, scale: float | None) -> Tensor:
        """Inputs as the kernel will see them, times their global scale."""
        if scale is None:
            return self.operand(x_NTI)
        return self.operand(
            quantize_activations(x_NTI.flatten(0, 1), scale, self.scales.group)
            .mul_(scale)
            .view_as(x_NTI)
        )

    def wanted(self, x_NTH: Tensor) -> Tensor:
        """y."""
        a_NTF, b_NTF = product(self.operand(x_NTH), self.gate_up_NZH.mT).chunk(2, -1)
        return product(self.operand(F.silu(a_NTF) * b_NTF), self.down_NHF.mT)

    def loss(self, batch: Batch, grids: Sequence[Tensor]) -> Tensor:
        """L per expert, (N,). grids: both quantized linears as operands (see `on_grid`)."""
        wanted_NTH = self.wanted(batch.x_NTH)
        a_NTF, b_NTF = (
            product(self.quantized(batch.x_NTH, self.scales.gate_up), grids[0].mT)
            * self.value_N11[0]
        ).chunk(2, -1)
        h_NTF = self.quantized(F.silu(a_NTF) * b_NTF, self.scales.down)
        error_NTH = product(h_NTF, grids[1].mT) * self.value_N11[1] - wanted_NTH
        error_N, scale_N = (
            ((product(self.operand(v), self.metric_NHH) * v).sum(-1) * batch.weight_NT).sum(1)
            for v in (error_NTH, wanted_NTH)
        )
        return error_N / scale_N.clamp_min(torch.finfo(torch.float32).tiny)

    def gradients(self, batch: Batch, grids: Sequence[Tensor]) -> Gradients:
        """Of the sum of L over experts, with respect to the values."""
        num_tokens = batch.x_NTH.shape[1]
        wanted_NTH = self.wanted(batch.x_NTH)
        x_NTH = self.quantized(batch.x_NTH, self.scales.gate_up)
        a_NTF, b_NTF = (product(x_NTH, grids[0].mT) * self.value_N11[0]).chunk(2, -1)
        s_NTF = torch.sigmoid(a_NTF)
        silu_NTF = a_NTF * s_NTF
        h_NTF = self.quantized(silu_NTF * b_NTF, self.scales.down)
        error_NTH = product(h_NTF, grids[1].mT) * self.value_N11[1] - wanted_NTH
        felt_NTH = product(self.operand(torch.cat([error_NTH, wanted_NTH], 1)), self.metric_NHH)
        scale_N = (
            ((felt_NTH[:, num_tokens:] * wanted_NTH).sum(-1) * batch.weight_NT)
            .sum(1)
            .clamp_min(torch.finfo(torch.float32).tiny)
        )
        d_NTH = self.operand(
            felt_NTH[:, :num_tokens] * (2 * batch.weight_NT / scale_N[:, None])[..., None]
        )
        dh_NTF = product(d_NTH, grids[1]) * self.down_value_N11
        da_NTF = dh_NTF * b_NTF * (s_NTF * (1 + a_NTF * (1 - s_NTF)))
        dab_NTZ = self.operand(torch.cat([da_NTF, dh_NTF * silu_NTF], -1))
        return Gradients(torch.bmm(dab_NTZ.mT, x_NTH), torch.bmm(d_NTH.mT, h_NTF))


def product(left: Tensor, right: Tensor) -> Tensor:
    """A batch of matrix products, summed in float32 (or in float64 where the operands are that)."""
    return (
        torch.bmm(left, right, out_dtype=torch.float32)
        if left.dtype == torch.bfloat16
        else torch.bmm(left, right)
    )


class _Linear:
    """Kept values of a linear as latents with Adam's moments, (N, K) in the order of the matrix,
    and the whole matrix on the grid as an operand."""

    def __init__(self, start: QuantizedLinear, dtype: torch.dtype) -> None:
        self.start = start
        # value of one E2M1 unit
        self.unit_NOG = effective_scale(start.scale_NOG, start.global_scale_N).contiguous()
        self.scale_NOG = start.scale_NOG.float()
        values_NOI = nvfp4.dequantize(start.codes_NOI, start.scale_NOG, start.global_scale_N)
        self.latent_NK = self.kept(values_NOI)
        self.first_NK, self.second_NK = (
            torch.zeros_like(self.latent_NK),
            torch.zeros_like(self.latent_NK),
        )
        self.rate_N = LEARNING_RATE_REL * self.latent_NK.square().mean(1).sqrt()
        self.grid_NOI = on_grid(values_NOI, self.unit_NOG, self.scale_NOG).to(dtype)

    def step_(self, gradient_NOI: Tensor, gradient_scale: float, rate: float, step: int) -> None:
        """One step of Adam with a rate per expert.

        Args:
            gradient_NOI: with respect to the whole matrix; only kept values take it.
            gradient_scale: what the gradient is to be multiplied with.
            rate: a factor on the linear's own rates.
            step: its number, from 1 on.
        """
        if self.latent_NK.is_cuda:
            from p48ray.kernels import refine_step as kernel

            kernel.adam_step_(
                (self.latent_NK, self.first_NK, self.second_NK), gradient_NOI, self.grid_NOI,
                (self.unit_NOG, self.scale_NOG), self.start.keep_NOP, self.rate_N * rate, BETAS,
                step, gradient_scale,
            )  # fmt: skip
            return
        gradient_NK = self.kept(gradient_NOI).mul_(gradient_scale)
        adam_(
            self.latent_NK,
            gradient_NK,
            self.first_NK,
            self.second_NK,
            (self.rate_N * rate)[:, None],
            step,
        )
        self.grid_NOI = on_grid(self.whole(self.latent_NK), self.unit_NOG, self.scale_NOG)

    def kept(self, values_NOI: Tensor) -> Tensor:
        """(N, K): every expert keeps as many."""
        return values_NOI.masked_select(self.start.keep_NOP.repeat_interleave(2, 2)).view(
            len(values_NOI), -1
        )

    def whole(self, values_NK: Tensor) -> Tensor:
        """(N, O, I), zeros where nothing is kept."""
        keep_NOI = self.start.keep_NOP.repeat_interleave(2, 2)
        return torch.zeros(keep_NOI.shape, device=keep_NOI.device).masked_scatter_(
            keep_NOI, values_NK
        )

    def finished(self, latent_NK: Tensor) -> QuantizedLinear:
        level_NOGV = (
            self.whole(latent_NK).unflatten(2, (-1, SCALE_GROUP)) / self.unit_NOG[..., None]
        )
        return replace(self.start, codes_NOI=e2m1.encode(level_NOGV.flatten(2)))


class _Refinement:
    """Both linears of a batch of experts, their tokens, and the best state so far."""

    def __init__(
        self,
        tokens: Sequence[ExpertTokens],
        gate_up_original: Tensor,
        down_original: Tensor,
        gate_up: QuantizedLinear,
        down: QuantizedLinear,
        output_hessian: Tensor,
        scales: InputScales,
    ) -> None:
        divisors = (gate_up.global_scale_N, down.global_scale_N)
        self.loss = ExpertLoss((gate_up_original, down_original), output_hessian, divisors, scales)
        self.linears = [_Linear(start, self.loss.dtype) for start in (gate_up, down)]
        self.gradient_scales = (1.0 / (scales.gate_up or 1.0), 1.0 / (scales.down or 1.0))
        self.is_frozen = [len(t.rows) < MIN_TOKENS for t in tokens]
        self.tokens = TokenTable(tokens)

    @torch.no_grad()
    def run(self, steps: int) -> Refined:
        held_out = self.tokens.held_out()
        before_N = best_N = self.loss.loss(held_out, self.grids())
        best = [linear.latent_NK.clone() for linear in self.linears]
        frozen_N = torch.tensor(self.is_frozen, device=best_N.device)
        interval = max(1, steps // CHECKS)
        drawn_SNT = self.tokens.draw(steps)
        for step in range(1, steps + 1):
            rate = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / steps))
            gradients = self.loss.gradients(self.tokens.batch(drawn_SNT[step - 1]), self.grids())
            for linear, gradient, scale in zip(
                self.linears, gradients, self.gradient_scales, strict=True
            ):
                linear.step_(gradient, scale, rate, step)
            if step % interval == 0 or step == steps:
                now_N = self.loss.loss(held_out, self.grids())
                better_N = (now_N < best_N) & ~frozen_N
                best_N = torch.where(better_N, now_N, best_N)
                for kept_NK, linear in zip(best, self.linears, strict=True):
                    kept_NK.copy_(torch.where(better_N[:, None], linear.latent_NK, kept_NK))
        linears = [
            linear.finished(latent) for linear, latent in zip(self.linears, best, strict=True)
        ]
        return Refined(
            gate_up=linears[0],
            down=linears[1],
            loss_before=tuple(before_N.tolist()),
            loss_after=tuple(best_N.tolist()),
        )

    def grids(self) -> list[Tensor]:
        return [linear.grid_NOI for linear in self.linears]


def on_grid(values_NOI: Tensor, unit_NOG: Tensor, scale_NOG: Tensor) -> Tensor:
    """Values on the grid, times the global scale: E2M1 value times E4M3 scale, (N, O, I). unit_NOG:
    value of one E2M1 unit."""
    level_NOGV = round_to_e2m1(values_NOI.unflatten(2, (-1, SCALE_GROUP)) / unit_NOG[..., None])
    return (level_NOGV * scale_NOG[..., None]).flatten(2)


def adam_(
    value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rate: Tensor, step: int
) -> None:
    """One step of Adam with a rate per expert.

    Args:
        value: (N, K), changed in place.
        gradient: (N, K).
        first, second: Adam's moments, (N, K), changed in place.
        rate: (N, 1).
        step: its number, from 1 on.
    """
    first.lerp_(gradient, 1 - BETAS[0])
    second.lerp_(gradient.square(), 1 - BETAS[1])
    corrected = (second / (1 - BETAS[1] ** step)).sqrt_().add_(1e-12)
    value.sub_(rate * (first / (1 - BETAS[0] ** step)) / corrected)
