"""Plans: pure, complete, and jealous of their run root."""

import math
from pathlib import Path

import pytest

from p48ray.config.load import load_config
from p48ray.errors import (
    ConfigError,
    NumericsError,
    PlanMismatchError,
    ShardCorruptError,
    SourceError,
)
from p48ray.run import run_root
from p48ray.run.changing_hands import check_plan
from p48ray.run.manifest import CompressedSums, EvaluationCell, EvaluationPart, LadderStep
from p48ray.run.plan import NUMERICS_VERSION, SETTINGS, RunPlan, cut_parts
from p48ray.run.records import Record
from p48ray.stages.prepare import Prepared, prepare
from p48ray.store.memory import MemoryStore
from tests.conftest import REPO

# For every setting that changes bytes: another legal value of it.
OTHER_VALUES = {
    "name": "other",
    "calibration.num_sequences": "8",
    "calibration.sequence_length": "64",
    "calibration.seed": "1",
    "calibration.propagate": "compressed",
    "calibration.sequences_per_part": "5",
    "calibration.sequences_per_micro_batch": "2",
    "calibration.compute_dtype": "bfloat16",
    "calibration.stored_bits": "8",
    "compression.solver": None,  # needs other settings to change with it
    "compression.code_sweeps": "3",
    "compression.sparsity": None,
    "compression.scale_span": "16",
    "compression.activation_group": "32",
    "compression.activation_headroom": "2",
    "compression.output_curvature": "false",
    "compression.damp": "0.05",
    "compression.output_damp": "0.3",
    "compression.router_weight_exponent": "0",
    "compression.sweeps": "1",
    "compression.refine_steps": "5",
    "compression.activation_quantization": None,
    "output.base_model": "owner/name",
    "output.max_shard_size": "1MB",
    "output.storage": "sparse",
    "run.experts_per_unit": "3",
    "run.threads_per_worker": "2",
    "run.layers": "[1]",
}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def planned(*overrides: str) -> Prepared:
    return prepare(load_config(REPO / "configs" / "tiny.yaml", overrides, "memory://plans"))


def test_plan_is_a_pure_function_and_survives_json() -> None:
    plan = planned().plan
    assert plan == planned().plan
    assert RunPlan.from_json(plan.to_json(), "memory") == plan


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_record_with_a_number_that_no_reader_takes_is_not_written(value: float) -> None:
    """JSON has no such number: pydantic's own writer makes a null of it, which its reader
    refuses."""
    sums = CompressedSums(loss=1.0, correct=2, kl=value)
    cell = EvaluationCell(
        document=0,
        stretch=0,
        num_tokens=3,
        source_loss=1.0,
        source_correct=1,
        compressed_loss=1.0,
        compressed_correct=1,
        kl=0.5,
    )
    part = EvaluationPart(
        plan_digest="NaN, Infinity", evaluation="", part=0, stretch_ends=(2,), cells=(cell,)
    )
    assert EvaluationPart.from_json(part.to_json(), "memory") == part, "words are no numbers"
    words = f"EvaluationPart: cells.0.in_groups_of_32.kl: expected a finite number, found {value}"
    with pytest.raises(NumericsError, match=words):
        loud = cell.model_copy(update={"in_groups_of_32": sums})
        part.model_copy(update={"cells": (loud,)}).to_json()
    step = LadderStep(step="NaN", output_error={"down": 1.0}, loss_error={"gate_up": value})
    with pytest.raises(NumericsError, match=r"LadderStep: loss_error\.gate_up: expected"):
        step.to_json()
    error = UnsoundNumbers(errors=(1.0, value))
    with pytest.raises(NumericsError, match=r"UnsoundNumbers: errors\.1: expected"):
        error.to_json()


class UnsoundNumbers(Record):
    """A record with a list of numbers."""

    errors: tuple[float, ...]


