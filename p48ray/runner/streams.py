"""Forward and backward pass of the source through its layers, the second where gradients are used.

Each slice of the calibration sequences is one task forward and one for each segment of the backward
pass (run.passes). They follow from each other, whatever other slices do, but for the back-pressure:
a segment is begun, for all slices, only while fewer than run.layers_in_flight layers have units
that are not done, and never before one above it. What a segment that is begun leaves can always be
used up: every slice's way to it is free. So a segment waits for units, and never for another one.
"""

from collections.abc import Collection, Sequence

from p48ray.run.needs import Needs
from p48ray.run.plan import RunPlan
from p48ray.stages.table import CAPTURE_STAGE, GRADIENTS_STAGE
from p48ray.stages.tasks import Task


class Streams:
    """Tasks of the source's own ways.

    Args: needs: what the run root lacks at the start.
    """

    def __init__(self, plan: RunPlan, needs: Needs) -> None:
        self.plan = plan
        self.following: dict[str, list[Task]] = {}  # id of a task -> those of its slice after it
        self.ready: list[Task] = []  # what precedes them in their slice is done
        self.under_way: set[str] = set()  # ids of those that were handed out, and are not done
        self.begun: list[range] = []
        self.num_open = 0
        parts = [p.part for p in plan.parts if needs.is_under_way(p.part)]
        waiting: set[range] = set()
        for share in share_out_parts(plan, parts):
            waiting |= self.begin(needs, share)
        self.waiting = sorted(waiting, key=lambda segment: segment.start)  # the next one last

    def begin(self, needs: Needs, parts: list[int]) -> set[range]:
        """Name a slice's tasks. Returns the segments that they pass."""
        visits = {p: {visit.segment for visit in needs.visits(p)} for p in parts}
        segments = [s for s in self.plan.passes.segments if any(s in visits[p] for p in parts)]
        up = [p for p in parts if needs.forward_layers(p)]
        tasks = [Task(stage=CAPTURE_STAGE.name, id=slice_id(up), item=up)] if up else []
        for segment in segments:
            own = [p for p in parts if segment in visits[p]]
            name = f"layer-{segment.start:03d}-{slice_id(own)}"
            tasks.append(Task(stage=GRADIENTS_STAGE.name, id=name, item=(segment.start, own)))
        self.ready.append(tasks[0])
        self.following[tasks[0].id] = tasks[1:]
        self.num_open += 1
        return set(segments)

    def take(
        self,
        unfinished: Collection[int] = (),
        complete: Collection[int] = (),
        is_stuck: bool = False,
    ) -> list[Task]:
        """Tasks that became ready since the last call.

        Args:
            unfinished: layers with units that are not done; none where units wait for all passes.
            complete: those whose parts are all there.
            is_stuck: nothing runs, and nothing else is left to do. The next segment is begun then
                all the same, unless a stream failed: a unit that failed for good holds up its own
                layer alone.
        """
        limit = self.plan.config.run.layers_in_flight
        while self.waiting and self.in_flight(unfinished, complete) < limit:
            self.begun.append(self.waiting.pop())
        found = self.pop_free()
        if not found and is_stuck and self.waiting and not self.under_way:
            self.begun.append(self.waiting.pop())
            found = self.pop_free()
        self.under_way |= {task.id for task in found}
        return found

    def in_flight(self, unfinished: Collection[int], complete: Collection[int]) -> int:
        """Layers whose tokens lie in the run root, or will once segments that are begun are
        passed."""
        return sum(n in complete or any(n in s for s in self.begun) for n in unfinished)

    def pop_free(self) -> list[Task]:
        """Tasks that wait for nothing, which leave the list."""
        bases = {segment.start for segment in self.begun}
        found = [t for t in self.ready if t.stage == CAPTURE_STAGE.name or t.item[0] in bases]
        self.ready = [task for task in self.ready if task not in found]
        return found

    def done(self, task: Task) -> bool:
        """What follows a task in its slice is ready now. Returns whether this was the last of all
        passes."""
        self.under_way.discard(task.id)
        following = self.following.pop(task.id, [])
        if following:
            self.ready.append(following[0])
            self.following[following[0].id] = following[1:]
            return False
        self.num_open -= 1
        return not self.num_open


def share_out_parts(plan: RunPlan, parts: Sequence[int]) -> list[list[int]]:
    """Parts shared out to the workers that stream."""
    workers = plan.config.run.stream_workers
    return [list(s) for s in (parts[i::workers] for i in range(workers)) if s]


def slice_id(parts: Sequence[int]) -> str:
    return f"parts-{parts[0]:04d}-and-{len(parts) - 1}-more"
