"""Pages of host memory, mapped files among them, that a GPU copies from by itself.

    tensor a        tensor b                    tensor c
    |---------------|---------------------------|-------------|
        |<------------- whole pages inside -------------->|          pinned
    ....                                                   .....
    dotted: copied by the driver through memory of its own

Only whole pages inside the range are pinned. CUDA refuses a copy of which one end is pinned and the
other is not ("invalid argument"), so a page that the range shares with something else is left
alone: a neighbour in the file, which other code copies, never touches pinned memory. Tensors of the
range that begin or end outside are copied in pieces, cut at the ends of the pages.

Source: CUDA runtime API, cudaHostRegister with cudaHostRegisterReadOnly (the mapping is read-only),
cudaMemcpyAsync.
"""

import bisect
import logging
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from p48ray import trace
from p48ray.checkpoint.tensors import MAX_GAP_BYTES

log = logging.getLogger(__name__)

PAGE_BYTES = 4096
READ_ONLY = 8  # cudaHostRegisterReadOnly


class PinnedPages:
    """Pinned for as long as the context lasts, or until `close`. Every copy from the pages must be
    complete by then.

    Where a range cannot be pinned, nothing is copied from the pages themselves: another's pinned
    range may begin anywhere in them. Tensors are then copied to memory of their own first, and the
    caller waits.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        """Args: tensors: on the CPU, contiguous; those near each other are pinned as one range."""
        self.device, self.runtime = device, torch.cuda.cudart()
        self.ranges: list[tuple[int, int]] = []
        self.is_complete = True
        with trace.span("pin"):
            for start, end in page_ranges((t.data_ptr(), t.nbytes) for t in tensors):
                self.pin(start, end)

    def pin(self, start: int, end: int) -> None:
        code = int(self.runtime.cudaHostRegister(start, end - start, READ_ONLY))
        if code == 0:
            self.ranges.append((start, end))
            return
        self.is_complete = False
        log.warning(
            "%d bytes cannot be pinned (CUDA error %d): copies to the device are slower",
            end - start,
            code,
        )
        # CUDA keeps the error for whoever asks next: that is to be nobody's kernel
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device)

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
        """Give the pages back."""
        with trace.span("pin"):
            for start, _ in self.ranges:
                self.runtime.cudaHostUnregister(start)
        self.ranges = []

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Copy a tensor into one of the same type and shape on the device, on the current stream,
        without waiting if its pages are pinned."""
        if not self.is_complete:
            target.copy_(source.clone())
            return
        from_bytes, to_bytes = (t.reshape(-1).view(torch.uint8) for t in (source, target))
        for start, end in pieces(source.data_ptr(), source.nbytes, self.ranges):
            to_bytes[start:end].copy_(from_bytes[start:end], non_blocking=True)


def pieces(address: int, num_bytes: int, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A span of memory cut wherever a pinned range begins or ends inside it: (start, end) relative
    to the address.

    Args:
        ranges: (start, end), ascending, apart from each other.
    """
    cuts = {0, num_bytes}
    for start, end in ranges[max(0, bisect.bisect_right(ranges, (address, 0)) - 1) :]:
        if start >= address + num_bytes:
            break
        cuts |= {edge - address for edge in (start, end) if 0 < edge - address < num_bytes}
    edges = sorted(cuts)
    return [(a, b) for a, b in pairwise(edges) if b > a]


def page_ranges(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(address, bytes) of tensors -> (start, end) of the whole pages inside, spans less than
    MAX_GAP_BYTES apart joined."""
    joined: list[tuple[int, int]] = []
    for start, num_bytes in sorted(spans):
        if joined and start <= joined[-1][1] + MAX_GAP_BYTES:
            joined[-1] = (joined[-1][0], max(start + num_bytes, joined[-1][1]))
        else:
            joined.append((start, start + num_bytes))
    inside = [
        (-(-start // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES)
        for start, end in joined
    ]
    return [(start, end) for start, end in inside if end > start]
