"""What every stage function gets besides its item of work: the plan, the run root, the opened
source, and where to compute."""

import hashlib
import mmap
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p48ray import trace
from p48ray.checkpoint.decode import decode_expert
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.errors import CorruptObjectError, ObjectMissingError, ShardCorruptError
from p48ray.model.decoder import Decoder
from p48ray.model.experts import ExpertWeights
from p48ray.run import arrow, run_root
from p48ray.run.checked import (
    blob_facts,
    load_part_manifest,
    load_tokens_manifest,
    load_unit_manifest,
)
from p48ray.run.manifest import LayerScales, UnitManifest
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.run.run_root import BlobKind
from p48ray.run.scales import load_layer_scales
from p48ray.store.base import ByteRange, Store, Written
from p48ray.store.checked_files import CheckedFiles
from p48ray.store.node_cache import NodeCache, fetch
from p48ray.store.open import scheme_of
from p48ray.store.view import lies_aside, local_path, name_of, sha256_of
from p48ray.unit.compiling import Compiling
from p48ray.unit.compute_lock import ComputeLock
from p48ray.unit.staging import to_device

PROCESS = uuid.uuid4().hex[:12]
"""This process, for manifests that say who worked when. Nothing of the machine is in it."""


@dataclass(frozen=True, slots=True)
class FinishedUnit:
    """A unit's manifest, and the shard of the attempt that it names."""

    manifest_key: str
    manifest: UnitManifest
    shard_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """Read-only handles, opened once per process and passed to each stage function.

    `cache`: what this node's workers read in common, if it comes from afar. `files`: which files of
    the node were hashed already. `compute_lock`: held by the one unit of a process that computes.
    `compiling`: a GPU's kernels, on their way. `known`: what stages of this process have found out
    once, by their names. `worker`: who works here, as manifests name it.
    """

    plan: RunPlan
    store: Store
    source: CheckpointIndex
    layout: ModelLayout
    device: torch.device
    cache: NodeCache | None = None
    files: CheckedFiles = field(default_factory=CheckedFiles)
    compute_lock: ComputeLock = field(default_factory=ComputeLock)
    compiling: Compiling | None = None
    known: dict[str, str] = field(default_factory=dict)
    worker: str = PROCESS

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.plan.config.calibration.compute_dtype)
        return dtype

    @property
    def device_name(self) -> str:
        """The card's model, or cpu."""
        is_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_gpu else self.device.type

    @property
    def store_is_near(self) -> bool:
        """The run root is a folder of this node's own: a copy on another of its disks would gain
        nothing."""
        return scheme_of(self.store.uri).is_local and not self.plan.config.run.root_is_shared

    def near_path(self, key: str) -> str | None:
        """The file of an object that is mapped where it lies: in a run root that is near, or in
        run.scratch, whatever disk or memory that is."""
        is_near = self.store_is_near or lies_aside(self.store, key)
        return local_path(self.store, key) if is_near else None

    def decoder(self) -> Decoder:
        return Decoder(self.source, self.layout, self.device, self.compute_dtype, self.cache)

    def decoded(self, layer: int, expert: int, stored: Mapping[str, Tensor]) -> ExpertWeights:
        """An expert of the source out of fetched tensors, decoded on the context's device in the
        source's float dtype; what is stored is what travels there.

        Raises: SourceError, naming file and tensor, for weights that are not finite.
        """
        there = {
            name: stored[name].to(self.device)
            for name in self.layout.expert_tensor_names(layer, expert)
        }
        linears = decode_expert(self.source, self.layout, layer, expert, there)
        return ExpertWeights(*(linears[p] for p in PROJECTIONS))

    def finished_unit(self, unit: WorkUnit) -> FinishedUnit:
        """What a unit's manifest says of it.

        Raises: CorruptObjectError for a manifest that is not this unit's, or of other settings.
        """
        manifest = load_unit_manifest(self.plan, self.store, unit)
        key = run_root.unit_shard(unit.id, manifest.attempt)
        return FinishedUnit(run_root.unit_manifest(unit.id), manifest, key)

    def layer_scales(self, layer: int) -> LayerScales:
        """A layer's scales, held against its parts once a process and value.

        Raises: CorruptObjectError for scales that are not what the parts say.
        """
        known, key = f"scales of layer {layer}", run_root.layer_scales(layer)
        with suppress(ObjectMissingError):
            if self.known.get(known) == (data := self.store.get(key)).decode(errors="replace"):
                return LayerScales.from_json(data, f"{self.store.uri}/{key}")
        scales = load_layer_scales(self.plan, self.store, layer)
        self.known[known] = scales.to_json().decode()
        return scales

    def stored_scales(self, layer: int) -> tuple[float, float]:
        """The input global scales of gate and up, and of down, that a finished layer's units
        hold."""
        unit = next(unit for unit in self.plan.units if unit.layer == layer)
        return self.finished_unit(unit).manifest.input_global_scales

    def activation_parts(self, layer: int) -> Iterator[dict[str, Tensor]]:
        """The captured parts of a layer, in the plan's order: hidden, expert_ids, router_weights;
        delta where gradients are used.

        Columns are stored as in token_rows, and mapped: what a caller does not touch is not read.
        Raises: ShardCorruptError when a part is not what its manifest says.
        """
        for part in self.plan.parts:
            columns = self.blob("activations", layer, part.part)
            if self.plan.uses_gradients:
                columns |= self.blob("gradients", layer, part.part)
            yield columns

    def blob(self, kind: BlobKind, layer: int, part: int) -> dict[str, Tensor]:
        """Columns of a blob, read-only and on the CPU, after a check of what it is: kind, layer,
        part, plan, size and digest.

        Args:
            kind: of blob.
            layer: that it belongs to; of a boundary, the layer that it enters.
            part: its number.
        Raises: CorruptObjectError, naming what to delete so that it is made again, when it is gone
            or another.
        """
        key = run_root.blob(kind, layer, part)
        manifest = load_part_manifest(self.plan, self.store, kind, layer, part)
        facts = blob_facts(self.plan, kind, layer, part)
        return self.arrow_columns(key, manifest.size_bytes, manifest.sha256, facts)

    def arrow_columns(
        self, key: str, size_bytes: int, sha256: str, facts: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """Columns of an Arrow file that has a manifest beside it.

        Args:
            key: of the file.
            size_bytes, sha256: as its manifest says.
            facts: what it must say of itself.
        Raises: CorruptObjectError naming file and manifest.
        """
        made_of = (run_root.manifest_of(key), key)
        data = self.checked(key, size_bytes, sha256, made_of)
        try:
            return arrow.decode(data, name_of(self.store, key), facts)
        except ShardCorruptError as error:
            raise CorruptObjectError(str(error), *made_of) from error

    def checked(
        self, key: str, size_bytes: int, sha256: str, made_of: tuple[str, ...]
    ) -> bytes | memoryview:
        """The bytes of an object whose digest is known: mapped where it is a file of this node, of
        the run root, of run.scratch or of the node's cache.

        They are hashed once a node and file (store.checked_files), once a call where they come from
        afar and are not cached.
        Args:
            key: in the run root.
            size_bytes, sha256: as its manifest says.
            made_of: what to delete so that the object is made again.
        Raises: CorruptObjectError when it is gone, or not what its manifest says.
        """
        expected = f"expected {size_bytes} bytes with SHA-256 {sha256[:12]} as its manifest says"

        def check(data: bytes | memoryview | mmap.mmap) -> None:
            with trace.span("hash", len(data), key):
                is_same = len(data) == size_bytes and hashlib.sha256(data).hexdigest() == sha256
            if not is_same:
                raise CorruptObjectError(
                    f"{name_of(self.store, key)}: {expected}, found {len(data)} others", *made_of
                )

        def fill(descriptor: int) -> None:
            with trace.span("read", size_bytes, key):
                fetch([(ByteRange(self.store, key, 0, size_bytes), 0)], descriptor)
            with mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_READ) as data:
                check(data)

        try:
            if (path := self.near_path(key)) is not None:
                return self.mapped(path, key, sha256, check)
            if (
                self.cache is not None
                and (held := self.cache.open(f"{self.store.uri}/{key} {sha256}", size_bytes, fill))
                is not None
            ):
                return held
            with trace.span("read", size_bytes, key):
                data = self.store.get(key)
        except (ObjectMissingError, ShardCorruptError) as error:
            raise CorruptObjectError(f"{error}; {expected}", *made_of) from error
        check(data)
        return data

    def mapped(
        self, path: str, key: str, sha256: str, check: Callable[[memoryview], None]
    ) -> memoryview:
        """A file of the run root, mapped; checked unless this node did that before.

        Args:
            path: of the file.
            key: the same in the run root, for messages.
            sha256: under which the file is known once it was checked.
            check: given the mapped bytes; raises where they are not what they should be.
        Raises: ObjectMissingError; what `check` raises.
        """
        try:
            with open(path, "rb") as file:
                facts = os.fstat(file.fileno())
                data = memoryview(
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if facts.st_size else b""
                )
        except OSError as error:
            raise ObjectMissingError(f"{path}: cannot be read: {error.strerror}") from error
        self.files.check_once(facts, sha256, lambda: check(data))
        return data

    def trust(self, key: str, written: Written) -> None:
        """Note that this process wrote an object and hashed it meanwhile, so that its node need not
        hash it again."""
        path = self.near_path(key)
        if path is not None and written.inode is not None:
            with suppress(OSError):  # another driver may have deleted it already
                self.files.trust(path, written.inode, written.size_bytes, written.sha256)

    def digest_of(self, key: str) -> str | None:
        """SHA-256 of an object as it is stored; None if there is none."""
        info = self.store.head(key)
        try:
            return None if info is None else sha256_of(self.store, key, info.size_bytes)
        except (ObjectMissingError, ShardCorruptError):
            return None

    def boundary(self, kind: BlobKind, layer: int, part: int) -> Tensor:
        """What a stream left at a layer's boundary, on the context's device, one row a token.

        Raises: CorruptObjectError when it is gone or not what was written; whoever owned the part
            takes it up again from further away.
        """
        return to_device(self.blob(kind, layer, part), self.device)["values"]

    def tokens(self, key: str, owner: str) -> Tensor:
        """Token ids (N, S) of the calibration sequences, or of an evaluation. owner: the digest of
        the plan's units, or the evaluation's.

        Raises: CorruptObjectError when they are not what was written: the driver packs the texts
            again.
        """
        manifest = load_tokens_manifest(self.store, key, owner)
        facts = {"kind": "tokens", "owner": owner}
        return self.arrow_columns(key, manifest.size_bytes, manifest.sha256, facts)["token_ids"]
