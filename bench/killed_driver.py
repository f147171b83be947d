"""Seconds until nothing is left of a job whose driver was killed (kill -9) with its own Ray.

    python bench/killed_driver.py [--machine "2 cores"]

Ray starts its processes on Linux with a parent-death signal, so that the job needs no watchdog of
its own; this measures that it holds. The job is configs/tiny.yaml, killed once it has a worker.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[1]
MARK = "P48RAY_BENCH_MARK"
"""In the environment of the driver, which all that it starts inherits."""
START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 600.0


def alive(mark: str) -> list[str]:
    """Names of the processes that inherited the mark."""
    names = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_ours = process.environ().get(MARK) == mark
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
    return sorted(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores, {platform.machine()}")
    machine = parser.parse_args().machine
    with tempfile.TemporaryDirectory(prefix="p48ray-killed-") as folder:
        root = Path(folder) / "run"
        command = [sys.executable, "jobs/compress.py", "--config", "configs/tiny.yaml"]
        driver = subprocess.Popen(
            [*command, "--run-root", str(root)],
            cwd=REPO,
            env=os.environ | {MARK: folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        start = time.monotonic()
        while not any("ray::Worker" in name for name in alive(folder)):
            if driver.poll() is not None or time.monotonic() - start > START_TIMEOUT_S:
                driver.kill()
                sys.exit("the job did not come to its workers")
            time.sleep(0.1)
        before = alive(folder)
        driver.kill()
        killed = time.monotonic()
        driver.wait()
        while (left := alive(folder)) and time.monotonic() - killed < END_TIMEOUT_S:
            time.sleep(0.05)
        seconds = time.monotonic() - killed
        print(
            f"{machine}: {len(before)} processes ({', '.join(before)}), then kill -9 of the driver"
        )
        print(f"{len(left)} left after {seconds:.1f} s {', '.join(left)}".rstrip())


if __name__ == "__main__":
    main()
