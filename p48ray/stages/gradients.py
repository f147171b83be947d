"""Gradients: the same stream backwards, a segment of layers at a time. What the model's own loss
says about an error at each mixture's output.

At the head one label a position is sampled from the model's own distribution, so that the mean of g
g^T over tokens is the Fisher information and not the empirical one (Kunstner et al. 2019,
"Limitations of the empirical Fisher approximation"). The gradient of the summed cross-entropy then
goes down layer by layer, each differentiated with respect to its activations only; one layer's
weights are held at a time.

A segment's layers first run again, from the boundary that the forward pass left, by the same
calls: what comes out is what was there, bit for bit. What enters each is held in memory until the
gradient comes down to it, so a wave of parts goes through a whole segment before the next wave
does. What the experts see on the way is written here, unless the run goes layer by layer
(run.passes).

A mixture's routed output is added to the residual stream, so the gradient there, delta, is the
gradient with respect to what leaves the layer.

Legend: B sequences, S positions, T = B S tokens, H hidden size.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from p48ray.errors import CalibrationError
from p48ray.model.decoder import Decoder, attend, mix
from p48ray.model.experts import RoutedInputs
from p48ray.run import run_root
from p48ray.run.checked import load_part_manifest
from p48ray.run.manifest import ActivationPart, GradientPart, PartManifest
from p48ray.run.needs import Needs, Visit, read_needs
from p48ray.run.plan import SequencePart
from p48ray.run.run_root import BlobKind
from p48ray.stages.blobs import Blob, BlobWriter
from p48ray.stages.capture import (
    ResidualStream,
    check_finite,
    write_activations,
    write_boundary,
)
from p48ray.stages.derivatives import layer_or_head, step_down
from p48ray.stages.streaming import opened_layer, waves
from p48ray.unit.context import StageContext
from p48ray.unit.token_columns import to_columns


def gradient_parts(
    context: StageContext, item: tuple[int, Sequence[int]]
) -> list[ActivationPart | GradientPart]:
    """Take parts through a segment, up and back down, writing what is missing.

    Args:
        item: a layer of the segment, or num_layers for the head's, and the parts.
    Returns: the manifests of activations and gradients. Raises: CorruptObjectError naming a
        boundary to make anew, CalibrationError for values that are not finite.
    """
    number, parts = item
    plan = context.plan
    decoder = context.decoder()
    needs = read_needs(plan, context.store)
    visits = {p: v for p in parts for v in needs.visits(p) if number in v.segment}
    with BlobWriter(context) as writer:
        for wave in waves(plan, [plan.parts[p] for p in parts if p in visits]):
            segment = SegmentPass(context, decoder, writer, needs, visits, wave)
            segment.go_up()
            segment.go_back()
        found = writer.drain()
    return [m for m in found if isinstance(m, ActivationPart | GradientPart)]


@dataclass(slots=True)
class SegmentPass:
    """A wave's way through a segment. `visits`: what is to be done, by part."""

    context: StageContext
    decoder: Decoder
    writer: BlobWriter
    needs: Needs
    visits: Mapping[int, Visit]
    wave: list[SequencePart]
    # (layer, part) -> what enters the layer, (B, S, H), until it is differentiated
    entering: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    # part -> gradient with respect to what leaves the layer that is next
    above: dict[int, Tensor] = field(default_factory=dict)
    # Seconds since a part's last manifest: the head, and layers of which nothing is wanted, count
    # for the next of which something is.
    spent: Counter[int] = field(default_factory=Counter)

    @torch.no_grad()
    def go_up(self) -> None:
        """Run the layers again, holding what enters each that is differentiated, and writing what
        the experts see."""
        plan = self.context.plan
        stream = ResidualStream(self.context, self.decoder, self.needs, self.writer)
        for part in self.wave:
            visit = self.visits[part.part]
            if visit.reads_boundary:
                self.hold(visit.up.start, part, stream.take(visit.up.start, part))
            if visit.seen and visit.up.start:
                # the forward pass leaves no record that stays: its seconds go with what is seen
                below = self.load_boundary(visit.up.start, part)
                self.spent[part.part] += below.seconds  # type: ignore[assignment]
        ups = [self.visits[part.part].up for part in self.wave if self.visits[part.part].up]
        positions = self.decoder.positions(plan.config.calibration.sequence_length)
        micro_batch = plan.config.calibration.sequences_per_micro_batch
        seen: list[RoutedInputs] = []
        for number in range(
            min((u.start for u in ups), default=0), max((u.stop for u in ups), default=0)
        ):
            passing = [p for p in self.wave if number in self.visits[p.part].up]
            start = time.monotonic()
            seen.clear()
            is_watched = any(number in self.visits[p.part].seen for p in passing)
            with opened_layer(
                self.context, self.decoder, number, seen.append if is_watched else None
            ) as layer:
                if any(number + 1 in self.visits[p.part].up for p in passing):
                    self.decoder.prefetch(number + 1)
                leaving = mix(
                    layer,
                    [
                        attend(layer, self.taken(number, part), positions, micro_batch)
                        for part in passing
                    ],
                )
            del layer  # it goes before the one above is read
            share = (time.monotonic() - start) / len(passing)
            for part in passing:
                start = time.monotonic() - share
                x_BSH = leaving.pop(0)
                check_finite(self.decoder, plan, number, part, x_BSH)
                self.hold(number + 1, part, x_BSH)
                observed = seen.pop(0) if seen else None
                if number in self.visits[part.part].seen:
                    assert observed is not None
                    begun = start - self.spent.pop(part.part, 0.0)
                    write_activations(self.context, self.writer, number, part, observed, begun)
                else:
                    self.spent[part.part] += time.monotonic() - start  # type: ignore[assignment]

    def load_boundary(self, number: int, part: SequencePart) -> PartManifest:
        return load_part_manifest(
            self.context.plan, self.context.store, "residuals", number, part.part
        )

    def hold(self, number: int, part: SequencePart, x_BSH: Tensor) -> None:
        visit = self.visits[part.part]
        if number in visit.entered or number in visit.up:
            self.entering[number, part.part] = x_BSH

    def taken(self, number: int, part: SequencePart) -> Tensor:
        """What enters a layer, which goes on being held only where it is differentiated."""
        place = (number, part.part)
        is_held = number in self.visits[part.part].entered
        return self.entering[place] if is_held else self.entering.pop(place)

    def go_back(self) -> None:
        """Come down through the layers from the head, or from the gradients stored above, and
        delete the boundaries that nobody reads any more."""
        visits = [self.visits[part.part] for part in self.wave]
        ways = [visit.back for visit in visits if visit.back]
        top = max((way.stop for way in ways), default=0)
        for number in range(top - 1, min((way.start for way in ways), default=0) - 1, -1):
            passing = [p for p in self.wave if number in self.visits[p.part].back]
            stepping = [p for p in passing if number in self.visits[p.part].entered]
            with (
                layer_or_head(self.context, self.decoder, number) if stepping else nullcontext()
            ) as module:
                if any(number - 1 in self.visits[p.part].entered for p in passing):
                    self.decoder.prefetch(number - 1)
                self.step(number, module, passing, stepping)
            del module  # the layer above goes before the next is read
        for part in self.wave:
            self.delete_boundaries(part)

    def step(
        self,
        number: int,
        module: nn.Module | None,
        passing: list[SequencePart],
        stepping: list[SequencePart],
    ) -> None:
        """Take parts down through a layer, and write the gradients wanted at its output, whose
        seconds hold that way.

        Args:
            number, module: of the layer, or of the head.
            passing: parts that come to it.
            stepping: those of them that it is differentiated for.
        """
        is_head = number == self.context.plan.source.num_layers
        start = time.monotonic()
        for part in passing:
            if not is_head and part.part not in self.above:
                self.above[part.part] = self.stored_gradient(number + 1, part)
        leaving = {part.part: self.above.pop(part.part, None) for part in passing}
        below: list[Tensor] = []
        if stepping:
            assert module is not None
            below = step_down(
                self.context,
                self.decoder,
                module,
                [self.entering.pop((number, part.part)) for part in stepping],
                [leaving[part.part] for part in stepping],
                stepping,
            )
        share = (time.monotonic() - start) / len(passing)
        for part in passing:
            start = time.monotonic() - share
            if number in self.visits[part.part].felt:
                delta_BSH = leaving[part.part]
                assert delta_BSH is not None
                begun = start - self.spent.pop(part.part, 0.0)
                delta_TH = delta_BSH.flatten(0, 1)
                write_gradients(self.context, self.writer, number, part, delta_TH, begun)
            else:
                self.spent[part.part] += time.monotonic() - start  # type: ignore[assignment]
        for part, gradient_BSH in zip(stepping, below, strict=True):
            self.put(number, part, gradient_BSH, time.monotonic() - share)

    def stored_gradient(self, number: int, part: SequencePart) -> Tensor:
        """Gradient with respect to what enters layer `number`, (B, S, H)."""
        values_TH = self.context.boundary("residual-gradients", number, part.part)
        return values_TH.reshape(part.num_sequences, -1, values_TH.shape[-1])

    def put(self, number: int, part: SequencePart, gradient_BSH: Tensor, start: float) -> None:
        """Keep the gradient with respect to what enters layer `number`, in the run root too where
        the next segment starts from it.

        Args:
            number, part, start: as capture.write_boundary takes them.
            gradient_BSH: must not change any more.
        """
        self.above[part.part] = gradient_BSH
        if number == self.visits[part.part].segment.start:
            write_boundary(self.writer, "residual-gradients", number, part, gradient_BSH, start)

    def delete_boundaries(self, part: SequencePart) -> None:
        """Delete the boundaries that this segment was the last to read, once what it leaves is
        stored."""
        if self.context.plan.config.run.keep == "all":
            return
        segment = self.visits[part.part].segment
        places: list[tuple[BlobKind, int]] = [
            *(("residuals", n) for n in segment),
            *(("residual-gradients", n + 1) for n in segment),
        ]
        keys = [
            key(kind, n, part.part)
            for kind, n in places
            if self.needs.has_blob(kind, n, part.part)
            for key in (run_root.blob_manifest, run_root.blob)
        ]
        self.writer.delete_after(part.part, keys)


def write_gradients(
    context: StageContext,
    writer: BlobWriter,
    layer: int,
    part: SequencePart,
    delta_TH: Tensor,
    start: float,
) -> None:
    """Have one part of a layer's gradients stored.

    Args:
        context, writer, layer, part: as capture.write_activations takes them.
        delta_TH: with respect to what leaves the layer, (B S, H).
        start: by the monotonic clock; the record's seconds are counted from it.
    Raises: CalibrationError when a gradient is not finite.
    """
    mean_square = delta_TH.float().square().sum(1).mean()
    if not bool(mean_square < float("inf")):
        raise CalibrationError(
            f"layer {layer}, part {part.part}: the gradients are not finite; is the source corrupt?"
        )
    writer.submit(
        Blob(
            record=GradientPart,
            kind="gradients",
            layer=layer,
            part=part.part,
            columns=to_columns("delta", delta_TH, context.plan.config.calibration.stored_bits),
            seconds=round(time.monotonic() - start, 3),
            values={"mean_square": mean_square},
        )
    )
