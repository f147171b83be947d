"""Tasks on a Ray cluster: one actor per worker holds the opened source and, on a GPU, its context; tasks are ids, results are verdicts.

A worker that dies takes its task back to the queue. Application errors are not retried; transient store errors are, up to run.max_attempts.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayActorError

from p48ray.errors import ConfigError, P48Error, StageFailedError, UserError
from p48ray.plan import RunPlan
from p48ray.runner.console import configure_logging
from p48ray.stages.tasks import Task, TaskResult, execute, open_context

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0  # how long to wait for a first worker before saying that the cluster has no room
OBJECT_STORE_BYTES = 256 * 2**20  # of a Ray that this job starts itself: tasks and results are kilobytes


class WorkerProcess:
    """The actor's body: opens the context once, then executes tasks."""

    def __init__(self, plan_json: bytes, store_uri: str) -> None:
        configure_logging()
        self.plan_json, self.store_uri = plan_json, store_uri

    def ready(self) -> P48Error | None:
        """Open the context. Returns what is wrong instead of raising it, which would reach the driver as a dead actor."""
        try:
            self.context = open_context(RunPlan.from_json(self.plan_json, "the driver's plan"), self.store_uri)
        except P48Error as error:
            return error
        return None

    def execute(self, task: Task) -> TaskResult:
        return execute(self.context, task)


class RayRunner:
    """Runs tasks on `num_workers` actors.

    Args: plan: with run.num_workers, run.gpus_per_worker, run.threads_per_worker. store_uri: the run root.
          address: of a running cluster; None starts a Ray on this machine and stops it at the end.
    """

    def __init__(self, plan: RunPlan, store_uri: str, address: str | None) -> None:
        self.plan, self.store_uri, self.address = plan, store_uri, address
        self.settings = plan.config.run
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}  # ready() reference -> actor
        self.running: dict[Any, tuple[Any, Task, int]] = {}  # execute() reference -> (actor, task, attempt)
        self.failed_starts = 0
        self.has_joined = False

    def __enter__(self) -> Self:
        if not ray.is_initialized():
            self.join()
        self.check_shared()
        actor = ray.remote(WorkerProcess)
        options = {"num_cpus": self.settings.threads_per_worker, "num_gpus": self.settings.gpus_per_worker, "max_restarts": 0}
        self.factory = actor.options(**options)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for actor in [*self.idle, *self.starting.values(), *(actor for actor, _, _ in self.running.values())]:
            ray.kill(actor)
        if self.has_joined:  # a Ray that the caller started is the caller's to stop
            ray.shutdown()

    def join(self) -> None:
        """Connect to the cluster, or start a Ray of this machine. Raises: ConfigError for an address where there is none."""
        own: dict[str, Any] = {
            "num_cpus": self.settings.num_workers * self.settings.threads_per_worker,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "address": "local",
        }
        try:
            ray.init(**({"address": self.address} if self.address else own), log_to_driver=True, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if self.address is None:
                raise
            raise ConfigError(
                f"RAY_ADDRESS: expected host:port of a running Ray cluster, found {self.address!r}: {first_line(error)}; "
                "start one with `ray start --head`, or unset RAY_ADDRESS to use this machine alone"
            ) from error
        self.has_joined = True

    def check_shared(self) -> None:
        """A local path means another folder on every node, unless the user says that it does not."""
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        if len(nodes) > 1 and not self.settings.root_is_shared:
            raise ConfigError(
                f"run.root: {self.store_uri} is a local path and the cluster has {len(nodes)} nodes; "
                "use a bucket, or set run.root_is_shared: true if every node mounts the same folder"
            )

    def run(self, tasks: Sequence[Task]) -> Iterator[TaskResult]:
        """Hand each task to the next idle worker; yield results as they finish. Workers stay for the next stage."""
        waiting = deque((task, 1) for task in tasks)
        try:
            while waiting or self.running:
                self.dispatch(waiting)
                done, _ = ray.wait([*self.starting, *self.running], num_returns=1, timeout=START_TIMEOUT_S)
                if not done and not self.running:
                    self.say_no_room()
                for ref in done:
                    if ref in self.starting:
                        self.settle_start(ref)
                    else:
                        yield from self.settle_task(ref, waiting)
        finally:
            for actor, _, _ in self.running.values():  # only left when the caller stopped listening: nobody would read these results
                ray.kill(actor)
            self.running.clear()

    def dispatch(self, waiting: deque[tuple[Task, int]]) -> None:
        """Give tasks to idle workers; start workers while there are fewer than wanted and tasks that none of those on their way up will take."""
        while waiting and self.idle:
            actor, (task, attempt) = self.idle.pop(), waiting.popleft()
            self.running[actor.execute.remote(task)] = (actor, task, attempt)
        while len(waiting) > len(self.starting) and len(self.starting) + len(self.running) < self.settings.num_workers:
            actor = self.factory.remote(self.plan.to_json(), self.store_uri)
            self.starting[actor.ready.remote()] = actor

    def settle_start(self, ref: Any) -> None:
        """A worker that is up, or that died on its way."""
        actor = self.starting.pop(ref)
        try:
            problem: Exception | None = ray.get(ref)
        except RayActorError as error:
            problem = error
        if problem is None:
            self.idle.append(actor)
            return
        ray.kill(actor)
        if isinstance(problem, UserError):
            raise problem
        self.failed_starts += 1
        if self.failed_starts >= self.settings.max_attempts * self.settings.num_workers:
            raise StageFailedError(f"workers can not start ({self.failed_starts} tries): {problem}") from problem
        log.warning("a worker could not start: %s", first_line(problem))

    def settle_task(self, ref: Any, waiting: deque[tuple[Task, int]]) -> Iterator[TaskResult]:
        """A task that ended, or whose worker died."""
        actor, task, attempt = self.running.pop(ref)
        try:
            result = ray.get(ref)
        except RayActorError as error:
            log.warning("%s %s: its worker died in attempt %d: %s", task.stage, task.id, attempt, first_line(error))
            ray.kill(actor)  # one that is only out of reach would keep its place in the cluster
            if attempt < self.settings.max_attempts:
                waiting.append((task, attempt + 1))
            else:
                yield TaskResult(task=task, error_type="WorkerDied", error=f"its worker died {attempt} times")
            return
        self.idle.append(actor)
        if result.is_transient and attempt < self.settings.max_attempts:
            log.warning("%s %s: attempt %d met a transient error: %s", task.stage, task.id, attempt, result.error)
            waiting.append((task, attempt + 1))
        else:
            yield result

    def say_no_room(self) -> None:
        wanted = f"{self.settings.threads_per_worker} CPU and {self.settings.gpus_per_worker:g} GPU a worker"
        log.warning("waiting for workers: %s wanted, the cluster has %s free", wanted, ray.available_resources())


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
