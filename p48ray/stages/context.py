"""What every stage function gets besides its item of work: the plan, the run root, the opened source, and where to compute."""

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from p48ray import run_root
from p48ray.checkpoint.decode import decode_expert
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.errors import CorruptObjectError, ObjectMissingError, ShardCorruptError
from p48ray.manifest import ActivationPart, GradientPart, LayerScales, UnitManifest
from p48ray.model.decoder import Decoder
from p48ray.model.experts import ExpertWeights
from p48ray.plan import RunPlan
from p48ray.stages import arrow
from p48ray.stages.compiling import Compiling
from p48ray.stages.turn import Turn
from p48ray.store.base import ByteRange, Store
from p48ray.store.local import LocalStore
from p48ray.store.node_cache import NodeCache, fetch


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """Read-only handles, opened once per process and passed to each stage function.

    `cache`: what this node's workers read in common, if it comes from afar. `turn`: whose it is to compute, where units share a process. `compiling`: a GPU's
    kernels, on their way.
    """

    plan: RunPlan
    store: Store
    source: CheckpointIndex
    layout: ModelLayout
    device: torch.device
    cache: NodeCache | None = None
    turn: Turn = field(default_factory=Turn)
    compiling: Compiling | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.plan.config.calibration.compute_dtype)
        return dtype

    @property
    def store_is_near(self) -> bool:
        """The run root is a folder of this node's own: a copy on another of its disks would gain nothing."""
        return isinstance(self.store, LocalStore) and not self.plan.config.run.root_is_shared

    def decoder(self) -> Decoder:
        return Decoder(self.source, self.layout, self.device, self.compute_dtype, self.cache)

    def decoded(self, layer: int, expert: int, stored: Mapping[str, Tensor]) -> ExpertWeights:
        """An expert of the source out of fetched tensors, decoded on the context's device in the source's float dtype; what is stored is what travels there.

        Raises: SourceError, naming file and tensor, for weights that are not finite.
        """
        there = {name: stored[name].to(self.device) for name in self.layout.expert_tensor_names(layer, expert)}
        linears = decode_expert(self.source, self.layout, layer, expert, there)
        return ExpertWeights(*(linears[p] for p in PROJECTIONS))

    def layer_scales(self, layer: int) -> LayerScales:
        scales = LayerScales.load(self.store, run_root.layer_scales(layer))
        self.check_owner(scales.plan_digest, run_root.layer_scales(layer))
        return scales

    def activation_parts(self, layer: int) -> Iterator[dict[str, Tensor]]:
        """The captured parts of a layer, in the plan's order: hidden, expert_ids, router_weights; delta where gradients are used (stored as in token_rows).

        Raises: ShardCorruptError when a part is not what its manifest says.
        """
        for part in self.plan.parts:
            seen = ActivationPart.load(self.store, run_root.activation_manifest(layer, part.part))
            columns = self.checked_part(run_root.activation_part(layer, part.part), seen)
            if self.plan.config.compression.output_curvature:
                felt = GradientPart.load(self.store, run_root.gradient_manifest(layer, part.part))
                columns |= self.checked_part(run_root.gradient_part(layer, part.part), felt)
            yield columns

    def checked_part(self, key: str, manifest: ActivationPart | GradientPart) -> dict[str, Tensor]:
        """Columns of one stored part, after a check of owner, size and digest: once a node where there is a cache, else for every reader."""
        self.check_owner(manifest.plan_digest, key)
        where = f"{self.store.uri}/{key}"
        data: bytes | memoryview | None = None
        if self.cache is not None and not self.store_is_near:
            data = self.cache.open(f"{where} {manifest.sha256}", manifest.size_bytes, partial(self.fetch_part, key, manifest))
        if data is not None:
            return arrow.decode(data, where, is_checked=True)
        try:
            data = self.store.get(key)
        except ObjectMissingError as error:
            raise CorruptObjectError(f"{error}, but its manifest is there", *made_anew(key)) from error
        self.check_part(key, manifest, data)
        return arrow.decode(data, where, is_checked=True)

    def fetch_part(self, key: str, manifest: ActivationPart | GradientPart | UnitManifest, descriptor: int) -> None:
        """Copy a part into a file of the node, and check it there."""
        try:
            fetch([(ByteRange(self.store, key, 0, manifest.size_bytes), 0)], descriptor)
        except (ObjectMissingError, ShardCorruptError) as error:
            raise CorruptObjectError(f"{error}, but its manifest says {manifest.size_bytes} bytes", *made_anew(key)) from error
        with mmap.mmap(descriptor, manifest.size_bytes, access=mmap.ACCESS_READ) as data:
            self.check_part(key, manifest, data)

    def check_part(self, key: str, manifest: ActivationPart | GradientPart | UnitManifest, data: bytes | mmap.mmap) -> None:
        if len(data) != manifest.size_bytes or hashlib.sha256(data).hexdigest() != manifest.sha256:
            raise CorruptObjectError(
                f"{self.store.uri}/{key}: expected {manifest.size_bytes} bytes with SHA-256 {manifest.sha256[:12]} as its manifest says, "
                f"found {len(data)} others",
                *made_anew(key),
            )

    def boundary(self, key: str, column: str) -> Tensor:
        """What a streaming stage left at a layer's boundary.

        Raises: CorruptObjectError when it is gone or not what was written; whoever owned the part takes it up again from further away.
        """
        try:
            return arrow.decode(self.store.get(key), f"{self.store.uri}/{key}")[column].to(self.device)
        except (ObjectMissingError, ShardCorruptError) as error:
            raise CorruptObjectError(str(error), key) from error

    def check_owner(self, digest: str, key: str) -> None:
        if digest != self.plan.digest:
            raise ShardCorruptError(f"{self.store.uri}/{key}: expected plan digest {self.plan.digest[:12]}, found {digest[:12]}")


def made_anew(key: str) -> tuple[str, str]:
    """What to delete so that a part is made again: its manifest first."""
    return (key.removesuffix(".arrow") + ".json", key)
