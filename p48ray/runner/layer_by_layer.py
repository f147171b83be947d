"""Layer by layer (calibration.propagate: compressed): a layer is captured behind the compressed
layers below it, then compressed, then the next.

First the source's own stream, where gradients are wanted: up for its boundaries, and back (see
Overlap). Then, from the lowest open layer up, its activations by the workers that stream, its units
by all workers. Between the two everybody waits for the last: the price of inputs as they will be,
which the report shows as idle time.
"""

from collections.abc import Sequence

from p48ray.run import run_root
from p48ray.run.changing_hands import is_still_ours
from p48ray.run.cleanup import delete_spent_streams
from p48ray.run.needs import Needs, read_needs
from p48ray.runner.layer_units import LayerUnits
from p48ray.runner.streams import Streams, share_out_parts, slice_id
from p48ray.stages.table import COMPRESS_STAGE, PROPAGATE_STAGE
from p48ray.stages.tasks import Task
from p48ray.unit.context import StageContext


class LayerByLayer:
    """The tasks of a run that goes layer by layer, as they become ready (a WorkSource).

    Which layer is next is read from the run root each time.

    Args: needs: what the run root lacks now.
    """

    def __init__(self, context: StageContext, needs: Needs) -> None:
        self.plan, self.store = context.plan, context.store
        self.streams, self.units = Streams(self.plan, needs), LayerUnits(context)
        self.ready = self.streams.take()
        self.open_captures = 0
        if not self.streams.num_open:
            self.end_streams()

    def next(self, is_idle: bool) -> Sequence[Task]:
        """Tasks that became ready since the last call."""
        found, self.ready = [*self.ready, *self.streams.take()], []
        return found

    def begun(self, task: Task) -> None:
        """Nothing follows."""

    def done(self, task: Task) -> None:
        """The end of one layer begins the next."""
        if task.stage == PROPAGATE_STAGE.name:
            self.open_captures -= 1
            if not self.open_captures:
                self.begin_layer()
        elif task.stage == COMPRESS_STAGE.name:
            if self.units.done(task):
                self.begin_layer()
        elif self.streams.done(task):
            self.end_streams()

    def end_streams(self) -> None:
        self.delete_streams()
        self.begin_layer()

    def begin_layer(self) -> None:
        """Name what the lowest open layer lacks: activations of some parts, or else its units."""
        needs = read_needs(self.plan, self.store)
        while needs.next_layer is not None and not self.name_tasks(needs, needs.next_layer):
            needs = read_needs(self.plan, self.store)  # another driver was faster
        if needs.next_layer is None:
            self.delete_streams()

    def name_tasks(self, needs: Needs, layer: int) -> list[Task]:
        missing = [p.part for p in self.plan.parts if needs.layers_up_to(layer, p.part)]
        tasks = [
            Task(stage=PROPAGATE_STAGE.name, id=f"layer-{layer:03d}-{slice_id(s)}", item=(layer, s))
            for s in share_out_parts(self.plan, missing)
        ]
        self.open_captures = len(tasks)
        tasks = tasks or self.units.begin_layer(
            layer, read_needs(self.plan, self.store, [run_root.UNITS])
        )
        self.ready += tasks
        return tasks

    def delete_streams(self) -> None:
        """What streams left goes, unless all is kept."""
        if self.plan.config.run.keep != "all" and is_still_ours(self.plan, self.store):
            delete_spent_streams(self.plan, self.store)
