"""What the stages that walk through the layers share: the experts of a layer, and how many tokens
meet them at once.

A worker's parts go through a layer together, in waves of bounded size, so that an expert is decoded
once a wave. How the parts are grouped changes no number: every product is taken part by part.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from p48ray.estimate.memory import WAVE_TOKENS
from p48ray.model.decoder import Decoder
from p48ray.model.expert_loader import layer_experts
from p48ray.model.experts import RoutedExperts, RoutedInputs
from p48ray.run.plan import RunPlan, SequencePart
from p48ray.unit.context import StageContext


def waves(plan: RunPlan, parts: Sequence[SequencePart]) -> Iterator[list[SequencePart]]:
    """Parts in order, in groups of at most WAVE_TOKENS tokens (or one part)."""
    wave: list[SequencePart] = []
    for part in parts:
        tokens = (
            sum(p.num_sequences for p in (*wave, part)) * plan.config.calibration.sequence_length
        )
        if wave and tokens > WAVE_TOKENS:
            yield wave
            wave = []
        wave.append(part)
    if wave:
        yield wave


@contextmanager
def opened_layer(
    context: StageContext,
    decoder: Decoder,
    number: int,
    observe: Callable[[RoutedInputs], None] | None = None,
) -> Iterator[Any]:
    """Layer `number` for as long as the context lasts; its routed experts stay packed as the source
    stores them until they are used.

    Args:
        context: of the run.
        decoder: of the source.
        number: of any layer, with or without routed experts.
        observe: receives what the routed experts saw, after each call; None: nobody asks.
    """
    if number not in context.plan.source.moe_layers:
        yield decoder.layer(number, None)
        return
    with layer_experts(decoder, number) as experts:
        group = context.plan.config.compression.activation_group
        yield decoder.layer(
            number, RoutedExperts(context.layout.num_experts, experts, observe=observe, group=group)
        )
