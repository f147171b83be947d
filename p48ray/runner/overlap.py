"""Capture, gradients and compress as one piece of work: what can be done by now, asked again and again while it is done.

A slice of the calibration sequences goes up the layers, then back down, whatever other slices do. A layer's units can be solved once all slices have passed
it: on the way down from the top where there is a way back, else on the way up. So of many workers a few stream, and the others solve what the stream left.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from p48ray import run_root
from p48ray.errors import TransientStoreError
from p48ray.manifest import LayerScales
from p48ray.stages.capture import finish_layer
from p48ray.stages.collect import collect_layer, collect_streams
from p48ray.stages.context import StageContext
from p48ray.stages.needs import Needs, read_needs
from p48ray.stages.table import CAPTURE, COMPRESS, GRADIENTS
from p48ray.stages.tasks import Task

log = logging.getLogger(__name__)

LOOK_S = 5.0
LOOKING_SHARE = 50  # times a look's own duration until the next one: two per cent of the time is spent on looking


class Overlap:
    """The tasks of the three stages as they become ready. Layers are looked at in the order in which streams complete them, one folder at a time.

    Args: needs: what the run root lacks now. clock: monotonic seconds.
    """

    def __init__(self, context: StageContext, needs: Needs, clock: Callable[[], float] = time.monotonic) -> None:
        self.context, self.plan, self.store, self.clock = context, context.plan, context.store, clock
        self.waiting = self.in_order(needs)
        self.ways_back: dict[str, Task] = {}  # id of the way up -> what follows it
        self.ready: list[Task] = []
        self.open_streams = 0
        self.left: Counter[int] = Counter()  # units by layer
        self.next_look = clock() + LOOK_S
        self.spans: dict[str, tuple[float, float]] = {}  # stage -> when its first task was named and its last one done
        for parts in self.slices([p.part for p in self.plan.parts if needs.way_up(p.part) or needs.way_back(p.part)]):
            self.begin_slice(needs, parts)
        if not self.open_streams:
            self.end_streams()
        for layer in sorted(n for n in self.waiting if needs.is_complete(n)):
            self.ready += self.units_of(layer, needs)
            self.waiting.remove(layer)

    def in_order(self, needs: Needs) -> list[int]:
        """Open layers as streams complete them."""
        return sorted(needs.open_layers, reverse=self.plan.config.compression.output_curvature)

    def begin_slice(self, needs: Needs, parts: list[int]) -> None:
        steps = [(CAPTURE.name, [p for p in parts if needs.way_up(p)]), (GRADIENTS.name, [p for p in parts if needs.way_back(p)])]
        tasks = [Task(stage=stage, id=name_of(s), item=s) for stage, s in steps if s]
        self.ready.append(tasks[0])
        if len(tasks) > 1:
            self.ways_back[tasks[0].id] = tasks[1]
        self.open_streams += 1

    def more(self, is_idle: bool) -> Sequence[Task]:
        """Tasks that became ready since the last call (runner.base.More)."""
        found, self.ready = self.ready, []
        if self.waiting and (is_idle or self.clock() >= self.next_look):
            start = self.clock()
            found += self.look(is_idle)
            now = self.clock()
            self.next_look = now + max(LOOK_S, LOOKING_SHARE * (now - start))
        for task in found:
            self.spans.setdefault(task.stage, (self.clock(), self.clock()))
        return found

    def look(self, is_all: bool) -> list[Task]:
        """Units of layers that are complete by now; unless `is_all`, only as far as they are complete one after the other."""
        found: list[Task] = []
        try:
            for layer in list(self.waiting):
                if Needs(self.plan, self.keys_of(layer)).is_complete(layer):
                    found += self.units_of(layer, read_needs(self.plan, self.store, [run_root.unit_folder(layer)]))
                    self.waiting.remove(layer)
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

    def units_of(self, layer: int, needs: Needs) -> list[Task]:
        """Tasks for the units of a complete layer that nobody has done."""
        finish_layer(self.context, layer)
        load = LayerScales.load(self.store, run_root.layer_scales(layer)).tokens_per_expert
        units = [u for u in needs.missing_units if u.layer == layer]
        self.left[layer] = len(units)
        return [
            Task(
                stage=COMPRESS.name,
                id=u.id,
                item=u,
                marker=run_root.unit_manifest(u.id),
                layer=layer,
                load=sum(load[e] for e in u.experts),
            )
            for u in units
        ]

    def on_done(self, task: Task) -> None:
        """What follows a task: the way back after the way up, and the end of what nobody reads any more (stages.collect)."""
        self.spans[task.stage] = (self.spans[task.stage][0], self.clock())
        if task.stage == COMPRESS.name:
            layer = task.item.layer
            self.left[layer] -= 1
            if not self.left[layer] and not self.keeps_all:
                collect_layer(self.plan, self.store, layer)
            return
        self.next_look = -float("inf")
        following = self.ways_back.pop(task.id, None) if task.stage == CAPTURE.name else None
        if following is not None:
            self.ready.append(following)
            return
        self.open_streams -= 1
        if not self.open_streams:
            self.end_streams()

    def end_streams(self) -> None:
        if not self.keeps_all:
            collect_streams(self.plan, self.store)

    @property
    def keeps_all(self) -> bool:
        return self.plan.config.run.keep == "all"

    def slices(self, parts: list[int]) -> list[list[int]]:
        """Parts shared out to the workers that stream."""
        workers = self.plan.config.run.capture_workers or self.plan.config.run.num_workers
        return [s for s in (parts[i::workers] for i in range(workers)) if s]


def name_of(parts: list[int]) -> str:
    return f"parts-{parts[0]:04d}-and-{len(parts) - 1}-more"
