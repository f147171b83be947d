"""Tasks on a Ray cluster: one actor per worker holds the opened source and, on a GPU, its CUDA
context; tasks and results are ids and a few numbers.

What becomes of a task that fails:
    an error of ours         deterministic, so it is set aside at once
    a transient store error  tried again, run.max_attempts times in all
    a foreign exception      tried again as often, in a fresh process: the old one (its GPU context,
                             its memory) may be unsound
    its worker died          the same
    its node died            (or is out of reach) tried again; preemption is nobody's fault and
                             counts apart, up to MAX_PREEMPTIONS

A worker that computes a unit gets the next one (run.prefetch_units) while there is one for every
worker, to read for it meanwhile. When it dies with several in hand, nobody knows whose fault it
was, and the attempt counts for none; whatever failed or was lost once has a worker for itself from
then on. Every failed attempt leaves its traceback under failures/, and the rest of the stage goes
on.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import ActorUnavailableError, RayError

from p48ray.errors import StageFailedError, UserError, WorkerLostError
from p48ray.run.plan import RunPlan
from p48ray.run.scratch import ScratchUse
from p48ray.runner.base import POLL_S, TaskList, WorkSource
from p48ray.runner.budget import budget_of
from p48ray.runner.capacity import machine_gpus, workers_here
from p48ray.runner.cluster import (
    START_TIMEOUT_S,
    Cluster,
    check_shared,
    first_line,
    starts_own,
    what_there_is,
)
from p48ray.runner.console import FROM_WORKERS
from p48ray.runner.dispatch import Dispatcher
from p48ray.runner.worker_process import WorkerProcess
from p48ray.stages.inputs import open_run_root
from p48ray.stages.tasks import Task, TaskResult, record_failure
from p48ray.store.base import Store

log = logging.getLogger(__name__)
worker_log = logging.getLogger(FROM_WORKERS)

SHARED_ROOT = "set run.root_is_shared: true if every node mounts the same folder"
CLOSE_TIMEOUT_S = 20.0
MAX_PREEMPTIONS = 50  # of one task; by then something else is wrong


@dataclass(frozen=True, slots=True, eq=False)
class Worker:
    """An actor that is up, and the node it is on."""

    actor: Any
    node: str


class RayRunner:
    """Runs tasks on `num_workers` actors.

    Args:
        plan: with run.num_workers, run.gpus_per_worker, run.threads_per_worker.
        store_uri: the run root.
        address: of a running cluster; None starts a Ray on this machine and stops it at the end.
        is_verbose: workers print all that they log.
    Raises: ConfigError where no worker has room on this machine, and Ray is started here.
    """

    def __init__(
        self, plan: RunPlan, store_uri: str, address: str | None, is_verbose: bool = False
    ) -> None:
        self.plan, self.store_uri, self.is_verbose = plan, store_uri, is_verbose
        self.settings = run = plan.config.run
        self.source: WorkSource = TaskList(())  # whose tasks are handed out; see run
        gpus = machine_gpus() if starts_own(address) else None
        self.num_workers = run.num_workers if gpus is None else workers_here(run, gpus)
        self.cluster = Cluster(address, self.num_workers * run.threads_per_worker, num_gpus=gpus)
        self.idle: list[Worker] = []
        self.starting: dict[Any, Any] = {}  # start() reference -> actor
        self.running: dict[Any, tuple[Worker, Task]] = {}  # by execute() reference
        self.store: Store = open_run_root(plan, store_uri)
        self.scratch = ScratchUse(plan, self.store)
        self.failures: Counter[str] = Counter()  # attempts that failed, by task
        self.preemptions: Counter[str] = Counter()
        # tasks that failed or were lost: they share no worker any more
        self.isolated: set[str] = set()
        self.failed_starts = 0
        self.budget = budget_of(plan, self.store, time.monotonic)

    def __enter__(self) -> Self:
        """Raises: ConfigError for an address without a cluster, a local run root on several nodes,
        or a scratch folder that can not be written."""
        run = self.settings
        with ExitStack() as opened:
            opened.enter_context(self.scratch)
            opened.enter_context(self.cluster)
            check_shared("run.root", self.store_uri, run.root_is_shared, SHARED_ROOT)
            actor = ray.remote(WorkerProcess)
            options = {"num_cpus": run.threads_per_worker, "num_gpus": run.gpus_per_worker}
            together = 1 + run.prefetch_units
            self.factory = actor.options(**options, max_restarts=0, max_concurrency=together)
            if self.cluster.is_own:  # on a cluster a worker may be a machine that is paid for
                for _ in range(self.num_workers):
                    self.start_worker()
            self.opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Those that are starting, and those that are busy, go first: one that is in its node's
        # cache would keep the last of the others from removing it.
        for actor in [*self.starting.values(), *(worker.actor for worker in self.assigned())]:
            ray.kill(actor)
        if self.starting:
            ray.wait([*self.starting], num_returns=len(self.starting), timeout=CLOSE_TIMEOUT_S)
        # A node without an idle worker leaves its cache to the next run's sweep.
        if self.idle:
            ray.wait(
                [worker.actor.close.remote() for worker in self.idle],
                num_returns=len(self.idle),
                timeout=CLOSE_TIMEOUT_S,
            )
        for worker in self.idle:
            ray.kill(worker.actor)
        self.opened.close()

    def run(self, source: WorkSource) -> Iterator[TaskResult]:
        """Hand each task to an idle worker; yield results as they finish. Workers stay for the next
        stage.

        Raises: BudgetSpentError, once nothing is under way, with tasks left.
        """
        self.source, waiting = source, Dispatcher(source.next(False))
        self.failures.clear()
        self.preemptions.clear()
        self.isolated.clear()
        quiet_s = 0.0
        try:
            while True:
                waiting.add(source.next(not waiting and not self.running))
                self.budget.count(self.num_held())
                if not self.running and (not waiting or self.budget.is_spent):
                    if waiting:
                        raise self.budget.error()
                    return
                if not self.budget.is_spent:
                    self.dispatch(waiting)
                done, _ = ray.wait([*self.starting, *self.running], num_returns=1, timeout=POLL_S)
                if not done:
                    self.cluster.check_alive()
                quiet_s = 0.0 if done or self.running else quiet_s + POLL_S
                if quiet_s >= START_TIMEOUT_S:
                    self.warn_no_capacity()
                    quiet_s = 0.0
                for ref in done:
                    if ref in self.starting:
                        self.handle_start(ref)
                    else:
                        yield from self.handle_result(ref, waiting)
        finally:
            # only left when the caller stopped listening: nobody would read these results
            for worker in self.assigned():
                ray.kill(worker.actor)
            self.running.clear()

    def num_held(self) -> int:
        """Workers that Ray was asked for and that are not gone."""
        return len(self.starting) + len(self.idle) + len(self.assigned())

    def dispatch(self, waiting: Dispatcher) -> None:
        """Give tasks to idle workers; start workers while there are fewer than wanted and tasks
        that none of those that are starting will take."""
        while self.idle and (task := waiting.take(self.idle[-1].node)):
            self.assign(self.idle.pop(), task)
        assigned = self.assigned()
        while (
            len(waiting) > len(self.starting)
            and len(self.starting) + len(assigned) < self.num_workers
        ):
            self.start_worker()
        self.assign_ahead(waiting, assigned)

    def start_worker(self) -> None:
        actor = self.factory.remote(self.plan.to_json(), self.store_uri)
        self.starting[actor.start.remote(self.is_verbose, self.scratch.probe())] = actor

    def assign_ahead(self, waiting: Dispatcher, assigned: Mapping[Worker, Sequence[Task]]) -> None:
        """One more unit for workers that compute one, while there is one for every worker, those
        that are starting included.

        So the last units are read ahead like all others, and a worker is idle beside one that has
        two only if that one is a whole unit behind.
        """
        workers = len(assigned) + len(self.starting)
        ahead = sum(len(tasks) - 1 for tasks in assigned.values())
        for held in range(1, 1 + self.settings.prefetch_units):
            for worker, tasks in assigned.items():
                if len(tasks) > held or any(
                    task.layer is None or task.id in self.isolated for task in tasks
                ):
                    continue
                if len(waiting) + ahead >= held * workers and (
                    task := waiting.take_ahead(worker.node, self.isolated)
                ):
                    self.assign(worker, task)
                    ahead += 1

    def assign(self, worker: Worker, task: Task) -> None:
        self.running[worker.actor.execute.remote(task)] = (worker, task)
        self.source.begun(task)

    def assigned(self) -> dict[Worker, list[Task]]:
        """The tasks of every worker that has any, as they were handed out."""
        found: dict[Worker, list[Task]] = {}
        for worker, task in self.running.values():
            found.setdefault(worker, []).append(task)
        return found

    def unassign(self, worker: Worker) -> list[Task]:
        """What a worker still has in hand; nobody waits for its results any more."""
        refs = [ref for ref, (holder, _) in self.running.items() if holder is worker]
        return [self.running.pop(ref)[1] for ref in refs]

    def handle_start(self, ref: Any) -> None:
        """A worker that is up, or that died on its way."""
        actor = self.starting.pop(ref)
        try:
            found: str | Exception = ray.get(ref)
        except RayError as error:  # it died, or raised what is not ours
            found = error
        if isinstance(found, str):
            self.failed_starts = 0
            self.idle.append(Worker(actor, found))
            return
        ray.kill(actor)
        if isinstance(found, UserError):
            raise found
        self.failed_starts += 1
        if self.failed_starts >= self.settings.max_attempts * self.num_workers:
            raise StageFailedError(
                f"workers can not start ({self.failed_starts} tries): {found}"
            ) from found
        log.warning("a worker could not start: %s", first_line(found))

    def handle_result(self, ref: Any, waiting: Dispatcher) -> Iterator[TaskResult]:
        """A task that ended, or whose worker died."""
        worker, task = self.running.pop(ref)
        try:
            result: TaskResult = ray.get(ref)
        except RayError as error:
            self.cluster.check_alive()
            # one that is only out of reach would keep its place in the cluster
            ray.kill(worker.actor)
            yield from self.handle_loss(worker, task, error, waiting)
            return
        for line in result.lines:
            worker_log.info("%s", line)
        if result.is_foreign:
            ray.kill(worker.actor)
            self.isolate(self.unassign(worker), waiting)
        elif worker not in self.assigned():
            self.idle.append(worker)
        if result.is_transient or result.is_foreign:
            yield from self.try_again(task, result, waiting)
        else:
            yield result

    def handle_loss(
        self, worker: Worker, task: Task, error: RayError, waiting: Dispatcher
    ) -> Iterator[TaskResult]:
        """Tasks whose worker died under them, alone or with its node.

        Args:
            worker: that is gone, or out of reach.
            task: whose result said so; no longer among those that run.
            error: that came instead of the result.
            waiting: takes back what is to run again.
        """
        tasks = [task, *self.unassign(worker)]
        loss = WorkerLostError(first_line(error))
        # A worker that died on a living node is reported as dead; one that can not be reached is on
        # a node that Ray has not given up yet.
        is_out_of_reach = isinstance(error, ActorUnavailableError)
        if is_out_of_reach or worker.node not in {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
            waiting.forget(worker.node)
            self.drop_idle(worker.node)
            for lost in tasks:
                yield from self.handle_preemption(lost, loss, waiting)
        elif len(tasks) > 1:
            self.isolate(tasks, waiting)
        else:
            yield from self.handle_death(task, loss, waiting)

    def handle_preemption(
        self, task: Task, loss: WorkerLostError, waiting: Dispatcher
    ) -> Iterator[TaskResult]:
        """A task whose node is gone; that counts against it only when it has happened too often."""
        self.preemptions[task.id] += 1
        if self.preemptions[task.id] > MAX_PREEMPTIONS:
            yield from self.handle_death(task, loss, waiting)
            return
        log.warning("%s %s: its node is gone, it goes to another: %s", task.stage, task.id, loss)
        waiting.put_back(task)

    def handle_death(
        self, task: Task, loss: WorkerLostError, waiting: Dispatcher
    ) -> Iterator[TaskResult]:
        """A task whose worker died of it, for all that is known."""
        record_failure(self.store, task, loss)
        yield from self.try_again(
            task,
            TaskResult(task=task, error_type=WorkerLostError.__name__, error=str(loss)),
            waiting,
        )

    def isolate(self, tasks: Sequence[Task], waiting: Dispatcher) -> None:
        """Back to the queue, without a failed attempt: tasks that shared a worker which is gone."""
        for task in tasks:
            log.warning(
                "%s %s: its worker is gone, with several units in hand; it goes to one of its own",
                task.stage,
                task.id,
            )
            self.isolated.add(task.id)
            waiting.put_back(task)

    def drop_idle(self, node: str) -> None:
        """Give up the idle workers of a node that is lost, so that no task is handed to them."""
        for worker in [w for w in self.idle if w.node == node]:
            ray.kill(worker.actor)
            self.idle.remove(worker)

    def try_again(
        self, task: Task, result: TaskResult, waiting: Dispatcher
    ) -> Iterator[TaskResult]:
        """Back to the queue, or given up after run.max_attempts."""
        self.failures[task.id] += 1
        self.isolated.add(task.id)
        attempt = self.failures[task.id]
        if attempt < self.settings.max_attempts:
            log.warning(
                "%s %s: attempt %d failed, it will be tried again: %s: %s",
                task.stage,
                task.id,
                attempt,
                result.error_type,
                result.error,
            )
            waiting.put_back(task)
        else:
            yield result

    def warn_no_capacity(self) -> None:
        log.warning(
            "waiting for a node with room: a worker asks for %d CPU (run.threads_per_worker) and %g"
            " GPU (run.gpus_per_worker), %s",
            self.settings.threads_per_worker,
            self.settings.gpus_per_worker,
            what_there_is(),
        )
