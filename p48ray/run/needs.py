"""What a run root still lacks of streams and units, from one listing: their resuming, as a function
of the plan and the keys that are there.

A layer is open while one of its units has no manifest. Only open layers need activations and
gradients, so what `run.keep` deleted is not made again unless a unit has to be. A part of the
calibration sequences goes up from the highest stored boundary that serves, and back down from the
lowest. What a pass leaves is the plan's to say (run.passes).

Where compressed layers feed the next (calibration.propagate), the run goes layer by layer: only the
lowest open one can be captured, because those below it are all compressed. The source's own forward
pass then serves the backward pass alone.

Boundary n is what enters layer n; boundary num_layers is what enters the head. The gradient at a
mixture's output is that at the boundary above it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from p48ray.run import run_root
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.run.run_root import BlobKind
from p48ray.store.base import Store

NEEDED_PREFIXES = (
    run_root.RESIDUALS,
    run_root.COMPRESSED_RESIDUALS,
    run_root.ACTIVATIONS,
    run_root.RESIDUAL_GRADIENTS,
    run_root.GRADIENTS,
    run_root.UNITS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What the backward pass does with one part in one segment.

    segment: its layers, num_layers for the head. up: layers that are run again, from a boundary
    that is stored, or that the forward pass has to store. back: those that it comes down through;
    the lowest of all is not differentiated. entered: those of them that are, so that what enters
    them is needed. seen, felt: whose activations and gradients are to be written. All of layers
    ascend.
    """

    segment: range
    up: range
    back: range
    entered: Sequence[int]
    seen: Sequence[int]
    felt: Sequence[int]

    @property
    def reads_boundary(self) -> bool:
        """Of the residual stream, that at up.start."""
        return bool(self.entered or self.seen)


@dataclass(frozen=True)
class Needs:
    """The plan against the keys of the run root."""

    plan: RunPlan
    keys: frozenset[str]

    @cached_property
    def missing_units(self) -> tuple[WorkUnit, ...]:
        return tuple(u for u in self.plan.units if run_root.unit_manifest(u.id) not in self.keys)

    @cached_property
    def open_layers(self) -> tuple[int, ...]:
        return tuple(sorted({u.layer for u in self.missing_units}))

    def activation_layers(self, part: int) -> list[int]:
        """Open layers whose activations of this part are not there in full, lowest first; none
        where they are not the source's to give."""
        if self.plan.propagates:
            return []
        return [n for n in self.open_layers if not self.has_activations(n, part)]

    def gradient_layers(self, part: int) -> list[int]:
        """The same for gradients; none where the plan does not use them."""
        if not self.plan.uses_gradients:
            return []
        return [n for n in self.open_layers if not self.has_gradients(n, part)]

    def is_complete(self, layer: int) -> bool:
        """Whether all is there that units of a layer read. Keys of the layer's own folders are
        enough to know."""
        return all(
            self.has_activations(layer, p.part)
            and (not self.plan.uses_gradients or self.has_gradients(layer, p.part))
            for p in self.plan.parts
        )

    def has_activations(self, layer: int, part: int) -> bool:
        return self.has_blob("activations", layer, part)

    def has_gradients(self, layer: int, part: int) -> bool:
        return self.has_blob("gradients", layer, part)

    def has_blob(self, kind: BlobKind, layer: int, part: int) -> bool:
        """Whether a blob is there, and the manifest without which it does not count."""
        key = run_root.blob(kind, layer, part)
        return key in self.keys and run_root.manifest_of(key) in self.keys

    def backward_layers(self, part: int) -> range:
        """Layers (num_layers stands for the head) through which the gradient still comes down with
        this part, lowest first; empty when it is done.

        Above the lowest each is differentiated; the lowest only gets its gradient written.
        """
        wanted = self.gradient_layers(part)
        if not wanted:
            return range(0)
        top = self.plan.source.num_layers
        stored = (
            b for b in range(wanted[-1] + 1, top) if self.has_blob("residual-gradients", b, part)
        )
        return range(wanted[0], next(stored, top + 1))

    def visits(self, part: int) -> list[Visit]:
        """Segments in which the backward pass has something to do with this part, top first."""
        felt, back = self.gradient_layers(part), self.backward_layers(part)
        seen = self.activation_layers(part) if self.plan.passes.sees_back else []
        found = []
        for segment in self.plan.passes.segments:
            own = [n for n in back if n in segment]
            seen_here = [n for n in seen if n in segment]
            entered = [n for n in own if n > back.start]
            first = min(entered + seen_here, default=segment.start)
            stop = max([*entered, *(n + 1 for n in seen_here)], default=segment.start)
            entry = (
                b for b in range(first, segment.start, -1) if self.has_blob("residuals", b, part)
            )
            if own or seen_here:
                visit = Visit(
                    segment=segment,
                    up=range(next(entry, segment.start), stop),
                    back=range(own[0], own[-1] + 1) if own else range(0),
                    entered=entered,
                    seen=seen_here,
                    felt=[n for n in felt if n in own],
                )
                found.append(visit)
        return found

    def bases(self, part: int) -> set[int]:
        """Boundaries from which the backward pass runs layers again with this part."""
        return {v.up.start for v in self.visits(part) if v.reads_boundary and v.up.start}

    def forward_layers(self, part: int) -> range:
        """Layers that capture still runs with this part; empty when it is done."""
        layers = {b - 1 for b in self.bases(part) if not self.has_blob("residuals", b, part)}
        if self.plan.passes.sees_forth:
            layers |= set(self.activation_layers(part))
        if not layers:
            return range(0)
        first = min(layers)
        entry = next((b for b in range(first, 0, -1) if self.has_blob("residuals", b, part)), 0)
        return range(entry, max(layers) + 1)

    def is_under_way(self, part: int) -> bool:
        """Whether either pass of the source is still to go on with this part."""
        return bool(self.visits(part) or self.forward_layers(part))

    @property
    def lost(self) -> list[str]:
        """Manifests of what open layers' units read whose blobs are gone: of a scratch folder that
        was wiped, say."""
        kinds: tuple[BlobKind, ...] = ("activations", "gradients")
        return [
            manifest
            for layer in self.open_layers
            for kind in kinds
            for p in self.plan.parts
            if (manifest := run_root.blob_manifest(kind, layer, p.part)) in self.keys
            and run_root.blob(kind, layer, p.part) not in self.keys
        ]

    @property
    def next_layer(self) -> int | None:
        """The layer that is to be captured and compressed next where the run goes layer by layer;
        None when all are done."""
        return self.open_layers[0] if self.open_layers else None

    def layers_up_to(self, layer: int, part: int) -> range:
        """Layers that this part still passes for the activations of `layer`, itself the last; empty
        when they are there. Those below are compressed."""
        if self.has_activations(layer, part):
            return range(0)
        entry = next(
            (b for b in range(layer, 0, -1) if self.has_blob("compressed-residuals", b, part)), 0
        )
        return range(entry, layer + 1)


def read_needs(plan: RunPlan, store: Store, prefixes: Iterable[str] = NEEDED_PREFIXES) -> Needs:
    """Needs as the store stands now."""
    return Needs(plan, frozenset(info.key for prefix in prefixes for info in store.list(prefix)))
