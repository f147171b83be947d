"""Forward and backward pass of the source through its layers, the second where gradients are used.

Each slice of the calibration sequences is one task forward and one backward; the backward pass
follows from the forward pass of the same slice, whatever other slices do.
"""

from collections.abc import Sequence

from p48ray.run.needs import Needs
from p48ray.run.plan import RunPlan
from p48ray.stages.table import CAPTURE_STAGE, GRADIENTS_STAGE
from p48ray.stages.tasks import Task


class Streams:
    """Tasks of the source's own ways.

    Args: needs: what the run root lacks at the start.
    """

    def __init__(self, plan: RunPlan, needs: Needs) -> None:
        self.ready: list[Task] = []
        self.backward_tasks: dict[str, Task] = {}  # id of the forward pass -> what follows it
        self.num_open = 0
        parts = [
            p.part
            for p in plan.parts
            if needs.forward_layers(p.part) or needs.backward_layers(p.part)
        ]
        for share in share_out_parts(plan, parts):
            self.begin(needs, share)

    def begin(self, needs: Needs, parts: list[int]) -> None:
        up = [p for p in parts if needs.forward_layers(p)]
        back = [p for p in parts if needs.backward_layers(p)]
        steps = ((CAPTURE_STAGE.name, up), (GRADIENTS_STAGE.name, back))
        tasks = [Task(stage=stage, id=slice_id(s), item=s) for stage, s in steps if s]
        self.ready.append(tasks[0])
        if len(tasks) > 1:
            self.backward_tasks[tasks[0].id] = tasks[1]
        self.num_open += 1

    def take(self) -> list[Task]:
        """Tasks that became ready since the last call."""
        found, self.ready = self.ready, []
        return found

    def done(self, task: Task) -> bool:
        """What follows a forward pass is ready now. Returns whether this was the last of all
        passes."""
        back = self.backward_tasks.pop(task.id, None) if task.stage == CAPTURE_STAGE.name else None
        if back is not None:
            self.ready.append(back)
            return False
        self.num_open -= 1
        return not self.num_open


def share_out_parts(plan: RunPlan, parts: Sequence[int]) -> list[list[int]]:
    """Parts shared out to the workers that stream."""
    workers = plan.config.run.capture_workers or plan.config.run.num_workers
    return [list(s) for s in (parts[i::workers] for i in range(workers)) if s]


def slice_id(parts: Sequence[int]) -> str:
    return f"parts-{parts[0]:04d}-and-{len(parts) - 1}-more"
