"""run_small.sh: lint, and its behaviour around a `ray` and a `python` that only pretend. The real
run takes a minute: infra/README.md."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.infra.conftest import INFRA, lint

SCRIPT = INFRA / "run_small.sh"

# A `ray` that logs what it is told: `start` waits to be ended, the first submit is refused, and all
# are where there is no head.
FAKE_RAY = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$1 $2" in
  "start --head")
    test -n "$HEAD_DIES" && exit 1
    trap 'echo head ended >> "$CALLS"; exit 0' TERM
    while :; do sleep 0.05; done ;;
  "job submit")
    test -n "$HEAD_DIES" && exit 1
    test -e "$CALLS.tried" || { touch "$CALLS.tried"; exit 1; } ;;
  "job logs") echo the log of the job; exit "${LOGS_CODE:-0}" ;;
esac
"""
# A `python` that is asked twice: to make a token, and, the real one with a Ray of ours, what became
# of the job.
FAKE_PYTHON = """#!/bin/sh
test "$1" = -c && { printf token; exit 0; }
stat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"
PYTHONPATH=$FAKES exec "$REAL_PYTHON" "$@"
"""
FAKE_CLIENT = """
import enum, os, types

class JobStatus(enum.Enum):
    RUNNING, SUCCEEDED, FAILED, STOPPED = "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"
    def is_terminal(self):
        return self is not JobStatus.RUNNING

class JobSubmissionClient:
    def __init__(self, address):
        self.told = [JobStatus.RUNNING]
    def get_job_info(self, job):
        status, code = os.environ["JOB_END"].split()
        if self.told:
            return types.SimpleNamespace(status=self.told.pop(), driver_exit_code=None)
        exit_code = None if code == "none" else int(code)
        return types.SimpleNamespace(status=JobStatus(status), driver_exit_code=exit_code)
"""


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    files = {
        "bin/ray": FAKE_RAY,
        "bin/python": FAKE_PYTHON,
        "fakes/ray/__init__.py": "",
        "fakes/ray/job_submission.py": FAKE_CLIENT,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path / "calls"


def run(calls: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    fakes = {
        "BIN": str(calls.parent / "bin"),
        "FAKES": str(calls.parent / "fakes"),
        "REAL_PYTHON": sys.executable,
        "CALLS": str(calls),
    }
    settings = os.environ | fakes | {"JOB_END": "SUCCEEDED 0", "RETRY_S": "0.05"} | env
    return subprocess.run(
        [str(SCRIPT), *args], env=settings, capture_output=True, text=True, timeout=60, check=False
    )


def started_folder(calls: Path) -> Path:
    (start,) = [line for line in calls.read_text().splitlines() if line.startswith("start")]
    (option,) = [word for word in start.split() if word.startswith("--temp-dir=")]
    return Path(option.removeprefix("--temp-dir=")).parent


def test_shellcheck_finds_nothing() -> None:
    result = lint("shellcheck", str(SCRIPT))
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("end", "code"),
    [("SUCCEEDED 0", 0), ("FAILED 1", 1), ("FAILED 2", 2), ("STOPPED none", 1), ("STOPPED 0", 1)],
)
def test_exit_code_is_what_ray_says_of_the_job_whatever_the_log_command_says(
    calls: Path, end: str, code: int
) -> None:
    result = run(calls, JOB_END=end, LOGS_CODE="0" if code else "1")
    assert result.returncode == code
    assert (
        "the log of the job" in result.stdout and f": {end.split()[0]}, exit code" in result.stdout
    )


def test_head_is_ended_and_its_folder_removed(calls: Path) -> None:
    assert run(calls, JOB_END="FAILED 2").returncode == 2
    assert "head ended" in calls.read_text()
    assert not started_folder(calls).exists()
    assert "\nstop" not in calls.read_text()  # `ray stop` would end every Ray of the machine


def test_submission_is_tried_until_the_head_takes_it_with_an_absolute_root_and_the_given_arguments(
    calls: Path,
) -> None:
    run(calls, "runs/here", "--set", "run.num_workers=1")
    submissions = [line for line in calls.read_text().splitlines() if line.startswith("job submit")]
    assert len(submissions) == 2
    job = submissions[-1].split(" -- ")[1]
    assert (
        job
        == f"python jobs/compress.py --config configs/tiny.yaml --run-root {REPO}/runs/here --set"
        " run.num_workers=1"
    )


def test_token_can_be_read_by_its_owner_alone(calls: Path) -> None:
    run(calls)
    assert "600" in calls.read_text().splitlines()


def test_head_that_dies_is_told_with_its_log(calls: Path) -> None:
    result = run(calls, HEAD_DIES="yes")
    assert result.returncode == 1 and "the head did not take the job" in result.stderr


def test_missing_environment_is_told_with_what_to_do(calls: Path) -> None:
    result = run(calls, BIN=str(calls.parent / "nowhere"))
    assert result.returncode == 1 and "make setup" in result.stderr
