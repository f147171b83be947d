"""Both runners do the same work to the same bytes, whoever dies on the way, and say what failed."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from p48ray.config.load import load_config
from p48ray.errors import CorruptObjectError, GaveUpError, SourceError, StageFailedError
from p48ray.run import run_root
from p48ray.run.manifest import Failure
from p48ray.run.plan import WorkUnit
from p48ray.runner import ray_runner
from p48ray.runner.base import TaskList, WorkSource, run_all
from p48ray.runner.dispatch import Dispatcher
from p48ray.runner.local_runner import LocalRunner
from p48ray.runner.pipeline import run_job
from p48ray.runner.ray_runner import RayRunner, Worker, WorkerProcess
from p48ray.stages.prepare import prepare
from p48ray.stages.table import STAGES
from p48ray.stages.tasks import Task, TaskResult
from p48ray.store.local import LocalStore
from p48ray.unit.context import StageContext
from tests.jobs import command
from tests.jobs.command import CONFIG, attempts, copy_model, invoke, small, snapshot
from tests.runner.conftest import ALL_STAGES

SAME_BYTES = (
    "calibration",
    "residuals",
    "activations",
    "residual-gradients",
    "gradients",
    "checkpoint",
)
ONE_WORKER = {"run.num_workers": "1"}  # where there is nothing for two
BOTH_RUNNERS = [
    pytest.param(False, id="local"),
    pytest.param(True, id="ray", marks=pytest.mark.ray),
]


def arguments(root: Path, settings: dict[str, str] | None = None) -> list[str]:
    """The command's arguments for the small run with all stages."""
    return command.arguments(root, ALL_STAGES | (settings or {}))


def assert_same_bytes(left: Path, right: Path) -> None:
    """Texts, boundaries, activations, gradients and the finished checkpoint, file by file."""
    for folder in SAME_BYTES:
        files = snapshot(left / folder)
        assert len(files) > 0
        assert files == snapshot(right / folder), folder


@pytest.fixture
def use_ray(request: pytest.FixtureRequest, on_ray: bool) -> None:
    """Starts Ray where the test's runner needs it."""
    if on_ray:
        request.getfixturevalue("ray_session")


# The same bytes.


