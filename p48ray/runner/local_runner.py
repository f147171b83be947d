"""Everything in this process, one task after the other: for tests, debuggers and machines without
Ray."""

from collections.abc import Iterator

from p48ray.run.plan import RunPlan
from p48ray.runner.base import WorkSource
from p48ray.stages.tasks import TaskResult
from p48ray.stages.workplace import Workplace


class LocalRunner:
    """Runs tasks in the calling process, in the order in which they are named, those without a
    layer first.

    Transient failures are retried run.max_attempts times in all.
    """

    def __init__(self, plan: RunPlan, store_uri: str) -> None:
        self.plan = plan
        self.workplace = Workplace(plan, store_uri)

    def run(self, source: WorkSource) -> Iterator[TaskResult]:
        waiting = list(source.next(False))
        while True:
            waiting = sorted(
                [*waiting, *source.next(not waiting)], key=lambda task: task.layer is not None
            )
            if not waiting:
                return
            task = waiting.pop(0)
            source.begun(task)
            result = self.workplace.execute(task)
            for _ in range(self.plan.config.run.max_attempts - 1):
                if not result.is_transient:
                    break
                result = self.workplace.execute(task)
            yield result
