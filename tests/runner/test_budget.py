"""run.max_gpu_hours: what counts, and where a run ends."""

from pathlib import Path

import pytest

from p48ray.errors import BudgetSpentError
from p48ray.report.work import gpu_hours, read_work
from p48ray.run import run_root
from p48ray.run.plan import RunPlan
from p48ray.runner.base import TaskList, run_all
from p48ray.runner.budget import Budget, budget_of
from p48ray.runner.ray_runner import RayRunner
from p48ray.stages.tasks import Task
from p48ray.store import LocalStore
from tests.stages.small_run import SmallRun

HOUR = 3600.0


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_workers_count_from_when_they_are_asked_for_busy_or_not() -> None:
    clock = Clock()
    budget = Budget(limit=10.0, before=2.5, gpus_per_worker=0.5, clock=clock)
    clock.now += HOUR
    budget.count(0)
    clock.now += 2 * HOUR
    budget.count(4)
    assert budget.held == pytest.approx(4.0)
    assert not budget.is_spent
    clock.now += HOUR
    budget.count(7)
    assert budget.is_spent
    assert str(budget.error()).startswith(
        "run.max_gpu_hours = 10 is spent: 10.00 GPU-hours, 2.50 of finished work of before and 7.50"
        " of this job's workers"
    )


def test_without_a_limit_nothing_is_ever_spent() -> None:
    clock = Clock()
    budget = Budget(limit=None, before=1e9, gpus_per_worker=8, clock=clock)
    clock.now += 1e9
    budget.count(64)
    assert not budget.is_spent


def test_finished_work_of_before_counts(finished: SmallRun) -> None:
    plan = with_run(finished.prepared.plan, max_gpu_hours=1e6, gpus_per_worker=2.0)
    budget = budget_of(plan, finished.prepared.store, Clock())
    keys = {info.key for info in finished.prepared.store.list()}
    work = read_work(plan, finished.prepared.store, keys)
    assert budget.before == gpu_hours(plan, work) > 0
    assert budget.before == pytest.approx(sum(w.worker_seconds for w in work) * 2 / HOUR)


def with_run(plan: RunPlan, **changes: object) -> RunPlan:
    run = plan.config.run.model_copy(update=changes)
    return plan.model_copy(update={"config": plan.config.model_copy(update={"run": run})})


@pytest.mark.ray
def test_run_ends_at_a_units_border_and_keeps_what_is_done(
    ray_session: None, finished: SmallRun, tmp_path: Path
) -> None:
    """One worker; the limit is reached while it has its first unit in hand."""
    run = {"num_workers": 1, "prefetch_units": 0, "root": str(tmp_path / "run")}
    plan = with_run(finished.prepared.plan, **run)
    copy_streams(finished.root, tmp_path / "run")
    store = LocalStore(tmp_path / "run")
    units = plan.units[:3]
    tasks = [
        Task(stage="compress", id=u.id, item=u, marker=run_root.unit_manifest(u.id), layer=u.layer)
        for u in units
    ]
    with RayRunner(plan, store.uri, "auto") as runner:
        clock = Clock()
        runner.budget = Budget(limit=1.0, before=0.0, gpus_per_worker=1.0, clock=clock)
        assign = runner.assign

        def spend(worker: object, task: Task) -> None:
            assign(worker, task)  # type: ignore[arg-type]
            clock.now += 2 * HOUR

        runner.assign = spend  # type: ignore[method-assign]
        with pytest.raises(BudgetSpentError, match=r"run\.max_gpu_hours = 1 is spent: 2\.00"):
            run_all(runner, TaskList(tasks), store)
    done = [u.id for u in units if store.head(run_root.unit_manifest(u.id)) is not None]
    assert len(done) == 1


def copy_streams(source: Path, root: Path) -> None:
    for name in ("plan.json", "activations", "calibration"):
        for path in [source / name, *(source / name).rglob("*")]:
            if path.is_file():
                target = root / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
