"""Blobs: what streams leave in the run root, an Arrow file of one part at one layer, and a manifest
with its digest beside it.

A blob is done when its manifest is there, which comes last. Its way to the store is one pass:
columns leave the GPU in pieces, and a piece is hashed and written while the next one is copied
(unit.staging). Threads beside the computation do that, so a stream goes on while what it left is
still on its way, up to BEHIND_BYTES; nothing is deleted before what replaces it is durable.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from p48ray import trace
from p48ray.run import arrow, run_root
from p48ray.run.checked import blob_facts, load_part_manifest
from p48ray.run.manifest import PartManifest
from p48ray.run.run_root import BlobKind
from p48ray.store.base import Written
from p48ray.store.view import name_of
from p48ray.unit.context import StageContext
from p48ray.unit.staging import Staging

log = logging.getLogger(__name__)

WRITERS = 4
"""Threads that write. One hashes and writes about 0.8 GB/s."""
BEHIND_BYTES = 6 * 10**9
"""Of columns that wait to be written, or are being written: on the device where they were made. A
single larger blob goes alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """One part at one layer, to be stored.

    record, values: its manifest, and the fields that it has of its own, as small tensors that may
    still be on their way. columns: one row a token; must not change any more. seconds: that the
    stream took for the part at this layer.
    """

    record: type[PartManifest]
    kind: BlobKind
    layer: int
    part: int
    columns: Mapping[str, Tensor]
    seconds: float
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.columns.values())


class BlobWriter:
    """Writes blobs beside the computation. As a context: at its end everything that was submitted
    is durable, or an error is raised.

    Raises (from submit, drain and at the context's end): the first error that a writer met. What
            was not begun by then is given up; after an error of the computation everything that was
            submitted is still written, for whoever resumes.
    """

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="blob-writer")
        self.own = threading.local()  # a writer's Staging
        self.room = threading.Condition()
        self.behind_bytes = 0
        self.submitted: list[tuple[int, Future[PartManifest]]] = []  # with the part
        # keys to delete, once these are durable
        self.leaving: list[tuple[list[Future[PartManifest]], list[str]]] = []
        self.deleting: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            has_failed = any(
                future.done() and not future.cancelled() and future.exception()
                for _, future in self.submitted
            )
            self.pool.shutdown(wait=True, cancel_futures=has_failed)

    def submit(self, blob: Blob) -> None:
        """Have a blob written; returns once there is room for it behind those on their way."""
        self.raise_first_error()
        ready = None
        blob = replace(
            blob, columns={name: tensor.contiguous() for name, tensor in blob.columns.items()}
        )
        if self.context.device.type == "cuda":
            blob = replace(
                blob,
                values={
                    name: value.to("cpu", non_blocking=True) for name, value in blob.values.items()
                },
            )
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.context.device))
        num_bytes = blob.num_bytes
        with trace.span("wait"), self.room:
            self.room.wait_for(
                lambda: self.behind_bytes + num_bytes <= BEHIND_BYTES or not self.behind_bytes
            )
            self.behind_bytes += num_bytes
        # before the next is written, so that the disk holds no more than what is behind beside what
        # a resume needs
        self.delete_replaced()
        future = self.pool.submit(self.write, blob, ready)
        future.add_done_callback(lambda _: self.release(num_bytes))
        self.submitted.append((blob.part, future))

    def release(self, num_bytes: int) -> None:
        """Room for others, once a blob's future is done: whoever waited for it finds it so."""
        with self.room:
            self.behind_bytes -= num_bytes
            self.room.notify_all()

    def delete_after(self, part: int, keys: list[str]) -> None:
        """Delete objects once everything that was submitted for the part so far is durable."""
        self.leaving.append(([future for p, future in self.submitted if p == part], keys))
        self.delete_replaced()

    def flush(self) -> list[PartManifest]:
        """Wait for everything, and for the end of what it replaces. Returns: the manifests since
        the last drain, as they were submitted."""
        with trace.span("wait"):
            found = [future.result() for _, future in self.submitted]
        self.delete_replaced()
        assert not self.leaving
        for deletion in self.deleting:
            deletion.result()
        self.deleting.clear()
        return found

    def drain(self) -> list[PartManifest]:
        """The same, once and for all: what is returned is forgotten."""
        found = self.flush()
        self.submitted.clear()
        return found

    def raise_first_error(self) -> None:
        for _, future in self.submitted:
            if future.done():
                future.result()

    def delete_replaced(self) -> None:
        """Hand to the writers what may be deleted by now: to take a large file out of the page
        cache takes half a second."""
        waiting = []
        for futures, keys in self.leaving:
            if all(f.done() and not f.cancelled() and f.exception() is None for f in futures):
                self.deleting.append(self.pool.submit(self.delete, keys))
            else:
                waiting.append((futures, keys))
        self.leaving = waiting

    def delete(self, keys: list[str]) -> None:
        for key in keys:
            self.context.store.delete(key)

    def write(self, blob: Blob, ready: torch.cuda.Event | None) -> PartManifest:
        """Body of a writer: the blob, then its manifest. One that is there already is kept if it is
        what this one would be.

        Args:
            ready: when the device has made the columns and values.
        """
        if ready is not None:
            with trace.span("wait"):
                ready.synchronize()
        start, plan = time.monotonic(), self.context.plan
        with trace.span("encode"):
            chunks = arrow.host_chunks if ready is None else partial(self.leave, ready)
            facts = blob_facts(plan, blob.kind, blob.layer, blob.part)
            file = arrow.encode(blob.columns, facts, chunks)
        written = store_once(self.context, run_root.blob(blob.kind, blob.layer, blob.part), file)
        manifest = blob.record(
            units_digest=plan.units_digest,
            kind=blob.kind,
            layer=blob.layer,
            part=blob.part,
            num_tokens=len(next(iter(blob.columns.values()))),
            size_bytes=written.size_bytes,
            sha256=written.sha256,
            seconds=blob.seconds,
            write_seconds=round(time.monotonic() - start, 3),
            finished_at=round(time.time(), 3),
            worker=self.context.worker,
            **{name: value.tolist() for name, value in blob.values.items()},
        )
        key = run_root.blob_manifest(blob.kind, blob.layer, blob.part)
        if self.context.store.put_if_absent(key, manifest.to_json()):
            return manifest
        return load_part_manifest(plan, self.context.store, blob.kind, blob.layer, blob.part)

    def leave(self, ready: torch.cuda.Event, tensor: Tensor) -> Iterator[memoryview]:
        if not hasattr(self.own, "staging"):
            self.own.staging = Staging(self.context.device)
        staging: Staging = self.own.staging
        return staging.pieces(tensor, ready)


def store_once(context: StageContext, key: str, file: arrow.ArrowFile) -> Written:
    """Store a blob that is never replaced once its manifest is there.

    Before that, a manifest without a blob is an orphan and goes, and a blob without a manifest (its
    writer died, or is about to name it) counts if it is byte for byte what this one is; else it is
    replaced.
    """
    store, manifest_key = context.store, run_root.manifest_of(key)
    if store.head(key) is None:
        store.delete(manifest_key)
    written = store.write_once(key, file)
    if (
        not written.is_ours
        and store.head(manifest_key) is None
        and context.digest_of(key) != written.sha256
    ):
        log.warning(
            "%s: there is another file, and no manifest that knows it; it is replaced",
            name_of(store, key),
        )
        store.delete(key)
        written = store.write_once(key, file)
    if written.is_ours:
        context.trust(key, written)
    return written
