"""What is deleted from a run root, on run roots that are made up object by object."""

import random
import time
import uuid
from collections.abc import Iterable

import pytest

from p48ray.config.load import load_config
from p48ray.errors import P48Error, TransientStoreError
from p48ray.run import run_root
from p48ray.run.cleanup import (
    delete_all,
    delete_layer_data,
    delete_lost_attempts,
    delete_spent_streams,
    delete_unit_shards,
)
from p48ray.run.manifest import UnitManifest
from p48ray.run.needs import Needs
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.stages.prepare import prepare
from p48ray.store import MemoryStore
from tests.conftest import REPO
from tests.run.test_needs import all_keys, random_keys

PARTS = (0, 1)


def planned(*overrides: str) -> RunPlan:
    small = (
        "calibration.num_sequences=4",
        "calibration.sequences_per_part=2",
        "calibration.sequence_length=64",
        "evaluation=null",
    )
    return prepare(
        load_config(REPO / "configs" / "tiny.yaml", (*small, *overrides), "memory://collect")
    ).plan


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        return planned()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(uuid.uuid4().hex)


def fill(store: MemoryStore, keys: Iterable[str]) -> None:
    for key in keys:
        store.put(key, b"x")


def keys_of(store: MemoryStore) -> set[str]:
    return {info.key for info in store.list()}


def data_of_layer(layer: int) -> set[str]:
    return {
        name(layer, p) for name in (run_root.activation_part, run_root.gradient_part) for p in PARTS
    }


BESIDE = (
    "plan.json",
    "calibration/tokens.arrow",
    "evaluation/0123/tokens.arrow",
    "checkpoint/config.json",
    "failures/capture/x/y.json",
)
"""What no collection of streams may touch."""


def test_finished_layer_loses_its_data_and_keeps_its_records(
    plan: RunPlan, store: MemoryStore
) -> None:
    before = {*all_keys(plan), run_root.layer_scales(2), *BESIDE}
    fill(store, before)
    assert delete_layer_data(plan, store, 2) == 4
    assert before - keys_of(store) == data_of_layer(2)


