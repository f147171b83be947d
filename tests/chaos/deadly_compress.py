"""jobs/compress.py with one unit that kills every worker that takes it, as a unit does for which
there is not enough memory.

python -m tests.chaos.deadly_compress UNIT --config FILE ...
"""

import os
import signal
import sys

import typer

from jobs import compress
from p48ray.runner import ray_runner
from p48ray.stages.tasks import Task, TaskResult


def deadly(unit: str) -> type[ray_runner.WorkerProcess]:
    """A worker that dies of the unit."""

    class DeadlyWorker(ray_runner.WorkerProcess):
        def execute(self, task: Task) -> TaskResult:
            if (task.stage, task.id) == ("compress", unit):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().execute(task)

    return DeadlyWorker


if __name__ == "__main__":
    ray_runner.WorkerProcess = deadly(sys.argv.pop(1))  # type: ignore[misc]
    typer.run(compress.main)
