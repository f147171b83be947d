"""Capture: the forward pass. Layers are streamed one at a time, straight from the source's packed
experts.

A capture task owns some parts of the calibration sequences and carries their residual stream up the
layers. Everything it writes is named by layer and part, so a task that died is repeated from the
last boundary of each of its parts, by whoever takes it, to the same bytes. What the experts see is
written here only if there is no backward pass, which runs every layer again (run.passes).

Legend: N calibration sequences, B those of a part, S positions, T = B S tokens, H hidden size, K
experts a token.
"""

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from p48ray.errors import CalibrationError
from p48ray.model.decoder import Decoder, attend, mix
from p48ray.model.expert_loader import check_layer
from p48ray.model.experts import RoutedInputs
from p48ray.numerics.headroom import count_bins, group_amax
from p48ray.run import run_root
from p48ray.run.manifest import ActivationPart, BoundaryPart
from p48ray.run.needs import Needs, read_needs
from p48ray.run.plan import RunPlan, SequencePart
from p48ray.run.run_root import BlobKind
from p48ray.stages.blobs import Blob, BlobWriter
from p48ray.stages.streaming import opened_layer, waves
from p48ray.unit.context import StageContext
from p48ray.unit.token_columns import to_columns


@torch.no_grad()
def capture_parts(context: StageContext, parts: Sequence[int]) -> list[ActivationPart]:
    """Run the given parts up the layers, writing what is missing of what the plan wants of this
    pass. Returns the manifests of activations."""
    plan = context.plan
    decoder = context.decoder()
    needs = read_needs(plan, context.store)
    ways = {p: needs.forward_layers(p) for p in parts}
    wanted = {p: needs.activation_layers(p) if plan.passes.sees_forth else [] for p in parts}
    positions = decoder.positions(plan.config.calibration.sequence_length)
    micro_batch = plan.config.calibration.sequences_per_micro_batch
    with BlobWriter(context) as writer:
        stream = ResidualStream(context, decoder, needs, writer)
        for number in range(plan.passes.num_up):
            waiting = [plan.parts[p] for p in parts if number in ways[p]]
            if not waiting:
                continue
            seen: list[RoutedInputs] = []
            is_watched = any(number in wanted[part.part] for part in waiting)
            observe = seen.append if is_watched else None
            with opened_layer(context, decoder, number, observe) as layer:
                if any(number + 1 in ways[part.part] for part in waiting):
                    decoder.prefetch(number + 1)
                for wave in waves(plan, waiting):
                    start = time.monotonic()
                    seen.clear()
                    leaving = mix(
                        layer,
                        [
                            attend(layer, stream.take(number, part), positions, micro_batch)
                            for part in wave
                        ],
                    )
                    share = (time.monotonic() - start) / len(wave)
                    for part in wave:
                        start = time.monotonic() - share
                        x_BSH = leaving.pop(0)
                        check_finite(decoder, plan, number, part, x_BSH)
                        stream.put(number + 1, part, x_BSH, start)
                        observed = seen.pop(0) if seen else None
                        if number in wanted[part.part]:
                            assert observed is not None
                            write_activations(context, writer, number, part, observed, start)
                        stream.delete_boundary(number, part)
            del layer  # it goes before the one above is read
        return [manifest for manifest in writer.drain() if isinstance(manifest, ActivationPart)]


def check_finite(
    decoder: Decoder, plan: RunPlan, number: int, part: SequencePart, x_BSH: Tensor
) -> None:
    """Look at what leaves a layer.

    Args:
        decoder: that ran the layer; reads its experts again where something is wrong.
        plan: of the run.
        number: the layer's.
        part: that x_BSH belongs to.
        x_BSH: what leaves the layer.
    Raises: SourceError naming the tensor at fault, where one is; else CalibrationError.
    """
    if not bool(torch.isfinite(x_BSH).all()):
        if number in plan.source.moe_layers:
            check_layer(decoder, number)
        raise CalibrationError(
            f"layer {number}, part {part.part}: the model's own activations are not finite; is the"
            " source corrupt?"
        )


