"""What one process works with: the run root and the source, opened once, and the bodies of the
stages."""

import threading
from contextlib import suppress
from dataclasses import replace

import torch

from p48ray import trace
from p48ray.checkpoint.families import FAMILIES, describe_model
from p48ray.checkpoint.index import CONFIG_FILE
from p48ray.estimate.fit import warn_of_memory
from p48ray.model.architecture import architecture
from p48ray.run.plan import RunPlan
from p48ray.stages.inputs import open_run_root
from p48ray.stages.mirror import mirror_state, open_source
from p48ray.stages.table import STAGES
from p48ray.stages.tasks import Task, TaskResult, attempt
from p48ray.store.base import Store, Traffic
from p48ray.store.checked_files import CheckedFiles
from p48ray.store.node_cache import NodeCache, node_folder, sweep_unused
from p48ray.store.view import local_path
from p48ray.unit.compiling import start_compiling
from p48ray.unit.context import StageContext


def open_context(plan: RunPlan, store: Store, node: str | None = None) -> StageContext:
    """Open the source in this process, and fix what could change a sum: threads and precision.

    Args:
        node: name of this node among those that share a disk; without one the process caches
            nothing.
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
    """This node's folder: a cache of what is read from afar, which holds nothing where nothing is,
    and notes of what was checked.

    What killed workers of other runs left behind goes first.
    """
    run = context.plan.config.run
    is_near = context.store_is_near and local_path(context.source.store, CONFIG_FILE) is not None
    sweep_unused(run.node_cache)
    return NodeCache(node_folder(run.node_cache, node), 0 if is_near else run.node_cache_size)


def warm_up(context: StageContext) -> None:
    """What the first task on a GPU would wait for, while the driver packs texts: transformers'
    import and a CUDA context, seconds each."""
    with suppress(Exception):  # whoever needs it meets the error again, and says where
        torch.zeros(1, device=context.device)
        architecture(FAMILIES[context.layout.family])


class Workplace:
    """What one process works with: the run root at once, the source when the first task comes that
    reads it.

    The tasks of the mirror come before there is a source to open. A process that starts after them
    opens everything at its start.
    """

    def __init__(self, plan: RunPlan, store_uri: str, node: str | None = None) -> None:
        """Open the run root; the source too where it is there already.

        Args:
            node: see open_context.
        Raises: SourceError when the source is not the one that was
            planned.
        """
        self.plan, self.store, self.node = plan, open_run_root(plan, store_uri), node
        self.opened: StageContext | None = None
        self.opening = threading.Lock()  # two tasks may be the first
        if mirror_state(plan, self.store).is_complete:
            self.context  # noqa: B018 (opened now)

    @property
    def context(self) -> StageContext:
        with self.opening:
            if self.opened is None:
                opened = open_context(self.plan, self.store, self.node)
                warn_of_memory(self.plan, opened.source, opened.layout, opened.device)
                self.opened = replace(
                    opened, compiling=start_compiling(self.plan, opened.layout, opened.device)
                )
                if opened.device.type == "cuda":
                    threading.Thread(target=warm_up, args=(opened,), daemon=True).start()
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
        source = (
            [self.opened.source.store.traffic]
            if self.opened is not None and not self.plan.source.mirror
            else []
        )
        return [self.store.traffic, *source]

    def execute(self, task: Task) -> TaskResult:
        """Run one task; see `attempt`. From any thread: units of several can be under way at once,
        and compute one at a time (StageContext.compute_lock)."""
        # which OpenMP keeps for every thread apart
        torch.set_num_threads(self.plan.config.run.threads_per_worker)
        with trace.task(task.stage, task.id):
            return attempt(self.store, task, lambda: self.work(task))

    def work(self, task: Task) -> object:
        stage = STAGES[task.stage]
        return stage.body(self.context if stage.opens_source else self.store, task.item)
