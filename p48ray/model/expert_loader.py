"""The experts of a layer, decoded whenever one is asked for; on a GPU, while one is multiplied, the next ones are on their way.

What is stored (half a byte a weight for INT4) goes from the mapped file through pinned memory to the device by threads and a stream of their own, and is
decoded there when its expert is asked for. Host memory: AHEAD + 2 packed experts, pinned. Device memory: as many again, and what the caller holds decoded.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

from p48ray.checkpoint.decode import check_expert, decode_checked, decode_expert
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.model.decoder import Decoder
from p48ray.model.experts import ExpertWeights

THREADS = 6
"""One thread copies 5 GB/s from a mapped file to pinned memory, six 15 GB/s, eight no more (docs/PERFORMANCE.md)."""

AHEAD = 8
"""Experts on their way."""

ALIGNMENT = 256


def layer_experts(decoder: Decoder, layer: int) -> Callable[[int], ExpertWeights]:
    """Experts of one layer by their number, in the decoder's dtype, on its device. Kept as stored until then, mapped where they can be.

    Raises (when called, not on a GPU: see check_layer): SourceError naming file and tensor that can not be decoded.
    """
    stored, index, layout = decoder.reader.tensors(layer), decoder.index, decoder.layout

    def weights(expert: int) -> ExpertWeights:
        linears = decode_expert(index, layout, layer, expert, stored)
        return ExpertWeights(*(linears[p].to(decoder.dtype) for p in PROJECTIONS))

    if decoder.device.type != "cuda":
        return weights

    def fetch(expert: int) -> dict[str, Tensor]:
        return {name: stored[name] for name in layout.expert_tensor_names(layer, expert)}

    def decode(expert: int, tensors: Mapping[str, Tensor]) -> ExpertWeights:
        parts = [{s: tensors[f"{layout.expert_linear_name(layer, expert, p)}.{s}"] for s in layout.expert_suffixes} for p in PROJECTIONS]
        size, hidden = layout.moe_intermediate_size, layout.hidden_size
        gate_up_ZH = torch.empty(2 * size, hidden, dtype=decoder.dtype, device=decoder.device)  # one product instead of two
        for part, out_FH in zip(parts, gate_up_ZH.split(size), strict=False):
            decode_checked(part, layout, out_FH)
        down_HF = decode_checked(parts[2], layout, torch.empty(hidden, size, dtype=decoder.dtype, device=decoder.device))
        gate_FH, up_FH = gate_up_ZH.split(size)
        return ExpertWeights(gate_FH, up_FH, down_HF)

    return ExpertLoader(layout.num_experts, fetch, decode, decoder.device)


def check_layer(decoder: Decoder, layer: int) -> None:
    """Look at every expert of a layer. A GPU's stream does not wait for this; what is not finite shows in what leaves the layer, and then this says why.

    Raises: SourceError naming file and tensor that can not be decoded.
    """
    for expert in range(decoder.layout.num_experts):
        check_expert(decoder.index, decoder.layout, layer, expert, decoder.reader.tensors(layer))


class Slot:
    """Room for one packed expert on either side. Events: the copy is complete; the device is done with it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.arrived, self.used = torch.cuda.Event(), torch.cuda.Event()


class ExpertLoader:
    """Calls `decode` with an expert's stored tensors on the device.

    Args: fetch: expert -> its tensors as stored, on the CPU; called by several threads. decode: those tensors on the device -> the expert.
          num_experts: asked for in ascending order mostly, some perhaps not at all.
    """

    def __init__(
        self,
        num_experts: int,
        fetch: Callable[[int], Mapping[str, Tensor]],
        decode: Callable[[int, Mapping[str, Tensor]], ExpertWeights],
        device: torch.device,
    ) -> None:
        self.num_experts, self.fetch, self.decode, self.device = num_experts, fetch, decode, device
        self.pending: dict[int, Future[tuple[Slot, dict[str, Tensor]]]] = {}
        self.thread = ThreadPoolExecutor(THREADS, thread_name_prefix="expert-loader")
        self.stream = torch.cuda.Stream(device)
        self.free: SimpleQueue[Slot | None] = SimpleQueue()
        for _ in range(AHEAD + 2):
            self.free.put(None)  # made when the size is known

    def __call__(self, expert: int) -> ExpertWeights:
        """Raises: what fetch raises."""
        for passed in [e for e in self.pending if e < expert or e > expert + AHEAD]:
            self.pending.pop(passed).add_done_callback(self.give_back)
        for coming in range(expert, min(expert + AHEAD + 1, self.num_experts)):
            if coming not in self.pending:
                self.pending[coming] = self.thread.submit(self.bring, coming)
        slot, tensors = self.pending.pop(expert).result()
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(slot.arrived)
        decoded = self.decode(expert, tensors)
        slot.used.record(stream)
        self.free.put(slot)
        return decoded

    def bring(self, expert: int) -> tuple[Slot, dict[str, Tensor]]:
        """Start one expert on its way to the device."""
        stored = self.fetch(expert)
        places, size = lay_out(stored)
        slot = self.free.get()
        if slot is None or len(slot.host) < size:
            slot = Slot(size, self.device)
        slot.arrived.synchronize()
        host = slot.host.numpy()  # whose copies are one thread's each: torch's would start a team of threads for every one of these
        for name, tensor in stored.items():
            host[places[name] :][: tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(slot.used)
            slot.device[:size].copy_(slot.host[:size], non_blocking=True)
            slot.arrived.record(self.stream)
        return slot, {
            name: slot.device[places[name] :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for name, tensor in stored.items()
        }

    def give_back(self, passed: "Future[tuple[Slot, dict[str, Tensor]]]") -> None:
        """The slot of an expert that nobody asked for."""
        self.free.put(None if passed.exception() else passed.result()[0])


def lay_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """A place for each tensor in one buffer, aligned, and the buffer's size."""
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end
