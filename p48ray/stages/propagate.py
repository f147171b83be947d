"""Propagate: what the experts of a layer will see in the finished model, where every mixture below
them is the compressed one.

With `calibration.propagate: compressed` the run goes layer by layer. A layer's inputs come from a
stream through the layers below: their experts decoded from the shards that the units' manifests
name, their inputs quantized as the server will (W4A4, the layer's own scales), everything else as
in the source. Then a layer runs with the source's experts, whose outputs nobody uses: they say how
large intermediates get. The stream is stored at every boundary, under a prefix of its own, so each
step passes two layers: the one that was just compressed, and its own.

Mixtures that the plan does not compress (run.layers) stay the source's.

Legend: B sequences of a part, S positions, H hidden size.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from p48ray.errors import CalibrationError
from p48ray.model.decoder import Decoder, attend, mix
from p48ray.model.experts import ActivationScales, ExpertWeights, RoutedExperts, RoutedInputs
from p48ray.run.manifest import ActivationPart
from p48ray.run.needs import read_needs
from p48ray.run.plan import SequencePart
from p48ray.run.run_root import BlobKind
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.capture import ResidualStream, write_activations
from p48ray.stages.compressed_experts import UnitShards
from p48ray.stages.streaming import opened_layer, waves
from p48ray.unit.context import StageContext


@torch.no_grad()
def propagate_parts(context: StageContext, item: tuple[int, list[int]]) -> list[ActivationPart]:
    """Take parts to a layer, from the highest boundary stored for each, and write the layer's
    activations. Returns the manifests it wrote.

    Args:
        item: the layer that is next, and the parts.
    Raises: CorruptObjectError naming what to make anew when a boundary or the shard of a unit below
        is not what was written.
    """
    layer, parts = item
    plan, decoder = context.plan, context.decoder()
    needs = read_needs(plan, context.store)
    ways = {p: needs.layers_up_to(layer, p) for p in parts}
    positions = decoder.positions(plan.config.calibration.sequence_length)
    micro_batch = plan.config.calibration.sequences_per_micro_batch
    with BlobWriter(context) as writer:
        stream = CompressedStream(context, decoder, needs, writer)
        for number in range(layer + 1):
            waiting = [plan.parts[p] for p in parts if number in ways[p]]
            if not waiting:
                continue
            seen: list[RoutedInputs] = []
            is_compressed = number < layer and number in plan.layers
            with (
                opened_compressed(context, decoder, number)
                if is_compressed
                else opened_layer(context, decoder, number, seen.append)
            ) as module:
                for wave in waves(plan, waiting):
                    start = time.monotonic()
                    seen.clear()
                    leaving = mix(
                        module,
                        [
                            attend(module, stream.take(number, part), positions, micro_batch)
                            for part in wave
                        ],
                    )
                    share = (time.monotonic() - start) / len(wave)
                    for part, x_BSH in zip(wave, leaving, strict=True):
                        start = time.monotonic() - share
                        if not bool(torch.isfinite(x_BSH).all()):
                            raise CalibrationError(
                                f"layer {number}, part {part.part}: activations behind compressed"
                                " layers are not finite"
                            )
                        if number < layer:
                            stream.put(number + 1, part, x_BSH, start)
                            stream.delete_boundary(number, part)
                        else:
                            write_activations(context, writer, number, part, seen.pop(0), start)
            del module  # it goes before the one above is read
        return [manifest for manifest in writer.drain() if isinstance(manifest, ActivationPart)]


class CompressedStream(ResidualStream):
    """The residual stream behind compressed layers; stored at every boundary that it reaches."""

    kind: BlobKind = "compressed-residuals"

    def is_stored(self, number: int) -> bool:
        return True

    def delete_boundary(self, number: int, part: SequencePart) -> None:
        """Delete a boundary once the next one is stored."""
        if self.context.plan.config.run.keep != "all":
            self.delete(number, part)


@contextmanager
def opened_compressed(context: StageContext, decoder: Decoder, layer: int) -> Iterator[Any]:
    """A finished layer as a server will run it."""
    yield decoder.layer(layer, compressed_experts(context, decoder, layer))


def compressed_experts(context: StageContext, decoder: Decoder, layer: int) -> RoutedExperts:
    """A finished layer's experts as a server will run them."""
    settings = context.plan.config.compression
    seen = (
        ActivationScales(*context.stored_scales(layer), settings.activation_group)
        if settings.activation_quantization
        else None
    )
    shards = UnitShards(context, layer)

    def expert(number: int) -> ExpertWeights:
        return ExpertWeights(*(w.to(decoder.dtype) for w in shards(number)))

    return RoutedExperts(context.layout.num_experts, expert, seen)
