"""A stage's time is that from its first task in a worker's hands to its last."""

import logging
import re
from pathlib import Path

import pytest

from p48ray.report.work import duration
from p48ray.runner.stage_times import StageTimes
from p48ray.stages.prepare import prepare
from p48ray.stages.tasks import Task
from tests.stages.small_run import SmallRun, configure, run_locally


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def task(name: str, stage: str = "compress") -> Task:
    return Task(stage=stage, id=name, item=None)


def test_time_goes_on_while_a_task_is_under_way_and_stops_with_the_last() -> None:
    clock = Clock()
    times = StageTimes(clock)
    assert times.seconds("compress") == 0.0
    clock.now = 110.0
    times.begun(task("a"))
    clock.now = 115.0
    times.begun(task("b"))
    times.ended(task("a"))
    clock.now = 120.0
    assert times.seconds("compress") == 10.0
    times.ended(task("b"))
    clock.now = 500.0
    assert times.seconds("compress") == 10.0
    assert times.seconds("capture") == 0.0


def test_task_that_is_tried_again_is_one_task() -> None:
    clock = Clock()
    times = StageTimes(clock)
    times.begun(task("a"))
    clock.now = 107.0
    times.begun(task("a"))
    clock.now = 109.0
    times.ended(task("a"))
    clock.now = 200.0
    assert times.seconds("compress") == 9.0


@pytest.mark.slow
def test_progress_lines_and_summary_tell_the_same_seconds(
    finished: SmallRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "p48ray.progress")
    report = run_locally(prepare(configure(finished.source, tmp_path)))
    said = dict(
        re.findall(r"^(\w+) +\d+/\d+ .* in (.+)$", "\n".join(caplog.messages), re.MULTILINE)
    )
    own = {name: duration(s) for name, s in report.stage_seconds.items() if name != "total"}
    assert said == own
    assert all(report.stage_seconds[name] > 0 for name in ("capture", "compress"))
