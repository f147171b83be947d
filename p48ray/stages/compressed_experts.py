"""Compressed experts, decoded: out of the written checkpoint, or out of units' shards where there
is none yet (calibration.propagate, and pilots)."""

import struct
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from p48ray.checkpoint.header import parse_header
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.checkpoint.sparse_storage import Storage, dense_tensors, storage_of, stored_suffixes
from p48ray.checkpoint.tensors import from_bytes, read_tensors
from p48ray.errors import CorruptObjectError
from p48ray.model.experts import ExpertWeights
from p48ray.numerics import e2m1, nvfp4
from p48ray.run import run_root
from p48ray.run.plan import WorkUnit
from p48ray.store.view import SubStore
from p48ray.unit.context import StageContext

WEIGHT_SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale")
HEADER_LENGTH_BYTES = 8  # of a safetensors file, before its header
CompressedExperts = Callable[[int, int], ExpertWeights]


def finished_experts(context: StageContext) -> CompressedExperts:
    """(layer, expert) -> that expert as it will be served: of the checkpoint, or of a pilot's
    units."""
    if not context.plan.is_pilot:
        checkpoint = open_checkpoint(SubStore(context.store, run_root.CHECKPOINT))
        return partial(compressed_expert, checkpoint, context)
    layers = {layer: UnitShards(context, layer) for layer in context.plan.layers}
    return lambda layer, expert: layers[layer](expert)


def compressed_expert(
    index: CheckpointIndex, context: StageContext, layer: int, expert: int
) -> ExpertWeights:
    """One expert of the written checkpoint, in either storage, decoded, float32.

    Args:
        index: of the written checkpoint.
        context: of the run, with the device that the weights end on.
        layer, expert: their numbers.
    """
    storage = storage_of(index.config)
    stored = read_tensors(
        index.store,
        [index.tensors[name] for name in compressed_names(context, layer, expert, storage)],
    )
    return decode_compressed(
        context, layer, expert, dense_tensors(stored) if storage == "sparse" else stored
    )


def compressed_names(
    context: StageContext, layer: int, expert: int, storage: Storage = "dense"
) -> list[str]:
    """Tensors that hold the weights of one compressed expert.

    Args:
        context: of the run.
        layer, expert: their numbers.
        storage: of the file that they are read from; a unit's shard is dense.
    """
    names = (context.layout.expert_linear_name(layer, expert, p) for p in PROJECTIONS)
    return [
        f"{name}.{stored}"
        for name in names
        for suffix in WEIGHT_SUFFIXES
        for stored in stored_suffixes(suffix, storage)
    ]


def decode_compressed(
    context: StageContext, layer: int, expert: int, tensors: Mapping[str, Tensor]
) -> ExpertWeights:
    """One expert from its stored tensors, decoded, float32, on the context's device.

    Args:
        context: of the run.
        layer, expert: their numbers.
        tensors: by name, in dense storage, on any device; others may be among them.
    """

    def decode(name: str) -> Tensor:
        packed, scale, divisor = (
            tensors[f"{name}.{suffix}"].to(context.device) for suffix in WEIGHT_SUFFIXES
        )
        return nvfp4.dequantize(e2m1.unpack(packed)[None], scale[None], divisor)[0]

    return ExpertWeights(
        *(
            decode(context.layout.expert_linear_name(layer, expert, p))
            for p in ("gate_proj", "up_proj", "down_proj")
        )
    )


class UnitShards:
    """Experts of a finished layer by their number, float32, decoded when asked for from the shards
    that the units' manifests name. One unit's shard is held at a time."""

    def __init__(self, context: StageContext, layer: int) -> None:
        self.context, self.layer = context, layer
        self.units = [u for u in context.plan.units if u.layer == layer]
        self.held: WorkUnit | None = None

    def __call__(self, expert: int) -> ExpertWeights:
        """Raises: CorruptObjectError when the shard is not what its unit's manifest says."""
        unit = next(u for u in self.units if expert in u.experts)
        if unit != self.held:
            self.held, self.key, self.data = None, *read_unit_shard(self.context, unit)
            (length,) = struct.unpack("<Q", self.data[:HEADER_LENGTH_BYTES])
            self.entries = parse_header(
                self.key, bytes(self.data[HEADER_LENGTH_BYTES:][:length]), len(self.data)
            )
            self.held = unit
        wanted = [self.entries[name] for name in compressed_names(self.context, self.layer, expert)]
        tensors = {
            e.name: from_bytes(self.data[e.start :][: e.num_bytes], e.dtype, e.shape)
            for e in wanted
        }
        return decode_compressed(self.context, self.layer, expert, tensors)


def read_unit_shard(context: StageContext, unit: WorkUnit) -> tuple[str, memoryview]:
    """Key and bytes of the attempt that a unit's manifest names, after a check of owner, size and
    digest: once a node where there is a cache."""
    done = context.finished_unit(unit)
    manifest, manifest_key, key = done.manifest, done.manifest_key, done.shard_key
    try:
        return key, memoryview(
            context.checked(key, manifest.size_bytes, manifest.sha256, (manifest_key, key))
        )
    except CorruptObjectError as error:
        raise CorruptObjectError(f"{error} ({manifest_key} names it)", manifest_key, key) from error
