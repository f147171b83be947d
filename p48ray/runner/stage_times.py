"""How long each stage of a job has worked, for progress lines, summary and report alike.

A stage's time begins when a worker that is up takes its first task: neither the start of workers
nor the stages before it count. It ends with the last task.
"""

import time
from collections.abc import Callable

from p48ray.stages.tasks import Task


class StageTimes:
    """Told by whoever runs tasks; asked from any thread.

    Args: clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.open: dict[str, set[str]] = {}  # tasks under way, by stage

    def begun(self, task: Task) -> None:
        """A worker has it; again when it is tried again."""
        self.first.setdefault(task.stage, self.clock())
        self.open.setdefault(task.stage, set()).add(task.id)

    def ended(self, task: Task) -> None:
        """Done, or given up."""
        self.last[task.stage] = self.clock()
        self.open.get(task.stage, set()).discard(task.id)

    def seconds(self, stage: str) -> float:
        """From its first task to its last, or until now while one is under way; 0 for a stage that
        has had none."""
        if stage not in self.first:
            return 0.0
        end = self.clock() if self.open[stage] else self.last[stage]
        return end - self.first[stage]
