"""Rows of values, one a token, as columns of a part (calibration.stored_bits): bf16, or int8 codes
with their scales.

And rooms for rows that a unit takes out of parts: in memory, in a file of the node, on a GPU. Parts
are mapped, so only those rows are read.

Legend: T tokens, H values of a token, G blocks of a row (H/16), R rows that are taken.
"""

import logging
import mmap
import os
import tempfile
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

    def copy_rows(self, source: Tensor, rows_R: Tensor) -> Tensor:
        """A copy of some rows of a tensor on the CPU; complete once the room is synchronized."""

    def synchronize(self) -> None:
        """Wait until all copies are complete."""


class HostRoom:
    """Memory of this process, as rows come."""

    def copy_rows(self, source: Tensor, rows_R: Tensor) -> Tensor:
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

    def copy_rows(self, source: Tensor, rows_R: Tensor) -> Tensor:
        shape = (len(rows_R), *source.shape[1:])
        if not len(rows_R):
            return source.new_empty(shape)
        start = -(-self.end // self.ALIGNMENT) * self.ALIGNMENT
        count = len(rows_R) * (source.numel() // len(source))
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

    def copy_rows(self, source: Tensor, rows_R: Tensor) -> Tensor:
        shape = (len(rows_R), *source.shape[1:])
        num_bytes = len(rows_R) * (source.nbytes // max(1, len(source)))
        start = -(-self.end // self.ALIGNMENT) * self.ALIGNMENT
        self.end = start + num_bytes
        out = self.data[start : self.end].view(source.dtype).view(shape)
        self.staging.gather(source, rows_R, out)
        return out

    def synchronize(self) -> None:
        self.staging.synchronize()


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
