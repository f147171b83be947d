"""Who is handed a second unit, and what becomes of it when its worker is gone. Ray's references are
plain objects here."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayError

from p48ray.run.plan import RunPlan
from p48ray.runner import ray_runner
from p48ray.runner.dispatch import Dispatcher
from p48ray.runner.ray_runner import RayRunner, Worker
from p48ray.stages.prepare import prepare
from p48ray.stages.tasks import Task, TaskResult
from tests.conftest import TINY
from tests.stages.small_run import configure


def units(count: int, layer: int = 1) -> list[Task]:
    """In the order in which they are taken."""
    return [
        Task(stage="compress", id=f"L{layer}-{n:02d}", item=n, layer=layer, load=100.0 - n)
        for n in range(count)
    ]


STREAM = Task(stage="capture", id="parts-0000-and-1-more", item=[0, 1])


@dataclass
class FakeRay:
    """Answers by reference, and who was killed."""

    answers: dict[Any, TaskResult | RayError] = field(default_factory=dict)
    killed: list[Any] = field(default_factory=list)
    alive: list[str] = field(default_factory=lambda: ["node"])

    def get(self, ref: Any) -> TaskResult:
        answer = self.answers[ref]
        if isinstance(answer, RayError):
            raise answer
        return answer

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node, "Alive": True} for node in self.alive]


class Actor:
    """`execute.remote(task)` gives a reference."""

    def __init__(self) -> None:
        self.execute = SimpleNamespace(remote=lambda task: object())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for name in ("get", "kill", "nodes"):
        monkeypatch.setattr(ray_runner.ray, name, getattr(fake, name))
    return fake


def runner_of(num_workers: int, ahead: int = 1) -> RayRunner:
    """With as many idle workers."""
    settings = (
        f"run.num_workers={num_workers}",
        f"run.prefetch_units={ahead}",
        "run.max_attempts=2",
    )
    plan: RunPlan = prepare(configure(TINY, "memory://ahead", *settings)).plan
    runner = RayRunner(plan, "memory://ahead", None)
    runner.idle = [Worker(Actor(), "node") for _ in range(num_workers)]
    return runner


def shares(runner: RayRunner) -> list[list[str]]:
    return sorted([task.id for task in tasks] for tasks in runner.assigned().values())


def ref_of(runner: RayRunner, task_id: str) -> Any:
    return next(ref for ref, (_, task) in runner.running.items() if task.id == task_id)


def settle(
    runner: RayRunner,
    fake: FakeRay,
    task_id: str,
    answer: TaskResult | RayError,
    waiting: Dispatcher,
) -> list[TaskResult]:
    ref = ref_of(runner, task_id)
    fake.answers[ref] = answer
    return list(runner.handle_result(ref, waiting))


def result(task: Task, error_type: str | None = None) -> TaskResult:
    return TaskResult(task=task, error_type=error_type)


@pytest.mark.parametrize(
    ("num_units", "ahead", "expected"),
    [
        (2, 1, [["L1-00"], ["L1-01"]]),
        (3, 1, [["L1-00"], ["L1-01"]]),
        (4, 1, [["L1-00", "L1-03"], ["L1-01", "L1-02"]]),
        (5, 1, [["L1-00", "L1-03"], ["L1-01", "L1-02"]]),
        (5, 2, [["L1-00", "L1-03"], ["L1-01", "L1-02"]]),
        (6, 2, [["L1-00", "L1-03", "L1-05"], ["L1-01", "L1-02", "L1-04"]]),
        (6, 1, [["L1-00", "L1-03"], ["L1-01", "L1-02"]]),
        (9, 1, [["L1-00", "L1-03"], ["L1-01", "L1-02"]]),
        (9, 0, [["L1-00"], ["L1-01"]]),
        (9, 2, [["L1-00", "L1-04", "L1-05"], ["L1-01", "L1-02", "L1-03"]]),
    ],
)
def test_second_units_are_handed_out_while_there_is_one_for_every_worker(
    num_units: int, ahead: int, expected: list[list[str]]
) -> None:
    runner, waiting = runner_of(2, ahead), Dispatcher(units(num_units))
    runner.dispatch(waiting)
    assert sorted(i for ids in shares(runner) for i in ids) == sorted(
        i for ids in expected for i in ids
    )
    assert sorted(len(ids) for ids in shares(runner)) == sorted(len(ids) for ids in expected)
    assert len(waiting) == num_units - sum(len(ids) for ids in expected)


def test_worker_that_streams_gets_no_unit_and_a_stream_waits_for_a_worker_of_its_own() -> None:
    runner, waiting = runner_of(1), Dispatcher([STREAM, *units(9)])
    runner.dispatch(waiting)
    assert shares(runner) == [[STREAM.id]]
    runner, waiting = runner_of(1), Dispatcher(units(9))
    runner.dispatch(waiting)
    (pair,) = shares(runner)
    runner.running.pop(ref_of(runner, pair[0]))
    waiting.add([STREAM])
    runner.dispatch(waiting)
    assert shares(runner) == [pair[1:]]


def test_worker_is_idle_only_when_nothing_is_left_in_its_hand(fake: FakeRay) -> None:
    runner, tasks = runner_of(1), units(4)
    waiting = Dispatcher(tasks)
    runner.dispatch(waiting)
    assert shares(runner) == [["L1-00", "L1-01"]]
    waiting = Dispatcher([])
    assert settle(runner, fake, "L1-01", result(tasks[1]), waiting) == [result(tasks[1])]
    assert (runner.idle, shares(runner)) == ([], [["L1-00"]])
    settle(runner, fake, "L1-00", result(tasks[0]), waiting)
    assert (len(runner.idle), shares(runner), fake.killed) == (1, [], [])


def test_dead_worker_gives_all_back_and_counts_against_one_that_was_alone(fake: FakeRay) -> None:
    runner, tasks = runner_of(1), units(5)
    waiting = Dispatcher(tasks)
    runner.dispatch(waiting)
    assert settle(runner, fake, "L1-00", ActorDiedError(), waiting) == []
    assert (len(waiting), runner.running, dict(runner.failures)) == (5, {}, {})
    assert list(runner.store.list("failures/")) == []
    for attempt in (1, 2):
        runner.idle = [Worker(Actor(), "node")]
        waiting = Dispatcher([tasks[0], *units(9, layer=2)])
        while not any(task.id == "L1-00" for _, task in runner.running.values()):
            runner.running.clear()
            runner.idle = [Worker(Actor(), "node")]
            runner.dispatch(waiting)
            assert all(len(ids) == 1 or "L1-00" not in ids for ids in shares(runner))
        ended = settle(runner, fake, "L1-00", ActorDiedError(), waiting)
        assert runner.failures["L1-00"] == attempt
        assert [r.error_type for r in ended] == ["WorkerLostError"] * (attempt == 2)


def test_unit_beside_one_that_leaves_the_process_unsound_goes_to_another_without_blame(
    fake: FakeRay,
) -> None:
    runner, tasks = runner_of(1), units(5)
    waiting = Dispatcher(tasks)
    runner.dispatch(waiting)
    (worker,) = runner.assigned()
    assert settle(runner, fake, "L1-00", result(tasks[0], "KeyError"), waiting) == []
    assert fake.killed == [worker.actor]
    assert (len(waiting), runner.running, runner.idle) == (5, {}, [])
    assert dict(runner.failures) == {"L1-00": 1}
    assert runner.isolated == {"L1-00", "L1-01"}


def test_lost_node_gives_all_back_as_preempted(fake: FakeRay) -> None:
    runner = runner_of(1)
    waiting = Dispatcher(units(5))
    runner.dispatch(waiting)
    fake.nodes = list  # type: ignore[method-assign]
    ray_runner.ray.nodes = fake.nodes
    assert settle(runner, fake, "L1-01", ActorDiedError(), waiting) == []
    assert (len(waiting), runner.running) == (5, {})
    assert dict(runner.preemptions) == {"L1-00": 1, "L1-01": 1}
    assert (runner.isolated, dict(runner.failures)) == (set(), {})
