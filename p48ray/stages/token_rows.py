"""Rows of values, one a token, as columns of a part (calibration.stored_bits): bf16, or int8 codes with their scales; and room for them in a file of a node."""

import logging
import mmap
import os
import tempfile

import torch
from torch import Tensor

from p48ray.numerics import block_int8
from p48ray.numerics.token_rows import TokenRows

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


class Spill:
    """Room for tensors in an unnamed file of this node, mapped: they are written once, and the kernel keeps of them in memory what there is room for."""

    ALIGNMENT = 64

    def __init__(self, num_bytes: int, folder: str | os.PathLike[str] | None) -> None:
        """Args: num_bytes: of all tensors. folder: where; None: the system's for temporary files. Raises: OSError when the disk has no room."""
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full disk is an error here, and a killed process later
            self.data = mmap.mmap(file.fileno(), num_bytes)
        self.end = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in the file."""
        start = -(-self.end // self.ALIGNMENT) * self.ALIGNMENT
        self.end = start + tensor.nbytes
        copy = torch.frombuffer(self.data, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        return copy.copy_(tensor)


class DeviceRoom:
    """Room for tensors on a GPU, filled beside what is computed there, by a stream of its own."""

    ALIGNMENT = 256

    def __init__(self, num_bytes: int, num_tensors: int, device: torch.device) -> None:
        self.data = torch.empty(num_bytes + num_tensors * self.ALIGNMENT, dtype=torch.uint8, device=device)
        self.stream, self.end = torch.cuda.Stream(device), 0
        self.stream.wait_stream(torch.cuda.default_stream(device))  # which may still use what lay there before

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in the room; complete once the room is settled."""
        start = -(-self.end // self.ALIGNMENT) * self.ALIGNMENT
        self.end = start + tensor.nbytes
        with torch.cuda.stream(self.stream):
            return self.data[start : self.end].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def settle(self) -> None:
        """Wait until all copies are complete."""
        self.stream.synchronize()


def reserve(num_bytes: int, num_tensors: int, folder: str | os.PathLike[str] | None) -> Spill | None:
    """A spill for so many bytes in so many tensors; None, and a warning, where the disk has no room for it."""
    try:
        return Spill(num_bytes + num_tensors * Spill.ALIGNMENT, folder)
    except OSError as error:
        log.warning(
            "%s: no room for %d bytes of tokens (%s); every pass over them reads their parts again", folder, num_bytes, error.strerror
        )
        return None