def test_plan_covers_every_expert_and_sequence_once() -> None:
    plan = planned("run.experts_per_unit=3", "calibration.sequences_per_part=7").plan
    assert [(u.layer, e) for u in plan.units for e in u.experts] == [
        (n, e) for n in (1, 2, 3, 4) for e in range(16)
    ]
    assert [
        s for p in plan.parts for s in range(p.first_sequence, p.first_sequence + p.num_sequences)
    ] == list(range(192))
    assert [p.num_sequences for p in cut_parts(5, 2)] == [2, 2, 1]


def test_unit_ids_are_the_public_names() -> None:
    assert planned("run.experts_per_unit=6").plan.units[1].id == "L001-E006-011"


def settings_of(effect: str) -> list[str]:
    return [k for k, v in OTHER_VALUES.items() if v is not None and SETTINGS[k] == effect]


@pytest.mark.parametrize("key", settings_of("units"))
def test_setting_that_changes_units_is_refused_by_name_on_resume(key: str) -> None:
    store = MemoryStore(f"mismatch-{key}")
    before, after = planned().plan, planned(f"{key}={OTHER_VALUES[key]}").plan
    assert before.digest != after.digest
    assert before.units_digest != after.units_digest
    store.put(run_root.PLAN, before.to_json())
    with pytest.raises(PlanMismatchError) as caught:
        check_plan(after, store)
    assert f"another plan: {key}: expected " in str(caught.value)


@pytest.mark.parametrize("key", settings_of("checkpoint"))
def test_setting_that_changes_only_the_checkpoint_keeps_the_units(key: str) -> None:
    store = MemoryStore(f"takes-over-{key}")
    before, after = planned().plan, planned(f"{key}={OTHER_VALUES[key]}").plan
    assert before.digest != after.digest
    assert before.units_digest == after.units_digest
    store.put(run_root.PLAN, before.to_json())
    assert check_plan(after, store) == before


def test_layers_belong_to_the_units_where_compressed_layers_feed_the_next() -> None:
    whole = planned("calibration.propagate=compressed").plan
    pilot = planned("calibration.propagate=compressed", "run.layers=[1]").plan
    assert whole.units_digest != pilot.units_digest
    store = MemoryStore("propagated-pilot")
    store.put(run_root.PLAN, pilot.to_json())
    with pytest.raises(PlanMismatchError, match=r"another plan: run\.layers: expected None"):
        check_plan(whole, store)


def test_every_setting_that_changes_bytes_is_tried() -> None:
    assert set(OTHER_VALUES) == {key for key, effect in SETTINGS.items() if effect != "free"}


@pytest.mark.parametrize(
    "override",
    [
        "run.num_workers=7",
        "run.max_attempts=1",
        "run.prefetch_units=0",
        "evaluation=null",
        "evaluation.seed=4",
        "run.gpu_hour_price=2.5",
        "run.capture_workers=1",
        "run.keep=units",
        "run.keep=checkpoint",
        "run.endpoint_url=http://127.0.0.1:8333",
        "source.endpoint_url=http://127.0.0.1:8333",
    ],
)
def test_setting_that_changes_no_byte_may_change_on_resume(override: str) -> None:
    store = MemoryStore(f"free-{override}")
    store.put(run_root.PLAN, planned().plan.to_json())
    held = check_plan(planned(override).plan, store)
    assert held is not None
    assert held.digest == planned(override).plan.digest


def test_texts_are_part_of_the_plan(tmp_path: Path) -> None:
    store, copy = MemoryStore("texts"), tmp_path / "calibration.jsonl"
    copy.write_bytes((REPO / "examples/tiny-kimi-k2.5/calibration.jsonl").read_bytes())
    same = planned(f"calibration.documents={copy}").plan
    assert same.digest == planned().plan.digest, "the place of the texts does not matter"
    store.put(run_root.PLAN, same.to_json())
    copy.write_bytes(copy.read_bytes() + b'{"text": "one more"}\n')
    with pytest.raises(PlanMismatchError, match="calibration documents' digest"):
        check_plan(planned(f"calibration.documents={copy}").plan, store)


def test_numerics_version_is_part_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore("numerics")
    store.put(run_root.PLAN, planned().plan.to_json())
    monkeypatch.setattr("p48ray.run.plan.NUMERICS_VERSION", NUMERICS_VERSION + 1)
    with pytest.raises(PlanMismatchError, match="numerics version"):
        check_plan(planned().plan, store)


