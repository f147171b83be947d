"""Refinement: the values of an expert's three linears together, masks and scales fixed, by gradient steps through SwiGLU and every quantizer.

Block descent works on one linear at a time. Here the error of the whole expert is lowered, measured as the loss feels it:

    minimise  sum_t w_t e_t G e_t^T / sum_t w_t,        e = E_Q(x^) - E(x),   E(x) = down(silu(gate x) * up x)

with G of down's output (without it, refinement undid part of what two-sided descent had gained on the small model, DESIGN 7.5). Rounding of weights and of the
intermediate passes gradients straight through. Some tokens of each expert are held out; their loss is taken before the first step and now and then after; the
best state counts, the start among them, so that no expert ends worse on them than it began.

Sources: straight-through estimator, Bengio et al. 2013; Adam, Kingma and Ba 2015.
Legend: N experts, T tokens of a batch, H hidden size, F intermediate size, Z = 2 F (gate's rows, then up's), O out, I in, G scale groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float32
from torch import Tensor

from p48ray.numerics import e2m1
from p48ray.numerics.activation import quantize_activations
from p48ray.numerics.e2m1 import round_to_e2m1
from p48ray.numerics.nvfp4 import SCALE_GROUP, effective_scale
from p48ray.numerics.products import tensor_float_32

BATCH_TOKENS = 256
LEARNING_RATE_REL = 0.005  # of the root mean square of a linear's kept values; the lab's 2e-4 on weights of about 0.04
BETAS = (0.9, 0.95)
HELD_OUT_SHARE = 8  # every eighth token is held out
MAX_HELD_OUT_TOKENS = 1024
MIN_TOKENS = 512  # below it nothing is learned that the held-out tokens could confirm
CHECKS = 10  # held-out losses taken on the way


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLinear:
    """One linear of a batch of experts: codes (N, O, I), E4M3 scales (N, O, G), global scales (N,), kept pairs (N, O, P)."""

    codes_NOI: Tensor
    scale_NOG: Tensor
    global_scale_N: Tensor
    keep_NOP: Tensor

    def unit(self) -> Tensor:
        """Value of one E2M1 unit at every weight, (N, O, I)."""
        return effective_scale(self.scale_NOG, self.global_scale_N).repeat_interleave(SCALE_GROUP, dim=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTokens:
    """What one expert is refined on: inputs (T, H), the same quantized, token weights (T,)."""

    x_TH: Tensor
    quantized_TH: Tensor
    weight_T: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """Refined linears, and the held-out loss of every expert before and after, relative to the mean loss of a zero output."""

    gate_up: QuantizedLinear
    down: QuantizedLinear
    loss_before: tuple[float, ...]
    loss_after: tuple[float, ...]


def refine(
    tokens: Sequence[ExpertTokens],
    gate_up_original: Float32[Tensor, "n z h"],
    down_original: Float32[Tensor, "n h f"],
    gate_up: QuantizedLinear,
    down: QuantizedLinear,
    output_hessian: Float32[Tensor, "n h h"],
    down_scale: float,
    group: int,
    steps: int,
) -> Refined:
    """Refine a batch of experts.

    Args:    tokens: one entry per expert; one with fewer than MIN_TOKENS keeps its start. output_hessian: G of down, damped. down_scale: the layer's input
             global scale of down. group: values that share an activation scale. steps: of Adam, 256 tokens of each expert each, cosine rate.
    Cost:    about 12 H F + 3 H^2 multiply-adds a token and step: original and quantized forward, gradients, the metric.
    """
    problem = _Refinement(tokens, gate_up_original, down_original, gate_up, down, output_hessian, down_scale, group)
    return problem.run(steps)


class _Refinement:
    """Latent values, their optimizer and the best state so far."""

    def __init__(
        self,
        tokens: Sequence[ExpertTokens],
        gate_up_original: Tensor,
        down_original: Tensor,
        gate_up: QuantizedLinear,
        down: QuantizedLinear,
        output_hessian: Tensor,
        down_scale: float,
        group: int,
    ) -> None:
        self.originals, self.starts = (gate_up_original, down_original), (gate_up, down)
        self.output_hessian_NHH, self.down_scale, self.group = output_hessian, down_scale, group
        self.units = [linear.unit() for linear in self.starts]
        self.masks = [linear.keep_NOP.repeat_interleave(2, dim=2).float() for linear in self.starts]
        self.latents = [(e2m1.decode(q.codes_NOI) * u).requires_grad_(True) for q, u in zip(self.starts, self.units, strict=True)]
        self.grid: list[Tensor] = []  # on a GPU: the latents' values on the grid, kept in step by the kernel
        if gate_up_original.is_cuda:
            with torch.no_grad():
                self.grid = [v.contiguous() for v in self.quantized()]
            self.grid_units = [effective_scale(q.scale_NOG, q.global_scale_N).contiguous() for q in self.starts]
        self.generator = torch.Generator().manual_seed(0)
        self.is_frozen = [len(t.x_TH) < MIN_TOKENS for t in tokens]
        self.train = [split(t, is_train=True) for t in tokens]
        self.held_out = batch([split(t, is_train=False) for t in tokens], [None] * len(tokens))

    @torch.no_grad()
    def rates(self) -> list[Tensor]:
        """Learning rate of every expert's linear, (N, 1, 1)."""
        squares = [(v.square() * m).sum((1, 2), keepdim=True) for v, m in zip(self.latents, self.masks, strict=True)]
        return [LEARNING_RATE_REL * (s / m.sum((1, 2), keepdim=True).clamp_min(1)).sqrt() for s, m in zip(squares, self.masks, strict=True)]

    def quantized(self) -> list[Tensor]:
        """Values on the grid; the gradient passes the rounding unchanged."""
        if self.grid:
            return [v.detach() for v in self.grid]
        values = []
        for latent, unit, mask in zip(self.latents, self.units, self.masks, strict=True):
            rounded = round_to_e2m1(latent.detach() / unit) * unit
            values.append((latent + (rounded - latent.detach())) * mask)
        return values

    def loss(self, tokens: ExpertTokens, values: list[Tensor]) -> Tensor:
        """Weighted mean error of every expert in the metric G over the same of the original output, (N,)."""
        with torch.no_grad():
            gate, up = (tokens.x_TH @ self.originals[0].mT).chunk(2, -1)
            wanted_NTH = (F.silu(gate) * up) @ self.originals[1].mT
        gate_up_NZH, down_NHF = values
        gate, up = (tokens.quantized_TH @ gate_up_NZH.mT).chunk(2, -1)
        h_NTF = F.silu(gate) * up
        on_grid_NTF = quantize_activations(h_NTF.detach().flatten(0, 1), self.down_scale, self.group).view_as(h_NTF)
        error_NTH = (h_NTF + (on_grid_NTF - h_NTF.detach())) @ down_NHF.mT - wanted_NTH
        weight_NT1 = tokens.weight_T[..., None]
        scale_N = ((wanted_NTH @ self.output_hessian_NHH) * wanted_NTH * weight_NT1).sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
        return ((error_NTH @ self.output_hessian_NHH) * error_NTH * weight_NT1).sum((1, 2)) / scale_N

    @torch.enable_grad()
    def run(self, steps: int) -> Refined:
        with torch.no_grad():
            before_N = best_N = self.loss(self.held_out, self.quantized())
        best = [latent.detach().clone() for latent in self.latents]
        rates = self.rates()
        moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in self.latents]
        frozen_N = torch.tensor(self.is_frozen, device=best_N.device)
        interval = max(1, steps // CHECKS)
        for step in range(1, steps + 1):
            rate = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 1) / steps))
            rows = [torch.randint(0, len(t.x_TH), (BATCH_TOKENS,), generator=self.generator) for t in self.train]
            self.step_(batch(self.train, rows), moments, [scale * rate for scale in rates], step)
            with torch.no_grad():
                if step % interval == 0 or step == steps:
                    now_N = self.loss(self.held_out, self.quantized())
                    better_N = (now_N < best_N) & ~frozen_N
                    best_N = torch.where(better_N, now_N, best_N)
                    best = [torch.where(better_N[:, None, None], v, b) for v, b in zip(self.latents, best, strict=True)]
        return self.finish(best, before_N, best_N)

    def step_(self, tokens: ExpertTokens, moments: list[tuple[Tensor, Tensor]], rates: list[Tensor], step: int) -> None:
        """One step of Adam on the latents."""
        if tokens.x_TH.is_cuda:
            self.step_by_kernel_(tokens, moments, rates, step)
            return
        gradients = torch.autograd.grad(self.loss(tokens, self.quantized()).sum(), self.latents)
        with torch.no_grad():
            for latent, gradient, (first, second), rate in zip(self.latents, gradients, moments, rates, strict=True):
                adam_(latent, gradient, first, second, rate, step)

    def step_by_kernel_(self, tokens: ExpertTokens, moments: list[tuple[Tensor, Tensor]], rates: list[Tensor], step: int) -> None:
        """The same on a GPU: the gradient at the values, in TF32, then one pass over all weights."""
        from p48ray.kernels import refinement as kernel

        values = [v.requires_grad_(True) for v in self.grid]
        with tensor_float_32():
            gradients = torch.autograd.grad(self.loss(tokens, values).sum(), values)
        with torch.no_grad():
            for k, (gradient, (first, second), rate) in enumerate(zip(gradients, moments, rates, strict=True)):
                unit_NOG, keep_NOP = self.grid_units[k], self.starts[k].keep_NOP
                kernel.adam_step_(
                    self.latents[k], gradient.contiguous(), first, second, values[k], unit_NOG, keep_NOP, rate.flatten(), BETAS, step
                )

    @torch.no_grad()
    def finish(self, best: list[Tensor], before_N: Tensor, after_N: Tensor) -> Refined:
        linears = [
            replace(start, codes_NOI=e2m1.encode(value / unit * mask))
            for start, value, unit, mask in zip(self.starts, best, self.units, self.masks, strict=True)
        ]
        return Refined(gate_up=linears[0], down=linears[1], loss_before=tuple(before_N.tolist()), loss_after=tuple(after_N.tolist()))


