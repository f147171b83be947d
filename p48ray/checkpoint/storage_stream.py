"""One unit of compressed experts from one storage to the other while a file is streamed: for
whoever stitches, converts, verifies, evaluates or publishes.

A unit is held in memory once in each storage, and no more of a checkpoint than that. What it is
held against is always the SHA-256 of its dense form as a shard of its own, because that is what was
verified.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from p48ray import trace
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.sparse_storage import Storage, dense_tensors, sparse_tensors
from p48ray.checkpoint.tensors import header_of, read_tensors, tensor_bytes, tensor_view
from p48ray.errors import ShardCorruptError, SourceError
from p48ray.store.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUnit:
    """A unit's tensors where they lie, in its order, all in one file. sha256: of its dense form, as
    a shard of its own; named_in: what says so."""

    id: str
    sha256: str
    named_in: str
    store: Store
    entries: tuple[TensorEntry, ...]

    @property
    def file(self) -> str:
        return self.entries[0].file


def recoded_unit(unit: StoredUnit, to: Storage) -> Iterator[bytes]:
    """The bytes of a unit's tensors in the other storage, in its order.

    Raises: SourceError, naming the tensor, for what sparse storage can not hold; ShardCorruptError
        for bytes that are not those that were verified. Both before the first byte is given out.
    """
    stored = read_tensors(unit.store, unit.entries)
    recoded = sparse_tensors(stored) if to == "sparse" else dense_tensors(stored)
    found = dense_sha256(stored if to == "sparse" else recoded)
    if found != unit.sha256:
        raise ShardCorruptError(
            f"{unit.store.uri}/{unit.file}: unit {unit.id}: expected the bytes with SHA-256"
            f" {unit.sha256} that {unit.named_in} names, found {found}"
        )
    for tensor in recoded.values():
        yield tensor_bytes(tensor)


def decoded_unit(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A unit's sparse tensors in dense storage, in its order.

    Raises: SourceError, naming what is wrong, for bytes that no conversion writes: a mask that is
        none, or one over other zero bytes than the lowest, which would decode to the same weights.
    """
    dense = dense_tensors(stored)
    again = sparse_tensors(dense)
    if header_of(again) != header_of(stored) or any(
        not is_same_bytes(again[name], tensor) for name, tensor in stored.items()
    ):
        raise SourceError("a mask marks other zero bytes as kept than the lowest")
    return dense


def is_same_bytes(one: Tensor, other: Tensor) -> bool:
    """Of one dtype and shape; compared where they are, and never as numbers."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def dense_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of dense tensors, on any device, as a unit's own shard holds them."""
    digest = hashlib.sha256(header_of(tensors))
    for tensor in tensors.values():
        with trace.span("hash", tensor.nbytes):
            digest.update(tensor_view(tensor))
    return digest.hexdigest()
