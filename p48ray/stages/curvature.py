"""What a unit's experts see, folded into second moments: the curvature that the solvers work with.

An expert with few tokens borrows from its layer: its moments are shrunk towards those of a sample of all the layer's tokens, the more the fewer it has.

Legend: N experts of the unit, T tokens, K experts a token, H hidden size, F intermediate size, I either of the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from p48ray.manifest import LayerScales
from p48ray.model.experts import ExpertWeights, intermediate
from p48ray.numerics.activation import count_clipped, quantize_activations
from p48ray.numerics.curvature import SecondMoment, shrinkage_from_tokens
from p48ray.plan import WorkUnit
from p48ray.stages.context import StageContext

LAYER_SAMPLE_TOKENS = 8192  # tokens of the whole layer that stand in for what an expert saw too little of
# Tokens per input at which the layer's statistics weigh as much as the expert's own. From the lab's few-token figures (DESIGN 7): at 6 tokens per input
# of gate and up a quarter was best for their H, a half for down's; at 0 tokens only the layer is left.
GATE_UP_HALF_TOKENS = 2.0
DOWN_HALF_TOKENS = 12.0
ASYMMETRIC_SOLVERS = ("block_descent",)  # the one-shot solvers stay what their papers describe
# One-shot solvers know no shrinkage, except for experts with fewer tokens than inputs, whose Hessian alone has no full rank.
MIN_TOKENS_PER_INPUT = 1.0
GATHERED_BYTES = 8 * 10**9  # routed tokens of a unit kept in memory; beyond it every pass reads the layer's parts again


@dataclass(slots=True)
class Curvature:
    """Second moments of one expert. `own` counts routed tokens, `shrinkage` is the layer's weight in `hessian_II`."""

    hessian_II: Tensor
    tokens: int
    shrinkage: float
    cross_II: Tensor | None = None
    energy_II: Tensor | None = None


RoutedSlice = tuple[int, Tensor, Tensor]


