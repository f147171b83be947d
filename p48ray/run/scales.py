"""A layer's two input global scales: combined from what its parts say, and held against them
whenever they are read."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

from p48ray.checkpoint.layout import LayerNames
from p48ray.errors import CalibrationError, CorruptObjectError
from p48ray.numerics.activation import input_global_scale
from p48ray.numerics.headroom import largest_headroom, loud_experts
from p48ray.run import run_root
from p48ray.run.checked import load_checked, load_each, load_part_manifest, raise_together
from p48ray.run.manifest import ActivationPart, LayerScales, UnitManifest
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.run.scale_counts import count_binned, merged_bins
from p48ray.store.base import Store


def write_layer_scales(plan: RunPlan, store: Store, layer: int) -> LayerScales:
    """scales.json of a layer whose parts are all there: made, or made again where what is there is
    not what the parts say.

    Raises: CorruptObjectError for a part's manifest that is unsound, CalibrationError as
        combine_scales does.
    """
    try:
        return load_layer_scales(plan, store, layer)
    except CorruptObjectError:
        scales = combine_scales(plan, layer, part_manifests(plan, store, layer))
        store.put(run_root.layer_scales(layer), scales.to_json())
        return scales


def known_scales(plan: RunPlan, store: Store) -> dict[int, LayerScales]:
    """Scales by layer, made again where they are unsound; without layers whose parts are gone,
    which nobody needs once their units are done."""
    found: dict[int, LayerScales] = {}
    for layer in plan.layers:
        with suppress(CorruptObjectError):
            found[layer] = write_layer_scales(plan, store, layer)
    return found


def load_layer_scales(plan: RunPlan, store: Store, layer: int) -> LayerScales:
    """A layer's scales, held against its parts where their manifests are all there; those of a
    layer that is done may have been deleted by hand.

    Raises: CorruptObjectError for scales that are not what the parts say, or for a manifest of a
        part that is unsound.
    """
    key = run_root.layer_scales(layer)
    manifests = {run_root.activation_manifest(layer, part.part) for part in plan.parts}
    said = None
    if manifests <= {info.key for info in store.list(run_root.activation_folder(layer))}:
        # first, so that a part is named where the scales are missing because of it
        said = combine_scales(plan, layer, part_manifests(plan, store, layer))
    found = load_checked(LayerScales, store, key, layer=layer, units_digest=plan.units_digest)
    if said is not None and found != said:
        names = [n for n in LayerScales.model_fields if getattr(found, n) != getattr(said, n)]
        raise CorruptObjectError(
            f"{store.uri}/{key}: {names[0]}: expected {getattr(said, names[0])!r} as the layer's"
            f" parts say, found {getattr(found, names[0])!r}",
            key,
        )
    return found


def check_units(units: Sequence[UnitManifest], scales: Mapping[int, LayerScales]) -> None:
    """Hold finished units against their layers' scales, which may have been made again since; where
    these are gone, against the layer's first unit.

    Args:
        units: manifests of units.
        scales: by layer.
    Raises: CorruptObjectError naming the units that were made with others.
    """
    errors = []
    expected = {layer: (s.gate_up, s.down) for layer, s in scales.items()}

    def hold(unit: UnitManifest, field: str, wanted: object, found: object) -> None:
        if found != wanted:
            key, layer = run_root.unit_manifest(unit.unit), WorkUnit.layer_of(unit.unit)
            where = run_root.layer_scales(layer)
            errors.append(
                CorruptObjectError(
                    f"{key}: {field}: expected {wanted} as {where} says, found {found}", key
                )
            )

    for unit in units:
        layer, found = WorkUnit.layer_of(unit.unit), unit.input_global_scales
        hold(unit, "input_global_scales", expected.setdefault(layer, found), found)
        if layer in scales:
            wanted = own_shifts(scales[layer], WorkUnit.experts_of(unit.unit))
            hold(unit, "shifts", wanted, unit.shifts)
    raise_together(errors)


def own_shifts(scales: LayerScales, experts: range) -> dict[int, int]:
    """Those of some experts."""
    return {expert: k for expert, k in scales.shifts.items() if expert in experts}


def shifted_linears(names: LayerNames, layer: int, shifts: Mapping[int, int]) -> dict[str, int]:
    """Linear -> e, of those that are 2^e times the source's."""
    return {
        names.expert_linear_name(layer, expert, projection): sign * k
        for expert, k in shifts.items()
        for projection, sign in (("up_proj", -1), ("down_proj", 1))
    }


def part_manifests(plan: RunPlan, store: Store, layer: int) -> list[ActivationPart]:
    """Of a layer's activations, in the plan's order."""
    found = load_each(
        lambda part: load_part_manifest(plan, store, "activations", layer, part.part), plan.parts
    )
    return [manifest for manifest in found if isinstance(manifest, ActivationPart)]


def combine_scales(plan: RunPlan, layer: int, parts: list[ActivationPart]) -> LayerScales:
    """A layer's input global scales from what its parts have seen. Each leaves room above the
    maximum, for texts that the calibration has not seen and for intermediates that compressed gate
    and up change. Experts far louder than their layer are shifted first (numerics.headroom).

    Where all are zero the scale is 1: experts that were pruned leave no intermediates.
    Raises: CalibrationError for activations that are not finite.
    """
    for part in parts:
        largest = max(part.amax_by_expert, key=lambda a: math.inf if math.isnan(a) else a)
        if not (math.isfinite(part.amax_input) and math.isfinite(largest)):
            raise CalibrationError(
                f"layer {layer}, part {part.part}: expected finite activations, found maxima"
                f" {part.amax_input} (input), {largest} (intermediate)"
            )
    amax_input = max(p.amax_input for p in parts)
    by_expert = [max(amaxes) for amaxes in zip(*(p.amax_by_expert for p in parts), strict=True)]
    bins = (
        merged_bins(p.input_groups for p in parts),
        merged_bins(p.intermediate_groups for p in parts),
    )
    shifts = loud_experts(by_expert, bins[1])
    amax_intermediate = max(
        (amax / 2 ** shifts.get(expert, 0) for expert, amax in enumerate(by_expert)), default=0.0
    )
    asked = plan.config.compression.activation_headroom
    headroom = tuple(
        largest_headroom(found, amax) if asked == "auto" else asked
        for found, amax in zip(bins, (amax_input, amax_intermediate), strict=True)
    )
    gate_up = input_global_scale(headroom[0] * amax_input)
    down = input_global_scale(headroom[1] * amax_intermediate)
    return LayerScales(
        units_digest=plan.units_digest,
        layer=layer,
        amax_input=amax_input,
        amax_intermediate=amax_intermediate,
        shifts=shifts,
        headroom=(headroom[0], headroom[1]),
        gate_up=gate_up,
        down=down,
        calibration=(count_binned(bins[0], gate_up), count_binned(bins[1], down)),
        tokens_per_expert=tuple(
            sum(counts) for counts in zip(*(p.tokens_per_expert for p in parts), strict=True)
        ),
    )
