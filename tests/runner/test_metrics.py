"""What a worker tells Ray's metrics. Ray's own counters check names, tags and values; they need no
cluster for that."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from ray.util.metrics import Counter, Gauge

from p48ray.run.manifest import LinearRecord, UnitManifest
from p48ray.runner import metrics
from p48ray.runner.metrics import WorkerMetrics
from p48ray.stages.tasks import Task, TaskResult, facts_of
from p48ray.store import MemoryStore
from p48ray.unit.context import StageContext

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Series:
    """Name and tags -> what was counted so far, or the last value of a gauge; Ray's own objects
    count too."""
    series: Series = defaultdict(float)

    class Counted(Counter):  # type: ignore[misc]
        def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
            super().inc(value, tags)
            series[self.info["name"], frozenset((tags or {}).items())] += value

    class Gauged(Gauge):  # type: ignore[misc]
        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            super().set(value, tags)
            series[self.info["name"], frozenset((tags or {}).items())] = value

    monkeypatch.setattr(metrics, "Counter", Counted)
    monkeypatch.setattr(metrics, "Gauge", Gauged)
    return series


class Source:
    """As much of a checkpoint index as is looked at."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store


@pytest.fixture
def context() -> StageContext:
    store, source = MemoryStore("metrics-root"), Source(MemoryStore("metrics-source"))
    anything: Any = None
    return StageContext(
        plan=anything, store=store, source=source, layout=anything, device=torch.device("cpu")
    )  # type: ignore[arg-type]


def tagged(name: str, **tags: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(tags.items())


def result(
    stage: str,
    seconds: float = 0.0,
    error: str | None = None,
    facts: dict[str, float] | None = None,
) -> TaskResult:
    return TaskResult(
        task=Task(stage=stage, id="x", item=None),
        error_type=error,
        seconds=seconds,
        facts=facts or {},
    )


def test_tasks_and_their_seconds_are_counted_by_stage(context: StageContext, told: Series) -> None:
    worker = WorkerMetrics(lambda: [context.store.traffic, context.source.store.traffic])
    for stage, seconds in (("capture", 2.5), ("compress", 1.0), ("compress", 3.0)):
        worker.count(result(stage, seconds))
    assert told == {
        tagged("p48ray_tasks_done", stage="capture"): 1,
        tagged("p48ray_tasks_done", stage="compress"): 2,
        tagged("p48ray_task_seconds", stage="capture"): 2.5,
        tagged("p48ray_task_seconds", stage="compress"): 4.0,
    }


def test_failed_attempts_are_counted_by_stage_and_error_and_are_not_done(
    context: StageContext, told: Series
) -> None:
    worker = WorkerMetrics(lambda: [context.store.traffic, context.source.store.traffic])
    for error in ("NumericsError", "TransientStoreError", "NumericsError"):
        worker.count(result("compress", 1.0, error))
    assert told == {
        tagged("p48ray_tasks_failed", stage="compress", error="NumericsError"): 2,
        tagged("p48ray_tasks_failed", stage="compress", error="TransientStoreError"): 1,
        tagged("p48ray_task_seconds", stage="compress"): 3.0,
    }


def test_units_tokens_and_seconds_by_phase_are_those_of_its_manifest(
    context: StageContext, told: Series
) -> None:
    linears = tuple(
        linear(f"experts.{e}.{p}", tokens)
        for e, tokens in ((0, 100), (1, 23))
        for p in ("gate_proj", "up_proj", "down_proj")
    )
    facts = facts_of(unit_manifest(linears, {"fetch": 0.5, "solve": 4.0, "write": 0.0}))
    worker = WorkerMetrics(lambda: [context.store.traffic, context.source.store.traffic])
    worker.count(result("compress", 5.0, facts=facts))
    worker.count(result("compress", 5.0, facts=facts))
    assert told[tagged("p48ray_unit_tokens")] == 2 * 123
    phases = {
        dict(tags)["phase"]: value
        for (name, tags), value in told.items()
        if name == "p48ray_unit_seconds"
    }
    assert phases == {"fetch": 1.0, "solve": 8.0}


def test_tasks_other_than_units_have_no_facts() -> None:
    assert facts_of(None) == facts_of([object()]) == {}


def test_bytes_are_what_went_through_both_stores_since_the_last_task(
    context: StageContext, told: Series
) -> None:
    worker = WorkerMetrics(lambda: [context.store.traffic, context.source.store.traffic])
    context.store.put("a", bytes(1000))
    context.source.store.put("b", bytes(50))
    context.source.store.get("b")
    worker.count(result("capture"))
    assert (
        told[tagged("p48ray_store_read_bytes")],
        told[tagged("p48ray_store_written_bytes")],
    ) == (50, 1050)
    context.store.get("a")
    worker.count(result("capture"))
    worker.count(result("capture"))
    assert (
        told[tagged("p48ray_store_read_bytes")],
        told[tagged("p48ray_store_written_bytes")],
    ) == (1050, 1050)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_gpu_memory_is_told_where_there_is_one(
    has_gpu: bool, context: StageContext, told: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([3e9, 5e9])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    worker = WorkerMetrics(lambda: [context.store.traffic, context.source.store.traffic])
    worker.count(result("compress"))
    worker.count(result("compress"))
    assert {name: value for (name, _), value in told.items() if "gpu" in name} == (
        {"p48ray_gpu_peak_bytes": 5e9} if has_gpu else {}
    )


def test_gpu_memory_of_a_unit_is_its_highest_phase_and_the_gauge_never_falls(
    context: StageContext, told: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's own count starts anew with every phase, so that after a unit it is that of the
    last one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1e9)
    worker = WorkerMetrics(lambda: [context.store.traffic, context.source.store.traffic])
    for peaks in ({"solve": 7_000_000_000, "describe": 1_000_000_000}, {"solve": 2_000_000_000}):
        made = unit_manifest((), {"solve": 1.0}).model_copy(update={"peak_gpu_bytes": peaks})
        worker.count(result("compress", 5.0, facts=facts_of(made)))
        assert told[tagged("p48ray_gpu_peak_bytes")] == 7e9


def linear(name: str, tokens: int) -> LinearRecord:
    return LinearRecord(
        name=name,
        tokens=tokens,
        outcome="solved",
        reason="",
        damp=0.1,
        shrinkage=0,
        relative_weight_error=0.1,
        relative_output_error=0.1,
    )


def unit_manifest(linears: tuple[LinearRecord, ...], seconds: dict[str, float]) -> UnitManifest:
    return UnitManifest(
        units_digest="",
        unit="L001-E000-001",
        attempt="abc",
        size_bytes=1,
        sha256="0",
        data_offset=0,
        input_global_scales=(1.0, 1.0),
        linears=linears,
        clipped_input_share=0,
        clipped_intermediate_share=0,
        seconds=seconds,
        finished_at=0,
        device="cpu",
        versions={},
    )
