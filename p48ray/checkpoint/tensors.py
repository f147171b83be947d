"""Tensors from and to safetensors bytes, by byte range: no file is ever read whole to get at a part
of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from p48ray.checkpoint.header import TensorEntry, dtype_name, encode_header, torch_dtype
from p48ray.errors import ShardCorruptError
from p48ray.store import Store
from p48ray.store.view import read_into

MAX_GAP_BYTES = 1 * 2**20
"""Unwanted bytes between two tensors that are read along with them. A request to a bucket takes as
long as about 1 MiB of its bytes."""

MAX_READ_BYTES = 256 * 2**20
"""A merged read stops growing here: it is held in memory beside the tensors cut from it."""


def read_tensors(store: Store, entries: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """Tensors by name, in the order given. Neighbours in a file are read in one request."""
    wanted = list(entries)
    found: dict[str, Tensor] = {}
    for run in merge_ranges(wanted):
        start = run[0].start
        end = max(entry.start + entry.num_bytes for entry in run)
        data = memoryview(store.get_range(run[0].file, start, end - start))
        for entry in run:
            found[entry.name] = from_bytes(
                data[entry.start - start :][: entry.num_bytes], entry.dtype, entry.shape
            )
    return {entry.name: found[entry.name] for entry in wanted}


def read_together(store: Store, entries: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """As read_tensors, for tensors that are used and let go together: neighbours share the memory
    they were read into, without a copy."""
    wanted = list(entries)
    found: dict[str, Tensor] = {}
    for run in merge_ranges(wanted):
        start = run[0].start
        data = bytearray(max(entry.start + entry.num_bytes for entry in run) - start)
        read_into(store, run[0].file, start, memoryview(data))
        for entry in run:
            at, dtype = entry.start - start, torch_dtype(entry.dtype)
            if entry.num_bytes and at % dtype.itemsize == 0:
                count = entry.num_bytes // dtype.itemsize
                found[entry.name] = torch.frombuffer(
                    data, dtype=dtype, offset=at, count=count
                ).reshape(entry.shape)
            else:
                found[entry.name] = from_bytes(
                    memoryview(data)[at : at + entry.num_bytes], entry.dtype, entry.shape
                )
    return {entry.name: found[entry.name] for entry in wanted}


def merge_ranges(
    entries: Iterable[TensorEntry], most: int = MAX_READ_BYTES
) -> Iterator[list[TensorEntry]]:
    """Groups of tensors to read in one request each: same file, gaps up to MAX_GAP_BYTES, at most
    `most` bytes (or one tensor)."""
    run: list[TensorEntry] = []
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.file, entry.start, entry.num_bytes)):
        entry_end = entry.start + entry.num_bytes
        if run:
            is_near = entry.file == run[0].file and entry.start - end <= MAX_GAP_BYTES
            if not is_near or max(end, entry_end) - run[0].start > most:
                yield run
                run = []
        end = max(end, entry_end) if run else entry_end
        run.append(entry)
    if run:
        yield run


def from_bytes(data: bytes | memoryview, dtype: str, shape: Sequence[int]) -> Tensor:
    """A new tensor with its own memory from stored bytes; `dtype` is safetensors' name. Raises:
    ShardCorruptError if the sizes differ."""
    target = torch_dtype(dtype)
    expected_bytes = prod(shape) * target.itemsize
    if expected_bytes != len(data):
        raise ShardCorruptError(
            f"expected {expected_bytes} bytes for {dtype} {list(shape)}, found {len(data)}"
        )
    if not expected_bytes:  # frombuffer refuses an empty buffer
        return torch.empty(tuple(shape), dtype=target)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(target).reshape(tuple(shape))


def tensor_view(tensor: Tensor) -> memoryview:
    """The same bytes as tensor_bytes gives, uncopied where the tensor lies in memory as a file
    holds it."""
    view: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes that a safetensors file holds for the tensor, which may be on any device and of any
    strides."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class TensorFile:
    """A safetensors file with the tensors in the mapping's order, as `store.base.Buffers`: they are
    written from where they lie.

    Raises: P48Error for a dtype that files here do not hold.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.header = tensors, header_of(tensors)
        self.size_bytes = len(self.header) + sum(t.nbytes for t in tensors.values())

    def __iter__(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        yield from map(tensor_view, self.tensors.values())


def header_of(tensors: Mapping[str, Tensor]) -> bytes:
    """The start of that file, up to the first tensor's bytes."""
    return encode_header(
        [(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    )