def test_finished_layer_of_a_plan_without_gradients_has_none_to_lose(
    plan: RunPlan, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    fill(store, all_keys(plan))
    assert delete_layer_data(planned("compression.output_curvature=false"), store, 3) == 2
    assert set(all_keys(plan)) - keys_of(store) == {run_root.activation_part(3, p) for p in PARTS}


def test_streams_of_a_finished_run_are_deleted_and_nothing_else_is(
    plan: RunPlan, store: MemoryStore
) -> None:
    before = {
        *all_keys(plan),
        *(run_root.unit_shard(u.id, "abc") for u in plan.units),
        *(run_root.layer_scales(n) for n in plan.layers),
        *BESIDE,
    }
    fill(store, before)
    deleted = {
        k for k in before if k.startswith(("activations/", "gradients/")) and k.endswith(".arrow")
    }
    # with their manifests
    deleted |= {k for k in before if k.startswith(("residuals/", "residual-gradients/"))}
    assert delete_spent_streams(plan, store) == len(deleted) == 2 * (4 + 4 + 2 * 4 + 2 * 3)
    assert before - keys_of(store) == deleted


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_open_layer_keeps_its_data_and_boundaries_go_once_no_part_is_under_way(
    layer: int, plan: RunPlan, store: MemoryStore
) -> None:
    missing = next(u for u in plan.units if u.layer == layer)
    before = set(all_keys(plan)) - {run_root.unit_manifest(missing.id)}
    fill(store, before)
    delete_spent_streams(plan, store)
    assert {k for k in keys_of(store) if k.endswith(".arrow")} == data_of_layer(layer)


@pytest.mark.parametrize(
    "gone",
    [
        run_root.activation_part(3, 1),
        run_root.activation_manifest(3, 0),
        run_root.gradient_part(3, 0),
    ],
)
def test_boundaries_stay_while_a_part_of_an_open_layer_is_missing(
    gone: str, plan: RunPlan, store: MemoryStore
) -> None:
    before = set(all_keys(plan)) - {run_root.unit_manifest("L003-E000-003"), gone}
    fill(store, before)
    delete_spent_streams(plan, store)
    assert before - keys_of(store) == data_of_layer(1) | data_of_layer(2) | data_of_layer(4)


def test_collecting_streams_never_adds_to_what_is_still_to_be_done(
    plan: RunPlan, store: MemoryStore
) -> None:
    chance = random.Random(8)
    for _ in range(150):
        held = random_keys(plan, chance)
        delete_spent_streams(plan, refill(store, held))
        before, after = Needs(plan, held), Needs(plan, frozenset(keys_of(store)))
        assert {
            k
            for k in held
            if k.endswith(".json") and not k.startswith(("residuals/", "residual-gradients/"))
        } <= after.keys
        for part in PARTS:
            assert (after.forward_layers(part), after.visits(part)) == (
                before.forward_layers(part),
                before.visits(part),
            )
            assert after.activation_layers(part) == before.activation_layers(part)
        assert delete_spent_streams(plan, store) == 0, "nothing is left for a second time"


def refill(store: MemoryStore, keys: Iterable[str]) -> MemoryStore:
    delete_all(store, keys_of(store))
    fill(store, keys)
    return store


# Attempts.


def manifest_of(plan: RunPlan, unit: WorkUnit, attempt: str) -> UnitManifest:
    return UnitManifest(
        units_digest=plan.units_digest,
        unit=unit.id,
        attempt=attempt,
        input_global_scales=(1.0, 1.0),
        size_bytes=1,
        sha256="0" * 64,
        data_offset=0,
        linears=(),
        clipped_input_share=0,
        clipped_intermediate_share=0,
        seconds={},
        finished_at=0,
        device="cpu",
        versions={},
    )


def finish(plan: RunPlan, store: MemoryStore, unit: WorkUnit, winner: str, *attempts: str) -> None:
    """A unit whose `winner` counts; `attempts` left shards too."""
    fill(store, [run_root.unit_shard(unit.id, a) for a in (winner, *attempts)])
    store.put(run_root.unit_manifest(unit.id), manifest_of(plan, unit, winner).to_json())


def test_losing_attempts_of_finished_units_are_collected_and_winning_ones_are_not(
    plan: RunPlan, store: MemoryStore
) -> None:
    first, second, third, fourth = plan.units[:4]
    finish(plan, store, first, "bbb", "aaa", "ccc")
    finish(plan, store, second, "aaa", "bbb")
    finish(plan, store, third, "ccc")
    fill(store, [run_root.unit_shard(fourth.id, a) for a in ("aaa", "bbb")])  # still under way
    before = keys_of(store)
    assert delete_lost_attempts(plan, store) == 3
    assert before - keys_of(store) == {run_root.unit_shard(first.id, a) for a in ("aaa", "ccc")} | {
        run_root.unit_shard(second.id, "bbb")
    }


def test_collecting_losers_of_kimis_units_takes_no_longer_than_a_listing(
    plan: RunPlan, store: MemoryStore
) -> None:
    """60 layers x 384 experts in units of 8, one loser each: well under the driver's 5 ms a
    unit."""
    units = tuple(
        WorkUnit(layer=n, first_expert=e, num_experts=8)
        for n in range(1, 61)
        for e in range(0, 384, 8)
    )
    for unit in units:
        finish(plan, store, unit, "aaa", "bbb")
    start = time.process_time()
    assert (
        delete_lost_attempts(plan.model_copy(update={"units": units}), store) == len(units) == 2880
    )
    assert time.process_time() - start < 0.001 * len(units)


def test_all_shards_go_and_all_manifests_stay(plan: RunPlan, store: MemoryStore) -> None:
    for unit in plan.units:
        finish(plan, store, unit, "aaa")
    fill(store, BESIDE)
    before = keys_of(store)
    assert delete_unit_shards(store) == len(plan.units)
    assert before - keys_of(store) == {run_root.unit_shard(u.id, "aaa") for u in plan.units}


def test_deletion_that_fails_is_not_passed_over(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, ["a", "b", "c"])
    real = MemoryStore.delete

    def delete(self: MemoryStore, key: str) -> None:
        if key == "b":
            raise TransientStoreError("b: the store did not answer")
        real(self, key)

    monkeypatch.setattr(MemoryStore, "delete", delete)
    with pytest.raises(P48Error, match="b: the store did not answer"):
        delete_all(store, ["c", "b", "a"])
    assert keys_of(store) == {"b"}
