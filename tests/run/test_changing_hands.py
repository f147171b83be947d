"""Whose run root it is: other units are refused, another checkpoint of the same units takes over,
and whoever was there before notices."""

import pytest

from p48ray.config.load import load_config
from p48ray.errors import PlanMismatchError
from p48ray.run import run_root
from p48ray.run.changing_hands import (
    check_plan,
    check_still_ours,
    finish_take_over,
    is_still_ours,
    read_plan,
    root_is_shared,
    take_over,
)
from p48ray.run.plan import FORMAT_VERSION, RunPlan
from p48ray.stages.prepare import prepare
from p48ray.store.memory import MemoryStore
from tests.conftest import REPO

UNITS = "units/L001-E000-007/manifest.json"
STITCHED = "checkpoint/model-00001-of-00004.safetensors"
BESIDE = ("activations/layer-001/part-0000.json", "calibration/tokens.json", "failures/a/b/c.json")
GOING = (STITCHED, "verification/model-00001-of-00004.json", "report/report.json")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def planned(*overrides: str) -> RunPlan:
    return prepare(load_config(REPO / "configs" / "tiny.yaml", overrides, "memory://hands")).plan


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryStore:
    """A run root of a pilot that is under way."""
    held = MemoryStore(request.node.name)
    held.put(run_root.PLAN, planned("run.layers=[1]").to_json())
    for key in (UNITS, *BESIDE, *GOING):
        held.put(key, b"-")
    return held


def test_taking_over_keeps_the_units_and_drops_what_was_made_of_them(store: MemoryStore) -> None:
    whole = planned()
    take_over(whole, store)
    assert {info.key for info in store.list()} == {run_root.PLAN, UNITS, *BESIDE}
    assert read_plan(store) == whole


def test_new_plan_is_there_before_anything_is_deleted(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    delete = store.delete
    monkeypatch.setattr(store, "delete", lambda key: (seen.append(read_plan(store)), delete(key)))
    whole = planned()
    take_over(whole, store)
    assert seen == [whole] * len(GOING)


FOREIGN = (
    "checkpoint/model-00001-of-00004.safetensors.bak",
    "checkpoint/model-1-of-4.safetensors",
    "checkpoint/model-00001-of-00004.json",
    "checkpoint/notes/model-00001-of-00004.safetensors",
    "checkpoint/weights.safetensors",
)


def test_deletions_that_a_dead_take_over_owes_are_made_by_the_next_start(
    store: MemoryStore,
) -> None:
    whole = planned()
    store.put(run_root.PLAN, whole.to_json())
    store.put(run_root.REPORT, b'{"plan_digest": "of the pilot"}')
    ours = ("checkpoint/model-00001-of-00003.safetensors", "verification/model-00001-of-00003.json")
    for key in (*ours, *FOREIGN):
        store.put(key, b"-")
    before = {info.key for info in store.list()}
    finish_take_over(whole, {"model-00001-of-00003.safetensors"}, store)
    assert before - {info.key for info in store.list()} == set(GOING)
    store.put(run_root.REPORT, b'{"plan_digest": "%s"}' % whole.digest.encode())
    finish_take_over(whole, {"model-00001-of-00003.safetensors"}, store)
    assert {info.key for info in store.list()} == before - set(GOING) | {run_root.REPORT}


def test_report_that_can_not_be_read_holds_up_no_start(store: MemoryStore) -> None:
    store.put(run_root.REPORT, b'{"plan_dig')
    finish_take_over(planned("run.layers=[1]"), {STITCHED.removeprefix("checkpoint/")}, store)
    assert store.head(run_root.REPORT) is None and store.head(STITCHED) is not None


def test_nothing_is_deleted_beside_an_index(store: MemoryStore) -> None:
    store.put("checkpoint/model.safetensors.index.json", b"{}")
    before = {info.key for info in store.list()}
    finish_take_over(planned(), set(), store)
    assert {info.key for info in store.list()} == before


def test_driver_that_was_there_before_notices(store: MemoryStore) -> None:
    pilot, whole = planned("run.layers=[1]"), planned()
    check_still_ours(pilot, store)
    take_over(whole, store)
    assert not is_still_ours(pilot, store)
    with pytest.raises(
        PlanMismatchError,
        match=r"run\.layers: expected \[1\].*another driver took the run root over",
    ):
        check_still_ours(pilot, store)
    check_still_ours(whole, store)


def test_run_root_without_a_plan_is_nobody_elses(store: MemoryStore) -> None:
    store.delete(run_root.PLAN)
    check_still_ours(planned(), store)
    assert check_plan(planned(), store) is None


def test_finished_checkpoint_of_another_plan_is_kept(store: MemoryStore) -> None:
    store.put("checkpoint/model.safetensors.index.json", b"{}")
    with pytest.raises(PlanMismatchError, match="its checkpoint is finished: take the old setting"):
        check_plan(planned(), store)
    held = check_plan(planned("run.layers=[1]"), store)
    assert held is not None


@pytest.mark.parametrize(
    ("made_by", "words"), [(None, "p48ray 0.1.0 resumes it"), ("0.9.9", "p48ray 0.9.9 resumes it")]
)
def test_run_root_of_another_format_names_what_resumes_it(
    made_by: str | None, words: str, store: MemoryStore
) -> None:
    text = store.get(run_root.PLAN).decode()
    text = text.replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99')
    ours = planned().made_by
    text = text.replace(f'"made_by": "{ours}",', f'"made_by": "{made_by}",' if made_by else "")
    store.put(run_root.PLAN, text.encode())
    with pytest.raises(PlanMismatchError) as caught:
        check_plan(planned(), store)
    assert f"format version: expected {FORMAT_VERSION}" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"name": 1}'])
def test_plan_that_can_not_be_read_is_named_with_what_helps(
    data: bytes, store: MemoryStore
) -> None:
    store.put(run_root.PLAN, data)
    with pytest.raises(PlanMismatchError, match=r"/plan\.json: .*delete this object"):
        check_plan(planned(), store)
    store.delete(run_root.PLAN)
    assert check_plan(planned(), store) is None


@pytest.mark.parametrize("is_shared", [True, False])
def test_publishing_asks_one_thing_of_a_plan_of_any_version(
    is_shared: bool, store: MemoryStore
) -> None:
    data = planned(f"run.root_is_shared={str(is_shared).lower()}").to_json()
    store.put(
        run_root.PLAN,
        data.replace(f'"format_version": {FORMAT_VERSION}'.encode(), b'"format_version": 2'),
    )
    assert root_is_shared(store) is is_shared


def test_pilot_and_full_run_have_the_same_units_digest() -> None:
    assert planned().units_digest == planned("run.layers=[1]", "name=x").units_digest
    assert planned().units_digest != planned("compression.sweeps=1").units_digest