def test_plan_with_an_unknown_key_is_refused() -> None:
    text = (
        planned()
        .plan.to_json()
        .replace(b'"schema_version": 1', b'"schema_version": 1, "surprise": 2', 1)
    )
    with pytest.raises(ShardCorruptError, match="surprise"):
        RunPlan.from_json(text, "plan.json")


# A pilot's plan.


def test_pilot_has_units_of_its_layers_and_streams_up_to_the_last_of_them() -> None:
    plan = planned("run.layers=[3,1,3]", "compression.output_curvature=false").plan
    assert (plan.layers, plan.is_pilot) == ((1, 3), True)
    assert [(u.layer, e) for u in plan.units for e in u.experts] == [
        (n, e) for n in (1, 3) for e in range(16)
    ]
    assert (plan.passes.num_up, plan.passes.boundaries) == (4, range(1, 4))


def test_pilot_that_goes_back_streams_up_to_the_top_segment() -> None:
    plan = planned("run.layers=[1,3]").plan
    assert (plan.passes.num_up, plan.passes.boundaries) == (4, range(1, 5))
    assert plan.passes.segments == (range(4, 6), range(3, 4), range(2, 3), range(1, 2))


def test_segments_end_where_boundaries_are_stored_and_the_head_is_in_the_top_one() -> None:
    passes = planned("run.boundary_every=2", "run.layers=[2,4]").plan.passes
    assert (passes.num_up, passes.boundaries) == (4, range(2, 5, 2))
    assert passes.segments == (range(4, 6), range(2, 4))
    assert passes.gradient_boundaries == (4,)
    assert (passes.num_again, passes.num_back) == (3, 2)
    whole = planned("run.boundary_every=5").plan.passes
    assert (whole.num_up, whole.segments, whole.num_again) == (0, (range(6),), 5)
    in_turn = planned("run.boundary_every=2", "calibration.propagate=compressed").plan.passes
    assert (in_turn.num_again, in_turn.num_back) == (3, 3)
    assert (in_turn.bases, planned("run.boundary_every=1").plan.passes.bases) == (
        (4, 2),
        (4, 3, 2, 1),
    )
    assert planned("calibration.propagate=compressed").plan.passes.bases == (4, 3, 2)


def test_plan_of_all_layers_is_no_pilot() -> None:
    assert not planned().plan.is_pilot and not planned("run.layers=[1,2,3,4]").plan.is_pilot
    assert planned("run.layers=[1,2,3,4]").plan.units == planned().plan.units


def test_pilot_has_no_output_shards() -> None:
    assert (planned("run.layers=[2]").shards, len(planned().shards)) == ((), 6)


@pytest.mark.parametrize(
    ("layers", "found"), [("[0]", r"\[0\]"), ("[4,5,7]", r"\[5, 7\]"), ("[]", "none")]
)
def test_layers_without_experts_are_refused_by_name(layers: str, found: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"run\.layers: expected some of the layers with experts \(1 to 4\), found {found}",
    ):
        planned(f"run.layers={layers}")


@pytest.mark.parametrize(
    ("override", "kind", "words"),
    [
        (
            "run.experts_per_unit=17",
            ConfigError,
            "run.experts_per_unit: expected at most the model's 16 experts, found 17",
        ),
        (
            "calibration.sequence_length=5000",
            ConfigError,
            "calibration.sequence_length: expected at most max_position_embeddings = 4096",
        ),
        (
            "evaluation.sequence_length=5000",
            ConfigError,
            "evaluation.sequence_length: expected at most max_position_embeddings = 4096",
        ),
        ("source.checkpoint=nowhere", SourceError, "config.json: expected in"),
        (
            "calibration.documents=nowhere.jsonl",
            ConfigError,
            "calibration.documents: nowhere.jsonl: can not be read",
        ),
    ],
)
def test_setting_that_does_not_fit_the_source_is_refused(
    override: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words.replace("(", r"\(")):
        planned(override)
