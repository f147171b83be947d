"""How a plan's streams go: what the forward and the backward pass run, and what they leave.

    without a backward pass    forward pass: boundaries and what the experts see, at every layer
    with one                   forward pass: every n-th boundary (run.boundary_every), no more.
                               Backward pass: a segment at a time, top first. From its lowest
                               boundary its layers run again, and what their experts see is written
                               then; back down each is differentiated. Gradients at boundaries are
                               stored between segments
    layer by layer             the same, but what the experts see comes from behind the compressed
                               layers, a pass of its own for each (stages.propagate)

So a mixture's inputs and its gradients are of one device, and no boundary is stored twice. Stages,
run.needs, the estimate and the runner read all of this here.

Boundary n is what enters layer n; boundary num_layers is what enters the head, which belongs to the
top segment.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Of one plan.

    num_layers: of the model. layers: those that are compressed. goes_back: there is a backward
    pass. propagates: the run goes layer by layer. every: run.boundary_every. draws: of labels, each
    with a gradient of its own at every mixture.
    """

    num_layers: int
    layers: tuple[int, ...]
    goes_back: bool
    propagates: bool
    every: int
    draws: int = 1

    @property
    def sees_back(self) -> bool:
        """The backward pass writes what the experts see."""
        return self.goes_back and not self.propagates

    @property
    def sees_forth(self) -> bool:
        """The forward pass writes it."""
        return not self.goes_back and not self.propagates

    @property
    def num_up(self) -> int:
        """Layers that the forward pass runs: up to the last one compressed, or to the boundary from
        which the top segment runs."""
        if self.goes_back:
            return self.segment_of(self.num_layers).start
        return 0 if self.propagates else self.layers[-1] + 1

    @property
    def boundaries(self) -> range:
        """That the forward pass stores."""
        if self.goes_back:
            return range(self.every, self.num_layers, self.every)
        return range(1, self.num_up)

    @property
    def gradient_boundaries(self) -> tuple[int, ...]:
        """At which the backward pass stores gradients, top first."""
        return tuple(s.start for s in self.segments if s.start > self.layers[0])

    @property
    def bases(self) -> tuple[int, ...]:
        """Boundaries from which the backward pass runs layers again."""
        return tuple(
            s.start for s in self.segments if s.start and (self.sees_back or s[-1] > self.layers[0])
        )

    @property
    def segments(self) -> tuple[range, ...]:
        """Layers of each, top first, down to the one with the lowest layer that is compressed; in
        the top one num_layers stands for the head. None without a backward pass."""
        found: list[range] = []
        number = self.num_layers
        while self.goes_back and number >= self.layers[0]:
            found.append(self.segment_of(number))
            number = found[-1].start - 1
        return tuple(found)

    def segment_of(self, number: int) -> range:
        """The segment that a layer, or the head, belongs to."""
        start = min(number, self.num_layers - 1) // self.every * self.every
        stop = start + self.every
        return range(start, stop if stop < self.num_layers else self.num_layers + 1)

    @property
    def num_again(self) -> int:
        """Layers that the backward pass runs once more: of a segment all, or all but the top one
        where nobody asks what its experts see."""
        return sum(
            min(s.stop - (not self.sees_back), self.num_layers) - s.start for s in self.segments
        )

    @property
    def num_back(self) -> int:
        """Layers that it differentiates: those above the lowest one compressed."""
        return self.num_layers - 1 - self.layers[0] if self.goes_back else 0

    @property
    def num_read_back(self) -> int:
        """Layers that it reads: the one where a segment turns around once."""
        turns = sum(min(s.stop, self.num_layers) - 1 > self.layers[0] for s in self.segments)
        return self.num_again + self.num_back - turns * self.sees_back

    @property
    def num_computed(self) -> int:
        """Layers that both passes compute, one that is differentiated counted as two."""
        return self.num_up + self.num_again + 2 * self.num_back

    @property
    def first_complete(self) -> float:
        """Layers of these that are computed until units can begin: both passes of the top segment,
        or the lowest layer that is compressed."""
        if not self.segments:
            return self.layers[0] + 1
        return self.num_up + (self.num_computed - self.num_up) / len(self.segments)
