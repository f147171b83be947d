"""What a run has cost and what is left, from manifests that are made up."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from p48ray.report.spans import Span
from p48ray.report.work import (
    Manifest,
    Work,
    duration,
    extrapolate,
    gpu_hours,
    measure_work,
    per_second,
    read_work,
    seconds_of,
    spans_of,
    stage_manifests,
)
from p48ray.run import run_root
from p48ray.run.manifest import ActivationPart, GradientPart, UnitManifest
from p48ray.run.plan import RunPlan
from p48ray.run.scale_counts import GroupHistogram
from p48ray.stages import gradients
from p48ray.stages.capture import capture_parts
from p48ray.stages.prepare import prepare
from p48ray.store import MemoryStore
from tests.stages.small_run import SmallRun, configure, write_inputs_once
from tests.stages.ways import go_back


def part(layer: int, number: int, finished_at: float, seconds: float = 1.0) -> ActivationPart:
    return ActivationPart(
        units_digest="",
        layer=layer,
        part=number,
        num_tokens=1,
        size_bytes=1,
        sha256="0",
        amax_input=1,
        amax_by_expert=(1,),
        input_groups=GroupHistogram(first=0, counts=()),
        intermediate_groups=GroupHistogram(first=0, counts=()),
        tokens_per_expert=(1,),
        seconds=seconds,
        write_seconds=0.5,
        finished_at=finished_at,
    )


def felt(layer: int, number: int, finished_at: float, seconds: float = 1.0) -> GradientPart:
    return GradientPart(
        units_digest="",
        layer=layer,
        part=number,
        num_tokens=1,
        size_bytes=1,
        sha256="0",
        mean_square=1,
        seconds=seconds,
        write_seconds=0.5,
        finished_at=finished_at,
    )


def unit(name: str, finished_at: float, seconds: dict[str, float]) -> UnitManifest:
    return UnitManifest(
        units_digest="",
        unit=name,
        attempt="abc",
        size_bytes=1,
        sha256="0",
        data_offset=0,
        input_global_scales=(1.0, 1.0),
        linears=(),
        clipped_input_share=0,
        clipped_intermediate_share=0,
        seconds=seconds,
        finished_at=finished_at,
        device="cpu",
        versions={},
    )


def spans(*times: tuple[float, float]) -> list[Span]:
    return [Span("capture", 1, start, end) for start, end in times]


# Rate and time left.


def test_rate_is_that_since_the_first_piece_of_work_was_begun() -> None:
    """One piece is enough to know it, and twelve that end at once took as long as the first was at
    work."""
    assert per_second(spans((100.0, 110.0))) == pytest.approx(0.1)
    assert per_second(spans((120.0, 130.0), (100.0, 110.0))) == pytest.approx(2 / 30)
    burst = spans(*((100.0 + n, 101.0 + n) for n in range(12)))
    assert per_second(burst) == pytest.approx(1.0)


def test_time_of_an_interruption_does_not_count() -> None:
    """A night in which nothing ran says nothing about how fast it goes."""
    assert per_second(spans((0.0, 10.0), (905.0, 915.0))) == pytest.approx(2 / 915)
    assert per_second(spans((0.0, 10.0), (50000.0, 50010.0))) == pytest.approx(2 / 20)


@pytest.mark.parametrize("times", [[], [(7.0, 7.0)]])
def test_there_is_no_rate_without_time(times: list[tuple[float, float]]) -> None:
    assert per_second(spans(*times)) is None


def test_time_left_is_what_is_missing_at_that_rate() -> None:
    found = measure_work("capture", spans((100, 110), (110, 120), (120, 130)), 13)
    assert found == Work(
        stage="capture", done=3, total=13, worker_seconds=30.0, per_minute=6.0, seconds_left=100.0
    )


def test_time_left_is_unknown_before_the_first_piece_and_none_when_all_is_done() -> None:
    nothing = measure_work("capture", [], 2)
    assert (nothing.done, nothing.worker_seconds, nothing.per_minute, nothing.seconds_left) == (
        0,
        0.0,
        None,
        None,
    )
    assert measure_work("capture", spans((99, 100)), 1).seconds_left == 0.0
    assert measure_work("capture", [], 0).seconds_left == 0.0


def test_seconds_of_a_unit_are_those_of_all_its_phases() -> None:
    assert seconds_of(unit("a", 1, {"fetch": 0.5, "solve": 2})) == 2.5
    assert seconds_of(part(1, 0, 1, seconds=1.5)) == 1.5


# From a run root.


@pytest.fixture
def plan(finished: SmallRun) -> RunPlan:
    """With the backward pass, which the session's run does not have: 4 layers, 3 parts, 8 units."""
    return prepare(
        configure(
            finished.source,
            "/nowhere",
            "compression.output_curvature=true",
            "run.gpus_per_worker=0.5",
        )
    ).plan


