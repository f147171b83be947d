"""Source and compressed model side by side, a layer at a time: the models that evaluate and greedy
compare. They differ in their experts alone.

Legend: B sequences, S positions, H hidden size, T tokens, G groups of values that share a scale.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor

from p48ray.config import RunConfig
from p48ray.model.decoder import Decoder, run_layer
from p48ray.model.expert_loader import layer_experts
from p48ray.model.experts import ActivationScales, ExpertWeights, RoutedExperts, RoutedInputs
from p48ray.numerics.headroom import group_amax
from p48ray.run.scale_counts import LayerScaleCounts, count_groups
from p48ray.stages.compressed_experts import CompressedExperts
from p48ray.unit.context import StageContext

Views = Callable[[int], AbstractContextManager[list[RoutedExperts]]]
"""Number of a layer with experts -> each model's, for as long as the context lasts."""


def through_layers(
    context: StageContext,
    decoder: Decoder,
    token_ids_BS: Tensor,
    count: int,
    views: Views,
) -> list[Tensor]:
    """What leaves the last layer, of so many models that differ in their experts alone: each layer
    is read once for all of them.

    Args:
        context: of the run.
        decoder: of the source.
        token_ids_BS: what the models read.
        count: of the models.
        views: of the models.
    """
    positions = decoder.positions(token_ids_BS.shape[1])
    streams = [decoder.embed(token_ids_BS)] * count
    micro_batch = context.plan.config.calibration.sequences_per_micro_batch
    last = context.plan.source.num_layers - 1
    for number in range(last + 1):
        is_mixture = number in context.plan.source.moe_layers
        with views(number) if is_mixture else nullcontext() as experts:
            layer = decoder.layer(number, experts[0] if experts else None)
            if number < last:
                decoder.prefetch(number + 1)
            for k, x_BSH in enumerate(streams):
                if experts:
                    layer.mlp.experts = experts[k]
                streams[k] = run_layer(layer, x_BSH, positions, micro_batch)
        layer = experts = None  # the layer goes before the one above is read
    return streams


@contextmanager
def mixtures(
    context: StageContext,
    decoder: Decoder,
    compressed: CompressedExperts,
    number: int,
    counts: list[LayerScaleCounts],
) -> Iterator[list[RoutedExperts]]:
    """The source's experts as they are, then the compressed ones, once for every view of the
    activations; in a layer that a pilot leaves out, the source's again.

    Args:
        context: of the run.
        decoder: of the source.
        compressed: as evaluate_part takes it.
        number: of a layer with experts.
        counts: what becomes of the served view's activations is appended.
    """
    if number not in context.plan.layers:
        groups = activation_groups(context.plan.config)
        with source_mixture(context, decoder, number) as originals:
            yield originals * (1 + len(groups))
        return
    with source_mixture(context, decoder, number) as originals:
        yield originals + compressed_mixtures(context, decoder, compressed, number, counts)


@contextmanager
def source_mixture(
    context: StageContext, decoder: Decoder, number: int
) -> Iterator[list[RoutedExperts]]:
    """The source's experts of a layer as they are, as a list of one."""
    with layer_experts(decoder, number) as originals:
        yield [RoutedExperts(context.layout.num_experts, originals)]


def compressed_mixtures(
    context: StageContext,
    decoder: Decoder,
    compressed: CompressedExperts,
    number: int,
    counts: list[LayerScaleCounts],
) -> list[RoutedExperts]:
    """The compressed experts of a layer, once for every view of the activations, the served one
    first. Arguments as `mixtures` takes them.

    Args:
        context, decoder, compressed, number, counts: of a layer that is compressed.
    """
    count, scales = context.layout.num_experts, context.stored_scales(number)

    def smaller(expert: int) -> ExpertWeights:
        return ExpertWeights(*(w.to(decoder.dtype) for w in compressed(number, expert)))

    views = []
    for place, group in enumerate(activation_groups(context.plan.config)):
        if group is None:
            views.append(RoutedExperts(count, smaller))
            continue

        def count_served(seen: RoutedInputs, group: int = group) -> None:
            counts.append(
                LayerScaleCounts(
                    layer=number,
                    gate_up=count_groups(group_amax(seen.hidden_TH, group), scales[0]),
                    down=count_groups(seen.group_amax_G, scales[1]),
                )
            )

        observe = None if place else count_served
        view = ActivationScales(*scales, group)
        views.append(RoutedExperts(count, smaller, view, observe, group))
    return views


def activation_groups(config: RunConfig) -> list[int | None]:
    """How the compressed experts' inputs are quantized under evaluation, the served way first:
    values that share a scale; None for original activations."""
    settings = config.evaluation
    if settings is not None and settings.activations == "original":
        return [None]
    return [*dict.fromkeys([served_group(config), *([32] if sees_both_groups(config) else [])])]


def served_group(config: RunConfig) -> int:
    settings = config.evaluation
    return (
        settings.activation_group
        if settings is not None and settings.activation_group
        else config.compression.activation_group
    )


def sees_both_groups(config: RunConfig) -> bool:
    """Whether activations in groups of 32 are looked at beside the served groups of 16: kernels
    that run paired-4:8 as sparse apply one scale to 32 inputs of both operands, so that this is
    what the same checkpoint is on them."""
    compression, settings = config.compression, config.evaluation
    is_for_them = compression.sparsity == "paired-4:8" and compression.scale_span == 32
    return (
        is_for_them
        and settings is not None
        and settings.activations == "nvfp4"
        and served_group(config) == 16
    )
