"""Routed experts, one at a time: the forward of a mixture whose weights are decoded when they are used, with or without W4A4.

Legend: T tokens, H hidden size, F expert intermediate size, K experts a token.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p48ray.numerics.activation import quantize_activations


class ExpertWeights(NamedTuple):
    """The three linears of one expert: gate and up (F, H), down (H, F)."""

    gate_FH: Tensor
    up_FH: Tensor
    down_HF: Tensor


class RoutedInputs(NamedTuple):
    """What the experts of a layer saw in one call."""

    hidden_TH: Tensor
    expert_ids_TK: Tensor
    router_weights_TK: Tensor
    amax_intermediate: Tensor


class ActivationScales(NamedTuple):
    """Input global scales of a layer (divisors, see manifest.LayerScales) and the group that shares a local scale."""

    gate_up: float
    down: float
    group: int


class ExpertCache:
    """Decoded experts of one layer, least recently used ones dropped beyond a budget of bytes."""

    def __init__(self, decode: Callable[[int], ExpertWeights], budget_bytes: int) -> None:
        self.decode, self.budget_bytes = decode, budget_bytes
        self.held: OrderedDict[int, ExpertWeights] = OrderedDict()

    def __call__(self, expert: int) -> ExpertWeights:
        if expert in self.held:
            self.held.move_to_end(expert)
            return self.held[expert]
        weights = self.held[expert] = self.decode(expert)
        size_bytes = sum(w.numel() * w.element_size() for w in weights)
        while len(self.held) > 1 and len(self.held) * size_bytes > self.budget_bytes:
            self.held.popitem(last=False)
        return weights


def intermediate(x_TH: Tensor, weights: ExpertWeights) -> Tensor:
    """SwiGLU: silu(x gate^T) * (x up^T), (T, F). Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6."""
    return F.silu(F.linear(x_TH, weights.gate_FH)) * F.linear(x_TH, weights.up_FH)


class RoutedExperts(nn.Module):
    """Stands in for a transformers experts module: the same call, but weights come from a function of the expert id.

    Args: weights: expert id -> ExpertWeights in the compute dtype. scales: emulate W4A4 activations when given.
          observe: receives what the experts saw, after each call.
    """

    def __init__(
        self,
        num_experts: int,
        weights: Callable[[int], ExpertWeights],
        scales: ActivationScales | None = None,
        observe: Callable[[RoutedInputs], None] | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.weights, self.scales, self.observe = num_experts, weights, scales, observe

    def forward(self, hidden_TH: Tensor, expert_ids_TK: Tensor, router_weights_TK: Tensor) -> Tensor:
        """Sum over the routed experts of router weight times expert output, (T, H).

        Each expert adds to distinct tokens, so the result does not depend on the order of atomics on a GPU.
        """
        out_TH = torch.zeros_like(hidden_TH)
        amax = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        x_TH = hidden_TH if self.scales is None else self.quantized(hidden_TH, self.scales.gate_up)
        for expert in range(self.num_experts):
            rows, slots = torch.where(expert_ids_TK == expert)
            if not len(rows):
                continue
            weights = self.weights(expert)
            h_TF = intermediate(x_TH[rows], weights)
            amax = torch.maximum(amax, h_TF.abs().amax().float())
            if self.scales is not None:
                h_TF = self.quantized(h_TF, self.scales.down)
            y_TH = F.linear(h_TF, weights.down_HF) * router_weights_TK[rows, slots, None]
            out_TH.index_add_(0, rows, y_TH.to(out_TH.dtype))
        if self.observe is not None:
            self.observe(RoutedInputs(hidden_TH, expert_ids_TK, router_weights_TK, amax))
        return out_TH

    def quantized(self, x: Tensor, global_scale: float) -> Tensor:
        assert self.scales is not None
        return quantize_activations(x.float(), global_scale, self.scales.group).to(x.dtype)
