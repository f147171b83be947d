"""Rows of values, one a token, as columns of a part (calibration.stored_bits): bf16, or int8 codes
with their scales.

And rooms for rows that a unit takes out of parts: on a GPU, in memory, in a file of the node, or in
several of these, filled in order. Parts are mapped, so only those rows are read.

Legend: T tokens, H values of a token, G blocks of a row (H/16), R rows that are taken.
"""

import logging
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from p48ray.numerics import block_int8
from p48ray.numerics.token_rows import TokenRows
from p48ray.unit.staging import Staging

log = logging.getLogger(__name__)

SCALE_SUFFIX = "_scale"


def to_columns(name: str, values_TH: Tensor, bits: int) -> dict[str, Tensor]:
    """The columns of a part that hold these values.

    Raises: NumericsError for values that are not finite, where they are stored in 8 bits.
    """
    if bits == 16:
        return {name: values_TH.to(torch.bfloat16)}
    codes_TH, scale_TG = block_int8.encode(values_TH)
    return {name: codes_TH, name + SCALE_SUFFIX: scale_TG}


def of_columns(part: dict[str, Tensor], name: str) -> TokenRows:
    """Inverse of `to_columns`, as stored."""
    return TokenRows(part[name], part.get(name + SCALE_SUFFIX))


class Room(Protocol):
    """Where rows go that are taken out of a part."""

    def fits(self, num_bytes: int) -> bool:
        """Whether there is space left for a tensor of so many bytes."""

    def copy_rows(self, source: Tensor, rows_R: Tensor) -> Tensor:
        """A copy of some rows of a tensor on the CPU; complete once the room is synchronized."""

    def synchronize(self) -> None:
        """Wait until all copies are complete."""


def taken_bytes(source: Tensor, rows_R: Tensor) -> int:
    """Of so many rows of a tensor."""
    return len(rows_R) * (source.nbytes // max(1, len(source)))


class HostRoom:
    """Memory of this process, as rows come. left_bytes: as long as there are so many; None for all
    that comes."""

    def __init__(self, left_bytes: int | None = None) -> None:
        self.left_bytes = left_bytes

    def fits(self, num_bytes: int) -> bool:
        return self.left_bytes is None or num_bytes <= self.left_bytes

    def copy_rows(self, source: Tensor, rows_R: Tensor) -> Tensor:
        if self.left_bytes is not None:
            self.left_bytes -= taken_bytes(source, rows_R)
        return source.index_select(0, rows_R)

    def synchronize(self) -> None:
        pass


class Spill:
    """Room for tensors in an unnamed file of this node, mapped: they are written once, and the
    kernel keeps of them in memory what there is room for."""

    ALIGNMENT = 64

    def __init__(self, num_bytes: int, folder: str | os.PathLike[str] | None) -> None:
        """Reserve the room.

        Args:
            num_bytes: of all tensors.
            folder: where; None: the system's for temporary files.
        Raises: OSError when the disk has no room.
        """
        with tempfile.TemporaryFile(dir=folder) as file:
            # a full disk is an error here, and a killed process later
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            self.data = mmap.mmap(file.fileno(), num_bytes)
        self.end = 0

    @property
    def start(self) -> int:
        """Of the next tensor."""
        return -(-self.end // self.ALIGNMENT) * self.ALIGNMENT

    def fits(self, num_bytes: int) -> bool:
        return self.start + num_bytes <= len(self.data)

    def copy_rows(self, source: Tensor, rows_R: Tensor) -> Tensor:
        shape = (len(rows_R), *source.shape[1:])
        if not len(rows_R):
            return source.new_empty(shape)
        start, count = self.start, len(rows_R) * (source.numel() // len(source))
        self.end = start + count * source.itemsize
        copy = torch.frombuffer(self.data, dtype=source.dtype, count=count, offset=start).view(
            shape
        )
        return torch.index_select(source, 0, rows_R, out=copy)

    def synchronize(self) -> None:
        pass


class DeviceRoom:
    """Room for tensors on a GPU, filled beside what is computed there, through pinned memory and by
    a stream of its own."""

    ALIGNMENT = 256

    def __init__(self, num_bytes: int, num_tensors: int, device: torch.device) -> None:
        self.data = torch.empty(
            num_bytes + num_tensors * self.ALIGNMENT, dtype=torch.uint8, device=device
        )
        self.staging, self.end = Staging(device), 0
        # which may still use what lay there before
        self.staging.stream.wait_stream(torch.cuda.default_stream(device))

    @property
    def start(self) -> int:
        """Of the next tensor."""
        return -(-self.end // self.ALIGNMENT) * self.ALIGNMENT

    def fits(self, num_bytes: int) -> bool:
        return self.start + num_bytes <= len(self.data)

    def copy_rows(self, source: Tensor, rows_R: Tensor) -> Tensor:
        shape, start = (len(rows_R), *source.shape[1:]), self.start
        self.end = start + taken_bytes(source, rows_R)
        out = self.data[start : self.end].view(source.dtype).view(shape)
        self.staging.gather(source, rows_R, out)
        return out

    def synchronize(self) -> None:
        self.staging.synchronize()


class RoomsInOrder:
    """Rooms of which each tensor takes the first that has space left for it. So whoever passes over
    them again and again finds most in the fastest."""

    def __init__(self, rooms: Sequence[Room]) -> None:
        self.rooms = rooms

    def fits(self, num_bytes: int) -> bool:
        return any(room.fits(num_bytes) for room in self.rooms)

    def copy_rows(self, source: Tensor, rows_R: Tensor) -> Tensor:
        num_bytes = taken_bytes(source, rows_R)
        return next(r for r in self.rooms if r.fits(num_bytes)).copy_rows(source, rows_R)

    def synchronize(self) -> None:
        for room in self.rooms:
            room.synchronize()


def reserve_spill(
    num_bytes: int, num_tensors: int, folder: str | os.PathLike[str] | None
) -> Spill | None:
    """A spill for so many bytes in so many tensors; None, and a warning, where the disk has no room
    for it."""
    try:
        return Spill(num_bytes + num_tensors * Spill.ALIGNMENT, folder)
    except OSError as error:
        log.warning(
            "%s: no room for %d bytes of tokens (%s); every pass over them reads their parts again",
            folder,
            num_bytes,
            error.strerror,
        )
        return None
