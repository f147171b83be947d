"""The serving clients' environment: made once for its pins, whole or not at all, and forgotten when
nobody uses it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.clients import environment
from tests.clients.environment import READY, digest
from tests.conftest import REPO


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "p48ray"


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    path = tmp_path / "pins.txt"
    path.write_text("a==1\n")
    return path


class Maker:
    """Stands for pip: a folder with the pins in it, or what is told."""

    def __init__(self, error: Exception | None = None, pause_s: float = 0.0) -> None:
        self.calls, self.error, self.pause_s = 0, error, pause_s

    def __call__(self, folder: Path, pins: Path) -> None:
        self.calls += 1
        folder.mkdir(parents=True)
        time.sleep(self.pause_s)
        if self.error:
            (folder / "half").touch()
            raise self.error
        (folder / "pins").write_bytes(pins.read_bytes())


def test_same_pins_are_made_once_and_others_beside_them(kept: Path, pins: Path) -> None:
    make = Maker()
    first = environment.environment(pins, make)
    assert first == kept / f"clients-{digest(b'a==1' + os.linesep.encode())}"
    assert environment.environment(pins, make) == first and make.calls == 1
    pins.write_text("a==2\n")
    second = environment.environment(pins, make)
    assert (second != first, make.calls) == (True, 2)
    assert [(folder / "pins").read_text() for folder in (first, second)] == ["a==1\n", "a==2\n"]


def test_another_python_has_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(b"a==1")
    monkeypatch.setattr(sys, "version", "3.99")
    assert digest(b"a==1") != before


def test_what_was_never_finished_is_made_anew(pins: Path) -> None:
    failed = Maker(subprocess.CalledProcessError(1, "pip"))
    with pytest.raises(subprocess.CalledProcessError):
        environment.environment(pins, failed)
    folder = environment.environment(pins, Maker())
    assert sorted(path.name for path in folder.iterdir()) == [READY, "pins"]


def test_two_that_come_at_once_make_one(pins: Path) -> None:
    make, found = Maker(pause_s=0.2), []
    threads = [
        threading.Thread(target=lambda: found.append(environment.environment(pins, make)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.calls == 1 and found[0] == found[1]


def test_unused_ones_go_when_another_is_made_and_used_ones_stay(kept: Path, pins: Path) -> None:
    old, recent, broken = (kept / f"clients-{name}" for name in ("old", "recent", "broken"))
    month_ago = time.time() - environment.UNUSED_S - 60
    for folder in (old, recent, broken):
        folder.mkdir(parents=True)
    for folder in (old, recent):
        (folder / READY).touch()
    os.utime(old / READY, (month_ago, month_ago))
    os.utime(broken, (month_ago, month_ago))
    made = environment.environment(pins, Maker())
    assert {path.name for path in kept.glob("clients-*")} == {"clients-recent", made.name}
    os.utime(made / READY, (month_ago, month_ago))
    environment.environment(pins, Maker())  # which is a use
    pins.write_text("a==2\n")
    environment.environment(pins, Maker())
    assert made.exists()


def test_command_prints_the_folder_alone(kept: Path) -> None:
    """So that a shell can take it; what pip says goes to the standard error."""
    folder = kept / f"clients-{digest((REPO / 'constraints-clients.txt').read_bytes())}"
    folder.mkdir(parents=True)
    (folder / READY).touch()
    done = subprocess.run(
        [sys.executable, "tests/clients/environment.py"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"{folder}\n", "")
