"""What verification reads, ahead of what it computes: bytes come and are hashed in threads,
findings are taken in the order of the shard.

Files and SHA-256 leave the interpreter to other threads while they are at it. Two segments of a
shard are looked at while a third is computed with, so that three units at most are in memory, and
of an untouched tensor a few chunks.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from p48ray import trace
from p48ray.checkpoint.decode import expert_entries
from p48ray.checkpoint.finite_values import FiniteCheck
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout
from p48ray.checkpoint.sparse_storage import Storage
from p48ray.checkpoint.storage_stream import decoded_unit, dense_sha256
from p48ray.checkpoint.tensors import read_together
from p48ray.run.plan import WorkUnit
from p48ray.store.base import Store

COMPARE_CHUNK_BYTES = 16 * 2**20
SEGMENTS_AHEAD = 2
"""Segments that are looked at beside the one in hand, each in a thread that reads, hashes and
compares."""
READ_THREADS = 4
"""For the next chunk of either side of each of them."""
INLINE_BYTES = 16 * 2**20
"""Shards up to this size are looked at in the thread that computes: handing them over would take
longer than reading them."""

Item = TypeVar("Item")
Found = TypeVar("Found")


class Readers:
    """The threads of one shard's verification. Those of `reads` wait for nobody, so that those of
    `segments` may wait for them."""

    def __init__(self, num_bytes: int) -> None:
        """Args: num_bytes: of the shard."""
        self.is_inline = num_bytes <= INLINE_BYTES
        self.segments = ThreadPoolExecutor(SEGMENTS_AHEAD, thread_name_prefix="verify")
        self.reads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="verify-read")

    def in_order(
        self, look: Callable[[Item], Found], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Found]]:
        """Each item with what `look` found in it, SEGMENTS_AHEAD of them in hand beside the one
        given out. Raises: what `look` raised, in its turn."""
        if self.is_inline:
            yield from ((item, look(item)) for item in items)
            return
        pending: deque[tuple[Item, Future[Found]]] = deque()
        for item in items:
            pending.append((item, self.segments.submit(look, item)))
            if len(pending) > SEGMENTS_AHEAD:
                yield _taken(pending)
        while pending:
            yield _taken(pending)


def _taken(pending: deque[tuple[Item, Future[Found]]]) -> tuple[Item, Found]:
    item, future = pending.popleft()
    with trace.span("wait"):
        return item, future.result()


@contextmanager
def readers(num_bytes: int) -> Iterator[Readers]:
    """Threads for a shard of `num_bytes` bytes.

    Where the body raises, what had not begun never does, and what had begun ends first: nothing
    reads on behind an error.
    """
    threads = Readers(num_bytes)
    try:
        yield threads
    finally:
        threads.segments.shutdown(wait=True, cancel_futures=True)
        threads.reads.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadUnit:
    """A unit as stored, the packed originals of its experts where there is a source, and the
    SHA-256 of dense tensors (None for sparse ones)."""

    stored: Mapping[str, Tensor]
    originals: Mapping[str, Tensor]
    digest: str | None

    def dense(self, storage: Storage, device: torch.device) -> dict[str, Tensor]:
        """Its tensors in dense storage on the device. Raises: SourceError as decoded_unit does."""
        there = {name: tensor.to(device) for name, tensor in self.stored.items()}
        return decoded_unit(there) if storage == "sparse" else there


def read_unit(
    checkpoint: Store,
    entries: list[TensorEntry],
    storage: Storage,
    originals: Callable[[], Mapping[str, Tensor]],
) -> ReadUnit:
    """A unit's tensors, and what they are compared with.

    Args:
        checkpoint: rooted at the checkpoint folder.
        entries: the unit's tensors, in its shard's order; the digest depends on it.
        storage: that they are in.
        originals: reads the packed originals, by name; an empty mapping without a source.
    Raises: what the stores raise for bytes that are not there.
    """
    with trace.span("read", sum(entry.num_bytes for entry in entries)):
        stored = read_together(checkpoint, entries)
    return ReadUnit(
        stored=stored,
        digest=dense_sha256(stored) if storage == "dense" else None,
        originals=originals(),
    )


def read_originals(
    source: CheckpointIndex, layout: ModelLayout, unit: WorkUnit
) -> dict[str, Tensor]:
    """The source's tensors of a unit's experts, as stored."""
    entries = expert_entries(source, layout, unit.layer, unit.experts)
    with trace.span("read", sum(entry.num_bytes for entry in entries)):
        return read_together(source.store, entries)


def compare_bytes(
    left: Store,
    a: TensorEntry,
    right: Store,
    b: TensorEntry,
    reads: ThreadPoolExecutor,
    values: FiniteCheck,
) -> tuple[bool, str]:
    """Whether two tensors' bytes are the same, and the left one's SHA-256; read in chunks, the next
    of both while this one is hashed.

    Args:
        left, right: stores that they lie in.
        a, b: the tensor of the left one, and that of the right one.
        reads: threads that fetch the chunks of large tensors.
        values: looks at those of the left one.
    """
    digest, is_same = hashlib.sha256(), a.num_bytes == b.num_bytes
    theirs = chunks(right, b, reads)
    for data in chunks(left, a, reads):
        with trace.span("hash", len(data)):
            digest.update(data)
            values.add(data)
        is_same = is_same and data == next(theirs)
    return is_same, digest.hexdigest()


def tensor_digest(
    store: Store, entry: TensorEntry, reads: ThreadPoolExecutor, values: FiniteCheck
) -> str:
    """SHA-256 of a tensor's bytes.

    Args:
        store, entry: where it lies.
        reads: threads that fetch the chunks of a large one.
        values: looks at its values.
    """
    digest = hashlib.sha256()
    for data in chunks(store, entry, reads):
        with trace.span("hash", len(data)):
            digest.update(data)
            values.add(data)
    return digest.hexdigest()


def chunks(store: Store, entry: TensorEntry, reads: ThreadPoolExecutor) -> Iterator[bytes]:
    """A tensor's bytes in pieces, the next one on its way while one is used. What a chunk's read
    raises comes in its turn."""
    if entry.num_bytes <= COMPARE_CHUNK_BYTES:
        if entry.num_bytes:
            yield store.get_range(entry.file, entry.start, entry.num_bytes)
        return
    pending: deque[Future[bytes]] = deque()
    for at in range(0, entry.num_bytes, COMPARE_CHUNK_BYTES):
        pending.append(
            reads.submit(
                store.get_range,
                entry.file,
                entry.start + at,
                min(COMPARE_CHUNK_BYTES, entry.num_bytes - at),
            )
        )
        if len(pending) > 1:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