class ResidualStream:
    """The residual stream of some parts: in memory between layers, in the run root at every
    boundary."""

    kind: BlobKind = "residuals"

    def __init__(
        self, context: StageContext, decoder: Decoder, needs: Needs, writer: BlobWriter
    ) -> None:
        """Nothing is held yet.

        Args:
            context: of the run.
            decoder: embeds the parts that start at layer 0.
            needs: say which boundaries are there, and which the backward pass reads.
            writer: stores and deletes boundaries; the caller's, who closes it.
        """
        self.context, self.decoder, self.needs, self.writer = context, decoder, needs, writer
        self.held: dict[int, tuple[int, Tensor]] = {}  # part -> (layer it enters, values)
        self.below: dict[int, set[int]] = {}  # part -> the stored boundary that was passed last
        # part -> seconds since then
        self.spent: Counter[int] = Counter()

    def take(self, number: int, part: SequencePart) -> Tensor:
        """What enters layer `number`, (B, S, H)."""
        layer, x_BSH = self.held.pop(part.part, (None, None))
        if layer == number and x_BSH is not None:
            return x_BSH
        if number == 0:
            return self.decoder.embed(self.token_ids(part))
        self.below[part.part] = {number}
        x_TH = self.context.boundary(self.kind, number, part.part)
        return x_TH.reshape(part.num_sequences, -1, x_TH.shape[-1])

    def put(self, number: int, part: SequencePart, x_BSH: Tensor, start: float) -> None:
        """Keep what enters layer `number`; in the run root too where a later stage or a resume may
        start from it.

        Args:
            number: of the layer that is entered.
            part: that x_BSH belongs to.
            x_BSH: must not change any more.
            start: when the layer below began with this part, by the monotonic clock.
        """
        self.held[part.part] = (number, x_BSH)
        if self.is_stored(number):
            begun = start - self.spent.pop(part.part, 0.0)
            write_boundary(self.writer, self.kind, number, part, x_BSH, begun)
        else:
            self.spent[part.part] += time.monotonic() - start  # type: ignore[assignment]

    def is_stored(self, number: int) -> bool:
        return number in self.context.plan.passes.boundaries

    def delete_boundary(self, number: int, part: SequencePart) -> None:
        """Delete boundaries that neither a resume nor the backward pass will read, once the one
        above layer `number` is stored, and all that this layer leaves."""
        if self.context.plan.config.run.keep == "all" or not self.is_stored(number + 1):
            return
        for boundary in self.below.pop(part.part, set()) - self.needs.bases(part.part):
            self.delete(boundary, part)
        self.below[part.part] = {number + 1}

    def delete(self, number: int, part: SequencePart) -> None:
        keys = [
            run_root.blob_manifest(self.kind, number, part.part),
            run_root.blob(self.kind, number, part.part),
        ]
        self.writer.delete_after(part.part, keys)

    def token_ids(self, part: SequencePart) -> Tensor:
        ids_NS = self.context.tokens(run_root.TOKENS, self.context.plan.units_digest)
        return ids_NS[part.first_sequence : part.first_sequence + part.num_sequences]


def write_boundary(
    writer: BlobWriter,
    kind: BlobKind,
    number: int,
    part: SequencePart,
    values_BSH: Tensor,
    start: float,
) -> None:
    """Have what enters a layer, or the gradient with respect to it, stored: one row a token.

    Args:
        writer: that stores it.
        kind: of the stream that it belongs to.
        number: of the layer that is entered.
        part: that the values belong to.
        values_BSH: must not change any more.
        start: when the stream began with this part behind the boundary stored before, by the
            monotonic clock.
    """
    seconds = round(time.monotonic() - start, 3)
    columns = {"values": values_BSH.flatten(0, 1)}
    writer.submit(
        Blob(
            record=BoundaryPart,
            kind=kind,
            layer=number,
            part=part.part,
            columns=columns,
            seconds=seconds,
        )
    )


def write_activations(
    context: StageContext,
    writer: BlobWriter,
    layer: int,
    part: SequencePart,
    observed: RoutedInputs,
    start: float,
) -> None:
    """Have one part of what the experts of a layer saw stored.

    The largest value is that of bf16, in whatever form the part is stored.
    Args:
        context: of the run.
        writer: that stores it.
        layer: the layer's number.
        part: whose tokens they are.
        observed: all tokens of the part, in order.
        start: when this layer began with the part, by the monotonic clock.
    """
    hidden_TH = observed.hidden_TH.to(torch.bfloat16)
    columns = to_columns("hidden", observed.hidden_TH, context.plan.config.calibration.stored_bits)
    columns |= {
        "expert_ids": observed.expert_ids_TK.to(torch.int16),
        "router_weights": observed.router_weights_TK.float(),
    }
    values = {
        "amax_input": hidden_TH.abs().amax().float(),
        "amax_by_expert": observed.amax_by_expert_E,
        "input_groups": count_bins(
            group_amax(hidden_TH, context.plan.config.compression.activation_group)
        ),
        "intermediate_groups": count_bins(observed.group_amax_G),
        "tokens_per_expert": torch.bincount(
            observed.expert_ids_TK.flatten(), minlength=context.layout.num_experts
        ),
    }

    seconds = round(time.monotonic() - start, 3)
    writer.submit(
        Blob(
            record=ActivationPart,
            kind="activations",
            layer=layer,
            part=part.part,
            columns=columns,
            seconds=seconds,
            values=values,
        )
    )
