"""A bounded look into a finished checkpoint: masks and scales of some rows of some linears a layer,
and the one-shot's masks beside them.

Manifests say how far the outputs moved, not which pairs were kept. To tell, some rows from the
middle of some experts' linears are read by byte range: at Kimi-K2.5's size 180 linears and 60 MB,
whatever the model weighs.

Legend: O out (the rows read), B packed bytes, G scale groups.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch import Tensor

from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import INDEX_FILE, SINGLE_FILE, CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.checkpoint.sparse_storage import (
    GROUP_SIZE,
    PACKED,
    SCALE,
    dense_tensors,
    storage_of,
    stored_suffixes,
)
from p48ray.checkpoint.tensors import read_tensors
from p48ray.numerics import paired48
from p48ray.numerics.solution import PAIRED_48
from p48ray.report.inspect import pattern_names, scale_histogram
from p48ray.run import run_root
from p48ray.store.base import Store
from p48ray.store.view import SubStore
from p48ray.unit.context import StageContext

SAMPLED_LINEARS = 192  # of all layers together; at least one expert of every layer
SAMPLED_EXPERTS = 4  # of a layer, at most
SAMPLED_BYTES = 2**18  # of a linear's packed weights
EXPERT_STEP = 37  # from layer to layer, so that not all layers show the same expert
READS_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSample:
    """Some rows of one linear. `overlap`: share of its kept pairs that the one-shot's checkpoint
    keeps too, None without one."""

    layer: int
    expert: int
    projection: str
    rows: int
    patterns: dict[str, int]
    scales: dict[str, int]
    overlap: float | None


def sample_checkpoint(context: StageContext, baseline_store: Store | None) -> list[LinearSample]:
    """Samples of the run's checkpoint, layer by layer; none when it is not there (a pilot).

    Args: baseline_store: run root of the one-shot reference.
    """
    ours = opened(context.store)
    theirs = None if baseline_store is None else opened(baseline_store)
    if ours is None:
        return []

    def one(where: tuple[int, int, str]) -> LinearSample:
        return sample_linear(context, ours, theirs, *where)

    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return list(pool.map(one, chosen(context.plan.layers, context.layout.num_experts)))


def opened(store: Store) -> CheckpointIndex | None:
    folder = SubStore(store, run_root.CHECKPOINT)
    return (
        open_checkpoint(folder)
        if any(folder.head(name) for name in (INDEX_FILE, SINGLE_FILE))
        else None
    )


def chosen(layers: Sequence[int], num_experts: int) -> Iterator[tuple[int, int, str]]:
    """(layer, expert, projection) of what is looked at: the same for every run of the same
    shape."""
    count = min(
        num_experts, SAMPLED_EXPERTS, max(1, SAMPLED_LINEARS // (len(PROJECTIONS) * len(layers)))
    )
    for position, layer in enumerate(layers):
        for i in range(count):
            expert = (position * EXPERT_STEP + i * num_experts // count) % num_experts
            yield from ((layer, expert, projection) for projection in PROJECTIONS)


def sample_linear(
    context: StageContext,
    ours: CheckpointIndex,
    theirs: CheckpointIndex | None,
    layer: int,
    expert: int,
    projection: str,
) -> LinearSample:
    """Some rows of one linear, and how far the reference's mask agrees.

    Args:
        context: of the run.
        ours: the run's checkpoint.
        theirs: that of the one-shot reference; None without one.
        layer, expert, projection: of the linear.
    """
    name = context.layout.expert_linear_name(layer, expert, projection)
    packed_OB, scale_OG = middle_rows(ours, name, PACKED), middle_rows(ours, name, SCALE)
    is_sparse = context.plan.config.compression.sparsity == PAIRED_48
    patterns = (
        dict(zip(pattern_names(), paired48.pattern_histogram(packed_OB).tolist(), strict=True))
        if is_sparse
        else {}
    )
    overlap = None
    if is_sparse and theirs is not None and f"{name}.{SCALE}" in theirs.tensors:
        overlap = mask_overlap(packed_OB, middle_rows(theirs, name, PACKED))
    return LinearSample(
        layer=layer,
        expert=expert,
        projection=projection,
        rows=len(packed_OB),
        patterns=patterns,
        scales=scale_histogram(scale_OG.float()),
        overlap=overlap,
    )


def middle_rows(index: CheckpointIndex, linear: str, suffix: str) -> Tensor:
    """Consecutive rows from the middle of a linear's codes or scales, in dense storage, read by
    byte range from either: as many as SAMPLED_BYTES of dense codes are."""
    storage = storage_of(index.config)
    scales = index.tensors[f"{linear}.{SCALE}"]
    codes_in_row = scales.shape[1] * GROUP_SIZE[storage] // 2  # bytes
    count = min(scales.shape[0], max(1, SAMPLED_BYTES // codes_in_row))
    names = [f"{linear}.{stored}" for stored in stored_suffixes(suffix, storage)]
    stored = read_tensors(index.store, [rows_of(index.tensors[name], count) for name in names])
    return (dense_tensors(stored) if storage == "sparse" else stored)[f"{linear}.{suffix}"]


def rows_of(entry: TensorEntry, count: int) -> TensorEntry:
    """`count` rows from the middle of a matrix, as an entry of their own."""
    row_bytes = entry.num_bytes // entry.shape[0]
    start = entry.start + (entry.shape[0] - count) // 2 * row_bytes
    return replace(entry, start=start, num_bytes=count * row_bytes, shape=(count, *entry.shape[1:]))


def mask_overlap(packed_OB: Tensor, other_OB: Tensor) -> float:
    """Share of the kept pairs of one that the other keeps; two random paired-4:8 masks share a
    half."""
    ours, theirs = (paired48.keep_top_pairs((p != 0).float()) for p in (packed_OB, other_OB))
    return float((ours & theirs).sum() / ours.sum())


def total(samples: Sequence[LinearSample], projection: str, what: str) -> dict[str, int]:
    """`patterns` or `scales` of all samples of a projection, in the order of the names (powers of
    two by size)."""
    counts: Counter[str] = Counter()
    for sample in samples:
        if sample.projection == projection:
            counts.update(getattr(sample, what))
    return (
        dict(
            sorted(
                counts.items(), key=lambda item: (not item[0].startswith("not"), exponent(item[0]))
            )
        )
        if what == "scales"
        else dict(counts)
    )


def exponent(name: str) -> int:
    return int(name.removeprefix("2^")) if name.startswith("2^") else 0
