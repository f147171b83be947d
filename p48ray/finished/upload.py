"""Upload: what a worker does with one shard of a checkpoint that is being published. It holds every
byte against p48ray.json on the way.

This module imports little, because the processes of a cluster that run it do nothing else.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import IO

from torch import Tensor

from p48ray.checkpoint.header import TensorEntry, encode_header, parse_header, read_header_bytes
from p48ray.checkpoint.layout import EXPERT_NAME, PROJECTIONS
from p48ray.checkpoint.modelopt import dense_from_modelopt
from p48ray.checkpoint.sparse_storage import KEPT
from p48ray.checkpoint.storage_stream import decoded_unit, dense_sha256
from p48ray.checkpoint.tensors import from_bytes
from p48ray.errors import ConfigError, SourceError, StageFailedError
from p48ray.finished.branch import Hub
from p48ray.run import run_root
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.run.manifest import PublishedShard
from p48ray.run.plan import WorkUnit
from p48ray.stages.tasks import Task, record_failure
from p48ray.store.base import Store

Decode = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
RANGE_BYTES = 32 * 2**20  # of a shard, in memory at once


class CheckedRange:
    """Bytes of a shard that p48ray.json has a digest of."""

    def __init__(self, what: str, end: int, expected: str | None, start: bytes = b"") -> None:
        """Begin the hash.

        Args:
            what: name of the range, for messages.
            end: offset in the file behind its last byte.
            expected: its SHA-256 in hex; None where p48ray.json has none, which no bytes match.
            start: hashed first: what the digest covers besides.
        """
        self.what, self.end, self.expected, self.digest = what, end, expected, hashlib.sha256(start)

    def update(self, data: memoryview) -> None:
        self.digest.update(data)

    def found(self) -> str:
        return self.digest.hexdigest()

    def check(self, shard: str) -> None:
        if (found := self.found()) != self.expected:
            raise changed(shard, f"{self.what}: expected SHA-256 {self.expected}, found {found}")


class DecodedRange(CheckedRange):
    """A unit in another form than dense storage, whose digest is that of its dense tensors: it is
    held in memory until it is whole."""

    def __init__(
        self,
        what: str,
        end: int,
        expected: str | None,
        rows: Sequence[TensorEntry],
        decode: Decode,
    ) -> None:
        """Begin with no bytes.

        Args:
            what, end, expected: as CheckedRange takes them.
            rows: the unit's stored tensors in file order, with nothing between them.
            decode: gives its dense tensors, in that order.
        """
        super().__init__(what, end, expected)
        self.rows, self.decode, self.data = rows, decode, bytearray()

    def update(self, data: memoryview) -> None:
        self.data += data

    def found(self) -> str:
        held, start = memoryview(self.data), self.rows[0].start
        # segments of a shard outlive their check, and together they would be the shard
        self.data = bytearray()
        stored = {
            e.name: from_bytes(held[e.start - start :][: e.num_bytes], e.dtype, e.shape)
            for e in self.rows
        }
        try:
            return dense_sha256(self.decode(stored))
        except SourceError as error:
            return f"none: {error}"


def changed(shard: str, what: str) -> ConfigError:
    verdict = run_root.shard_verdict(shard)
    return ConfigError(
        f"{shard}: changed since it was verified: {what}; delete {run_root.checkpoint_file(shard)}"
        f" and {verdict} and run jobs/compress.py again; a folder without a run root is to be"
        " written anew (p48ray convert)"
    )


def segments_of(
    shard: str, header_bytes: int, entries: Mapping[str, TensorEntry], manifest: CheckpointManifest
) -> list[CheckedRange]:
    """Header, units and untouched tensors in file order. Together they are the whole file, which
    the header's parser has seen to.

    Args:
        shard: name of the file.
        header_bytes: of the header with the eight that give its length.
        entries: all tensors of the file.
        manifest: of the checkpoint.
    """
    header = CheckedRange("header", header_bytes, manifest.header_sha256.get(shard))
    units: dict[tuple[int, int], list[TensorEntry]] = {}
    found: list[CheckedRange] = []
    for entry in sorted(entries.values(), key=lambda e: e.start):
        expert = EXPERT_NAME.fullmatch(entry.name)
        if expert and entry.name.rpartition(".")[0] in manifest.relative_weight_errors:
            units.setdefault(
                (int(expert[2]), int(expert[3]) // manifest.experts_per_unit), []
            ).append(entry)
        elif entry.num_bytes:
            found.append(
                CheckedRange(
                    entry.name,
                    entry.start + entry.num_bytes,
                    manifest.untouched_sha256.get(entry.name),
                )
            )
    for (layer, position), rows in units.items():
        num_experts = len({e.name.rpartition(".")[0] for e in rows}) // len(PROJECTIONS)
        unit = WorkUnit(
            layer=layer, first_expert=position * manifest.experts_per_unit, num_experts=num_experts
        ).id
        end = rows[-1].start + rows[-1].num_bytes
        decode: Decode | None = None
        if manifest.modelopt is not None:
            decode = partial(dense_from_modelopt, scales=manifest.modelopt.global_scales)
        elif any(e.name.endswith(f".{KEPT}") for e in rows):
            decode = decoded_unit
        if decode is not None:
            sha256 = manifest.unit_sha256.get(unit)
            found.append(DecodedRange(f"unit {unit}", end, sha256, rows, decode))
            continue
        # of the unit's shard, whose digest is the promise
        own_header = encode_header([(e.name, e.dtype, e.shape) for e in rows])
        found.append(CheckedRange(f"unit {unit}", end, manifest.unit_sha256.get(unit), own_header))
    return [header, *sorted(found, key=lambda s: s.end)]


def stage_shard(
    checkpoint: Store, shard: str, size_bytes: int, manifest: CheckpointManifest, file: IO[bytes]
) -> str:
    """Copy a shard to a local file, range by range, and hold every byte against the manifest on the
    way. Returns its SHA-256.

    Args:
        checkpoint: rooted at the checkpoint folder.
        shard: name of the file in it.
        size_bytes: that it was verified with.
        manifest: of the checkpoint.
        file: empty; written from its start, and flushed.
    Raises: ConfigError if it is not the shard that was verified.
    """
    try:
        raw, found_bytes = read_header_bytes(checkpoint, shard)
        entries = parse_header(shard, raw, found_bytes)
    except SourceError as error:
        raise changed(shard, str(error)) from error
    if found_bytes != size_bytes:
        raise changed(shard, f"expected {size_bytes} bytes, found {found_bytes}")
    whole, position = hashlib.sha256(), 0
    segments = iter(segments_of(shard, 8 + len(raw), entries, manifest))
    segment = next(segments)
    for start in range(0, size_bytes, RANGE_BYTES):
        data = memoryview(checkpoint.get_range(shard, start, min(RANGE_BYTES, size_bytes - start)))
        whole.update(data)
        file.write(data)
        while position < start + len(data):
            end = min(segment.end, start + len(data))
            segment.update(data[position - start : end - start])
            position = end
            if position == segment.end:
                segment.check(shard)
                segment = next(segments, segment)
    file.flush()
    return whole.hexdigest()


@contextmanager
def unnamed_file(size_bytes: int) -> Iterator[tuple[IO[bytes], str]]:
    """A file in TMPDIR, and a path to it. On Linux it has no name there, so that a worker that is
    killed leaves no 5 GB behind.

    Raises: StageFailedError where there is no room for it.
    """
    folder = tempfile.gettempdir()
    if (free := shutil.disk_usage(folder).free) < size_bytes:
        raise StageFailedError(
            f"{folder} has {free} bytes free, a shard of {size_bytes} bytes was to lie there; set"
            " TMPDIR to another disk"
        )
    is_linux = os.path.isdir("/proc/self/fd")
    with tempfile.TemporaryFile() if is_linux else tempfile.NamedTemporaryFile() as file:
        yield file, f"/proc/self/fd/{file.fileno()}" if is_linux else str(file.name)


@dataclass(frozen=True)
class Uploader:
    """What a worker needs to publish shards, in a kilobyte. `checkpoint`: rooted at the folder.
    `records`: the run root that keeps them, if any. `checkpoint_sha256`: of the manifest that the
    driver has read."""

    checkpoint: Store
    records: Store | None
    hub: Hub
    manifest_file: str
    checkpoint_sha256: str

    @cached_property
    def manifest(self) -> CheckpointManifest:
        found = CheckpointManifest.load(self.checkpoint, self.manifest_file)
        if found.sha256 != self.checkpoint_sha256:
            raise ConfigError(
                f"{self.checkpoint.uri}: {self.manifest_file} was replaced while it was being"
                " published; run the same command again"
            )
        return found

    def upload(self, shard: str, size_bytes: int) -> PublishedShard:
        """Stage, check and upload one shard, and record it. Running it twice is harmless."""
        with unnamed_file(size_bytes) as (file, path):
            sha256 = stage_shard(self.checkpoint, shard, size_bytes, self.manifest, file)
            self.hub.upload(shard, path, sha256)
        t = self.hub.target
        record = PublishedShard(
            endpoint=t.endpoint,
            repo=t.repo,
            revision=t.revision,
            path=shard,
            size_bytes=size_bytes,
            sha256=sha256,
            checkpoint_sha256=self.checkpoint_sha256,
            finished_at=time.time(),
        )
        if self.records is not None:
            self.records.put(run_root.published_shard(t.digest, shard), record.to_json())
        return record


def upload_and_record(uploader: Uploader, shard: str, size_bytes: int) -> PublishedShard:
    """The body of a task. What goes wrong is recorded under failures/ of the run root, if there is
    one, then raised."""
    try:
        return uploader.upload(shard, size_bytes)
    except Exception as error:
        if uploader.records is not None:
            record_failure(uploader.records, Task(stage="publish", id=shard, item=shard), error)
        raise
