"""What a run root lacks, against a slow simulation of the two ways that knows nothing of how Needs
finds them."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import pytest

from p48ray.config.load import load_config
from p48ray.run import run_root
from p48ray.run.needs import Needs, Visit, read_needs
from p48ray.run.plan import RunPlan
from p48ray.stages.prepare import prepare
from p48ray.store import MemoryStore
from tests.conftest import REPO

HEAD = 5  # the tiny model has a dense layer 0 and mixtures 1 to 4


def blobs(kind: run_root.BlobKind, layer: int, part: int) -> frozenset[str]:
    """A blob and the manifest without which it does not count."""
    return frozenset({run_root.blob(kind, layer, part), run_root.blob_manifest(kind, layer, part)})


BOUNDARY, BOUNDARY_BACK, BEHIND = (
    partial(blobs, kind) for kind in ("residuals", "residual-gradients", "compressed-residuals")
)
SEEN = (run_root.activation_part, run_root.activation_manifest)
FELT = (run_root.gradient_part, run_root.gradient_manifest)

PLANS = {
    "forth": ("compression.output_curvature=false",),
    "forth, layers 1 and 3": ("compression.output_curvature=false", "run.layers=[3,1]"),
    "forth, layer 2": ("compression.output_curvature=false", "run.layers=[2]"),
    "and back": ("compression.output_curvature=true",),
    "and back, layers 1 and 3": ("compression.output_curvature=true", "run.layers=[1,3]"),
    "and back, layer 4": ("compression.output_curvature=true", "run.layers=[4]"),
    "and back, every second boundary": (
        "compression.output_curvature=true",
        "run.boundary_every=2",
    ),
    "and back, every third boundary, layers 1 and 3": (
        "compression.output_curvature=true",
        "run.boundary_every=3",
        "run.layers=[1,3]",
    ),
    "and back, no boundary at all": (
        "compression.output_curvature=true",
        "run.boundary_every=5",
    ),
}


def planned(*overrides: str) -> RunPlan:
    small = (
        "calibration.num_sequences=4",
        "calibration.sequences_per_part=2",
        "calibration.sequence_length=64",
        "evaluation=null",
    )
    return prepare(
        load_config(REPO / "configs" / "tiny.yaml", (*small, *overrides), "memory://needs")
    ).plan


@pytest.fixture(scope="module")
def plans() -> dict[str, RunPlan]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        return {name: planned(*overrides) for name, overrides in PLANS.items()}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest, plans: dict[str, RunPlan]) -> RunPlan:
    return plans[request.param]


def goes_back(plan: RunPlan) -> bool:
    return plan.config.compression.output_curvature


def all_keys(plan: RunPlan) -> list[str]:
    """Whatever a run of the plan may have left."""
    parts = [p.part for p in plan.parts]
    names = [
        name(n, p)
        for n in plan.layers
        for p in parts
        for name in (*SEEN, *(FELT if goes_back(plan) else ()))
    ]
    names += [key for b in range(1, HEAD) for p in parts for key in sorted(BOUNDARY(b, p))]
    names += [
        key
        for b in range(2, HEAD)
        for p in parts
        if goes_back(plan)
        for key in sorted(BOUNDARY_BACK(b, p))
    ]
    return names + [run_root.unit_manifest(u.id) for u in plan.units]


def random_keys(plan: RunPlan, chance: random.Random) -> frozenset[str]:
    """Some of them; every kind of object is rare in some draws and frequent in others."""
    share = {
        kind: chance.choice((0.0, 0.2, 0.6, 0.9, 1.0))
        for kind in ("activations", "gradients", "residuals", "residual-gradients", "units")
    }
    return frozenset(key for key in all_keys(plan) if chance.random() < share[key.split("/")[0]])


# The simulation: which layers some part is run through, and what that leaves.


def open_layers(plan: RunPlan, keys: frozenset[str]) -> list[int]:
    return [
        n
        for n in plan.layers
        if not all(run_root.unit_manifest(u.id) in keys for u in plan.units if u.layer == n)
    ]


def is_left(plan: RunPlan, boundary: int) -> bool:
    """Whether the passes leave it: every n-th where there is a backward pass, else every one."""
    return not goes_back(plan) or boundary in range(0, HEAD, plan.config.run.boundary_every)


def climb(
    plan: RunPlan, keys: frozenset[str], part: int, layers: Iterable[int]
) -> frozenset[str] | None:
    """What there is after the forward pass through the layers; None if one of them has nothing to
    start from."""
    found, held = set(keys), 0
    for n in sorted(layers):
        if n != held and not BOUNDARY(n, part) <= keys:
            return None
        held = n + 1
        if is_left(plan, held):
            found |= BOUNDARY(held, part)
        if not goes_back(plan):
            found |= {name(n, part) for name in SEEN}
    return frozenset(found)


def is_reached(plan: RunPlan, keys: frozenset[str], part: int, boundary: int) -> bool:
    """Whether the layers below can be run again up to a boundary: from a stored one, without
    passing one that the forward pass was to leave."""
    while boundary and not BOUNDARY(boundary, part) <= keys:
        if is_left(plan, boundary):
            return False
        boundary -= 1
    return True


def descend(
    plan: RunPlan, keys: frozenset[str], part: int, layers: Iterable[int]
) -> frozenset[str] | None:
    """What there is after the gradient came down through the layers; None if it or a boundary is
    missing on the way. The lowest layer is not differentiated."""
    found, held = set(keys), HEAD + 1
    visited = sorted(layers, reverse=True)
    for n in visited:
        if n != HEAD:
            if held != n + 1 and not BOUNDARY_BACK(n + 1, part) <= keys:
                return None
            found |= {name(n, part) for name in FELT}
        if n != visited[-1]:
            if not is_reached(plan, keys, part, n):
                return None
            if is_left(plan, n):
                found |= BOUNDARY_BACK(n, part)
            held = n
    return frozenset(found)


def follow(
    plan: RunPlan, keys: frozenset[str], part: int, visits: Sequence[Visit]
) -> frozenset[str] | None:
    """What there is after the backward pass, visit by visit as a worker goes; None if one of them
    has nothing to start from, or does not come to what it is to write."""
    found = set(keys)
    for visit in visits:
        entered = set(visit.up) | {visit.up.stop} if visit.reads_boundary else set()
        if entered and visit.up.start and not BOUNDARY(visit.up.start, part) <= found:
            return None
        if not set(visit.entered) <= entered or not set(visit.seen) <= set(visit.up):
            return None
        found |= {name(n, part) for n in visit.seen for name in SEEN}
        stop = visit.back.stop
        if visit.back and stop <= HEAD and not BOUNDARY_BACK(stop, part) <= found:
            return None
        for n in reversed(visit.back):
            found |= {name(n, part) for name in FELT if n in visit.felt}
            if n in visit.entered and n == visit.segment.start:
                found |= BOUNDARY_BACK(n, part)
            if n not in visit.entered and n != visit.back.start:
                return None
    return frozenset(found)


def is_served(plan: RunPlan, keys: frozenset[str], part: int) -> bool:
    """Whether every open layer has what its units read."""
    names = (*SEEN, *(FELT if goes_back(plan) else ()))
    return all(name(n, part) in keys for n in open_layers(plan, keys) for name in names)


def slices(top: int) -> list[range]:
    """All runs of consecutive layers below `top`, shortest first."""
    return sorted((range(a, b) for a in range(top + 1) for b in range(a, top + 1)), key=len)


def test_both_ways_give_open_layers_all_they_read_and_nothing_shorter_would(plan: RunPlan) -> None:
    chance = random.Random(5)
    for _ in range(150):
        keys = random_keys(plan, chance)
        needs = Needs(plan, keys)
        for part in (0, 1):
            up, back = needs.forward_layers(part), needs.backward_layers(part)
            captured = climb(plan, keys, part, up)
            assert captured is not None, "starts where nothing is stored"
            visits = Needs(plan, captured).visits(part)
            felt = follow(plan, captured, part, visits)
            assert felt is not None, "misses a boundary in the backward pass"
            assert is_served(plan, felt, part)
            assert len(back) <= len(shortest_back(plan, keys, part))
            assert sorted(n for visit in visits for n in visit.back) == list(back)
            assert len(up) == len(shortest_up(plan, keys, part, back))


def shortest_up(plan: RunPlan, keys: frozenset[str], part: int, back: range) -> range:
    """By trying all: the forward pass after which the given backward pass can be gone, and open
    layers have their activations or can be run again for them."""

    def serves(way: range) -> bool:
        found = climb(plan, keys, part, way)
        if found is None or descend(plan, found, part, back) is None:
            return False
        unseen = [
            n for n in open_layers(plan, keys) if not {name(n, part) for name in SEEN} <= found
        ]
        if plan.propagates:
            return True
        return all(goes_back(plan) and is_reached(plan, found, part, n) for n in unseen)

    return next(way for way in slices(HEAD) if serves(way))


def test_no_segment_is_run_again_from_further_below_or_further_up_than_it_has_to(
    plan: RunPlan,
) -> None:
    chance = random.Random(11)
    for _ in range(50):
        keys = random_keys(plan, chance)
        captured = climb(plan, keys, 0, Needs(plan, keys).forward_layers(0))
        assert captured is not None
        visits = Needs(plan, captured).visits(0)
        for i, visit in enumerate(visits):
            for first in range(visit.segment.start, HEAD):
                for stop in range(first, first + len(visit.up)):
                    other = replace(visit, up=range(first, stop))
                    assert follow(plan, captured, 0, [*visits[:i], other]) is None


def shortest_back(plan: RunPlan, keys: frozenset[str], part: int) -> range:
    """By trying all, with every boundary of the forward pass there."""
    everywhere = keys.union(*(BOUNDARY(b, part) for b in range(1, HEAD)))

    def serves(way: range) -> bool:
        found = descend(plan, everywhere, part, way)
        return found is not None and all(
            name(n, part) in found for n in open_layers(plan, keys) for name in FELT
        )

    return next(way for way in slices(HEAD + 1) if not goes_back(plan) or serves(way))


def test_ways_that_were_gone_need_not_be_gone_again(plan: RunPlan) -> None:
    chance = random.Random(6)
    for _ in range(50):
        keys = random_keys(plan, chance)
        for part in (0, 1):
            captured = climb(plan, keys, part, Needs(plan, keys).forward_layers(part))
            assert captured is not None
            assert not Needs(plan, captured).forward_layers(part)
            felt = follow(plan, captured, part, Needs(plan, captured).visits(part))
            assert felt is not None
            assert not Needs(plan, felt).is_under_way(part)


def test_part_that_is_missing_says_nothing_about_the_other(plans: dict[str, RunPlan]) -> None:
    plan = plans["and back"]
    gone = {key for key in all_keys(plan) if key.endswith(("part-0001.arrow", "part-0001.json"))}
    needs = Needs(
        plan, frozenset(all_keys(plan)) - gone - {run_root.unit_manifest("L002-E000-003")}
    )
    assert (needs.forward_layers(0), needs.backward_layers(0)) == (range(0), range(0))
    assert needs.open_layers == (2,)
    assert (needs.activation_layers(1), needs.gradient_layers(1)) == ([2], [2])
    assert (needs.forward_layers(1), needs.backward_layers(1)) == (range(4), range(2, 6))


@pytest.mark.parametrize(
    ("name", "up", "back"),
    [
        ("forth", range(5), range(0)),
        ("forth, layers 1 and 3", range(4), range(0)),
        ("forth, layer 2", range(3), range(0)),
        ("and back", range(4), range(1, 6)),
        ("and back, layers 1 and 3", range(4), range(1, 6)),
        ("and back, layer 4", range(4), range(4, 6)),
        ("and back, every second boundary", range(4), range(1, 6)),
        ("and back, every third boundary, layers 1 and 3", range(3), range(1, 6)),
        ("and back, no boundary at all", range(0), range(1, 6)),
    ],
)
def test_empty_run_root_needs_every_layer_up_to_the_last_and_back_to_the_first(
    name: str, up: range, back: range, plans: dict[str, RunPlan]
) -> None:
    needs = Needs(plans[name], frozenset())
    assert needs.open_layers == plans[name].layers
    assert needs.missing_units == plans[name].units
    for part in (0, 1):
        assert (needs.forward_layers(part), needs.backward_layers(part)) == (up, back)


def test_run_root_with_all_manifests_of_units_needs_nothing_whatever_else_is_gone(
    plan: RunPlan,
) -> None:
    needs = Needs(plan, frozenset(run_root.unit_manifest(u.id) for u in plan.units))
    assert (needs.missing_units, needs.open_layers) == ((), ())
    for part in (0, 1):
        assert (needs.activation_layers(part), needs.gradient_layers(part)) == ([], [])
        assert not needs.forward_layers(part) and not needs.backward_layers(part)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("stored", [(), (1,), (1, 2), (2, 3), (1, 2, 3, 4)])
def test_one_open_layer_is_run_from_the_highest_stored_boundary_below_it(
    layer: int, stored: tuple[int, ...], plans: dict[str, RunPlan]
) -> None:
    plan = plans["forth"]
    done = {run_root.unit_manifest(u.id) for u in plan.units if u.layer != layer}
    needs = Needs(plan, frozenset(done).union(*(BOUNDARY(b, 0) for b in stored)))
    assert needs.forward_layers(0) == range(
        max((b for b in stored if b <= layer), default=0), layer + 1
    )


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("stored", [(), (4,), (3, 4), (2, 3, 4)])
def test_one_open_layer_is_reached_from_the_lowest_stored_gradient_above_it(
    layer: int, stored: tuple[int, ...], plans: dict[str, RunPlan]
) -> None:
    plan = plans["and back"]
    done = {run_root.unit_manifest(u.id) for u in plan.units if u.layer != layer}
    needs = Needs(plan, frozenset(done).union(*(BOUNDARY_BACK(b, 0) for b in stored)))
    assert needs.backward_layers(0) == range(
        layer, min((b for b in stored if b > layer), default=HEAD + 1)
    )


@pytest.mark.parametrize("missing", [0, 1])
def test_part_counts_as_there_only_with_both_its_data_and_its_manifest(
    missing: int, plans: dict[str, RunPlan]
) -> None:
    plan = plans["and back"]
    there = frozenset(all_keys(plan)) - {run_root.unit_manifest("L003-E004-007")}
    needs = Needs(plan, there - {SEEN[missing](3, 0), FELT[missing](3, 1)})
    assert [needs.activation_layers(p) for p in (0, 1)] == [[3], []]
    assert [needs.gradient_layers(p) for p in (0, 1)] == [[], [3]]


def test_layer_stays_open_until_its_last_unit_has_a_manifest(plans: dict[str, RunPlan]) -> None:
    plan = plans["forth"]
    units = [u for u in plan.units if u.layer == 2]
    there = frozenset(all_keys(plan)) - {run_root.unit_manifest(u.id) for u in units}
    for n in range(len(units)):
        needs = Needs(plan, there | {run_root.unit_manifest(u.id) for u in units[:n]})
        assert (needs.open_layers, needs.missing_units) == ((2,), tuple(units[n:]))
    assert Needs(plan, there | {run_root.unit_manifest(u.id) for u in units}).open_layers == ()


def test_shards_of_attempts_are_no_manifests(plans: dict[str, RunPlan]) -> None:
    plan = plans["forth"]
    needs = Needs(plan, frozenset(run_root.unit_shard(u.id, "abc") for u in plan.units))
    assert needs.missing_units == plan.units


def test_needs_are_read_from_one_listing_of_what_they_are_about(plans: dict[str, RunPlan]) -> None:
    plan, store = plans["and back"], MemoryStore("needs-listing")
    keys = random_keys(plan, random.Random(7))
    for key in [*keys, "plan.json", "checkpoint/config.json", "report/report.json"]:
        store.put(key, b"{}")
    assert read_needs(plan, store) == Needs(plan, keys)
    assert (
        read_needs(plan, store, [run_root.UNITS]).missing_units == Needs(plan, keys).missing_units
    )


# Layer by layer: each is captured behind the compressed ones below it.

IN_TURN = {
    name.replace("forth", "turn"): (*overrides, "calibration.propagate=compressed")
    for name, overrides in PLANS.items()
    if "back" not in name
} | {
    f"{name}, in turn": (*overrides, "calibration.propagate=compressed")
    for name, overrides in PLANS.items()
    if "back" in name
}


@pytest.fixture(scope="module")
def turn_plans() -> dict[str, RunPlan]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        return {name: planned(*overrides) for name, overrides in IN_TURN.items()}


@pytest.fixture(params=IN_TURN)
def turn_plan(request: pytest.FixtureRequest, turn_plans: dict[str, RunPlan]) -> RunPlan:
    return turn_plans[request.param]


def pass_through(
    keys: frozenset[str], part: int, layer: int, layers: Iterable[int]
) -> frozenset[str] | None:
    """What there is after taking a part through layers to `layer`; None if one of them has nothing
    to start from."""
    found, held = set(keys), 0
    for n in layers:
        if n != held and not BEHIND(n, part) <= keys:
            return None
        held = n + 1
        found |= {name(n, part) for name in SEEN} if n == layer else BEHIND(n + 1, part)
    return frozenset(found)


def test_way_to_the_layer_whose_turn_it_is_gives_its_activations_and_nothing_shorter_would(
    turn_plan: RunPlan,
) -> None:
    chance = random.Random(8)
    for _ in range(150):
        behind = [
            key
            for b in range(1, HEAD)
            for p in (0, 1)
            if chance.random() < 0.3
            for key in sorted(BEHIND(b, p))
            if chance.random() < 0.9
        ]
        keys = random_keys(turn_plan, chance) | set(behind)
        needs = Needs(turn_plan, keys)
        opened = open_layers(turn_plan, keys)
        assert needs.next_layer == (opened[0] if opened else None)
        if needs.next_layer is None:
            continue
        for part in (0, 1):
            way = needs.layers_up_to(needs.next_layer, part)
            found = pass_through(keys, part, needs.next_layer, way)
            assert found is not None, "starts where nothing is stored"
            assert all(name(needs.next_layer, part) in found for name in SEEN)
            assert not Needs(turn_plan, found).layers_up_to(needs.next_layer, part)
            shorter = [w for w in slices(needs.next_layer + 1) if len(w) < len(way)]
            for other in shorter:
                reached = pass_through(keys, part, needs.next_layer, other)
                assert reached is None or not all(
                    name(needs.next_layer, part) in reached for name in SEEN
                ), other


def test_the_sources_own_way_up_serves_the_way_back_alone(turn_plan: RunPlan) -> None:
    """Its activations are not asked for, and with no backward pass it is not gone at all."""
    chance = random.Random(9)
    for _ in range(150):
        keys = random_keys(turn_plan, chance)
        needs = Needs(turn_plan, keys)
        for part in (0, 1):
            up, back = needs.forward_layers(part), needs.backward_layers(part)
            assert needs.activation_layers(part) == []
            assert goes_back(turn_plan) or (up, back) == (range(0), range(0))
            climbed = climb(turn_plan, keys, part, up)
            assert climbed is not None
            felt = follow(turn_plan, climbed, part, Needs(turn_plan, climbed).visits(part))
            assert felt is not None
            assert all(
                name(n, part) in felt
                for n in open_layers(turn_plan, keys)
                for name in FELT
                if goes_back(turn_plan)
            )
            assert len(back) <= len(shortest_back(turn_plan, keys, part))


def test_empty_run_root_begins_with_the_lowest_layer(turn_plans: dict[str, RunPlan]) -> None:
    needs = Needs(turn_plans["turn, layers 1 and 3"], frozenset())
    assert (needs.next_layer, needs.layers_up_to(1, 0), needs.forward_layers(0)) == (
        1,
        range(2),
        range(0),
    )
    done = frozenset(run_root.unit_manifest(u.id) for u in needs.plan.units if u.layer == 1)
    assert Needs(needs.plan, done).next_layer == 3
    assert Needs(needs.plan, done).layers_up_to(3, 0) == range(4)
    assert Needs(needs.plan, done | BEHIND(1, 0) | BEHIND(2, 0)).layers_up_to(3, 0) == range(2, 4)
    assert Needs(needs.plan, done | BEHIND(4, 0)).layers_up_to(3, 0) == range(4), (
        "one above it is of no use"
    )
