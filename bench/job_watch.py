"""What a job does to its machine while it runs, sampled from outside: GPUs, memory of its
processes, its run root.

A run root alone does not tell: with run.keep parts go as soon as their layer is done. So the watch
reads manifests as they come, and remembers every object that it has seen, with its size. What comes
and goes within a second is missed.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

GPU_PERIOD_S = 0.15
SLOW_EVERY = 5  # GPU samples from one look at processes and run root to the next
WORKER_TITLE = "ray::WorkerProcess"
PART_MANIFESTS = ("activations/", "gradients/")


def open_gpus() -> tuple[Any, list[Any]]:
    """(NVML's module, a handle a device); (None, []) where there is neither module nor device."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, [
            pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
        ]
    except Exception:  # noqa: BLE001 (no module, no driver, no device: nothing to look at)
        return None, []


@dataclass(slots=True)
class Peaks:
    """Largest values seen, in bytes. Private memory is resident less what is shared; host memory
    that a GPU's driver pinned for a process is mapped from the device and shows in no figure of the
    kernel; `locked` and `pinned` are what it does know. It shows in `host_used_bytes`: of the whole
    machine, other programs too, beyond what was in use at the start, page cache apart."""

    gpu_bytes: int | None = None
    worker_private_bytes: int = 0
    workers_private_bytes: int = 0
    driver_private_bytes: int = 0
    worker_locked_bytes: int = 0
    worker_pinned_bytes: int = 0
    host_used_bytes: int = 0
    run_root_bytes: int = 0


@dataclass(slots=True)
class Watch:
    """Samples from `start` to `stop`, over as many processes as `follow` names one after the other.

    Args:
        root: the run root, a local folder.
        busy: (Unix time, mean utilization of all GPUs, 0 to 1).
        parts: manifests by key.
        objects: sizes by key of all that were seen, bytes.
    """

    root: Path
    peaks: Peaks = field(default_factory=Peaks)
    busy: list[tuple[float, float]] = field(default_factory=list)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    driver: psutil.Process | None = None
    is_over: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.is_over.set()
        if self.thread:
            self.thread.join()
        self.look_at_root()

    def follow(self, pid: int) -> None:
        """The job's process from now on."""
        self.driver = psutil.Process(pid)

    def watch(self) -> None:
        nvml, gpus = open_gpus()
        number, in_use = 0, host_in_use()
        while not self.is_over.wait(GPU_PERIOD_S):
            if gpus:
                self.look_at_gpus(nvml, gpus)
            if number % SLOW_EVERY == 0:
                self.look_at_processes()
                self.look_at_root()
                self.peaks.host_used_bytes = max(self.peaks.host_used_bytes, host_in_use() - in_use)
            number += 1

    def look_at_gpus(self, nvml: Any, gpus: list[Any]) -> None:
        with suppress(nvml.NVMLError):
            busy = [nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100 for gpu in gpus]
            used = [nvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in gpus]
            self.busy.append((time.time(), sum(busy) / len(busy)))
            self.peaks.gpu_bytes = max(self.peaks.gpu_bytes or 0, *used)

    def look_at_processes(self) -> None:
        """Private memory of the driver and of Ray's processes that are workers of the job."""
        if self.driver is None:
            return
        peaks, together = self.peaks, 0
        with suppress(psutil.Error):
            peaks.driver_private_bytes = max(peaks.driver_private_bytes, private_bytes(self.driver))
        for worker in workers(self.driver):
            with suppress(psutil.Error, OSError):
                private = private_bytes(worker)
                together += private
                status = kernel_figures(worker.pid)
                peaks.worker_private_bytes = max(peaks.worker_private_bytes, private)
                peaks.worker_locked_bytes = max(peaks.worker_locked_bytes, status.get("VmLck", 0))
                peaks.worker_pinned_bytes = max(peaks.worker_pinned_bytes, status.get("VmPin", 0))
        peaks.workers_private_bytes = max(peaks.workers_private_bytes, together)

    def look_at_root(self) -> None:
        """Sizes of all objects, and manifests that are new."""
        total = 0
        for path, size_bytes in files_under(self.root):
            total += size_bytes
            key = os.path.relpath(path, self.root)
            if os.path.basename(key).startswith("."):  # a temporary file of the store
                continue
            self.objects[key] = max(size_bytes, self.objects.get(key, 0))
            is_part = (
                key.startswith(PART_MANIFESTS)
                and key.endswith(".json")
                and not key.endswith("scales.json")
            )
            if is_part and key not in self.parts:
                with suppress(OSError, ValueError):
                    self.parts[key] = json.loads(Path(path).read_bytes())
        self.peaks.run_root_bytes = max(self.peaks.run_root_bytes, total)


def workers(driver: psutil.Process, is_busy: bool = False) -> list[psutil.Process]:
    """The job's workers, by the title that Ray gives them; is_busy: those in the middle of a
    task."""
    title = f"{WORKER_TITLE}.execute" if is_busy else WORKER_TITLE
    found = []
    with suppress(psutil.Error):
        for process in driver.children(recursive=True):
            with suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith(title):
                    found.append(process)
    return found


def host_in_use() -> int:
    """Bytes of the machine's memory that nobody else can have. A machine may grow, so what is
    available alone does not tell."""
    memory = psutil.virtual_memory()
    return int(memory.total - memory.available)


def private_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def kernel_figures(pid: int) -> dict[str, int]:
    """What /proc says of a process's memory: name -> bytes. Raises: OSError when it is gone."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}


def files_under(folder: Path) -> Iterator[tuple[str, int]]:
    """(path, size in bytes) of every file that is still there when it is looked at."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with suppress(OSError):
                yield path, os.stat(path).st_size
