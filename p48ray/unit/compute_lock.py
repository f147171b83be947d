"""A process computes one unit at a time, and reads another or writes a third beside it."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class ComputeLock:
    """A lock that knows since when nothing has computed."""

    def __init__(self) -> None:
        self.lock, self.free_since = threading.Lock(), -math.inf

    @contextmanager
    def held(self) -> Iterator[float]:
        """Waits until nothing else computes. Yields when the computation before ended, in
        time.perf_counter's seconds; -inf if there was none."""
        with self.lock:
            try:
                yield self.free_since
            finally:
                self.free_since = time.perf_counter()


def idle_seconds(begun_at: float, fetched_at: float, free_since: float) -> float:
    """Of the time in which a unit's data was fetched, the part in which nothing computed."""
    return max(0.0, fetched_at - max(begun_at, free_since))
