"""How far a stage is: a line per change with counts, rate and time left, the same in a terminal and
in a log file.

Tasks of a run are counted by their done-markers, as the bucket tells them (`Progress`): many
workers write them, and a driver that was started again knows no other count. Files of a finished
checkpoint are counted as they come back, by their bytes (`each_file`).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from p48ray.errors import P48Error
from p48ray.report.plan_table import size
from p48ray.report.work import duration

log = logging.getLogger("p48ray.progress")

INTERVAL_S = 5.0
LISTING_SHARE = 50
"""Times a listing's own duration until the next one: two per cent of the time goes to watching."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Amount:
    """Items, and their bytes where these are what takes the time."""

    items: int
    num_bytes: int | None = None

    def plus(self, items: int, num_bytes: int) -> "Amount":
        return Amount(self.items + items, (self.num_bytes or 0) + num_bytes)


def progress_line(
    label: str, noun: str, first: Amount, done: Amount, total: Amount, elapsed_s: float
) -> str:
    """How far, how fast and how long yet.

    Args:
        label: of the stage.
        noun: what is counted.
        first: what was done before that.
        done: what is done now, `first` included.
        total: what is done in the end.
        elapsed_s: seconds since the first piece of work was begun; 0 where none was.
    """
    counts = f"{label:9s} {done.items}/{total.items} {noun}"
    if total.num_bytes is None or first.num_bytes is None or done.num_bytes is None:
        before, now, end = first.items, done.items, total.items
        rate = (now - before) / elapsed_s if elapsed_s else 0.0
        pace = f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min"
    else:
        before, now, end = first.num_bytes, done.num_bytes, total.num_bytes
        rate = max(now - before, 1) / max(elapsed_s, 1e-3)
        pace = f"{size(round(rate))}/s"
        counts += f"  {size(now)} of {size(end)}"
    left = duration((end - now) / rate) if rate else "unknown"
    return f"{counts}  {100 * now // max(end, 1)} %  {pace}  {left} left"


class Progress:
    """Counts a stage's done-markers from a thread while the stage runs."""

    def __init__(
        self,
        stage: str,
        noun: str,
        total: int,
        count: Callable[[], int],
        seconds: Callable[[], float],
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Counting begins with the context.

        Args:
            stage: its label.
            noun: what is counted.
            total: markers when done.
            count: how many there are now, by listing the store.
            seconds: that the stage has worked (runner.stage_times).
            interval_s: seconds between two counts, at least.
        """
        self.stage, self.noun, self.total = stage, noun, total
        self.count, self.seconds, self.interval_s = count, seconds, interval_s
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, name=f"progress-{stage}", daemon=True)

    def __enter__(self) -> Self:
        self.last = self.first = self.count()
        self.final: int | None = None
        self.worked_s = 0.0
        resumed = f", {self.first} already done" if self.first else ""
        log.info("%-9s %d %s%s", self.stage, self.total, self.noun, resumed)
        if self.first == self.total:  # nothing is taken away from a stage that is done
            self.end(self.first)
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopped.set()
        self.thread.join()
        if kind is None and self.final is None:
            self.end(self.count())

    def end(self, done: int) -> None:
        """The last line. Stages overlap: one may be complete long before its neighbours. Its
        seconds are those of the summary too."""
        self.final, self.worked_s = done, round(self.seconds(), 1)
        elapsed = duration(self.worked_s)
        log.info("%-9s %d/%d %s in %s", self.stage, done, self.total, self.noun, elapsed)

    def watch(self) -> None:
        pause_s = self.interval_s
        while self.final is None and not self.stopped.wait(pause_s):
            before = time.monotonic()
            try:
                done = self.count()
            except P48Error:
                continue  # a listing that failed costs one line of progress, no more
            finally:
                pause_s = max(self.interval_s, LISTING_SHARE * (time.monotonic() - before))
            if done == self.total:
                self.end(done)
            elif done != self.last:
                self.last = done
                log.info(self.line(done, self.seconds()))

    def line(self, done: int, elapsed_s: float) -> str:
        amounts = (Amount(self.first), Amount(done), Amount(self.total))
        return progress_line(self.stage, self.noun, *amounts, elapsed_s)


def each_file(
    stage: str, done: Iterable[tuple[str, T]], sizes: Mapping[str, int], before: Amount
) -> Iterator[tuple[str, T]]:
    """`done` as it comes, with a line in the log for each file.

    Args:
        stage: its label.
        done: (file, result).
        sizes: bytes of every file still to do.
        before: files and bytes that were done already.
    """
    start, now = time.monotonic(), before
    total = before.plus(len(sizes), sum(sizes.values()))
    for name, result in done:
        now = now.plus(1, sizes[name])
        elapsed_s = time.monotonic() - start
        log.info(progress_line(stage, "shards", before, now, total, elapsed_s))
        yield name, result
