"""Progress as the bucket tells it: a line per change with counts, rate and time left, the same in a terminal and in a log file."""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from p48ray.errors import P48Error
from p48ray.report.work import duration

log = logging.getLogger("p48ray.progress")

INTERVAL_S = 5.0
LISTING_SHARE = 50  # times a listing's own duration until the next one: two per cent of the time is spent on watching


class Progress:
    """Counts a stage's done-markers from a thread while the stage runs.

    Args: stage, noun: what is shown. total: markers when done. count: how many there are now, by listing the store.
    """

    def __init__(self, stage: str, noun: str, total: int, count: Callable[[], int], interval_s: float = INTERVAL_S) -> None:
        self.stage, self.noun, self.total, self.count, self.interval_s = stage, noun, total, count, interval_s
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch, name=f"progress-{stage}", daemon=True)

    def __enter__(self) -> Self:
        self.start, self.first = time.monotonic(), self.count()
        self.last = self.first
        self.final: int | None = None
        resumed = f", {self.first} already done" if self.first else ""
        log.info("%-9s %d %s%s", self.stage, self.total, self.noun, resumed)
        if self.first == self.total:  # nothing is taken away from a stage that is done
            self.end(self.first)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stopped.set()
        self.thread.join()
        if kind is None and self.final is None:
            self.end(self.count())

    def end(self, done: int) -> None:
        """The last line. Stages overlap: one may be complete long before its neighbours."""
        self.final = done
        log.info("%-9s %d/%d %s in %s", self.stage, done, self.total, self.noun, duration(time.monotonic() - self.start))

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
                log.info(self.line(done, time.monotonic() - self.start))

    def line(self, done: int, elapsed_s: float) -> str:
        rate = (done - self.first) / elapsed_s
        left = duration((self.total - done) / rate) if rate else "unknown"
        pace = f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min"
        return f"{self.stage:9s} {done}/{self.total} {self.noun}  {100 * done // self.total} %  {pace}  {left} left"
