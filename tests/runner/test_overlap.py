"""Capture, gradients and compress at once: what is ready when, that it really happens at once, and
that the bytes are those of one stage after the other."""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest

from p48ray.config.load import load_config
from p48ray.errors import CalibrationError, P48Error, TransientStoreError
from p48ray.run import run_root
from p48ray.run.manifest import ActivationPart, GradientPart, LayerScales, UnitManifest
from p48ray.run.needs import read_needs
from p48ray.run.plan import SequencePart
from p48ray.run.scale_counts import GroupHistogram
from p48ray.run.scales import combine_scales
from p48ray.runner import overlap, ray_runner
from p48ray.runner.base import TaskList
from p48ray.runner.local_runner import LocalRunner
from p48ray.runner.overlap import POLL_S, Overlap
from p48ray.runner.ray_runner import WorkerProcess
from p48ray.stages import capture, gradients
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.prepare import Prepared, prepare
from p48ray.stages.tasks import Task, TaskResult
from p48ray.store import LocalStore, MemoryStore
from p48ray.store.base import Store
from p48ray.unit.context import StageContext
from tests.conftest import REPO
from tests.jobs.command import CONFIG, invoke, small, snapshot
from tests.runner.conftest import ALL_STAGES
from tests.runner.test_ray_runner import arguments, assert_same_bytes

WAIT_S = 60.0
TOP, BOTTOM = 4, 1  # the small model's mixtures are layers 1 to 4


# On Ray: a stream that does not end before units of what it left are done.


def wait_for(store: Store, prefix: str) -> None:
    """Raises: P48Error when nothing comes to be there."""
    deadline = time.monotonic() + WAIT_S
    while not any(key.key.endswith(".json") for key in store.list(prefix)):
        if time.monotonic() > deadline:
            raise P48Error(f"nothing under {prefix}")
        time.sleep(0.05)


class WaitingWorker(WorkerProcess):
    """Its streams write the last layer on their way only when a unit of the first one is done."""

    awaited = run_root.UNITS

    def execute(self, task: Task) -> TaskResult:
        goes_back = self.workplace.plan.config.compression.output_curvature
        write_gradients, write_activations = gradients.write_gradients, capture.write_activations

        def back(context: StageContext, writer: BlobWriter, layer: int, *rest: object) -> None:
            if layer == BOTTOM:
                self.before_last(context.store, TOP)
            write_gradients(context, writer, layer, *rest)  # type: ignore[arg-type]

        def up(context: StageContext, writer: BlobWriter, layer: int, *rest: object) -> None:
            if layer == TOP and not goes_back:
                self.before_last(context.store, BOTTOM)
            write_activations(context, writer, layer, *rest)  # type: ignore[arg-type]

        with (
            mock.patch.object(gradients, "write_gradients", back),
            mock.patch.object(capture, "write_activations", up),
        ):
            return super().execute(task)

    def before_last(self, store: Store, first: int) -> None:
        wait_for(store, run_root.unit_prefix(first))