def stored(
    plan: RunPlan,
    store: MemoryStore,
    manifests: Sequence[ActivationPart | GradientPart | UnitManifest],
) -> set[str]:
    for m in manifests:
        if isinstance(m, UnitManifest):
            store.put(run_root.unit_manifest(m.unit), m.to_json())
        else:
            name = (
                run_root.activation_manifest
                if isinstance(m, ActivationPart)
                else run_root.gradient_manifest
            )
            store.put(name(m.layer, m.part), m.to_json())
    return {info.key for info in store.list()}


def test_work_is_read_stage_by_stage_from_the_manifests_that_are_there(plan: RunPlan) -> None:
    store = MemoryStore("work-stages")
    manifests = [
        *(part(n, p, 60.0 * n + p, 2.0) for n in (1, 2, 3, 4) for p in (0, 1, 2)),
        *(felt(4, p, 300.0 + 30 * p, 4.0) for p in (0, 1, 2)),
        unit("L001-E000-007", 400.0, {"solve": 10.0}),
    ]
    capture_work, back, compress = read_work(plan, store, stored(plan, store, manifests))
    assert (
        capture_work.stage,
        capture_work.done,
        capture_work.total,
        capture_work.worker_seconds,
    ) == ("capture", 12, 12, 24.0)
    assert back == Work(
        stage="gradients",
        done=3,
        total=12,
        worker_seconds=12.0,
        per_minute=2.81,  # begun at 296, the last one ended at 360
        seconds_left=192.0,
    )
    assert compress == Work(
        stage="compress", done=1, total=8, worker_seconds=10.0, per_minute=6.0, seconds_left=70.0
    )
    assert gpu_hours(plan, (capture_work, back, compress)) == pytest.approx(46.0 / 3600 * 0.5)


