"""jobs/compress.py that writes down which node was handed which task.

python -m tests.jobs.recording_compress FILE --config FILE ...
    one JSON line a task: {"node", "stage", "id", "layer"}
"""

import json
import sys
from collections.abc import Container

import typer

from jobs import compress
from p48ray.runner import ray_runner
from p48ray.runner.dispatch import Dispatcher
from p48ray.stages.tasks import Task


def recording(path: str) -> type[Dispatcher]:
    def record(node: str, task: Task | None) -> Task | None:
        if task is not None:
            with open(path, "a") as file:
                file.write(
                    json.dumps(
                        {"node": node, "stage": task.stage, "id": task.id, "layer": task.layer}
                    )
                    + "\n"
                )
        return task

    class RecordingDispatcher(Dispatcher):
        def take(self, node: str) -> Task | None:
            return record(node, super().take(node))

        def take_ahead(self, node: str, apart: Container[str]) -> Task | None:
            return record(node, super().take_ahead(node, apart))

    return RecordingDispatcher


if __name__ == "__main__":
    ray_runner.Dispatcher = recording(sys.argv.pop(1))  # type: ignore[misc]
    typer.run(compress.main)