def busy_workers() -> list[psutil.Process]:
    """Our workers that are in the middle of a task, by the title that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] == ["ray::WorkerProcess.execute"]:
                found.append(process)
    return found


class KillingRunner(RayRunner):
    """Kills a worker that is busy, once, when the first unit is done."""

    killed = 0

    def run(self, source: WorkSource) -> Iterator[TaskResult]:
        for result in super().run(source):
            if result.task.stage == "compress" and not self.killed:
                victims = busy_workers()
                for victim in victims[:1]:
                    victim.kill()
                KillingRunner.killed += len(victims[:1])
            yield result


@pytest.mark.ray
def test_killed_worker_leaves_the_same_bytes(
    ray_session: None, local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p48ray.runner.ray_runner.RayRunner", KillingRunner)
    monkeypatch.setattr(KillingRunner, "killed", 0)
    outcome = invoke(*arguments(tmp_path / "run", {"run.prefetch_units": "0"}), on_ray=True)
    assert outcome.code == 0, outcome
    assert KillingRunner.killed == 1
    assert outcome.out.count("attempt 1 failed, it will be tried again: WorkerLostError") == 1
    failures = list((tmp_path / "run" / "failures").rglob("*.json"))
    assert len(failures) == 1, "of a unit, or of a stream that was under way beside the first one"
    assert_same_bytes(local_run, tmp_path / "run")


class TwoAtOnceKillingRunner(RayRunner):
    """Kills its one worker, once, when that has two units in hand. Notes what it hands out."""

    killed: ClassVar[list[Task]]
    handed: ClassVar[list[tuple[Task, list[Task]]]]

    def assign(self, worker: Worker, task: Task) -> None:
        self.handed.append((task, self.assigned().get(worker, [])))
        super().assign(worker, task)

    def assign_ahead(self, waiting: Dispatcher, assigned: Mapping[Worker, Sequence[Task]]) -> None:
        super().assign_ahead(waiting, assigned)
        ((_, tasks),) = self.assigned().items() or ((None, []),)
        if len(tasks) == 2 and not self.killed:
            wait_until(lambda: bool(busy_workers()))
            for victim in busy_workers():
                victim.kill()
            self.killed.extend(tasks)


@pytest.mark.ray
def test_worker_killed_with_two_units_in_hand_gives_both_back_and_neither_shares_a_worker_again(
    ray_session: None, local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p48ray.runner.ray_runner.RayRunner", TwoAtOnceKillingRunner)
    for name in ("killed", "handed"):
        monkeypatch.setattr(TwoAtOnceKillingRunner, name, [], raising=False)
    outcome = invoke(
        *arguments(tmp_path / "run", {"run.num_workers": "1", "run.max_attempts": "1"}), on_ray=True
    )
    assert outcome.code == 0, outcome
    lost = TwoAtOnceKillingRunner.killed
    assert [
        f"{t.stage} {t.id}: its worker is gone, with several units in hand" in outcome.out
        for t in lost
    ] == [True, True]
    handed = TwoAtOnceKillingRunner.handed
    assert all(
        [t.stage for t in (task, *beside)] == ["compress"] * 2 for task, beside in handed if beside
    )
    shared = [(task, *beside) for task, beside in handed if beside]
    assert shared[0] == tuple(reversed(lost))
    assert len(shared) > 1
    assert not {t.id for t in lost} & {t.id for pair in shared[1:] for t in pair}
    assert [sum(task == t for task, _ in handed) for t in lost] == [2, 2]
    assert not (tmp_path / "run" / "failures").exists()
    assert_same_bytes(local_run, tmp_path / "run")


def wait_until(is_true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class PowerCutError(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a power cut."""


