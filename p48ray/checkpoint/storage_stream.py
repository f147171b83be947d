"""One unit of compressed experts from one form to another while a file is streamed: for whoever
stitches, converts, verifies, evaluates or publishes.

A unit is held in memory once in each form, and no more of a checkpoint than that. What it is
held against is always the SHA-256 of its dense form as a shard of its own, because that is what was
verified.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p48ray import trace
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.modelopt import (
    Form,
    GlobalScales,
    dense_from_modelopt,
    modelopt_tensors,
)
from p48ray.checkpoint.sparse_storage import dense_tensors, sparse_tensors
from p48ray.checkpoint.tensors import header_of, read_tensors, tensor_bytes, tensor_view
from p48ray.errors import ShardCorruptError, SourceError
from p48ray.store.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUnit:
    """A unit's tensors where they lie, in its order, all in one file. sha256: of its dense form, as
    a shard of its own; named_in: what says so. global_scales: of its linears, where the form is
    ModelOpt's."""

    id: str
    sha256: str
    named_in: str
    store: Store
    entries: tuple[TensorEntry, ...]
    form: Form = "dense"
    global_scales: GlobalScales = field(default_factory=dict)

    @property
    def file(self) -> str:
        return self.entries[0].file


def recoded_unit(unit: StoredUnit, to: Form) -> Iterator[bytes]:
    """The bytes of a unit's tensors in another form, in its order.

    Raises: SourceError, naming the tensor, for what that form can not hold; ShardCorruptError for
        bytes that are not those that were verified. Both before the first byte is given out.
    """
    stored = read_tensors(unit.store, unit.entries)
    dense = as_dense(stored, unit.form, unit.global_scales)
    recoded = dense
    if to != "dense":
        recoded = sparse_tensors(dense) if to == "sparse" else modelopt_tensors(dense)
    found = dense_sha256(dense)
    if found != unit.sha256:
        raise ShardCorruptError(
            f"{unit.store.uri}/{unit.file}: unit {unit.id}: expected the bytes with SHA-256"
            f" {unit.sha256} that {unit.named_in} names, found {found}"
        )
    for tensor in recoded.values():
        yield tensor_bytes(tensor)


def as_dense(
    stored: Mapping[str, Tensor], form: Form, scales: GlobalScales
) -> Mapping[str, Tensor]:
    """A unit's tensors in dense storage. scales: as dense_from_modelopt takes them. Raises:
    SourceError, naming the tensor, for what can not be decoded."""
    if form == "modelopt":
        return dense_from_modelopt(stored, scales)
    return dense_tensors(stored) if form == "sparse" else stored


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
