"""Capture, gradients and compress as one piece of work: what can be done by now, asked again and
again while it is done.

A slice of the calibration sequences goes up the layers, then back down, whatever other slices do. A
layer's units can be solved once all slices have passed it: in the backward pass, from the top where
there is a backward pass, else in the forward pass. So of many workers a few stream, and the others
solve what the stream left. A backward pass that gets too far ahead of them waits (runner.streams).
"""

import logging
import time
from collections.abc import Callable, Sequence

from p48ray.errors import TransientStoreError
from p48ray.run import run_root
from p48ray.run.changing_hands import is_still_ours
from p48ray.run.cleanup import delete_spent_streams
from p48ray.run.needs import Needs, read_needs
from p48ray.runner.base import POLL_S
from p48ray.runner.layer_units import LayerUnits
from p48ray.runner.streams import Streams
from p48ray.stages.table import COMPRESS_STAGE
from p48ray.stages.tasks import Task
from p48ray.unit.context import StageContext

log = logging.getLogger(__name__)

POLLING_SHARE = 50
"""Times a look's own duration until the next one: two per cent of the time is spent on looking."""


class Overlap:
    """The tasks of the three stages as they become ready (a WorkSource).

    Layers are looked at in the order in which streams complete them, one folder at a time.

    Args: needs: what the run root lacks now. clock: monotonic seconds.
    """

    def __init__(
        self, context: StageContext, needs: Needs, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.context, self.plan, self.store = context, context.plan, context.store
        self.clock = clock
        # Open layers as streams complete them.
        self.waiting = sorted(needs.open_layers, reverse=self.plan.uses_gradients)
        self.unfinished = set(needs.open_layers)
        self.streams, self.units = Streams(self.plan, needs), LayerUnits(context)
        self.ready: list[Task] = []
        self.next_poll = clock() + POLL_S
        if not self.streams.num_open:
            self.end_streams()
        for layer in sorted(n for n in self.waiting if needs.is_complete(n)):
            self.ready += self.begin_layer(layer, needs)

    def next(self, is_idle: bool) -> Sequence[Task]:
        """Tasks that became ready since the last call."""
        units, self.ready = self.ready, []
        if self.waiting and (is_idle or self.clock() >= self.next_poll):
            start = self.clock()
            units += self.complete_layers(is_idle)
            now = self.clock()
            self.next_poll = now + max(POLL_S, POLLING_SHARE * (now - start))
        complete = self.unfinished.difference(self.waiting)
        streams = self.streams.take(self.unfinished, complete, is_stuck=is_idle and not units)
        return [*streams, *units]

    def begin_layer(self, layer: int, needs: Needs) -> list[Task]:
        """Units of a layer that is complete now."""
        tasks = self.units.begin_layer(layer, needs)
        self.waiting.remove(layer)
        if not tasks:  # others did them
            self.unfinished.discard(layer)
        return tasks

    def complete_layers(self, is_all: bool) -> list[Task]:
        """Units of layers that are complete by now.

        Args: is_all: of any; else only as far as layers are complete one after the other.
        """
        found: list[Task] = []
        try:
            for layer in list(self.waiting):
                if Needs(self.plan, self.keys_of(layer)).is_complete(layer):
                    lacking = read_needs(self.plan, self.store, [run_root.unit_prefix(layer)])
                    found += self.begin_layer(layer, lacking)
                elif not is_all:
                    break
        except TransientStoreError as error:
            if is_all and not found:
                raise
            log.warning("whether layers are complete is not known for now: %s", error)
        # All at once, as after an interruption: from the lowest up, as the plan names them.
        return sorted(found, key=lambda task: task.item.layer)

    def keys_of(self, layer: int) -> frozenset[str]:
        prefixes = [run_root.activation_folder(layer), run_root.gradient_folder(layer)]
        return frozenset(info.key for prefix in prefixes for info in self.store.list(prefix))

    def begun(self, task: Task) -> None:
        """Nothing follows."""

    def done(self, task: Task) -> None:
        """What follows a task is ready now; what nobody reads any more goes (run.cleanup)."""
        if task.stage == COMPRESS_STAGE.name:
            if self.units.done(task):
                self.unfinished.discard(task.item.layer)
            return
        self.next_poll = -float("inf")
        if self.streams.done(task):
            self.end_streams()

    def end_streams(self) -> None:
        if self.plan.config.run.keep != "all" and is_still_ours(self.plan, self.store):
            delete_spent_streams(self.plan, self.store)