def run_through_power_cuts(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command again and again, cut before or after every twelfth write in turn, until it
    ends."""
    write, count = LocalStore._write, 0

    def cut(self: LocalStore, path: str, *rest: Any) -> tuple[int, bool]:
        nonlocal count
        count += 1
        if count % 24 == 12:
            raise PowerCutError("before the object has its name")
        result = write(self, path, *rest)
        if count % 24 == 0:
            raise PowerCutError("after it")
        return result

    monkeypatch.setattr(LocalStore, "_write", cut)
    codes: list[int] = []
    while not codes:
        assert count < 1000, "the run does not get ahead"
        with suppress(PowerCutError):
            codes.append(invoke(*args).code)
    assert codes == [0]
    assert count > 100


def test_run_cut_after_every_twelfth_write_ends_in_the_same_bytes(
    local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_through_power_cuts(arguments(tmp_path / "run"), monkeypatch)
    assert_same_bytes(local_run, tmp_path / "run")


# What failed.


def reopened(run: Path, root: Path, *layers: int) -> Path:
    """A copy of a finished run whose units of some layers are to be done again."""
    shutil.copytree(run, root)
    for layer in layers:
        for manifest in root.glob(f"units/L{layer:03d}-*/manifest.json"):
            manifest.unlink()
    return root


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


UNITS_OF_LAYER_2 = {f"L002-E{first:03d}-{first + 3:03d}" for first in (0, 4, 8, 12)}


@pytest.mark.parametrize("on_ray", BOTH_RUNNERS)
@pytest.mark.usefixtures("use_ray")
def test_failed_task_is_set_aside_the_stage_goes_on_and_a_mended_run_ends_well(
    on_ray: bool, local_run: Path, tmp_path: Path
) -> None:
    root = reopened(local_run, tmp_path / "run", 2, 3)
    for unit in UNITS_OF_LAYER_2:  # a file where the unit's folder has to be
        shutil.rmtree(root / "units" / unit, ignore_errors=True)
        (root / "units" / unit).write_text("")
    outcome = invoke(*arguments(root, ONE_WORKER), on_ray=on_ray)
    assert outcome.code == 1, outcome
    assert outcome.err.count("error: ") == 1
    assert (
        f"compress: 4 of 8 tasks failed; tracebacks under {root}/failures/compress/" in outcome.err
    )
    assert attempts(root).keys() == attempts(local_run).keys() - UNITS_OF_LAYER_2
    assert {path.name for path in (root / "failures" / "compress").iterdir()} == UNITS_OF_LAYER_2
    for unit in UNITS_OF_LAYER_2:
        assert f"  {unit}: P48Error: " in outcome.err
        (record,) = (root / "failures" / "compress" / unit).iterdir()
        check_record(Failure.from_json(record.read_bytes(), record.name), unit, record.stem)
    for unit in UNITS_OF_LAYER_2:
        (root / "units" / unit).unlink()
    assert invoke(*arguments(root, ONE_WORKER), on_ray=on_ray).code == 0
    assert_same_bytes(local_run, root)


def check_record(failure: Failure, unit: str, attempt: str) -> None:
    """What, where, with which input, and how to find the place."""
    assert (failure.stage, failure.task, failure.attempt) == ("compress", unit, attempt)
    assert failure.error.startswith("P48Error: ")
    assert f"units/{unit}/" in failure.error and "Not a directory" in failure.error
    assert "compress_unit" in failure.traceback
    assert "layer=2" in failure.input
    assert not failure.is_transient


CORRUPTIBLE = ["activations/layer-002/part-0001.arrow", "gradients/layer-003/part-0000.arrow"]


@pytest.mark.parametrize(
    ("key", "damage", "on_ray"),
    [
        *((key, damage, False) for key in CORRUPTIBLE for damage in ("flipped", "gone")),
        # what the driver makes of it is the same code
        pytest.param(CORRUPTIBLE[1], "flipped", True, marks=pytest.mark.ray),
    ],
)
@pytest.mark.usefixtures("use_ray")
def test_corrupt_object_is_made_anew_by_the_same_run(
    on_ray: bool, damage: str, key: str, local_run: Path, tmp_path: Path
) -> None:
    root = reopened(local_run, tmp_path / "run", 2, 3)
    if damage == "flipped":
        flip_a_bit(root / key)
    else:
        (root / key).unlink()
    outcome = invoke(*arguments(root, ONE_WORKER), on_ray=on_ray)
    assert outcome.code == 0, outcome
    assert_same_bytes(local_run, root)
    # what is gone is seen in the listing
    assert (f"{key}, made anew next" in outcome.out) == (damage == "flipped")


@pytest.mark.parametrize("damage", ["flipped", "gone", "shorter"])
def test_unit_whose_shard_was_damaged_after_its_manifest_is_done_again(
    damage: str, local_run: Path, tmp_path: Path
) -> None:
    root = reopened(local_run, tmp_path / "run")
    (shard,) = root.glob("units/L002-E004-007/*/shard.safetensors")
    shutil.rmtree(root / "checkpoint")
    shutil.rmtree(root / "verification")
    if damage == "flipped":
        flip_a_bit(shard)
    elif damage == "shorter":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    before = attempts(root)
    outcome = invoke(*arguments(root))
    assert outcome.code == 0, outcome
    assert_same_bytes(local_run, root)
    after = attempts(root)
    assert {unit for unit in after if after[unit] != before[unit]} == {"L002-E004-007"}
    assert not shard.exists()


def test_object_that_is_corrupt_each_time_it_is_made_ends_the_run(
    local_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = reopened(local_run, tmp_path / "run", 2)
    rounds: list[str] = []

    def compress(context: StageContext, unit: WorkUnit) -> object:
        rounds.append(unit.id)
        raise CorruptObjectError("the disk lies", run_root.gradient_part(2, 0))

    monkeypatch.setitem(STAGES, "compress", replace(STAGES["compress"], body=compress))
    outcome = invoke(*arguments(root, {"run.max_attempts": "2"}))
    assert (outcome.code, len(rounds)) == (1, 8)
    assert f"{run_root.gradient_part(2, 0)}: found corrupt 2 times: " in outcome.err


def flaky(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """compress fails `times` times on one unit with an error that a retry may cure. Returns the
    units as they are tried."""
    tried: list[str] = []
    real = STAGES["compress"].body

    def compress(context: StageContext, unit: WorkUnit) -> object:
        tried.append(unit.id)
        if unit.id == "L001-E000-003" and tried.count(unit.id) <= times:
            raise GaveUpError(f"{unit.id}: the store did not answer")
        return real(context, unit)

    monkeypatch.setitem(STAGES, "compress", replace(STAGES["compress"], body=compress))
    return tried


@pytest.fixture
def one_unit_missing(local_run: Path, tmp_path: Path) -> Path:
    """A run that lacks L001-E000-003."""
    root = tmp_path / "run"
    shutil.copytree(local_run, root)
    (root / "units" / "L001-E000-003" / "manifest.json").unlink()
    return root


@pytest.mark.parametrize(("max_attempts", "code", "num_tries"), [(3, 0, 3), (2, 1, 2), (1, 1, 1)])
def test_transient_error_is_retried_up_to_max_attempts(
    max_attempts: int,
    code: int,
    num_tries: int,
    one_unit_missing: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = flaky(monkeypatch, times=2)
    outcome = invoke(*arguments(one_unit_missing, {"run.max_attempts": str(max_attempts)}))
    assert outcome.code == code, outcome
    assert tried == ["L001-E000-003"] * num_tries
    records = list((one_unit_missing / "failures" / "compress" / "L001-E000-003").iterdir())
    assert len(records) == min(2, num_tries)
    assert all(Failure.from_json(path.read_bytes(), path.name).is_transient for path in records)
    assert ("L001-E000-003: GaveUpError: " in outcome.err) == (code == 1)


def test_other_errors_are_not_retried(
    one_unit_missing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def compress(context: StageContext, unit: WorkUnit) -> object:
        tried.append(unit.id)
        raise KeyError("a bug")

    monkeypatch.setitem(STAGES, "compress", replace(STAGES["compress"], body=compress))
    outcome = invoke(*arguments(one_unit_missing))
    assert (outcome.code, tried) == (1, ["L001-E000-003"])
    assert "L001-E000-003: KeyError: 'a bug'" in outcome.err


class FlakyWorker(WorkerProcess):
    """A store is away in its first two tasks, for longer than its client tries (store.retry)."""

    def __init__(self, plan_json: bytes, store_uri: str) -> None:
        super().__init__(plan_json, store_uri)
        self.left = 2

    def execute(self, task: Task) -> TaskResult:
        if task.stage == "compress" and self.left:
            self.left -= 1
            return TaskResult(task=task, error_type="GaveUpError", error="the store did not answer")
        return super().execute(task)


@pytest.mark.ray
@pytest.mark.parametrize(("max_attempts", "code"), [(3, 0), (2, 1)])
def test_transient_error_on_ray_is_retried_up_to_max_attempts(
    max_attempts: int,
    code: int,
    ray_session: None,
    one_unit_missing: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_runner, "WorkerProcess", FlakyWorker)
    outcome = invoke(
        *arguments(one_unit_missing, ONE_WORKER | {"run.max_attempts": str(max_attempts)}),
        on_ray=True,
    )
    assert outcome.code == code, outcome
    assert [
        f"attempt {n} failed, it will be tried again: GaveUpError" in outcome.out for n in (1, 2)
    ] == [True, code == 0]
    assert ("L001-E000-003: GaveUpError: the store did not answer" in outcome.err) == (code == 1)


@pytest.mark.parametrize("on_ray", BOTH_RUNNERS)
@pytest.mark.usefixtures("use_ray")
def test_source_that_changed_since_it_was_planned_is_a_users_mistake(
    on_ray: bool, tmp_path: Path
) -> None:
    folder = copy_model(tmp_path / "model")
    settings = small() | ONE_WORKER | {"source.checkpoint": str(folder)}
    prepared = prepare(
        load_config(CONFIG, tuple(f"{k}={v}" for k, v in settings.items()), str(tmp_path / "run"))
    )
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")

    class Local(LocalRunner):
        def __enter__(self) -> "Local":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    with pytest.raises(
        SourceError, match=f"^{folder}: changed since it was planned: expected fingerprint [^\\n]*$"
    ):
        run_job(
            prepared,
            lambda plan, root: RayRunner(plan, root, None) if on_ray else Local(plan, root),
        )


@pytest.mark.ray
def test_local_run_root_on_several_nodes_must_be_declared_shared(
    ray_session: None, one_unit_missing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = ray_runner.ray.nodes() * 2
    monkeypatch.setattr(ray_runner.ray, "nodes", lambda: nodes)
    outcome = invoke(*arguments(one_unit_missing, ONE_WORKER), on_ray=True)
    assert outcome.code == 2, outcome
    for words in ("run.root", "2 nodes", "run.root_is_shared: true"):
        assert words in outcome.err
    assert (
        invoke(
            *arguments(one_unit_missing, ONE_WORKER | {"run.root_is_shared": "true"}), on_ray=True
        ).code
        == 0
    )


class Ended:
    """A runner whose tasks have ended as they are told."""

    def __init__(self, *results: TaskResult) -> None:
        self.results = results

    def run(self, source: WorkSource) -> Iterator[TaskResult]:
        source.next(False)
        yield from self.results


def test_units_that_a_users_mistake_stopped_are_all_listed_beside_other_failures(
    tmp_path: Path,
) -> None:
    units = [Task(stage="compress", id=f"unit-{n}", item=n) for n in range(4)]
    mistake, bug, corrupt = (
        TaskResult(task=units[1], error_type="SourceError", error="model.safetensors: not finite"),
        TaskResult(task=units[2], error_type="KeyError", error="a bug"),
        TaskResult(
            task=units[3],
            error_type="CorruptObjectError",
            error="flipped",
            redo=("units/unit-3/manifest.json",),
        ),
    )
    store = LocalStore(tmp_path)
    store.put("units/unit-3/manifest.json", b"{}")
    with pytest.raises(SourceError) as caught:
        run_all(Ended(TaskResult(task=units[0]), mistake, bug, corrupt), TaskList(units), store)
    for words in (
        "compress: 3 of 4 tasks failed",
        "unit-1: SourceError: model.safetensors: not finite",
        "unit-2: KeyError: a bug",
        "unit-3: ",
    ):
        assert words in str(caught.value)
    assert "unit-0" not in str(caught.value)
    assert store.head("units/unit-3/manifest.json") is None


def test_failures_of_stages_that_ran_at_once_are_listed_by_stage(tmp_path: Path) -> None:
    stream = Task(stage="gradients", id="parts-0000-and-1-more", item=[0, 1])
    units = [Task(stage="compress", id=f"unit-{n}", item=n, layer=4) for n in range(3)]

    class Following(TaskList):
        def next(self, is_idle: bool) -> Sequence[Task]:
            return super().next(is_idle) or units

    class Ending:
        def run(self, source: WorkSource) -> Iterator[TaskResult]:
            (first,) = source.next(False)
            yield TaskResult(task=first, error_type="KeyError", error="a bug")
            for task in source.next(False):
                yield TaskResult(
                    task=task,
                    error_type=None if task.id == "unit-1" else "NumericsError",
                    error="no factor",
                )

    with pytest.raises(StageFailedError) as caught:
        run_all(Ending(), Following([stream]), LocalStore(tmp_path))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("gradients: 1 of 1 tasks failed; tracebacks under ")
    assert lines[2].startswith("compress: 2 of 3 tasks failed; tracebacks under ")
    assert lines[1::2] == [
        "  parts-0000-and-1-more: KeyError: a bug",
        "  unit-0: NumericsError: no factor",
    ]
