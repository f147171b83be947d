"""Layers in turn (calibration.propagate: compressed): a layer is captured behind the compressed layers below it, then compressed, then the next.

First the source's own stream, where gradients are wanted: up for its boundaries, and back (see Overlap). Then, from the lowest open layer up, its activations
by the workers that stream, its units by all workers. Between the two everybody waits for the last: the price of inputs as they will be, which the report
shows as idle time.
"""

from p48ray import run_root
from p48ray.runner.overlap import Overlap, name_of
from p48ray.stages.collect import collect_streams
from p48ray.stages.needs import Needs, read_needs
from p48ray.stages.table import COMPRESS, PROPAGATE
from p48ray.stages.tasks import Task


class InTurn(Overlap):
    """The tasks of a run whose layers take turns, as they become ready. Whose turn it is, is read from the run root each time."""

    open_captures = 0

    def in_order(self, needs: Needs) -> list[int]:
        """No layer is looked out for: the end of one turn begins the next."""
        return []

    def end_streams(self) -> None:
        super().end_streams()
        self.begin_turn()

    def begin_turn(self) -> None:
        """Name what the lowest open layer lacks: activations of some parts, or else its units."""
        needs = read_needs(self.plan, self.store)
        while needs.turn is not None and not self.name_tasks(needs, needs.turn):
            needs = read_needs(self.plan, self.store)  # another driver was faster
        if needs.turn is None and not self.keeps_all:
            collect_streams(self.plan, self.store)

    def name_tasks(self, needs: Needs, layer: int) -> list[Task]:
        missing = self.slices([p.part for p in self.plan.parts if needs.way_to(layer, p.part)])
        tasks = [Task(stage=PROPAGATE.name, id=f"layer-{layer:03d}-{name_of(s)}", item=(layer, s)) for s in missing]
        self.open_captures = len(tasks)
        tasks = tasks or self.units_of(layer, read_needs(self.plan, self.store, [run_root.UNITS]))
        self.ready += tasks
        return tasks

    def on_done(self, task: Task) -> None:
        if task.stage == PROPAGATE.name:
            self.spans[task.stage] = (self.spans[task.stage][0], self.clock())
            self.open_captures -= 1
            if not self.open_captures:
                self.begin_turn()
            return
        super().on_done(task)
        if task.stage == COMPRESS.name and not self.left[task.item.layer]:
            self.begin_turn()
