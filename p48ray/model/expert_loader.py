"""The experts of a layer, decoded whenever one is asked for; on a GPU, while one is multiplied, the
next ones are on their way.

What is stored (half a byte a weight for INT4) stays where the file is mapped: its pages are pinned
for as long as the layer is open (model.pinned_pages), a stream of its own copies the next experts
from them, and an expert is decoded on the device when it is asked for. Device memory: EXPERTS_AHEAD
+ 1 packed experts, and what the caller holds decoded.

Legend: H hidden size, F expert intermediate size, Z = 2 F (gate's rows, then up's).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from p48ray.checkpoint.decode import check_expert, decode_checked, decode_expert
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.model.decoder import Decoder
from p48ray.model.experts import ExpertWeights
from p48ray.model.pinned_pages import PinnedPages

EXPERTS_AHEAD = 8
"""Experts on their way."""

GPU_ALIGNMENT = 256


@contextmanager
def layer_experts(decoder: Decoder, layer: int) -> Iterator[Callable[[int], ExpertWeights]]:
    """Experts of one layer by their number, in the decoder's dtype, on its device, for as long as
    the context lasts.

    They are kept as stored until one is asked for, mapped where they can be. Raises (when called,
    not on a GPU: see check_layer): SourceError naming file and tensor that can not be decoded.
    """
    stored, index, layout = decoder.reader.tensors(layer), decoder.index, decoder.layout

    def weights(expert: int) -> ExpertWeights:
        linears = decode_expert(index, layout, layer, expert, stored)
        return ExpertWeights(*(linears[p].to(decoder.dtype) for p in PROJECTIONS))

    if decoder.device.type != "cuda":
        yield weights
        return

    def stored_expert(expert: int) -> dict[str, Tensor]:
        return {name: stored[name] for name in layout.expert_tensor_names(layer, expert)}

    def decode(expert: int, tensors: Mapping[str, Tensor]) -> ExpertWeights:
        parts = [
            {
                s: tensors[f"{layout.expert_linear_name(layer, expert, p)}.{s}"]
                for s in layout.expert_suffixes
            }
            for p in PROJECTIONS
        ]
        size, hidden = layout.moe_intermediate_size, layout.hidden_size
        # one product instead of two
        gate_up_ZH = torch.empty(2 * size, hidden, dtype=decoder.dtype, device=decoder.device)
        for part, out_FH in zip(parts, gate_up_ZH.split(size), strict=False):
            decode_checked(part, layout, out_FH)
        down_HF = decode_checked(
            parts[2], layout, torch.empty(hidden, size, dtype=decoder.dtype, device=decoder.device)
        )
        gate_FH, up_FH = gate_up_ZH.split(size)
        return ExpertWeights(gate_FH, up_FH, down_HF)

    with ExpertLoader(layout.num_experts, stored_expert, decode, decoder.device) as loader:
        yield loader


def check_layer(decoder: Decoder, layer: int) -> None:
    """Look at every expert of a layer. A GPU's stream does not wait for this; what is not finite
    shows in what leaves the layer, and then this says why.

    Raises: SourceError naming file and tensor that can not be decoded.
    """
    for expert in range(decoder.layout.num_experts):
        check_expert(decoder.index, decoder.layout, layer, expert, decoder.reader.tensors(layer))


class Slot:
    """Room for one packed expert on the device. Events: the copy is complete; the device is done
    with it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.room = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.arrived, self.used = torch.cuda.Event(), torch.cuda.Event()


class ExpertLoader:
    """Calls `decode` with an expert's stored tensors on the device. As a context: at its end the
    stored pages are given back."""

    def __init__(
        self,
        num_experts: int,
        stored: Callable[[int], Mapping[str, Tensor]],
        decode: Callable[[int, Mapping[str, Tensor]], ExpertWeights],
        device: torch.device,
    ) -> None:
        """Pins what is stored; nothing is copied yet.

        Args:
            num_experts: asked for in ascending order mostly, some perhaps not at all.
            stored: expert -> its tensors as stored, on the CPU.
            decode: an expert and those tensors on the device -> its weights.
            device: a GPU.
        """
        self.num_experts, self.stored, self.decode, self.device = (
            num_experts,
            stored,
            decode,
            device,
        )
        self.coming: dict[int, tuple[Slot, dict[str, Tensor]]] = {}
        self.free: list[Slot] = []
        self.stream = torch.cuda.Stream(device)
        self.pages = PinnedPages(
            (t for expert in range(num_experts) for t in stored(expert).values()), device
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the pages back, once nothing is on its way from them."""
        self.stream.synchronize()
        self.pages.close()

    def __call__(self, expert: int) -> ExpertWeights:
        for passed in [e for e in self.coming if e < expert or e > expert + EXPERTS_AHEAD]:
            self.free.append(self.coming.pop(passed)[0])
        for wanted in range(expert, min(expert + EXPERTS_AHEAD + 1, self.num_experts)):
            if wanted not in self.coming:
                self.coming[wanted] = self.bring(wanted)
        slot, tensors = self.coming.pop(expert)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(slot.arrived)
        decoded = self.decode(expert, tensors)
        slot.used.record(stream)
        self.free.append(slot)
        return decoded

    def bring(self, expert: int) -> tuple[Slot, dict[str, Tensor]]:
        """Send one expert on its way to the device."""
        stored = self.stored(expert)
        places, size = lay_out(stored)
        slot = self.free.pop(0) if self.free else Slot(size, self.device)
        if len(slot.room) < size:
            slot = Slot(size, self.device)
        views = {
            n: slot.room[places[n] :][: t.nbytes].view(t.dtype).view(t.shape)
            for n, t in stored.items()
        }
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(slot.used)  # by the decoding of what was there before
            for name, tensor in stored.items():
                self.pages.copy_(views[name], tensor)
            slot.arrived.record(self.stream)
        return slot, views


def lay_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """A place for each tensor in one buffer, aligned, and the buffer's size."""
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = end
        end += -(-tensor.nbytes // GPU_ALIGNMENT) * GPU_ALIGNMENT
    return places, end
