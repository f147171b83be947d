"""A function over many items as Ray tasks, for commands that need no more of a cluster than that:
publishing, verifying, converting.

What becomes of a task that fails:
    a user's mistake        ends everything
    another error of ours   is set aside, the rest goes on
    a transient store error, a worker or its node lost, or what is not ours
                            tried again, MAX_ATTEMPTS times in all
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from p48ray.errors import (
    P48Error,
    StageFailedError,
    TransientStoreError,
    UserError,
    WorkerLostError,
)
from p48ray.runner.base import LISTED_FAILURES
from p48ray.runner.cluster import (
    START_TIMEOUT_S,
    Cluster,
    check_shared,
    first_line,
    what_there_is,
)
from p48ray.store.base import Store

log = logging.getLogger("p48ray.progress")

MAX_ATTEMPTS = 3  # at one item

T = TypeVar("T")
Body = Callable[..., T]


@dataclass(frozen=True, slots=True, kw_only=True)
class RayTasks:
    """Tasks of one CPU each.

    Args:
        what: names them in messages.
        num_workers: how many at once; None for as many as the cluster has CPUs.
        address: of a running cluster; None starts a Ray on this machine and stops it at the end.
        settings: environment variables of the tasks on a cluster, no secrets among them.
        is_shared: a local path is the same folder on every node.
        shows_logs: what workers print comes out here.
    """

    what: str
    num_workers: int | None
    address: str | None
    settings: Mapping[str, str] = field(default_factory=dict)
    is_shared: bool = False
    shows_logs: bool = True

    def run(
        self, body: Body[T], items: Mapping[str, Sequence[Any]], stores: Mapping[str, Store]
    ) -> Iterator[tuple[str, T]]:
        """Yields (name, result) as items are done. All that can be done is, before a failure is
        raised.

        Args:
            items: arguments by name, in the order in which they start.
            stores: those that tasks will open, by the option that names them.
        """
        with Cluster(self.address, self.num_workers or 1, self.shows_logs) as cluster:
            for option, store in stores.items():
                check_shared(option, store.uri, self.is_shared, "a shared folder")
            count = self.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            options = {} if cluster.is_own else {"runtime_env": {"env_vars": dict(self.settings)}}
            yield from self.run_tasks(cluster, body, items, count, options)

    def run_tasks(
        self,
        cluster: Cluster,
        body: Body[T],
        items: Mapping[str, Sequence[Any]],
        count: int,
        options: Mapping[str, Any],
    ) -> Iterator[tuple[str, T]]:
        """The loop of `run`, on a cluster that is joined already.

        Args:
            cluster: that was joined.
            body, items: as `run` takes them.
            count: tasks at once.
            options: for ray.remote, besides CPUs and retries.
        """
        task = ray.remote(returning_errors(body)).options(num_cpus=1, max_retries=0, **options)
        waiting = list(items)[::-1]
        attempts: Counter[str] = Counter()
        running: dict[Any, str] = {}
        failed: dict[str, P48Error] = {}
        try:
            while waiting or running:
                while waiting and len(running) < count:
                    name = waiting.pop()
                    running[task.remote(*items[name])] = name
                done, _ = ray.wait(list(running), num_returns=1, timeout=START_TIMEOUT_S)
                if not done:
                    cluster.check_alive()
                    self.warn_no_capacity()
                    continue
                name = running.pop(done[0])
                found = outcome(done[0])
                if not isinstance(found, P48Error):
                    yield name, found
                    continue
                if isinstance(found, UserError):
                    raise found
                if isinstance(found, WorkerLostError):
                    cluster.check_alive()
                attempts[name] += 1
                may_pass = isinstance(found, TransientStoreError | WorkerLostError)
                if may_pass and attempts[name] < MAX_ATTEMPTS:
                    log.warning(
                        "%s %s: attempt %d failed, it will be tried again: %s",
                        self.what,
                        name,
                        attempts[name],
                        found,
                    )
                    waiting.append(name)
                else:
                    failed[name] = found
        finally:
            for ref in running:
                ray.cancel(ref, force=True)
        if failed:
            lines = [
                f"  {name}: {type(error).__name__}: {first_line(error)}"
                for name, error in list(failed.items())[:LISTED_FAILURES]
            ]
            raise StageFailedError(
                f"{self.what}: {len(failed)} of {len(items)} shards failed; run the same command"
                " again to go on\n" + "\n".join(lines)
            )

    def warn_no_capacity(self) -> None:
        """Nothing has ended for a while: that may be a long task, or a cluster that has no place
        for one."""
        if ray.cluster_resources().get("CPU", 0) < 1:
            log.warning(
                "%s: waiting for a node with CPUs: a task asks for 1 CPU, %s",
                self.what,
                what_there_is(),
            )


def returning_errors(body: Body[T]) -> Callable[..., T | P48Error]:
    """The body as Ray calls it: an error of ours comes back as a result, which tells it from a
    process that died, and keeps its own type."""

    @functools.wraps(body)
    def call(*args: Any) -> T | P48Error:
        try:
            return body(*args)
        except P48Error as error:
            return error

    return call


def outcome(ref: Any) -> Any:
    """A finished task's result, or what went wrong. A process that died, or that raised what is not
    ours, may be replaced."""
    try:
        return ray.get(ref)
    except RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return WorkerLostError(lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}")
