"""Continuous integration: it runs what the Makefile has, and a missing browser stops nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.browser.chromium import find_chromium
from tests.conftest import REPO

CI = (REPO / ".ci" / "run").read_text()
MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(MAKE is None, reason="no make on PATH")


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make(target: str, path: Path) -> subprocess.CompletedProcess[str]:
    """With no program but those in `path`."""
    command = [str(MAKE), "--no-print-directory", "SHELL=/bin/sh", target]
    return subprocess.run(
        command, cwd=REPO, env={"PATH": str(path)}, capture_output=True, text=True, timeout=60
    )


def test_every_step_is_a_target() -> None:
    steps = re.findall(r"^make (\S+)$", CI, flags=re.M)
    assert steps == ["setup", "chromium", "check", "test", "test-clients"]
    for step in steps:
        result = subprocess.run(
            [str(MAKE), "--dry-run", step], cwd=REPO, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr


def test_steps_end_at_the_first_that_fails() -> None:
    assert "set -euo pipefail" in CI


def test_browser_that_is_there_is_left_alone(tmp_path: Path) -> None:
    program(tmp_path, "google-chrome", "exit 0")
    program(tmp_path, "apt-get", f"echo called > {tmp_path}/called")
    program(tmp_path, "id", "echo 0")
    result = make("chromium", tmp_path)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path}/google-chrome\n")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("user", "status", "calls", "says_so"),
    [(0, 0, 2, False), (0, 100, 1, True), (1000, 0, 0, True)],
)
def test_browser_that_is_not_there_is_installed_by_root_and_missed_by_others(
    tmp_path: Path, user: int, status: int, calls: int, says_so: bool
) -> None:
    program(tmp_path, "apt-get", f'echo "$@" >> {tmp_path}/called; exit {status}')
    program(tmp_path, "id", f"echo {user}")
    result = make("chromium", tmp_path)
    assert result.returncode == 0, result
    called = (
        (tmp_path / "called").read_text().splitlines() if (tmp_path / "called").exists() else []
    )
    assert len(called) == calls and (calls < 2 or "chromium" in called[1])
    assert ("the browser tests will be skipped" in result.stdout) == says_so


def test_browser_that_does_not_start_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "chromium", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_chromium() is None
    program(tmp_path, "chromium-browser", "echo Chromium 1")
    assert find_chromium() == str(tmp_path / "chromium-browser")