class CorruptingWorker(WaitingWorker):
    """Flips a bit in what units of the layer before the last will read, and waits until one has
    found out."""

    def before_last(self, store: Store, first: int) -> None:
        if not any(True for _ in store.list(run_root.FAILURES)):
            key = run_root.activation_part(BOTTOM + 1, 0)
            data = bytearray(store.get(key))
            data[len(data) // 2] ^= 1
            store.put(key, bytes(data))
            wait_for(store, run_root.FAILURES)


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (overlap, ray_runner):
        monkeypatch.setattr(module, "POLL_S", 0.1)


ONE_STREAM = {"run.capture_workers": "1", "run.num_workers": "2", "run.layers_in_flight": "9"}


@pytest.mark.ray
@pytest.mark.usefixtures("quick_looks", "ray_session")
def test_units_of_the_top_layer_are_done_before_the_lowest_has_its_gradients(
    local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_runner, "WorkerProcess", WaitingWorker)
    outcome = invoke(*arguments(tmp_path / "run", ONE_STREAM), on_ray=True)
    assert outcome.code == 0, outcome
    assert_same_bytes(local_run, tmp_path / "run")
    store = LocalStore(tmp_path / "run")
    felt = [GradientPart.load(store, run_root.gradient_manifest(BOTTOM, p)) for p in (0, 1)]
    keys = [
        info.key
        for info in store.list(run_root.unit_prefix(TOP))
        if info.key.endswith("manifest.json")
    ]
    assert min(UnitManifest.load(store, key).finished_at for key in keys) < min(
        part.finished_at for part in felt
    )
    for line in (
        "capture   8 activation parts",
        "gradients 8 gradient parts",
        "compress  16 units",
    ):
        assert outcome.out.index(line) < outcome.out.index("activation parts in "), (
            "all three are shown from the start"
        )


@pytest.mark.ray
@pytest.mark.usefixtures("quick_looks", "ray_session")
def test_without_a_way_back_units_of_the_lowest_layer_are_done_before_the_top_has_its_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forth = ONE_STREAM | {"compression.output_curvature": "false"}
    assert invoke(*arguments(tmp_path / "staged", forth)).code == 0
    monkeypatch.setattr(ray_runner, "WorkerProcess", WaitingWorker)
    outcome = invoke(*arguments(tmp_path / "run", forth), on_ray=True)
    assert outcome.code == 0, outcome
    for folder in ("activations", "checkpoint"):
        assert snapshot(tmp_path / "run" / folder) == snapshot(tmp_path / "staged" / folder) != {}


@pytest.mark.ray
@pytest.mark.usefixtures("quick_looks", "ray_session")
def test_object_that_a_unit_finds_corrupt_while_the_stream_goes_on_is_made_anew(
    local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_runner, "WorkerProcess", CorruptingWorker)
    outcome = invoke(*arguments(tmp_path / "run", ONE_STREAM), on_ray=True)
    assert outcome.code == 0, outcome
    corrupt = run_root.activation_part(BOTTOM + 1, 0)
    assert f"{corrupt}, made anew next" in outcome.out.replace(
        f"{run_root.manifest_of(corrupt)}, ", ""
    )
    assert_same_bytes(local_run, tmp_path / "run")


# What is ready when.


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.chdir(REPO)
    return make("all")


def make(keep: str, **settings: str) -> Prepared:
    chosen = (
        small()
        | ALL_STAGES
        | {"calibration.num_sequences": "8", "run.num_workers": "3", "run.keep": keep}
        | settings
    )
    uri = f"memory://overlap-{time.monotonic_ns()}"
    return prepare(load_config(CONFIG, tuple(f"{k}={v}" for k, v in chosen.items()), uri))


def started(prepared: Prepared) -> tuple[Overlap, Clock]:
    clock = Clock()
    return Overlap(prepared.context, read_needs(prepared.plan, prepared.store), clock), clock


def tokens_of(prepared: Prepared, part: SequencePart) -> int:
    return part.num_sequences * prepared.plan.config.calibration.sequence_length


def leave(prepared: Prepared, layer: int, *parts: SequencePart, way: str = "both") -> None:
    """A layer's records and stubs of its data, as a stream leaves them."""
    store, size = prepared.store, prepared.layout.num_experts
    shared = {
        "units_digest": prepared.plan.units_digest,
        "layer": layer,
        "size_bytes": 1,
        "sha256": "0" * 64,
    }
    shared |= {"seconds": 1.0, "write_seconds": 1.0, "finished_at": 1.0}
    for p in parts or prepared.plan.parts:
        shared |= {"num_tokens": tokens_of(prepared, p)}
        if way != "back":
            seen = ActivationPart(
                part=p.part,
                amax_input=1.0,
                amax_by_expert=(1.0,) * size,
                input_groups=GroupHistogram(first=0, counts=()),
                intermediate_groups=GroupHistogram(first=0, counts=()),
                tokens_per_expert=(layer,) * size,
                **shared,
            )
            store.put(run_root.activation_part(layer, p.part), b"-")
            store.put(run_root.activation_manifest(layer, p.part), seen.to_json())
        if way != "up":
            store.put(run_root.gradient_part(layer, p.part), b"-")
            store.put(
                run_root.gradient_manifest(layer, p.part),
                GradientPart(part=p.part, mean_square=1.0, **shared).to_json(),
            )


def names(tasks: object) -> list[tuple[str, object]]:
    return [(t.stage, t.item if t.layer is None else t.layer) for t in tasks]  # type: ignore[attr-defined]


def test_slices_go_up_and_each_back_down_as_soon_as_it_is_up(prepared: Prepared) -> None:
    work, _ = started(prepared)
    up = work.next(False)
    assert names(up) == [("capture", [0, 3]), ("capture", [1]), ("capture", [2])]
    assert work.next(False) == []
    work.done(up[1])
    (back,) = work.next(False)
    assert names([back]) == [("gradients", (4, [1]))]
    work.done(back)
    (back,) = work.next(False)
    assert names([back]) == [("gradients", (3, [1]))]
    work.done(up[0])
    assert names(work.next(False)) == [("gradients", (4, [0, 3]))]


def test_layer_is_ready_when_all_its_parts_are_there_both_ways(prepared: Prepared) -> None:
    work, clock = started(prepared)
    work.next(False)
    for n in prepared.plan.layers:
        leave(prepared, n, way="up")
    leave(prepared, TOP, *prepared.plan.parts[:-1], way="back")
    clock.now += 2 * POLL_S
    assert work.next(False) == []
    leave(prepared, TOP, prepared.plan.parts[-1], way="back")
    leave(prepared, BOTTOM, way="back")
    clock.now += 2 * POLL_S
    assert names(work.next(False)) == [("compress", TOP)] * 4, (
        "the lowest is not looked at while those above it are under way"
    )
    assert prepared.store.head(run_root.layer_scales(TOP)) is not None
    assert names(work.next(True)) == [("compress", BOTTOM)] * 4, "when all is idle, everything is"
    assert work.next(True) == []


def test_units_carry_their_layer_marker_and_load(prepared: Prepared) -> None:
    leave(prepared, 2)
    work, _ = started(prepared)
    tasks = [t for t in work.next(False) if t.stage == "compress"]
    assert [(t.id, t.layer, t.load, t.marker) for t in tasks] == [
        (u.id, 2, 2.0 * len(prepared.plan.parts) * u.num_experts, run_root.unit_manifest(u.id))
        for u in prepared.plan.units
        if u.layer == 2
    ]


def test_store_is_asked_at_a_bounded_rate_and_whenever_a_stream_ended(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, clock = started(prepared)
    up = work.next(False)
    asked: list[str] = []
    listing = MemoryStore.list
    monkeypatch.setattr(
        MemoryStore, "list", lambda store, prefix="": asked.append(prefix) or listing(store, prefix)
    )
    for _ in range(100):
        work.next(False)
    assert asked == []
    clock.now += POLL_S
    for _ in range(100):
        work.next(False)
    assert asked == [run_root.activation_folder(TOP), run_root.gradient_folder(TOP)]
    work.done(up[0])
    work.next(False)
    assert len(asked) == 4


def test_look_that_the_store_does_not_answer_is_made_again_later(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, clock = started(prepared)
    work.next(False)
    leave(prepared, TOP)

    def away(store: MemoryStore, prefix: str = "") -> Iterator[object]:
        raise TransientStoreError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "list", away)
        clock.now += POLL_S
        assert work.next(False) == []
        with pytest.raises(TransientStoreError):
            work.next(True)
    clock.now += POLL_S
    assert names(work.next(False)) == [("compress", TOP)] * 4


def test_units_that_somebody_has_done_meanwhile_are_not_named(prepared: Prepared) -> None:
    work, clock = started(prepared)
    work.next(False)
    leave(prepared, TOP)
    done = [u for u in prepared.plan.units if u.layer == TOP][:3]
    for unit in done:
        prepared.store.put(run_root.unit_manifest(unit.id), b"{}")
    clock.now += POLL_S
    assert [t.id for t in work.next(False)] == [
        u.id for u in prepared.plan.units if u.layer == TOP
    ][3:]


def test_data_goes_with_its_layers_last_unit_and_boundaries_with_the_last_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPO)
    prepared = make("units", **{"run.num_workers": "1"})
    work, _ = started(prepared)
    (up,) = work.next(False)
    boundaries = [run_root.blob("residuals", 2, 0), run_root.blob("residual-gradients", 3, 0)]
    for key in boundaries:
        prepared.store.put(key, b"-")
    work.done(up)
    found = list(work.next(True))
    for n in (TOP, 3, 2):
        back = next(task for task in found if task.item == (n, [0, 1, 2, 3]))
        leave(prepared, n)
        work.done(back)
        found += work.next(True)
    units = [task for task in found if task.stage == "compress"]
    assert names(units) == [("compress", n) for n in (TOP, 3, 2) for _ in range(4)]
    assert len(found) == 3 + len(units), "the lowest segment waits"
    for task in (t for t in units if t.layer == TOP):
        assert prepared.store.head(run_root.activation_part(TOP, 0)) is not None
        prepared.store.put(task.marker or "", b"{}")
        work.done(task)
    assert prepared.store.head(run_root.activation_part(TOP, 0)) is None
    assert prepared.store.head(run_root.gradient_part(TOP, 3)) is None
    assert prepared.store.head(run_root.activation_manifest(TOP, 0)) is not None
    assert prepared.store.head(run_root.activation_part(3, 0)) is not None
    assert all(prepared.store.head(key) is not None for key in boundaries), (
        "the backward pass reads them"
    )
    (back,) = work.next(False)
    assert names([back]) == [("gradients", (BOTTOM, [0, 1, 2, 3]))]
    leave(prepared, BOTTOM)
    work.done(back)
    assert all(prepared.store.head(key) is None for key in boundaries)


@pytest.mark.parametrize(
    ("maxima", "scales"), [((0.0, 0.0), (1.0, 1.0)), ((2.0, 0.0), (1344.0 / 16, 1.0))]
)
def test_layer_whose_activations_are_all_zero_has_scales_of_one(
    maxima: tuple[float, float], scales: tuple[float, float], prepared: Prepared
) -> None:
    leave(prepared, 3)
    for part in prepared.plan.parts:
        key = run_root.activation_manifest(3, part.part)
        size = prepared.layout.num_experts
        changes = {"amax_input": maxima[0], "amax_by_expert": (maxima[1],) * size}
        record = ActivationPart.load(prepared.store, key).model_copy(update=changes)
        prepared.store.put(key, record.to_json())
    started(prepared)
    found = LayerScales.load(prepared.store, run_root.layer_scales(3))
    assert (found.gate_up, found.down) == scales


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["amax_input", "amax_by_expert"])
def test_activations_that_are_not_finite_name_layer_and_part(
    name: str, value: float, prepared: Prepared
) -> None:
    leave(prepared, 3)
    parts = [
        ActivationPart.load(prepared.store, run_root.activation_manifest(3, p.part))
        for p in prepared.plan.parts
    ]
    changed = value if name == "amax_input" else (1.0, value, *parts[1].amax_by_expert[2:])
    parts[1] = parts[1].model_copy(update={name: changed})
    with pytest.raises(CalibrationError, match="layer 3, part 1: expected finite"):
        combine_scales(prepared.plan, 3, parts)


# Runners, and what follows from a task.


def test_local_runner_runs_what_follows_streams_first() -> None:
    runner = object.__new__(LocalRunner)
    runner.plan, runner.workplace = (
        mock.Mock(),
        mock.Mock(execute=lambda task: TaskResult(task=task)),
    )
    runner.plan.config.run.max_attempts = 1
    stream = [Task(stage="gradients", id=f"s{n}", item=n) for n in range(2)]
    unit = [Task(stage="compress", id=f"u{n}", item=n, layer=1) for n in range(3)]
    ran: list[str] = []
    idle: list[bool] = []

    class Following(TaskList):
        def next(self, is_idle: bool) -> Sequence[Task]:
            if first := super().next(is_idle):
                return first
            idle.append(is_idle)
            return (
                {1: [stream[1], unit[1]], 4: [unit[2]]}.get(len(ran), [])
                if len(idle) in (2, 5)
                else []
            )

    for result in runner.run(Following([unit[0], stream[0]])):
        ran.append(result.task.id)
    assert ran == ["s0", "s1", "u0", "u1", "u2"]
    assert idle == [False, False, False, False, True, True]
