"""What a worker tells Ray's metrics, from where Prometheus reads it: tasks, seconds by phase,
tokens, bytes, and the GPU's memory.

Metrics are for watching. What counts is in the bucket, and `p48ray status` reads it there.
"""

import threading
from collections.abc import Callable, Iterable

import torch
from ray.util.metrics import Counter, Gauge

from p48ray.stages.tasks import TaskResult
from p48ray.store.base import Traffic


class WorkerMetrics:
    """Counters of one worker process. Ray adds the node and the worker to every series."""

    def __init__(self, traffic: Callable[[], Iterable[Traffic]]) -> None:
        """Args: traffic: of the stores that this process has opened so far."""
        self.traffic, self.lock = traffic, threading.Lock()
        self.seen = [0, 0]
        self.peak_gpu_bytes = 0.0
        stage = ("stage",)
        self.done = Counter("p48ray_tasks_done", "Tasks that ended well.", stage)
        self.failed = Counter("p48ray_tasks_failed", "Attempts that failed.", ("stage", "error"))
        self.seconds = Counter("p48ray_task_seconds", "Seconds spent in tasks.", stage)
        self.phases = Counter("p48ray_unit_seconds", "Seconds of units by phase.", ("phase",))
        self.tokens = Counter(
            "p48ray_unit_tokens", "Routed tokens of the experts that were compressed."
        )
        self.read = Counter("p48ray_store_read_bytes", "Bytes read from source and run root.")
        self.written = Counter("p48ray_store_written_bytes", "Bytes written to the run root.")
        self.memory = Gauge("p48ray_gpu_peak_bytes", "Largest GPU memory allocated so far.")

    def count(self, result: TaskResult) -> None:
        """Add one finished task; from any thread."""
        with self.lock:
            self.add_up(result)

    def add_up(self, result: TaskResult) -> None:
        tags = {"stage": result.task.stage}
        if result.is_done:
            self.done.inc(1, tags)
        else:
            self.failed.inc(1, tags | {"error": result.error_type or ""})
        add(self.seconds, result.seconds, tags)
        add(self.tokens, result.facts.get("tokens", 0.0), {})
        for name, value in result.facts.items():
            if name.endswith("_s"):
                add(self.phases, value, {"phase": name.removesuffix("_s")})
        traffic = list(self.traffic())
        now = [sum(t.bytes_read for t in traffic), sum(t.bytes_written for t in traffic)]
        add(self.read, now[0] - self.seen[0], {})
        add(self.written, now[1] - self.seen[1], {})
        self.seen = now
        if torch.cuda.is_available():
            # A unit starts the device's own count anew with every phase, and says itself what was
            # most.
            self.peak_gpu_bytes = max(
                self.peak_gpu_bytes,
                torch.cuda.max_memory_allocated(),
                result.facts.get("peak_gpu_bytes", 0.0),
            )
            self.memory.set(self.peak_gpu_bytes)


def add(counter: Counter, value: float, tags: dict[str, str]) -> None:
    """Ray's counters refuse an increment of 0."""
    if value > 0:
        counter.inc(value, tags)
