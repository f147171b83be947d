"""What a worker asks for that this machine lacks, and how many have room."""

import logging
from pathlib import Path

import pytest

from p48ray.config import RunSettings
from p48ray.errors import ConfigError
from p48ray.runner import cluster, ray_runner
from p48ray.runner.capacity import amount, workers_here
from p48ray.runner.ray_runner import RayRunner
from p48ray.stages.prepare import prepare
from tests.conftest import TINY
from tests.jobs.command import arguments, run_process
from tests.jobs.test_bad_input import assert_refused
from tests.stages.small_run import configure


def settings(**values: object) -> RunSettings:
    return RunSettings.model_validate({"root": "r"} | values)


@pytest.mark.parametrize(
    ("asked", "gpus_each", "num_gpus", "expected"),
    [
        (4, 0.0, 0, 4),
        (1, 1.0, 1, 1),
        (4, 1.0, 2, 2),
        (2, 1.0, 8, 2),
        (9, 3.0, 8, 2),
        (9, 0.5, 2, 4),
        (9, 0.4, 2, 4),  # a worker's share is of one GPU
        (9, 1 / 3, 1, 3),
    ],
)
def test_as_many_workers_are_asked_for_as_have_room(
    asked: int, gpus_each: float, num_gpus: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "p48ray.progress"):
        found = workers_here(settings(num_workers=asked, gpus_per_worker=gpus_each), num_gpus)
    assert found == expected
    said = [m for m in caplog.messages if m.startswith(f"run.num_workers: {asked} asked for")]
    assert len(said) == (expected < asked)


@pytest.mark.parametrize(("each", "num_gpus"), [(0.25, 0), (1.0, 0), (2.0, 1)])
def test_gpus_that_this_machine_lacks_are_refused_by_key_asked_and_found(
    each: float, num_gpus: int
) -> None:
    words = (
        rf"^run\.gpus_per_worker: expected at most the {num_gpus} GPUs of this machine, found"
        rf" {each:g}; set RAY_ADDRESS"
    )
    with pytest.raises(ConfigError, match=words):
        workers_here(settings(gpus_per_worker=each), num_gpus)


def test_more_threads_than_this_machine_has_cpus_are_said_and_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run that was begun elsewhere goes on with its threads, on which its bytes depend."""
    assert workers_here(settings(threads_per_worker=1000, num_workers=2), 0) == 2
    assert "run.threads_per_worker: a worker has 1000 threads" in caplog.text


def test_workers_without_room_are_neither_started_nor_paid_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_runner, "machine_gpus", lambda: 2)
    # tests before this one may have left their Ray running
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    changed = ("run.num_workers=8", "run.gpus_per_worker=1", "run.threads_per_worker=3")
    plan = prepare(configure(TINY, "memory://room", *changed)).plan
    runner = RayRunner(plan, "memory://room", None)
    assert (runner.num_workers, runner.cluster.num_cpus, runner.cluster.num_gpus) == (2, 6, 2)
    on_cluster = RayRunner(plan, "memory://room", "somewhere:6379")
    assert (on_cluster.num_workers, on_cluster.cluster.num_gpus) == (8, None)


def test_resources_in_words() -> None:
    assert amount({"CPU": 8.0, "node:1.2.3.4": 1.0}) == "8 CPU and 0 GPU"


@pytest.mark.ray
@pytest.mark.slow
def test_job_for_gpus_of_a_machine_without_ends_before_anything_is_written(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "RAY_ADDRESS": ""}
    outcome = run_process(*arguments(root, {"run.gpus_per_worker": "1"}), env=hidden)
    words = ["run.gpus_per_worker", "at most the 0 GPUs of this machine", "found 1"]
    assert_refused(outcome, words, root)