def test_manifests_that_are_known_are_not_read_again(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, read = MemoryStore("work-known"), list[str]()
    keys = stored(plan, store, [part(1, 0, 10.0), part(1, 1, 11.0)])
    known: dict[str, Manifest] = {}
    first = stage_manifests(plan, store, keys, known)
    get = store.get
    monkeypatch.setattr(store, "get", lambda key: [read.append(key), get(key)][1])
    keys = stored(plan, store, [part(1, 2, 12.0)])
    second = stage_manifests(plan, store, keys, known)
    assert read == [run_root.activation_manifest(1, 2)]
    assert [m.part for m in second["capture"]] == [0, 1, 2]  # type: ignore[union-attr]
    assert [m.part for m in first["capture"]] == [0, 1]  # type: ignore[union-attr]


def test_workers_that_ran_both_streams_and_units_are_one_each_in_the_spans(plan: RunPlan) -> None:
    """A unit that was written while the next was computed, after parts that became durable
    together."""
    made = {
        "capture": [part(n, 0, 10.0, 4.0).model_copy(update={"worker": "a"}) for n in (1, 2)],
        "compress": [
            unit("L001-E000-003", 21.0, {"solve": 10.0}).model_copy(update={"worker": "a"}),
            unit("L002-E000-003", 30.0, {"solve": 10.0}).model_copy(update={"worker": "a"}),
        ],
    }
    plan = plan.model_copy(update={"units": tuple(u for u in plan.units if u.first_expert == 0)})
    names = [u.id for u in plan.units][:2]
    made["compress"] = [
        m.model_copy(update={"unit": name}) for m, name in zip(made["compress"], names, strict=True)
    ]
    found = spans_of(plan, made)
    assert [(s.stage, s.layer, s.start, s.end) for s in found] == [
        ("capture", 2, 2.0, 6.0),
        ("capture", 1, 6.0, 10.0),
        ("compress", 1, 10.0, 20.0),
        ("compress", 2, 20.0, 30.0),
    ]


def test_work_of_a_plan_without_gradients_has_no_such_stage(finished: SmallRun) -> None:
    work = read_work(
        finished.prepared.plan,
        finished.prepared.store,
        {info.key for info in finished.prepared.store.list()},
    )
    assert [(w.stage, w.done, w.total) for w in work] == [("capture", 12, 12), ("compress", 8, 8)]
    assert all(w.worker_seconds > 0 for w in work)


def test_manifests_that_the_plan_does_not_name_are_nobodys_work(plan: RunPlan) -> None:
    store = MemoryStore("work-strange")
    keys = stored(
        plan, store, [part(7, 0, 1.0), part(1, 9, 1.0), unit("L007-E000-007", 1.0, {"solve": 1.0})]
    )
    assert [w.done for w in read_work(plan, store, keys)] == [0, 0, 0]


NAP_S = 0.05


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["capture", "gradients"])
def test_seconds_of_a_part_hold_the_pass_through_its_layer(
    stage: str, finished: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what GPU-hours and cost rest on. Every pass of the backward pass through a layer, up
    and down, is slowed down by a nap."""
    prepared = prepare(
        configure(
            finished.source,
            tmp_path,
            "compression.output_curvature=true",
            "calibration.num_sequences=2",
        )
    )
    write_inputs_once(prepared)
    capture_parts(prepared.context, [0])
    slow(monkeypatch, gradients, "attend" if stage == "capture" else "step_down")
    go_back(prepared.context, [0])
    store, keys = prepared.store, {info.key for info in prepared.store.list()}
    (work,) = [w for w in read_work(prepared.plan, store, keys) if w.stage == stage]
    assert work.worker_seconds >= 3 * NAP_S, "of 4 passes up, or 4 down with that through the head"


def slow(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    real = getattr(module, name)

    def napping(*args: object) -> object:
        time.sleep(NAP_S)
        return real(*args)

    monkeypatch.setattr(module, name, napping)


# What a pilot says.


def pilot(finished: SmallRun, *overrides: str) -> RunPlan:
    return prepare(
        configure(finished.source, "/nowhere", "run.layers=[1,3]", "run.num_workers=4", *overrides)
    ).plan


def hours(stage: str, worker_hours: float) -> Work:
    return Work(
        stage=stage,
        done=1,
        total=1,
        worker_seconds=3600 * worker_hours,
        per_minute=None,
        seconds_left=0.0,
    )


WORK = (hours("capture", 1.0), hours("gradients", 2.0), hours("compress", 10.0))


def test_pilot_is_scaled_from_its_layers_to_all(finished: SmallRun) -> None:
    """2 of 4 layers: everything doubles; 4 workers share it."""
    found = extrapolate(pilot(finished), WORK)
    assert (found.layers, found.of_layers) == (2, 4)
    assert found.worker_hours == pytest.approx(26.0)
    assert found.wall_hours == pytest.approx(26.0 / 4)
    assert (found.gpu_hours, found.cost) == (0.0, None)


def test_capture_workers_share_the_streams_only(finished: SmallRun) -> None:
    found = extrapolate(pilot(finished, "run.capture_workers=2"), WORK)
    assert found.wall_hours == pytest.approx(6.0 / 2 + 20.0 / 4)


def test_cost_is_gpu_hours_at_the_configured_price(finished: SmallRun) -> None:
    found = extrapolate(pilot(finished, "run.gpus_per_worker=0.5", "run.gpu_hour_price=3"), WORK)
    assert found.gpu_hours == pytest.approx(13.0)
    assert found.cost == pytest.approx(39.0)
    free = extrapolate(pilot(finished, "run.gpus_per_worker=0.5"), WORK)
    assert (free.gpu_hours, free.cost) == (found.gpu_hours, None)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.9, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (90 * 3600, "90 h 00 min"),
    ],
)
def test_duration_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_durations_words_never_say_sixty() -> None:
    assert not [
        d
        for d in map(duration, itertools.chain(range(0, 20000, 7), (n + 0.5 for n in range(7300))))
        if " 60 " in f" {d} "
    ]
