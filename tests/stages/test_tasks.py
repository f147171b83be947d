"""How a task ended, by the name of its error: what a runner tries again, and which process it no
longer trusts."""

import pytest

from p48ray.errors import GaveUpError, NumericsError, SourceError, TransientStoreError
from p48ray.stages.tasks import Task, TaskResult

TASK = Task(stage="compress", id="L001-E000-007", item=None)


@pytest.mark.parametrize(
    ("kind", "is_transient", "is_foreign"),
    [
        (TransientStoreError, True, False),
        (GaveUpError, True, False),  # a store that was away for longer than its client tried
        (SourceError, False, False),
        (NumericsError, False, False),
        (KeyError, False, True),
        (MemoryError, False, True),
    ],
)
def test_an_outage_is_tried_again_and_a_bug_costs_its_process(
    kind: type[Exception], is_transient: bool, is_foreign: bool
) -> None:
    result = TaskResult(task=TASK, error_type=kind.__name__, error="why")
    assert (result.is_transient, result.is_foreign) == (is_transient, is_foreign)


def test_a_task_that_is_done_is_neither() -> None:
    done = TaskResult(task=TASK)
    assert (done.is_done, done.is_transient, done.is_foreign) == (True, False, False)
