"""How long it takes to compare the finished checkpoint with its source on held-out text."""

import math

from p48ray.checkpoint.layout import ModelLayout
from p48ray.estimate.nearness import is_source_near
from p48ray.estimate.rates import Rates
from p48ray.run.plan import RunPlan


def evaluate_seconds(
    plan: RunPlan, layout: ModelLayout, dense_elements: int, rates: Rates
) -> float:
    """Source and result on held-out text; each part decodes each expert, the result's once a view.

    Args:
        plan, layout, dense_elements, rates: as for `duration.stage_times`.
    """
    settings, c = plan.config.evaluation, plan.config.compression
    if settings is None:
        return 0.0
    sees_both = (
        settings.activations == "nvfp4" and c.sparsity == "paired-4:8" and c.scale_span == 32
    )
    models = 2 + (sees_both and (settings.activation_group or c.activation_group) == 16)
    parts = math.ceil(settings.num_sequences / settings.sequences_per_part)
    share = math.ceil(parts / min(plan.config.run.num_workers, parts)) / parts
    flops = models * forward_flops(
        settings.num_sequences * settings.sequence_length, layout, dense_elements
    )
    weights = models * parts * len(layout.moe_layers) * layout.num_experts * expert_weights(layout)
    return share * (flops / rates.stream_flops + weights / rates.decode_weights)


def forward_flops(tokens: int, layout: ModelLayout, dense_elements: int) -> float:
    """Two FLOP per weight that a token meets, outside the experts and in top_k experts a layer."""
    routed = len(layout.moe_layers) * layout.top_k * expert_weights(layout)
    return 2.0 * tokens * (dense_elements + routed)


def source_passes(plan: RunPlan) -> tuple[int, int]:
    """(parts of the greedy agreement's prompts, passes of each over the source at most). Where the
    model writes what its drafts expect, passes are fewer; (0, 0): there is no greedy agreement."""
    evaluation = plan.config.evaluation
    if evaluation is None or evaluation.greedy is None or plan.is_pilot:
        return 0, 0
    settings = evaluation.greedy
    return math.ceil(settings.prompts / settings.prompts_per_part), settings.tokens


def greedy_seconds(
    plan: RunPlan, layout: ModelLayout, source: int, dense_elements: int, rates: Rates
) -> float:
    """At most: every pass reads the source and decodes each expert, and the compressed model is one
    pass more. A worker takes a part at a time.

    Args:
        plan, layout, dense_elements, rates: as for `duration.stage_times`.
        source: its bytes.
    """
    parts, passes = source_passes(plan)
    if not parts:
        return 0.0
    evaluation = plan.config.evaluation
    assert evaluation is not None and evaluation.greedy is not None
    settings = evaluation.greedy
    prompts = min(settings.prompts, settings.prompts_per_part)
    tokens = prompts * (settings.prompt_tokens + settings.tokens)
    weights = len(layout.moe_layers) * layout.num_experts * expert_weights(layout)
    read = source / (rates.near_read if is_source_near(plan) else rates.link)
    computed = forward_flops(tokens, layout, dense_elements) / rates.stream_flops
    one = max(read, computed + weights / rates.decode_weights)
    return math.ceil(parts / plan.config.run.num_workers) * (passes + 1) * one


def expert_weights(layout: ModelLayout) -> int:
    return 3 * layout.hidden_size * layout.moe_intermediate_size
