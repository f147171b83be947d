"""Units of layers that are complete: their tasks, and how many are left of each layer."""

import logging
from collections import Counter

from p48ray.errors import CorruptObjectError
from p48ray.run import run_root
from p48ray.run.cleanup import delete_layer_data
from p48ray.run.needs import Needs
from p48ray.run.scales import write_layer_scales
from p48ray.stages.table import COMPRESS_STAGE
from p48ray.stages.tasks import Task
from p48ray.unit.context import StageContext

log = logging.getLogger(__name__)


class LayerUnits:
    """Units by layer. What nobody reads any more goes with a layer's last unit (`run.keep`)."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.left: Counter[int] = Counter()

    def begin_layer(self, layer: int, needs: Needs) -> list[Task]:
        """For the units of a complete layer that nobody has done.

        Raises: CalibrationError if the layer's scales can not be made.
        """
        load = self.tokens_per_expert(layer)
        units = [u for u in needs.missing_units if u.layer == layer]
        self.left[layer] = len(units)
        return [
            Task(
                stage=COMPRESS_STAGE.name,
                id=u.id,
                item=u,
                marker=run_root.unit_manifest(u.id),
                layer=layer,
                load=sum(load[e] for e in u.experts),
            )
            for u in units
        ]

    def tokens_per_expert(self, layer: int) -> tuple[int, ...]:
        """Of a complete layer, whose scales are written on the way.

        Raises: CalibrationError if the layer's scales can not be made.
        """
        plan, store = self.context.plan, self.context.store
        try:
            return write_layer_scales(plan, store, layer).tokens_per_expert
        except CorruptObjectError as error:
            # the layer's units meet it too, and what they say is deleted
            log.warning("%s", error)
            return (0,) * plan.source.num_experts

    def done(self, task: Task) -> bool:
        """Returns whether it was its layer's last."""
        layer = task.item.layer
        self.left[layer] -= 1
        if self.left[layer]:
            return False
        if self.context.plan.config.run.keep != "all":
            delete_layer_data(self.context.plan, self.context.store, layer)
        return True
