"""Refinement of a unit: gathers each expert's tokens and hands them, with the solved linears, to numerics.refine."""

import torch
from torch import Tensor

from p48ray.model.experts import ExpertWeights
from p48ray.numerics.refine import ExpertTokens, Refined, refine
from p48ray.numerics.solvers import Solution, damped_output_hessian
from p48ray.stages.curvature import Curvature, OutputSide, RoutedTokens

MAX_TOKENS = 65_536  # per expert; a step sees 256 of them


def refine_experts(
    tokens: RoutedTokens, side: OutputSide, originals: list[ExpertWeights], gate_up: Solution, down: Solution, curvature: list[Curvature]
) -> Refined:
    """Refine all experts of a unit together, in down's G (the identity where gradients are not used)."""
    settings = tokens.settings
    down_NOI = torch.stack([w.down_HF for w in originals])
    num_experts, hidden, size = down_NOI.shape
    metric_NHH = torch.eye(hidden, device=down_NOI.device).expand(num_experts, hidden, hidden)
    if settings.output_curvature:
        output_damp = None if settings.output_damp == "auto" else settings.output_damp
        output_hessian_NHH = torch.stack([c.output_hessian_OO for c in curvature if c.output_hessian_OO is not None])
        metric_NHH = damped_output_hessian(output_hessian_NHH, [c.tokens / size for c in curvature], size, output_damp)
    return refine(
        gather(tokens, side, num_experts, hidden),
        torch.stack([torch.cat([w.gate_FH, w.up_FH]) for w in originals]),
        down_NOI,
        gate_up.as_quantized(),
        down.as_quantized(),
        metric_NHH,
        tokens.scales.down,
        settings.activation_group,
        settings.refine_steps,
    )


def gather(tokens: RoutedTokens, side: OutputSide, num_experts: int, hidden: int) -> list[ExpertTokens]:
    """The first MAX_TOKENS tokens of every expert, in the plan's order."""
    slices: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_experts)]
    room = [MAX_TOKENS] * num_experts
    for s, weight_T in zip(tokens, side.down_weights, strict=True):
        if room[s.position]:
            x_TH = s.x_TH[: room[s.position]]
            slices[s.position].append((x_TH, weight_T[: len(x_TH)]))
            room[s.position] -= len(x_TH)
    result = []
    for mine in slices:
        x_TH = torch.cat([x for x, _ in mine]) if mine else torch.zeros(0, hidden, device=tokens.context.device)
        weight_T = torch.cat([w for _, w in mine]) if mine else x_TH.new_zeros(0)
        quantized_TH = tokens.quantized(x_TH, tokens.scales.gate_up) if mine else x_TH
        result.append(ExpertTokens(x_TH=x_TH, quantized_TH=quantized_TH, weight_T=weight_T))
    return result
