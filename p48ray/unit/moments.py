"""What a unit's experts see, folded into second moments: the curvature that the solvers work with.

An expert with few tokens borrows from its layer: its moments are shrunk towards those of a sample
of all the layer's tokens, the more the fewer it has.

Legend: N experts of the unit, T tokens, H hidden size, F intermediate size, Z = 2 F (gate, then
up), I, O in and out of a linear.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from p48ray.model.experts import ExpertWeights, intermediate
from p48ray.numerics.activation import count_clipped
from p48ray.numerics.curvature import SecondMoment, shrink_towards, shrinkage_from_tokens
from p48ray.numerics.output_gradients import expert_gradients, norm_weights
from p48ray.numerics.products import tensor_float_32
from p48ray.numerics.solvers import SOLVERS
from p48ray.unit.routed_tokens import RoutedTokens

# Tokens per input at which the layer's statistics weigh as much as the expert's own (DESIGN 7.6).
# By a prototype with 6 tokens per input of gate and up, a quarter was best for their H, a half for
# down's; at 0 tokens only the layer is left.
GATE_UP_HALF_TOKENS = 2.0
DOWN_HALF_TOKENS = 12.0
# The same for G, in tokens per input of gate and up: at 6 of them three quarters were best for
# down's.
GATE_UP_OUTPUT_HALF_TOKENS = 2.0
DOWN_OUTPUT_HALF_TOKENS = 18.0
GRADIENT_NORM_CLIP = 20.0  # times the mean; DESIGN 7
# One-shot solvers know no shrinkage, except for experts with fewer tokens than inputs, whose
# Hessian alone has no full rank.
MIN_TOKENS_PER_INPUT = 1.0


@dataclass(slots=True)
class Curvature:
    """Second moments of one expert's linear. `tokens`: its own routed ones; `shrinkage`: the
    layer's weight in `hessian_II`. For down: `cross_II` = mean of (original intermediate)^T
    (compressed one), `energy_II` that of the originals. `output_hessian_OO`: G, with gradients.
    `sees_zeros`: whether all inputs were zero (as float32 squares them), original and compressed
    ones, of tokens that weigh something."""

    hessian_II: Tensor
    tokens: int
    shrinkage: float
    cross_II: Tensor | None = None
    energy_II: Tensor | None = None
    output_hessian_OO: Tensor | None = None
    sees_zeros: bool = False


@dataclass(slots=True)
class OutputSide:
    """G of every expert, None without gradients; token weights of every slice, in order."""

    gate_up: list[Tensor | None]
    down: list[Tensor | None]
    gate_up_weights: list[Tensor]
    down_weights: list[Tensor]


def output_side(tokens: RoutedTokens, originals: list[ExpertWeights]) -> OutputSide:
    """What the gradients say: both G per expert, shrunk towards the layer's, and token weights from
    gradient norms. Router weights where there are none."""
    if not tokens.settings.output_curvature:
        weights = [s.router_T**tokens.settings.router_weight_exponent for s in tokens]
        return OutputSide([None] * len(originals), [None] * len(originals), weights, weights)
    hidden, size = originals[0].down_HF.shape
    device = tokens.context.device
    own = [
        (SecondMoment.zeros(2 * size, device), SecondMoment.zeros(hidden, device))
        for _ in originals
    ]
    norms: list[tuple[int, Tensor, Tensor]] = []
    for s in tokens:
        assert s.delta_TH is not None
        with tensor_float_32():
            inner_TZ, outer_TH = expert_gradients(
                s.x_TH, s.delta_TH, s.router_T, *originals[s.position]
            )
        for moment, gradient in zip(own[s.position], (inner_TZ, outer_TH), strict=True):
            moment.add_(gradient, None)
        norms.append((s.position, inner_TZ.norm(dim=1), outer_TH.norm(dim=1)))
    return OutputSide(
        *shrunk_output_hessians(tokens, originals, own), *token_weights(tokens, norms)
    )


def shrunk_output_hessians(
    tokens: RoutedTokens,
    originals: list[ExpertWeights],
    own: list[tuple[SecondMoment, SecondMoment]],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """G of gate and up towards the expert's response to the layer's sample, G of down towards the
    sample's own."""
    x_TH, router_T, delta_TH = tokens.sample
    assert delta_TH is not None
    pool_down = SecondMoment.zeros(delta_TH.shape[1], delta_TH.device)
    pool_down.add_(delta_TH * router_T[:, None], None)
    gate_up: list[Tensor | None] = []
    down: list[Tensor | None] = []
    for (inner, outer), weights in zip(own, originals, strict=True):
        per_input = inner.num_tokens / x_TH.shape[1]
        pool_inner = SecondMoment.zeros(inner.sum_II.shape[0], x_TH.device)
        with tensor_float_32():
            pool_inner.add_(expert_gradients(x_TH, delta_TH, router_T, *weights)[0], None)
        gate_up.append(
            shrink_towards(
                inner, pool_inner, shrinkage_from_tokens(per_input, GATE_UP_OUTPUT_HALF_TOKENS)
            )
        )
        down.append(
            shrink_towards(
                outer, pool_down, shrinkage_from_tokens(per_input, DOWN_OUTPUT_HALF_TOKENS)
            )
        )
    return gate_up, down


