"""Pinned memory between a GPU and what is stored: a few pieces that are filled and emptied in turn,
so that large tensors pass without lying in host memory.

    GPU ──copy──▶ [piece 1][piece 2][piece 3] ──hash, write──▶ store
        the next pieces are copied while one is written
    mapped file ──gather──▶ [piece 1][piece 2][piece 3] ──copy──▶ GPU
        the next one is gathered while one is copied

One thread uses a Staging at a time.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from p48ray import trace
from p48ray.model.pinned_pages import PinnedPages

PIECE_BYTES = 32 * 2**20
PIECES = 3
"""PIECE_BYTES each of pinned host memory, for every thread that writes or gathers."""


class Staging:
    """PIECES of pinned memory, a stream of their own, and for each piece the end of the last copy
    that touched it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.rooms = [
            torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(PIECES)
        ]
        self.copied = [torch.cuda.Event() for _ in range(PIECES)]

    def pieces(self, tensor: Tensor, ready: torch.cuda.Event) -> Iterator[memoryview]:
        """The bytes of a contiguous tensor on the GPU, piece by piece. ready: when the tensor is
        what it is to be.

        The tensor must not change until the last piece was asked for.
        """
        flat = tensor.reshape(-1).view(torch.uint8)
        self.stream.wait_event(ready)
        spans = [
            (start, min(start + PIECE_BYTES, len(flat)))
            for start in range(0, len(flat), PIECE_BYTES)
        ]
        for n in range(min(PIECES - 1, len(spans))):
            self.copy_piece(flat, spans, n)
        for n, (start, end) in enumerate(spans):
            with trace.span("copy", end - start):
                self.copied[n % PIECES].synchronize()
            # into the room that was handed out before this one, whose bytes nobody looks at any
            # more
            if n + PIECES - 1 < len(spans):
                self.copy_piece(flat, spans, n + PIECES - 1)
            yield self.rooms[n % PIECES][: end - start].numpy().data

    def copy_piece(self, flat: Tensor, spans: list[tuple[int, int]], n: int) -> None:
        start, end = spans[n]
        with torch.cuda.stream(self.stream):
            self.rooms[n % PIECES][: end - start].copy_(flat[start:end], non_blocking=True)
            self.copied[n % PIECES].record(self.stream)

    def gather(self, source: Tensor, rows: Tensor, out: Tensor) -> None:
        """Rows of a tensor on the CPU into a tensor on the GPU, whose copies are complete once
        `synchronize` was called.

        Args:
            source: (T, ...) contiguous.
            rows: (R,) int64 on the CPU.
            out: (R, ...) contiguous, of the source's type.
        """
        row_bytes = max(1, source.nbytes // max(1, len(source)))
        step = max(1, PIECE_BYTES // row_bytes)
        for n, first in enumerate(range(0, len(rows), step)):
            some, event = rows[first : first + step], self.copied[n % PIECES]
            event.synchronize()
            room = (
                self.rooms[n % PIECES][: len(some) * row_bytes]
                .view(source.dtype)
                .view(len(some), *source.shape[1:])
            )
            with trace.span("gather", room.nbytes):
                torch.index_select(source, 0, some, out=room)
            with torch.cuda.stream(self.stream):
                out[first : first + step].copy_(room, non_blocking=True)
                event.record(self.stream)
        self.wait_for_copies()

    def wait_for_copies(self) -> None:
        """The next tensor starts with the first room again: its copy must have ended by then."""
        for event in self.copied:
            event.synchronize()

    def synchronize(self) -> None:
        """Wait until all copies are complete."""
        self.stream.synchronize()


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of a mapped file on a device. A GPU copies from the file's own pages, which are
    pinned meanwhile."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    found = {
        name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in tensors.items()
    }
    with (
        PinnedPages(tensors.values(), device) as pages,
        trace.span("copy", sum(t.nbytes for t in tensors.values())),
    ):
        for name, tensor in tensors.items():
            pages.copy_(found[name], tensor)
        torch.cuda.current_stream(device).synchronize()
    return found
