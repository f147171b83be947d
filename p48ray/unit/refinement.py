"""Refinement of a unit: gathers each expert's tokens and hands them, with the solved linears, to
numerics.refine.

Legend: N experts of the unit, T tokens of one expert, O outputs, I inputs, H hidden size.
"""

import torch
from torch import Tensor

from p48ray.numerics.refine import InputScales, Refined, refine
from p48ray.numerics.refine_tokens import ExpertTokens
from p48ray.numerics.solution import Solution
from p48ray.numerics.solver_inputs import damped_output_hessian
from p48ray.numerics.token_rows import TokenRows, joined
from p48ray.unit.moments import Curvature, OutputSide
from p48ray.unit.routed_tokens import RoutedTokens

MAX_TOKENS = 65_536  # per expert; a step sees 256 of them


def refine_experts(
    tokens: RoutedTokens,
    side: OutputSide,
    originals: tuple[Tensor, Tensor],
    gate_up: Solution,
    down: Solution,
    curvature: list[Curvature],
) -> Refined:
    """Refine all experts of a unit together, in down's G (the identity where gradients are not
    used).

    Args:
        tokens: of the unit, with the settings and input scales that count.
        side: of the same tokens; its weights for down are used.
        originals: gate above up (N, 2 F, H), and down (N, H, F), of all experts.
        gate_up, down: the solved linears of all experts.
        curvature: of down, one an expert.
    """
    settings = tokens.settings
    gate_up_NOI, down_NOI = originals
    num_experts, hidden, size = down_NOI.shape
    metric_NHH = torch.eye(hidden, device=down_NOI.device).expand(num_experts, hidden, hidden)
    if settings.output_curvature:
        output_damp = None if settings.output_damp == "auto" else settings.output_damp
        metric_NHH = damped_output_hessian(
            torch.stack(
                [c.output_hessian_OO for c in curvature if c.output_hessian_OO is not None]
            ),
            [c.tokens / size for c in curvature],
            size,
            output_damp,
        )
    is_quantized = settings.activation_quantization
    scales = InputScales(
        gate_up=tokens.scales.gate_up if is_quantized else None,
        down=tokens.scales.down if is_quantized else None,
        group=settings.activation_group,
    )
    return refine(
        gather_tokens(tokens, side, num_experts, hidden),
        gate_up_NOI,
        down_NOI,
        gate_up.as_quantized(),
        down.as_quantized(),
        metric_NHH,
        scales,
        settings.refine_steps,
    )


def gather_tokens(
    tokens: RoutedTokens, side: OutputSide, num_experts: int, hidden: int
) -> list[ExpertTokens]:
    """The first MAX_TOKENS tokens of every expert as they are stored, in the plan's order.

    Args:
        tokens: of the unit.
        side: of the same tokens; its weights for down are taken.
        num_experts: of the unit.
        hidden: hidden size, of the empty rows where the unit has no token.
    Returns: one entry an expert, on the context's device.
    """
    device = tokens.context.device
    none = TokenRows(torch.zeros(0, hidden, device=device))
    slices: list[list[tuple[TokenRows, Tensor]]] = [[] for _ in range(num_experts)]
    room = [MAX_TOKENS] * num_experts
    for s, weight_T in zip(tokens.stored(), side.down_weights, strict=True):
        none = s.x.pick(slice(0)).to(device)
        if room[s.position]:
            x = s.x.pick(slice(room[s.position])).to(device)
            slices[s.position].append((x, weight_T[: len(x)].to(device)))
            room[s.position] -= len(x)
    return [
        ExpertTokens(
            rows=joined([x for x, _ in mine] or [none]),
            weight_T=torch.cat([w for _, w in mine]) if mine else torch.zeros(0, device=device),
        )
        for mine in slices
    ]