class RoutedTokens:
    """The tokens of a unit's experts, in the plan's order, and a sample of the whole layer's.

    One pass over the layer's parts takes both; the tokens stay in memory (bf16, as stored) unless they pass GATHERED_BYTES.
    """

    def __init__(self, context: StageContext, unit: WorkUnit, scales: LayerScales) -> None:
        self.context, self.unit, self.scales = context, unit, scales
        self.settings = context.plan.config.compression
        expected = sum(scales.tokens_per_expert[e] for e in unit.experts) * 2 * context.layout.hidden_size
        self.gathered: list[RoutedSlice] | None = [] if expected <= GATHERED_BYTES else None
        share = -(-LAYER_SAMPLE_TOKENS // len(context.plan.parts))
        samples = []
        for part in context.activation_parts(unit.layer):
            hidden_TH = part["hidden"]
            samples.append(hidden_TH[:: max(1, len(hidden_TH) // share)][:share].float())
            if self.gathered is not None:
                self.gathered += self.routed(part)
        self.sample_TH = torch.cat(samples).to(context.device)

    def routed(self, part: dict[str, Tensor]) -> Iterator[RoutedSlice]:
        """(position in the unit, x (T, H) bf16, token weights (T,)) of every expert that has tokens in a part."""
        ids_TK, router_TK, hidden_TH = part["expert_ids"], part["router_weights"], part["hidden"]
        for n, expert in enumerate(self.unit.experts):
            rows, slots = torch.where(ids_TK == expert)
            if len(rows):
                yield n, hidden_TH[rows], router_TK[rows, slots] ** self.settings.router_weight_exponent

    def __iter__(self) -> Iterator[RoutedSlice]:
        """As `routed`, over all parts, x in float32, on the context's device."""
        parts = self.context.activation_parts(self.unit.layer)
        slices = self.gathered if self.gathered is not None else (s for part in parts for s in self.routed(part))
        for n, x_TH, weights_T in slices:
            yield n, x_TH.to(self.context.device).float(), weights_T.to(self.context.device)

    def quantized(self, values: Tensor, global_scale: float) -> Tensor:
        """Values as the kernel will see them (compression.activation_quantization), else as they are."""
        if not self.settings.activation_quantization:
            return values
        return quantize_activations(values, global_scale, self.settings.activation_group)


def gate_up_curvature(tokens: RoutedTokens) -> tuple[list[Curvature], float]:
    """H of every expert's quantized inputs, shrunk towards the layer's; and the share of input values clipped."""
    scale, sample_TH = tokens.scales.gate_up, tokens.sample_TH
    hidden = sample_TH.shape[1]
    own = [SecondMoment.zeros(hidden, sample_TH.device) for _ in tokens.unit.experts]
    clipped, seen = torch.zeros((), dtype=torch.int64, device=sample_TH.device), 0
    for n, x_TH, weights_T in tokens:
        own[n].add_(tokens.quantized(x_TH, scale), weights_T)
        clipped += count_clipped(x_TH, scale)
        seen += x_TH.numel()
    pool = SecondMoment.zeros(hidden, sample_TH.device)
    pool.add_(tokens.quantized(sample_TH, scale), None)
    result = []
    for moment in own:
        share = shrinkage(tokens, moment.num_tokens, hidden, GATE_UP_HALF_TOKENS)
        hessian_HH = blend(moment, pool, share)
        result.append(Curvature(hessian_HH, moment.num_tokens, share))
    return result, clipped.item() / max(1, seen)


def down_curvature(tokens: RoutedTokens, originals: list[ExpertWeights], gate_up_NOI: Tensor) -> tuple[list[Curvature], float]:
    """Moments of the intermediates: compressed-and-quantized ones (hessian), original times those (cross), originals (energy)."""
    size, sample_TH = originals[0].gate_FH.shape[0], tokens.sample_TH
    compressed = [ExpertWeights(w[:size], w[size:], o.down_HF) for w, o in zip(gate_up_NOI, originals, strict=True)]
    own = [[SecondMoment.zeros(size, sample_TH.device) for _ in range(3)] for _ in originals]
    clipped, seen = torch.zeros((), dtype=torch.int64, device=sample_TH.device), 0

    def add(moments: list[SecondMoment], n: int, x_TH: Tensor, weights_T: Tensor | None) -> Tensor:
        h_TF = intermediate(x_TH, originals[n])
        raw_TF = intermediate(tokens.quantized(x_TH, tokens.scales.gate_up), compressed[n])
        hq_TF = tokens.quantized(raw_TF, tokens.scales.down)
        moments[0].add_(hq_TF, weights_T)
        moments[1].add_(hq_TF, weights_T, h_TF)
        moments[2].add_(h_TF, weights_T)
        return raw_TF

    for n, x_TH, weights_T in tokens:
        raw_TF = add(own[n], n, x_TH, weights_T)
        clipped += count_clipped(raw_TF, tokens.scales.down)
        seen += raw_TF.numel()
    result = []
    for n, moments in enumerate(own):
        share = shrinkage(tokens, moments[0].num_tokens, size, DOWN_HALF_TOKENS)
        elsewhere = [SecondMoment.zeros(size, sample_TH.device) for _ in range(3)]
        if share:
            add(elsewhere, n, sample_TH, None)
        hessian_FF, cross_FF, energy_FF = (
            blend(m, p, share, by=(moments[0], elsewhere[0])) for m, p in zip(moments, elsewhere, strict=True)
        )
        result.append(Curvature(hessian_FF, moments[0].num_tokens, share, cross_FF, energy_FF))
    return result, clipped.item() / max(1, seen)


def shrinkage(tokens: RoutedTokens, num_tokens: int, in_features: int, half_tokens: float) -> float:
    """Weight of the layer's statistics for an expert that saw `num_tokens` (see GATE_UP_HALF_TOKENS)."""
    per_input = num_tokens / in_features
    if tokens.settings.solver not in ASYMMETRIC_SOLVERS and per_input >= MIN_TOKENS_PER_INPUT:
        return 0.0
    return shrinkage_from_tokens(per_input, half_tokens)


def blend(own: SecondMoment, pool: SecondMoment, share: float, by: tuple[SecondMoment, SecondMoment] | None = None) -> Tensor:
    """(1 - share) own + share * pool, the pool rescaled to own's mean diagonal (taken from the pair `by` where the moment is not symmetric)."""
    if own.num_tokens == 0:
        return pool.mean()
    if share == 0:
        return own.mean()
    own_by, pool_by = by or (own, pool)
    ratio = own_by.mean().diagonal().mean() / pool_by.mean().diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (1 - share) * own.mean() + share * ratio * pool.mean()
