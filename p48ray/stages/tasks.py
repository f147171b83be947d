"""The unit of dispatch: a stage's name and one item of its work. Runners hand tasks to processes; a `Workplace` is what each process does them with."""

import logging
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from p48ray import errors, run_root, trace
from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import CONFIG_FILE, open_checkpoint
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.errors import CorruptObjectError, P48Error, TransientStoreError
from p48ray.manifest import Failure, ShardVerdict, UnitManifest
from p48ray.output_layout import OutputShard, shard_rows
from p48ray.plan import RunPlan, SequencePart, WorkUnit
from p48ray.stages.capture import capture_parts
from p48ray.stages.compiling import start_compiling
from p48ray.stages.compress import compress_unit
from p48ray.stages.context import StageContext
from p48ray.stages.evaluate import compressed_expert, evaluate_part
from p48ray.stages.fit import warn_of_memory
from p48ray.stages.gradients import gradient_parts
from p48ray.stages.inputs import open_run_root
from p48ray.stages.mirror import look, mirror_file, open_source
from p48ray.stages.propagate import propagate_parts
from p48ray.stages.reduce import stitch_shard
from p48ray.stages.verify import Promise, verify_shard
from p48ray.store.base import Store, Traffic
from p48ray.store.checked_files import CheckedFiles
from p48ray.store.node_cache import NodeCache, node_folder, sweep_unused
from p48ray.store.view import SubStore, local_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One item of a stage's work: `item` is small and picklable, ids and positions, never weights.

    `marker`: the key whose presence means that it is done, whoever did it. `layer`, `load`: what runners dispatch by.
    """

    stage: str
    id: str
    item: Any
    marker: str | None = None
    layer: int | None = None
    load: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """How a task ended. `error_type` is the name of a class of p48ray.errors, or of any other exception.

    `redo`: keys of corrupt objects, to be deleted so that they are made anew. `facts`: what a unit's manifest says that metrics count.
    """

    task: Task
    error_type: str | None = None
    error: str = ""
    redo: tuple[str, ...] = ()
    seconds: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.error_type is None

    @property
    def is_transient(self) -> bool:
        return self.error_type == TransientStoreError.__name__

    @property
    def is_foreign(self) -> bool:
        """Not an error of ours: a bug, or a process (a GPU context) that is no longer sound."""
        kind = getattr(errors, self.error_type or "", None)
        return not self.is_done and not (isinstance(kind, type) and issubclass(kind, P48Error))

    def as_exception(self) -> P48Error:
        """The error as the stage raised it, or a StageFailedError around a foreign one."""
        kind = getattr(errors, self.error_type or "", None)
        if isinstance(kind, type) and issubclass(kind, P48Error):
            return kind(self.error)
        return errors.StageFailedError(f"{self.task.stage} {self.task.id}: {self.error_type}: {self.error}")


def open_context(plan: RunPlan, store: Store, node: str | None = None) -> StageContext:
    """Open the source in this process, and fix what could change a sum: threads and precision.

    Args:   node: name of this node among those that share a disk; without one the process caches nothing.
    Raises: SourceError when the source is not the one that was planned.
    """
    torch.set_num_threads(plan.config.run.threads_per_worker)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    source = open_source(plan, store)
    on_gpu = plan.config.run.gpus_per_worker > 0
    context = StageContext(
        plan=plan,
        store=store,
        source=source,
        layout=describe_model(source),
        device=torch.device("cuda" if on_gpu else "cpu"),
    )
    if node is None:
        return context
    cache = open_cache(context, node)
    return replace(context, cache=cache, files=CheckedFiles(cache.folder))


def open_cache(context: StageContext, node: str) -> NodeCache:
    """This node's folder: a cache of what is read from afar, which holds nothing where nothing is, and notes of what was checked.

    What killed workers of other runs left behind goes first.
    """
    run = context.plan.config.run
    is_near = context.store_is_near and local_path(context.source.store, CONFIG_FILE) is not None
    sweep_unused(run.node_cache)
    return NodeCache(node_folder(run.node_cache, node), 0 if is_near else run.node_cache_size)


class Workplace:
    """What one process works with: the run root at once, the source when the first task comes that reads it.

    The tasks of the mirror come before there is a source to open. A process that starts after them opens everything at its start.
    """

    def __init__(self, plan: RunPlan, store_uri: str, node: str | None = None) -> None:
        """Args: node: see open_context. Raises: SourceError when the source is not the one that was planned."""
        self.plan, self.store, self.node = plan, open_run_root(plan, store_uri), node
        self.opened: StageContext | None = None
        self.opening = threading.Lock()  # two tasks may be the first
        if look(plan, self.store).is_complete:
            self.context  # noqa: B018 (opened now)

    @property
    def context(self) -> StageContext:
        with self.opening:
            if self.opened is None:
                opened = open_context(self.plan, self.store, self.node)
                warn_of_memory(self.plan, opened.source, opened.layout, opened.device)
                self.opened = replace(opened, compiling=start_compiling(self.plan, opened.layout, opened.device))
            return self.opened

    def close(self) -> None:
        """Let go of the node's cache, and end what compiles kernels."""
        if self.opened is not None and self.opened.compiling is not None:
            self.opened.compiling.close()
        if self.opened is not None and self.opened.cache is not None:
            self.opened.cache.close()

    @property
    def traffic(self) -> list[Traffic]:
        """Counters of what this process has opened so far."""
        source = [self.opened.source.store.traffic] if self.opened is not None and not self.plan.source.mirror else []
        return [self.store.traffic, *source]

    def execute(self, task: Task) -> TaskResult:
        """Run one task; see `attempt`. From any thread: units of several can be under way at once, and take turns at computing (StageContext.turn)."""
        torch.set_num_threads(self.plan.config.run.threads_per_worker)  # which OpenMP keeps for every thread apart
        with trace.task(task.stage, task.id):
            if task.stage == MIRROR_STAGE:
                return attempt(self.store, task, lambda: mirror_file(self.store, task.item))
            return attempt(self.store, task, lambda: STAGES[task.stage](self.context, task.item))


