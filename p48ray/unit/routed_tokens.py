"""The tokens that a unit's experts see, gathered once and kept as stored, and a sample of all of
their layer's.

Legend: T tokens, K experts a token, E (token, expert) pairs, R those of one expert, H hidden size.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from p48ray.estimate.memory import part_tokens, routed_token_bytes, row_bytes, token_room_bytes
from p48ray.numerics.activation import quantize_activations
from p48ray.numerics.token_rows import TokenRows
from p48ray.run.manifest import LayerScales
from p48ray.run.plan import WorkUnit
from p48ray.unit.context import StageContext
from p48ray.unit.token_columns import (
    DeviceRoom,
    HostRoom,
    Room,
    RoomsInOrder,
    of_columns,
    reserve_spill,
)

# tokens of the whole layer that stand in for what an expert saw too little of
LAYER_SAMPLE_TOKENS = 8192
# Routed tokens kept in a worker's memory, those of units read ahead included (a unit of Kimi-K2.5,
# 2.1 M tokens in all: 10 GB in bf16, 5.6 GB in int8); what passes a unit's share is in a file of
# the node.
GATHERED_BYTES = 16 * 10**9


class StoredSlice(NamedTuple):
    """One expert's tokens in one part, as stored, with router weights; delta with gradients."""

    position: int
    x: TokenRows
    router_T: Tensor
    delta: TokenRows | None


class RoutedSlice(NamedTuple):
    """The same, decoded."""

    position: int
    x_TH: Tensor
    router_T: Tensor
    delta_TH: Tensor | None


class LayerRows(NamedTuple):
    """Some tokens of one part, as stored, whatever experts they went to."""

    x: TokenRows
    router_TK: Tensor
    delta: TokenRows | None


class LayerSample(NamedTuple):
    """Tokens of the whole layer. router_T: root mean square of a token's router weights."""

    x_TH: Tensor
    router_T: Tensor
    delta_TH: Tensor | None


class RoutedTokens:
    """The tokens of a unit's experts, in the plan's order, and a sample of the whole layer's.

    One pass over the layer's parts takes both. The tokens are kept as stored: on a GPU as long as
    they fit there (memory.token_room_bytes), then in memory, and what passes the unit's share of
    GATHERED_BYTES in a mapped file of this node. `gathered` is None where its disk has no room:
    then every pass reads the layer's parts again."""

    def __init__(self, context: StageContext, unit: WorkUnit, scales: LayerScales) -> None:
        self.context, self.unit, self.scales = context, unit, scales
        self.settings = context.plan.config.compression
        num_tokens = sum(scales.tokens_per_expert[e] for e in unit.experts)
        expected = num_tokens * routed_token_bytes(context.layout.hidden_size, context.plan.config)
        num_tensors = 5 * unit.num_experts * len(context.plan.parts)
        found = self.room(expected, num_tensors)
        room = found or HostRoom()
        self.gathered: list[StoredSlice] | None = None if found is None else []
        self.sampled: list[LayerRows] = []
        share = -(-LAYER_SAMPLE_TOKENS // len(context.plan.parts))
        for part in context.activation_parts(unit.layer):
            num_tokens = len(part["hidden"])
            some = torch.arange(0, num_tokens, max(1, num_tokens // share))[:share]
            delta = of_columns(part, "delta").pick(some) if self.settings.output_curvature else None
            self.sampled.append(
                LayerRows(
                    of_columns(part, "hidden").pick(some), part["router_weights"][some], delta
                )
            )
            if self.gathered is not None:
                self.gathered += self.routed(part, room)
        room.synchronize()

    def room(self, num_bytes: int, num_tensors: int) -> Room | None:
        """Where to keep so many bytes; None where there is no place for them.

        A tensor lies in one room, so less than the largest one is left empty in each but the last.
        """
        context, plan = self.context, self.context.plan
        largest = part_tokens(plan) * row_bytes(
            context.layout.hidden_size, plan.config.calibration.stored_bits
        )
        rooms: list[Room] = []
        if context.device.type == "cuda":
            memory = torch.cuda.get_device_properties(context.device).total_memory
            there = min(num_bytes, token_room_bytes(plan, context.layout, memory))
            rooms.append(DeviceRoom(there, num_tensors, context.device))
            if there == num_bytes:
                return rooms[0]
            num_bytes += largest - there
        share = GATHERED_BYTES // (1 + plan.config.run.prefetch_units)
        if num_bytes <= share:
            return RoomsInOrder([*rooms, HostRoom()])
        if share:
            rooms.append(HostRoom(share))
            num_bytes += largest - share
        folder = None if context.cache is None else context.cache.folder
        spill = reserve_spill(num_bytes, num_tensors, folder)
        return None if spill is None else RoomsInOrder([*rooms, spill])

    @cached_property
    def sample(self) -> LayerSample:
        """The layer's sample on the context's device."""
        device = self.context.device
        x_TH = torch.cat([rows.x.decoded(device) for rows in self.sampled])
        router_TK = torch.cat([rows.router_TK.to(device) for rows in self.sampled])
        deltas = [rows.delta.decoded(device) for rows in self.sampled if rows.delta is not None]
        return LayerSample(
            x_TH, router_TK.square().mean(1).sqrt(), torch.cat(deltas) if deltas else None
        )

    def routed(self, part: dict[str, Tensor], room: Room) -> Iterator[StoredSlice]:
        """Slices of a part, one for every expert with tokens in it; only their rows are read."""
        hidden = of_columns(part, "hidden")
        delta = of_columns(part, "delta") if self.settings.output_curvature else None
        ids_TK, router_E = part["expert_ids"], part["router_weights"].reshape(-1)
        first, last = self.unit.experts[0], self.unit.experts[-1]
        # of the unit's experts, row by row
        places_E = torch.nonzero(((ids_TK >= first) & (ids_TK <= last)).reshape(-1)).reshape(-1)
        experts_E = ids_TK.reshape(-1)[places_E]
        for n, expert in enumerate(self.unit.experts):
            own_R = places_E[experts_E == expert]
            if len(own_R):
                taken = partial(copy_rows_to, room, own_R // ids_TK.shape[1])
                yield StoredSlice(
                    n,
                    hidden.mapped(taken),
                    room.copy_rows(router_E, own_R),
                    None if delta is None else delta.mapped(taken),
                )

    def stored(self) -> Iterator[StoredSlice]:
        """As `routed`, over all parts; the same order every time."""
        if self.gathered is not None:
            yield from self.gathered
            return
        for part in self.context.activation_parts(self.unit.layer):
            yield from self.routed(part, HostRoom())

    def __iter__(self) -> Iterator[RoutedSlice]:
        """The same, in float32 on the context's device."""
        device = self.context.device
        for s in self.stored():
            yield RoutedSlice(
                s.position,
                s.x.decoded(device),
                s.router_T.to(device),
                None if s.delta is None else s.delta.decoded(device),
            )

    def exact_scale(self, global_scale: float) -> float:
        """The factor under which `quantized` values are exact in bf16 (SecondMoment.add_)."""
        return global_scale if self.settings.activation_quantization else 1.0

    def quantized(self, values: Tensor, global_scale: float) -> Tensor:
        """Values as the kernel sees them: quantized if compression.activation_quantization."""
        if not self.settings.activation_quantization:
            return values
        return quantize_activations(values, global_scale, self.settings.activation_group)


def copy_rows_to(room: Room, rows_R: Tensor, source: Tensor) -> Tensor:
    return room.copy_rows(source, rows_R)