def token_weights(
    tokens: RoutedTokens, norms: list[tuple[int, Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Clipped gradient norms over each expert's mean, for every slice."""
    result: tuple[list[Tensor], list[Tensor]] = ([], [])
    for side in range(2):
        weights: dict[int, list[Tensor]] = {}
        for n in range(tokens.unit.num_experts):
            mine = [
                (inner if side == 0 else outer) for position, inner, outer in norms if position == n
            ]
            if mine:
                weights[n] = list(
                    norm_weights(torch.cat(mine), GRADIENT_NORM_CLIP).split([len(m) for m in mine])
                )
        for entry in norms:
            result[side].append(weights[entry[0]].pop(0))
    return result


def gate_up_curvature(tokens: RoutedTokens, side: OutputSide) -> tuple[list[Curvature], float]:
    """H of every expert's quantized inputs, shrunk towards the layer's; share of values clipped."""
    scale, sample_TH = tokens.scales.gate_up, tokens.sample.x_TH
    hidden = sample_TH.shape[1]
    own = [SecondMoment.zeros(hidden, sample_TH.device) for _ in tokens.unit.experts]
    clipped, seen = torch.zeros((), dtype=torch.int64, device=sample_TH.device), 0
    for s, weights_T in zip(tokens, side.gate_up_weights, strict=True):
        own[s.position].add_(
            tokens.quantized(s.x_TH, scale), weights_T, x_scale=tokens.exact_scale(scale)
        )
        clipped += count_clipped(s.x_TH, scale)
        seen += s.x_TH.numel()
    pool = SecondMoment.zeros(hidden, sample_TH.device)
    pool.add_(tokens.quantized(sample_TH, scale), None, x_scale=tokens.exact_scale(scale))
    result = []
    for output_hessian in side.gate_up:
        moment = own.pop(0)  # gone once it is blended: 0.2 GB each for Kimi-K2.5
        share = shrinkage(tokens, moment.num_tokens, hidden, GATE_UP_HALF_TOKENS)
        result.append(
            Curvature(
                shrink_towards(moment, pool, share),
                moment.num_tokens,
                share,
                output_hessian_OO=output_hessian,
                sees_zeros=tokens.scales.amax_input**2 < torch.finfo(torch.float32).tiny,
            )
        )
    return result, clipped.item() / max(1, seen)


def down_curvature(
    tokens: RoutedTokens, side: OutputSide, originals: list[ExpertWeights], gate_up_NOI: Tensor
) -> tuple[list[Curvature], float]:
    """Moments of the intermediates: compressed-and-quantized ones (hessian), original times those
    (cross), originals (energy); and the share of compressed ones clipped.
    Args:
        tokens, side: as gate_up_curvature takes them.
        originals: one an expert of the unit.
        gate_up_NOI: gate above up of the same experts, after compression.
    """
    size, sample_TH = originals[0].gate_FH.shape[0], tokens.sample.x_TH
    compressed = [
        ExpertWeights(w[:size], w[size:], o.down_HF)
        for w, o in zip(gate_up_NOI, originals, strict=True)
    ]
    own = [[SecondMoment.zeros(size, sample_TH.device) for _ in range(3)] for _ in originals]
    clipped, seen = torch.zeros((), dtype=torch.int64, device=sample_TH.device), 0
    down_scale = tokens.exact_scale(tokens.scales.down)

    def add(moments: list[SecondMoment], n: int, x_TH: Tensor, weights_T: Tensor | None) -> Tensor:
        """Add tokens to one expert's moments; returns its compressed intermediates.
        Args:
            moments: hessian, cross and energy.
            n, x_TH, weights_T: the expert's position, its inputs, their weights (None: all 1).
        """
        with tensor_float_32():
            h_TF = intermediate(x_TH, originals[n])
            raw_TF = intermediate(tokens.quantized(x_TH, tokens.scales.gate_up), compressed[n])
        hq_TF = tokens.quantized(raw_TF, tokens.scales.down)
        moments[0].add_(hq_TF, weights_T, x_scale=down_scale)
        moments[1].add_(hq_TF, weights_T, h_TF, x_scale=down_scale)
        moments[2].add_(h_TF, weights_T)
        return raw_TF

    for s, weights_T in zip(tokens, side.down_weights, strict=True):
        raw_TF = add(own[s.position], s.position, s.x_TH, weights_T)
        clipped += count_clipped(raw_TF, tokens.scales.down)
        seen += raw_TF.numel()
    result = []
    for n, moments in enumerate(own):
        share = shrinkage(tokens, moments[0].num_tokens, size, DOWN_HALF_TOKENS)
        elsewhere = [SecondMoment.zeros(size, sample_TH.device) for _ in range(3)]
        if share:
            add(elsewhere, n, sample_TH, None)
        blended = [
            shrink_towards(m, p, share, by=(moments[0], elsewhere[0]))
            for m, p in zip(moments, elsewhere, strict=True)
        ]
        # a moment is zero too where its tokens weigh nothing
        counted = moments[2] if moments[2].num_tokens else elsewhere[2]
        result.append(
            Curvature(
                blended[0],
                moments[0].num_tokens,
                share,
                blended[1],
                blended[2],
                side.down[n],
                sees_zeros=counted.weight_sum > 0 and not (blended[0].any() or blended[2].any()),
            )
        )
    return result, clipped.item() / max(1, seen)


def shrinkage(tokens: RoutedTokens, num_tokens: int, in_features: int, half_tokens: float) -> float:
    """Weight of the layer's statistics in an expert's (see GATE_UP_HALF_TOKENS).
    Args:
        tokens: of the unit; only the settings are looked at.
        num_tokens, in_features: tokens that the expert saw, inputs of its linear.
        half_tokens: tokens per input at which both weigh the same.
    """
    per_input = num_tokens / in_features
    if not SOLVERS[tokens.settings.solver].uses_model_loss and per_input >= MIN_TOKENS_PER_INPUT:
        return 0.0
    return shrinkage_from_tokens(per_input, half_tokens)
