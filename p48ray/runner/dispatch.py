"""Who does what next: streams before all else, then tasks that share a layer's activations to the
same node, heaviest first.

Among tasks of one call those without a layer are streams, beside units, which have one. Streams are
what layers' units wait for, so a unit that waits never holds one up, nor the next attempt at one.

A node works on whole layers, so that it reads each layer's activations and gradients once. It takes
the heaviest layer that nobody has; when none is left, it joins the layer with the most waiting work
for each node on it. (A layer that moved as a whole would leave its first node idle, which would
take the next one, and so on: with more nodes than layers every unit would be read by another node.)
"""

from collections import defaultdict
from collections.abc import Container, Iterable

from p48ray.stages.tasks import Task


class Dispatcher:
    """Waiting tasks. Within a layer by falling load; tasks without a layer belong to everybody and
    go first."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.waiting: dict[int | None, list[Task]] = defaultdict(list)
        self.nodes: dict[int, set[str]] = defaultdict(set)
        self.add(tasks)

    def add(self, tasks: Iterable[Task]) -> None:
        """More tasks; they wait behind those of their layer that wait already."""
        for task in sorted(tasks, key=lambda task: (task.load, task.id), reverse=True):
            self.waiting[task.layer].insert(0, task)  # taken from the end

    def __len__(self) -> int:
        return sum(len(queue) for queue in self.waiting.values())

    def put_back(self, task: Task) -> None:
        """A task whose attempt failed; it waits behind the rest of its layer, so that a poison unit
        does not hold up the others."""
        self.waiting[task.layer].insert(0, task)

    def forget(self, node: str) -> None:
        """A node that is gone: its layers are free again."""
        for nodes in self.nodes.values():
            nodes.discard(node)

    def take(self, node: str) -> Task | None:
        """The next task for a worker on `node`; None when nothing waits."""
        if self.waiting[None]:
            return self.waiting[None].pop()
        layer = self.layer_for(node)
        return None if layer is None else self.take_of(layer, node)

    def take_ahead(self, node: str, isolated: Container[str]) -> Task | None:
        """What `take` would give a worker on `node`, for one that has a task already. None for what
        has no layer, and for ids in `isolated`."""
        layer = None if self.waiting[None] else self.layer_for(node)
        return (
            None
            if layer is None or self.waiting[layer][-1].id in isolated
            else self.take_of(layer, node)
        )

    def take_of(self, layer: int, node: str) -> Task:
        self.nodes[layer].add(node)
        return self.waiting[layer].pop()

    def layer_for(self, node: str) -> int | None:
        """The layer of a node's next task; None when none has any."""
        open_layers = [
            layer for layer, queue in self.waiting.items() if layer is not None and queue
        ]
        if not open_layers:
            return None
        mine = [layer for layer in open_layers if node in self.nodes[layer]]
        return max(mine or open_layers, key=lambda n: (self.weight(n), -n))

    def weight(self, layer: int) -> tuple[bool, float]:
        """An unowned layer before every shared one; then waiting load for each node on the layer,
        one more that would join it included."""
        load = float(sum(task.load for task in self.waiting[layer]) + len(self.waiting[layer]))
        owners = len(self.nodes[layer])
        return (not owners, load / (1 + owners))