def attempt(store: Store, task: Task, work: Callable[[], object]) -> TaskResult:
    """Do the work of one task; a failure is recorded in the bucket and returned, never raised, so that the rest of the stage goes on."""
    start = time.monotonic()
    try:
        made = work()
    except Exception as error:  # noqa: BLE001 (the one boundary: whatever a stage raises becomes a record with its traceback)
        record_failure(store, task, error)
        redo = error.keys if isinstance(error, CorruptObjectError) else ()
        return TaskResult(task=task, error_type=type(error).__name__, error=str(error), redo=redo, seconds=time.monotonic() - start)
    return TaskResult(task=task, seconds=time.monotonic() - start, facts=facts_of(made))


def facts_of(made: object) -> dict[str, float]:
    """Tokens, peak GPU memory, and seconds by phase of a unit; nothing for other tasks."""
    if not isinstance(made, UnitManifest):
        return {}
    tokens = sum(record.tokens for record in made.linears) / len(PROJECTIONS)
    peak = max(made.peak_gpu_bytes.values(), default=0)
    return {"tokens": tokens, "peak_gpu_bytes": peak} | {f"{phase}_s": seconds for phase, seconds in made.seconds.items()}


def record_failure(store: Store, task: Task, error: Exception) -> None:
    """Leave a failed attempt's traceback in the bucket."""
    attempt = uuid.uuid4().hex[:12]
    failure = Failure(
        stage=task.stage,
        task=task.id,
        attempt=attempt,
        error=f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        input=repr(task.item)[:2000],
        is_transient=isinstance(error, TransientStoreError),
    )
    log.error("%s %s failed: %s", task.stage, task.id, failure.error)
    try:
        store.put(run_root.failure(task.stage, task.id, attempt), failure.to_json())
    except P48Error as second:
        log.error("%s %s: the failure could not be recorded: %s", task.stage, task.id, second)


def verify_and_record(context: StageContext, shard: OutputShard) -> None:
    """Verify one output shard against source and manifests; the verdict is the done-marker."""
    claims: dict[str, float] = {}
    digests: dict[str, str] = {}
    for segment in shard.segments:
        if isinstance(segment, WorkUnit):
            manifest = UnitManifest.load(context.store, run_root.unit_manifest(segment.id))
            claims |= {record.name: record.relative_weight_error for record in manifest.linears}
            digests[segment.id] = manifest.sha256
    checkpoint = SubStore(context.store, run_root.CHECKPOINT)
    compression = context.plan.config.compression
    promise = Promise(
        is_sparse=compression.sparsity == "paired-4:8", scale_span=compression.scale_span, weight_errors=claims, unit_sha256=digests
    )
    found = verify_shard(checkpoint, context.source, context.layout, shard, promise, context.device)
    held = checkpoint.head(shard.name)
    verdict = ShardVerdict(
        plan_digest=context.plan.digest,
        shard=shard.name,
        size_bytes=held.size_bytes if held else 0,
        num_tensors=len(shard_rows(shard, context.layout)),
        num_linears=len(claims),
        problems=tuple(found.problems),
        header_sha256=found.header_sha256,
        untouched_sha256=dict(found.untouched_sha256),
    )
    context.store.put(run_root.shard_verdict(shard.name), verdict.to_json())


def evaluate_and_record(context: StageContext, item: tuple[str, SequencePart]) -> None:
    """Evaluate one part of the held-out sequences; the sums are the done-marker."""
    digest, part = item
    ids_NS = context.tokens(run_root.evaluation_tokens(digest), digest)
    checkpoint = open_checkpoint(SubStore(context.store, run_root.CHECKPOINT))
    ids_BS = ids_NS[part.first_sequence : part.first_sequence + part.num_sequences]
    sums = evaluate_part(context, partial(compressed_expert, checkpoint, context), ids_BS, part)
    context.store.put(run_root.evaluation_part(digest, part.part), sums.to_json())


MIRROR_STAGE = "mirror"  # the one stage that works without the source
STAGES: dict[str, Callable[[StageContext, Any], object]] = {
    "capture": capture_parts,
    "gradients": gradient_parts,
    "propagate": propagate_parts,
    "compress": compress_unit,
    "reduce": stitch_shard,
    "verify": verify_and_record,
    "evaluate": evaluate_and_record,
}
