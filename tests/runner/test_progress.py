"""The lines that tell a person how far a stage is."""

import logging
import threading

import pytest

from p48ray.errors import TransientStoreError
from p48ray.report.work import duration
from p48ray.runner.progress import Progress


class Counter:
    """Answers the given counts in turn, the last one for ever; says when it was asked for it."""

    def __init__(self, *counts: int | Exception) -> None:
        self.counts = list(counts)
        self.is_at_the_end = threading.Event()

    def __call__(self) -> int:
        if len(self.counts) == 1:
            self.is_at_the_end.set()
        count = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        if isinstance(count, Exception):
            raise count
        return count


@pytest.fixture(autouse=True)
def caught(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "p48ray.progress")
    return caplog


def run(counter: Counter, total: int) -> None:
    with Progress("compress", "units", total, counter, lambda: 0.0, interval_s=0.001):
        assert counter.is_at_the_end.wait(10)


def test_line_tells_counts_share_rate_and_time_left() -> None:
    progress = Progress("compress", "units", 100, lambda: 10, lambda: 0.0)
    progress.first = 10
    assert progress.line(40, 15.0) == "compress  40/100 units  40 %  2.0/s  30 s left"
    assert progress.line(11, 60.0) == "compress  11/100 units  11 %  1.0/min  1 h 29 min left"


def test_line_without_progress_knows_no_time_left() -> None:
    progress = Progress("capture", "parts", 8, lambda: 0, lambda: 0.0)
    progress.first = 0
    assert progress.line(0, 5.0) == "capture   0/8 parts  0 %  0.0/min  unknown left"
    assert progress.line(1, 0.0) == "capture   1/8 parts  12 %  0.0/min  unknown left", (
        "another driver's, before anything was begun here"
    )


def test_time_left_follows_from_the_time_that_the_stage_has_worked(
    caught: pytest.LogCaptureFixture,
) -> None:
    """And the last line has the seconds that the summary will have."""
    counter = Counter(0, 2, 4)
    worked = iter([20.0, 39.96])
    with Progress("compress", "units", 4, counter, lambda: next(worked), 0.001) as progress:
        assert counter.is_at_the_end.wait(10)
    assert caught.messages[1:] == [
        "compress  2/4 units  50 %  6.0/min  20 s left",
        "compress  4/4 units in 40 s",
    ]
    assert progress.worked_s == 40.0


def test_stage_says_how_much_there_is_and_how_it_ended(caught: pytest.LogCaptureFixture) -> None:
    run(Counter(0, 1, 2), total=2)
    assert caught.messages[0] == "compress  2 units"
    assert caught.messages[1].startswith("compress  1/2 units  50 %  ")
    assert caught.messages[2] == "compress  2/2 units in 0 s"
    assert len(caught.messages) == 3


def test_resumed_stage_says_what_was_done_already(caught: pytest.LogCaptureFixture) -> None:
    run(Counter(3, 5), total=5)
    assert caught.messages[0] == "compress  5 units, 3 already done"


def test_a_line_is_written_only_when_the_count_changed(caught: pytest.LogCaptureFixture) -> None:
    run(Counter(0, 1, 1, 1, 2, 2, 3), total=3)
    assert [message.split()[1] for message in caught.messages] == ["3", "1/3", "2/3", "3/3"]


def test_listing_that_fails_costs_no_more_than_a_line(caught: pytest.LogCaptureFixture) -> None:
    run(Counter(0, TransientStoreError("no answer"), 1, 2), total=2)
    assert [message.split()[1] for message in caught.messages] == ["2", "1/2", "2/2"]


def test_failed_stage_does_not_claim_to_have_ended(caught: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError), Progress("compress", "units", 2, lambda: 0, lambda: 0.0, 0.001):
        raise KeyError("a task")
    assert caught.messages == ["compress  2 units"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.9, "1 h 00 min"),
        (3720, "1 h 02 min"),
    ],
)
def test_duration_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
