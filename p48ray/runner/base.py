"""What a runner is: something that takes tasks from a source and returns how each one ended."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from p48ray.errors import (
    CorruptObjectError,
    StageFailedError,
    TransientStoreError,
    UserError,
)
from p48ray.runner.stage_times import StageTimes
from p48ray.stages.tasks import Task, TaskResult
from p48ray.store.base import Store

log = logging.getLogger(__name__)

LISTED_FAILURES = 10
POLL_S = 5.0
"""How long nothing may happen until the driver asks whether there is more to do."""


class WorkSource(Protocol):
    """Where a runner's tasks come from."""

    def next(self, is_idle: bool) -> Sequence[Task]:
        """Tasks that became ready since the last call, each once. Asked first, at intervals, and
        whenever a task has ended.

        Args: is_idle: nothing waits and nothing runs; what is not named now is not asked for again.
        """
        ...

    def begun(self, task: Task) -> None:
        """A worker that is up has a task; said again when it is tried again."""
        ...

    def done(self, task: Task) -> None:
        """A task is done; what follows from it may be ready now."""
        ...


class TaskList:
    """Tasks that are all ready from the start."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.waiting = tasks

    def next(self, is_idle: bool) -> Sequence[Task]:
        found, self.waiting = self.waiting, ()
        return found

    def begun(self, task: Task) -> None:
        """Nothing follows."""

    def done(self, task: Task) -> None:
        """Nothing follows."""


@dataclass(frozen=True, slots=True)
class Counted:
    """A source whose tasks are counted by stage, and timed."""

    source: WorkSource
    handed: Counter[str]
    times: StageTimes

    def next(self, is_idle: bool) -> Sequence[Task]:
        found = self.source.next(is_idle)
        self.handed.update(task.stage for task in found)
        return found

    def begun(self, task: Task) -> None:
        self.times.begun(task)
        self.source.begun(task)

    def done(self, task: Task) -> None:
        self.source.done(task)


class Runner(Protocol):
    """Runs tasks in some processes. Order of results is the order in which they finish. It asks the
    source for tasks; whoever takes the results tells the source what is done (run_all), which
    happens before the runner asks again.

    Tasks without a layer go before those with one: streams are never held up by the units that
    follow from them.
    """

    def run(self, source: WorkSource) -> Iterator[TaskResult]: ...


class RedoError(CorruptObjectError):
    """Corrupt objects were found by tasks, and are deleted; the stages that make them have to run
    again. Never leaves the pipeline."""


def run_all(
    runner: Runner, source: WorkSource, store: Store, times: StageTimes | None = None
) -> None:
    """Run a source's tasks to the end: all that can be done of them.

    Args:
        runner, source: the two sides.
        store: the run root.
        times: learns when tasks began and ended, if anybody asks.
    Raises: an error that lists what failed: of the kind of the user's mistake if one stopped a
        task; RedoError if corrupt objects of the run root are all that stopped the rest; else
        StageFailedError. Corrupt objects are deleted in any case.
    """
    failed: list[TaskResult] = []
    handed: Counter[str] = Counter()
    times = times or StageTimes()
    for result in runner.run(Counted(source, handed, times)):
        times.ended(result.task)
        if result.is_done or is_done_by_another(store, result.task):
            source.done(result.task)
        else:
            failed.append(result)
    if not failed:
        return
    for result in failed:
        if result.redo:
            message = f"{result.task.stage} {result.task.id}: {result.error}"
            delete_corrupt(store, message, result.redo)
    stages = dict.fromkeys(result.task.stage for result in failed)
    mistakes = [
        error
        for error in (result.as_exception() for result in failed)
        if isinstance(error, UserError)
    ]
    kind = (
        type(mistakes[0])
        if mistakes
        else RedoError
        if all(result.redo for result in failed)
        else StageFailedError
    )
    message = "\n".join(
        describe_failures(stage, [r for r in failed if r.task.stage == stage], handed[stage], store)
        for stage in stages
    )
    keys = dict.fromkeys(key for result in failed for key in result.redo)
    raise kind(message, *(keys if kind is RedoError else ()))


def delete_corrupt(store: Store, message: str, keys: Sequence[str]) -> None:
    """Delete what was found corrupt, and say so."""
    more = f" and {len(keys) - LISTED_FAILURES} more" if len(keys) > LISTED_FAILURES else ""
    log.warning(
        "%s; deleting %s%s, made anew next", message, ", ".join(keys[:LISTED_FAILURES]), more
    )
    for key in keys:
        store.delete(key)


def describe_failures(stage: str, failed: Sequence[TaskResult], handed: int, store: Store) -> str:
    """What failed of a stage, in words.

    Args:
        stage: its name.
        failed: at least one; the first LISTED_FAILURES are listed.
        handed: how many tasks of the stage the runner was given.
        store: the run root.
    """
    lines = [f"  {r.task.id}: {r.error_type}: {r.error}" for r in failed[:LISTED_FAILURES]]
    rest = f"\n  and {len(failed) - LISTED_FAILURES} more" if len(failed) > LISTED_FAILURES else ""
    return (
        f"{stage}: {len(failed)} of {handed} tasks failed; tracebacks under"
        f" {store.uri}/failures/{stage}/; run the same command again to resume\n"
        + "\n".join(lines)
        + rest
    )


def is_done_by_another(store: Store, task: Task) -> bool:
    """Two drivers may work on one run root: what failed here because the other was faster (and
    cleaned up) is done all the same."""
    try:
        return task.marker is not None and store.head(task.marker) is not None
    except TransientStoreError:
        return False  # the store is away: the task counts as failed, the stage goes on
