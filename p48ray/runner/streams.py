"""The source's own ways through the layers: up, and back down where gradients are wanted.

Each slice of the calibration sequences is one task up and one back; the way back follows from the
way up of the same slice, whatever other slices do.
"""

from collections.abc import Sequence

from p48ray.run.needs import Needs
from p48ray.run.plan import RunPlan
from p48ray.stages.table import CAPTURE, GRADIENTS
from p48ray.stages.tasks import Task


class Streams:
    """Tasks of the source's own ways.

    Args: needs: what the run root lacks at the start.
    """

    def __init__(self, plan: RunPlan, needs: Needs) -> None:
        self.ready: list[Task] = []
        self.ways_back: dict[str, Task] = {}  # id of the way up -> what follows it
        self.num_open = 0
        parts = [p.part for p in plan.parts if needs.way_up(p.part) or needs.way_back(p.part)]
        for share in slices(plan, parts):
            self.begin(needs, share)

    def begin(self, needs: Needs, parts: list[int]) -> None:
        up = [p for p in parts if needs.way_up(p)]
        back = [p for p in parts if needs.way_back(p)]
        steps = ((CAPTURE.name, up), (GRADIENTS.name, back))
        tasks = [Task(stage=stage, id=name_of(s), item=s) for stage, s in steps if s]
        self.ready.append(tasks[0])
        if len(tasks) > 1:
            self.ways_back[tasks[0].id] = tasks[1]
        self.num_open += 1

    def take(self) -> list[Task]:
        """Tasks that became ready since the last call."""
        found, self.ready = self.ready, []
        return found

    def done(self, task: Task) -> bool:
        """What follows a way up is ready now. Returns whether this was the last of all ways."""
        back = self.ways_back.pop(task.id, None) if task.stage == CAPTURE.name else None
        if back is not None:
            self.ready.append(back)
            return False
        self.num_open -= 1
        return not self.num_open


def slices(plan: RunPlan, parts: Sequence[int]) -> list[list[int]]:
    """Parts shared out to the workers that stream."""
    workers = plan.config.run.capture_workers or plan.config.run.num_workers
    return [list(s) for s in (parts[i::workers] for i in range(workers)) if s]


def name_of(parts: Sequence[int]) -> str:
    return f"parts-{parts[0]:04d}-and-{len(parts) - 1}-more"
