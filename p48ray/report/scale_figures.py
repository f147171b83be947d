"""What E4M3 scales cost, layer by layer: values above the room that a global scale leaves, and
groups so small that their scale has lost bits or is zero."""

from collections.abc import Callable, Iterable, Sequence

from p48ray.run import run_root
from p48ray.run.manifest import LayerScales, UnitManifest
from p48ray.run.plan import WorkUnit
from p48ray.run.records import Record, load_readable
from p48ray.run.scale_counts import LayerScaleCounts, ScaleCounts
from p48ray.store.base import Store

WARN_SHARE = 0.001
"""Of groups: above it a layer is named. The room is chosen so that the calibration stays below it
(numerics.headroom), where that is possible at all."""


class LayerScaleFigures(Record):
    """One layer. Pairs: of gate and up's inputs, and of down's."""

    layer: int
    headroom: tuple[float, float]
    calibration: tuple[ScaleCounts, ScaleCounts]
    held_out: tuple[ScaleCounts, ScaleCounts] | None = None
    weights: ScaleCounts


def scale_figures(
    store: Store, units: Sequence[UnitManifest], held_out: Iterable[LayerScaleCounts]
) -> tuple[LayerScaleFigures, ...]:
    """Of every layer that has units.

    Args:
        store: the run root. A layer whose scales.json is gone is left out.
        units: finished ones.
        held_out: what an evaluation has counted; of no layer where there was none.
    """
    weights: dict[int, ScaleCounts] = {}
    for unit in units:
        layer = WorkUnit.layer_of(unit.unit)
        weights[layer] = weights.get(layer, ScaleCounts()) + unit.weight_scales
    keys = {run_root.layer_scales(layer): layer for layer in sorted(weights)}
    seen = {c.layer: (c.gate_up, c.down) for c in held_out}
    return tuple(
        LayerScaleFigures(
            layer=keys[key],
            headroom=scales.headroom,
            calibration=scales.calibration,
            held_out=seen.get(keys[key]),
            weights=weights[keys[key]],
        )
        for key, scales in load_readable(LayerScales, store, list(keys)).items()
    )


def saturated(counts: ScaleCounts) -> float:
    """Share of groups with values above the largest that the format holds."""
    return counts.saturated / max(1, counts.groups)


def lost(counts: ScaleCounts) -> float:
    """Share of groups whose scale is subnormal or zero."""
    return (counts.subnormal + counts.zero) / max(1, counts.groups)


Share = Callable[[ScaleCounts], float]

KINDS: tuple[tuple[str, Share, Callable[[LayerScaleFigures], ScaleCounts | None]], ...] = (
    ("inputs, calibration: too small", lost, lambda f: f.calibration[0]),
    ("intermediates, calibration: too small", lost, lambda f: f.calibration[1]),
    ("inputs, held-out: saturated", saturated, lambda f: f.held_out and f.held_out[0]),
    ("inputs, held-out: too small", lost, lambda f: f.held_out and f.held_out[0]),
    ("intermediates, held-out: saturated", saturated, lambda f: f.held_out and f.held_out[1]),
    ("intermediates, held-out: too small", lost, lambda f: f.held_out and f.held_out[1]),
    ("weights: too small", lost, lambda f: f.weights),
)
"""What is counted: its name, the share, and where its counts stand."""


def scale_warnings(figures: Sequence[LayerScaleFigures]) -> list[str]:
    """A line for each kind that passes WARN_SHARE in a layer, with the layers; none where all is
    well."""
    lines = []
    for name, share, counts_of in KINDS:
        found = {f.layer: share(c) for f in figures if (c := counts_of(f)) is not None}
        above = {layer: value for layer, value in found.items() if value > WARN_SHARE}
        if above:
            worst = max(above, key=lambda layer: above[layer])
            lines.append(
                f"{name}: more than {WARN_SHARE:.1%} of the groups in {len(above)} of {len(found)}"
                f" layers, most in layer {worst} ({above[worst]:.2%})"
            )
    return lines


def headroom_words(figures: Sequence[LayerScaleFigures]) -> str:
    """In one line: how much room activations have."""

    def spread(which: int) -> str:
        found = [f.headroom[which] for f in figures]
        low, high = min(found), max(found)
        return f"{low:g}x" if low == high else f"{low:g}x to {high:g}x"

    return f"room above the calibration's maxima: {spread(0)} (gate and up), {spread(1)} (down)"