def split(tokens: ExpertTokens, is_train: bool) -> ExpertTokens:
    """Every eighth token is held out, at most MAX_HELD_OUT_TOKENS of them; an expert without tokens gets one of zeros and weight zero."""
    count = len(tokens.x_TH)
    if count < HELD_OUT_SHARE:
        zeros_1H = torch.zeros_like(tokens.x_TH[:1]) if count else torch.zeros(1, tokens.x_TH.shape[1], device=tokens.x_TH.device)
        return ExpertTokens(x_TH=zeros_1H, quantized_TH=zeros_1H, weight_T=torch.zeros(1, device=zeros_1H.device))
    index_T = torch.arange(count, device=tokens.x_TH.device)
    is_held_T = index_T % HELD_OUT_SHARE == 0
    chosen_T = index_T[~is_held_T] if is_train else index_T[is_held_T][:MAX_HELD_OUT_TOKENS]
    return ExpertTokens(x_TH=tokens.x_TH[chosen_T], quantized_TH=tokens.quantized_TH[chosen_T], weight_T=tokens.weight_T[chosen_T])


def batch(tokens: Sequence[ExpertTokens], rows: Sequence[Tensor | None]) -> ExpertTokens:
    """Rows of every expert stacked to (N, T, ...); None takes all, short experts padded by weight zero."""
    longest = max(len(t.x_TH) if r is None else len(r) for t, r in zip(tokens, rows, strict=True))

    def stacked(name: str) -> Tensor:
        columns = []
        for t, r in zip(tokens, rows, strict=True):
            column = getattr(t, name) if r is None else getattr(t, name)[r.to(t.x_TH.device)]
            columns.append(F.pad(column, (0, 0) * (column.dim() - 1) + (0, longest - len(column))))
        return torch.stack(columns)

    return ExpertTokens(x_TH=stacked("x_TH"), quantized_TH=stacked("quantized_TH"), weight_T=stacked("weight_T"))


def adam_(value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rate: Tensor, step: int) -> None:
    """One step of Adam with a rate per expert."""
    first.lerp_(gradient, 1 - BETAS[0])
    second.lerp_(gradient.square(), 1 - BETAS[1])
    corrected = (second / (1 - BETAS[1] ** step)).sqrt_().add_(1e-12)
    value.sub_(rate * (first / (1 - BETAS[0] ** step)) / corrected)
