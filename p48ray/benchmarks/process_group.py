"""Runs a command, and ends every process of its group when the command ends or whoever started this
is gone: `python -m p48ray.benchmarks.process_group COMMAND...`

    starter (a Ray worker)  >  launcher  >  guardian  >  command  >  its own processes
                            all but the starter in one session, led by the launcher

A server of a large model is many processes, and its front may end without ending those that hold
the GPUs. The kernel tells a process of its parent's death (Linux). Two of them, because Ray kills
what a lost worker has started, and only that, without warning: then the launcher is gone, and the
guardian, which is told, ends the rest.
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

# between SIGTERM and SIGKILL; an engine lets go of its GPUs in some seconds
GRACE_S = float(os.environ.get("P48RAY_GRACE_S", "20"))
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def others_in_group() -> list[int]:
    """Processes of this one's group that are not zombies, without this one and its launcher.
    Source: proc(5), /proc/PID/stat."""
    mine, not_counted, found = os.getpgrp(), (os.getpid(), os.getppid()), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(group) == mine and state not in "ZX" and int(entry.name) not in not_counted:
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


def told_of_death(parent: int, number: int) -> None:
    """Have the kernel send a signal when the parent ends. Ends here if it has ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(1)


def guard(command: list[str], launcher: int) -> NoReturn:
    """The guardian: run the command, and leave nobody behind."""

    def asked_to_end(number: int, _: FrameType | None) -> NoReturn:
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_IGN)
        end_others()
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, asked_to_end)
    told_of_death(launcher, signal.SIGTERM)
    code = subprocess.Popen(command).wait()
    end_others()
    sys.exit(code if code >= 0 else 128 - code)


def main(command: list[str]) -> NoReturn:
    """The launcher: passes on what it is asked, and how the command ended."""
    starter, launcher = os.getppid(), os.getpid()
    guardian = os.fork()
    if guardian == 0:
        guard(command, launcher)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(guardian, number))
    told_of_death(starter, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(guardian, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(sys.argv[1:])
