"""Boundaries that the forward pass did not leave to the backward pass (run.boundary_every), run
again from the one below, a segment of layers at a time.

The same parts go through the same layers by the same calls as in capture, so what comes out is what
was there, bit for bit.

Legend: B sequences of a part, S positions, H hidden size.
"""

import time
from collections.abc import Sequence

import torch

from p48ray.model.decoder import Decoder, attend, mix
from p48ray.run.needs import Needs
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.capture import ResidualStream
from p48ray.stages.streaming import opened_layer, waves
from p48ray.unit.context import StageContext


@torch.no_grad()
def remake_boundaries(
    context: StageContext, decoder: Decoder, needs: Needs, parts: Sequence[int], boundary: int
) -> Needs:
    """Run those of the parts that lack a boundary up to it, storing it and those on the way.

    Args:
        context: of the run.
        decoder: of the source.
        needs: as the run root stands now.
        parts: their numbers.
        boundary: number of the layer that it enters.
    Returns: needs with what is there now. Raises: CorruptObjectError naming the boundary that a
        part would have started from.
    """
    plan = context.plan
    lacking = [p for p in parts if not needs.has_blob("residuals", boundary, p)]
    ways = {p: range(needs.start_of(boundary, p), boundary) for p in lacking}
    positions = decoder.positions(plan.config.calibration.sequence_length)
    micro_batch = plan.config.calibration.sequences_per_micro_batch
    with BlobWriter(context) as writer:
        stream = ResidualStream(context, decoder, needs, writer)
        for number in range(min((way.start for way in ways.values()), default=boundary), boundary):
            waiting = [plan.parts[p] for p in lacking if number in ways[p]]
            with opened_layer(context, decoder, number) as layer:
                decoder.prefetch(number + 1)
                for wave in waves(plan, waiting):
                    start = time.monotonic()
                    entering = [
                        attend(layer, stream.take(number, part), positions, micro_batch)
                        for part in wave
                    ]
                    for part, x_BSH in zip(wave, mix(layer, entering), strict=True):
                        stream.put(number + 1, part, x_BSH, start)
            del layer  # it goes before the one above is read
    return needs.with_residuals((b + 1, p) for p, way in ways.items() for b in way)
