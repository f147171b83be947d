"""Nothing is read in the driver while Ray's processes are forked: a fork closes the Hub client's
connections in the child, and waits for ever for a lock that a thread holds which reads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from p48ray.runner import pipeline
from p48ray.runner.local_runner import LocalRunner
from p48ray.stages.prepare import Prepared, prepare
from tests.conftest import TINY
from tests.stages.small_run import configure


class EndedError(Exception):
    """Ends the run behind its inputs."""


def test_inputs_are_written_behind_the_runners_start_and_by_no_other_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    before = set(threading.enumerate())

    @contextmanager
    def runner(plan: object, uri: str) -> Iterator[LocalRunner]:
        begun = set(threading.enumerate()) - before
        others = [thread.name for thread in begun if "ThreadPoolExecutor" in thread.name]
        seen.append(f"started beside {others}")
        yield LocalRunner(plan, uri)  # type: ignore[arg-type]

    def inputs(prepared: Prepared) -> None:
        seen.append("inputs")
        raise EndedError

    monkeypatch.setattr(pipeline, "write_inputs", inputs)
    with pytest.raises(EndedError):
        pipeline.run_job(prepare(configure(TINY, "memory://behind")), runner)
    assert seen == ["started beside []", "inputs"]
