"""What a runner is: something that takes a stage's tasks and returns how each one ended."""

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

from p48ray.errors import StageFailedError, UserError
from p48ray.stages.tasks import Task, TaskResult

log = logging.getLogger(__name__)

LISTED_FAILURES = 10


class Runner(Protocol):
    """Runs tasks in some processes. Order of results is the order in which they finish."""

    def run(self, tasks: Sequence[Task]) -> Iterator[TaskResult]: ...


def run_all(runner: Runner, tasks: Sequence[Task], store_uri: str) -> None:
    """Run a stage's tasks to the end, all that can be done of them.

    Raises: the user's mistake if that is what stopped a task; else StageFailedError listing what failed.
    """
    failed = [result for result in runner.run(tasks) if not result.is_done]
    if not failed:
        return
    for result in failed:
        error = result.as_exception()
        if isinstance(error, UserError):
            raise error
    lines = [f"  {r.task.id}: {r.error_type}: {r.error}" for r in failed[:LISTED_FAILURES]]
    rest = f"\n  and {len(failed) - LISTED_FAILURES} more" if len(failed) > LISTED_FAILURES else ""
    stage = failed[0].task.stage
    raise StageFailedError(
        f"{stage}: {len(failed)} of {len(tasks)} tasks failed; tracebacks under {store_uri}/failures/{stage}/; run the same command again to resume\n"
        + "\n".join(lines)
        + rest
    )
