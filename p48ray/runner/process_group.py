"""Runs a command, and ends every process of its group when the command ends or whoever started this is gone: `python -m p48ray.runner.process_group COMMAND...`

A server of a large model is many processes, and its front may end without ending those that hold the GPUs. What is started here is told of its parent's death
by the kernel (Linux) and has nothing else to do, so that only a SIGKILL of this process itself leaves anything behind. Expects to lead a session of its own.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

GRACE_S = 20.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def others_in_group() -> list[int]:
    """Processes of this one's group that are not zombies, without this one. Source: proc(5), /proc/PID/stat."""
    mine, found = os.getpgrp(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(group) == mine and state not in "ZX" and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def end_others() -> None:
    """Ask, wait, kill."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        for pid in others_in_group():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + patience
        while others_in_group() and time.monotonic() < deadline:
            time.sleep(0.1)


def main(command: list[str]) -> NoReturn:
    def asked_to_end(number: int, _: FrameType | None) -> NoReturn:
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_IGN)
        end_others()
        sys.exit(128 + number)

    parent = os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, asked_to_end)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before it could be asked to tell
        sys.exit(1)
    code = subprocess.Popen(command).wait()
    end_others()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(sys.argv[1:])
