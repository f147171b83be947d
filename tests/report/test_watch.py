"""A run that is watched: shown as it changes, until it is complete."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from p48ray.errors import ConfigError, ObjectMissingError, TransientStoreError
from p48ray.report import watch as watch_module
from p48ray.report.watch import WATCH_S, watch
from p48ray.store import LocalStore, MemoryStore
from tests.stages.small_run import SmallRun


@pytest.fixture
def root(finished: SmallRun, tmp_path: Path) -> Path:
    """The finished run without its last unit and what follows; `later` has what is missing."""
    shutil.copytree(finished.root, tmp_path / "run", ignore=shutil.ignore_patterns("residuals"))
    (tmp_path / "run" / "units" / "L004-E008-015").rename(tmp_path / "later")
    return tmp_path / "run"


def finish(root: Path) -> None:
    (root.parent / "later").rename(root / "units" / "L004-E008-015")


def consoles(is_terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=120, force_terminal=is_terminal, no_color=True), out


def test_run_is_shown_when_it_changes_and_let_go_when_it_is_complete(root: Path) -> None:
    console, out = consoles(is_terminal=False)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            finish(root)
        assert len(waits) < 4, "a complete run is not asked for again"

    watch(LocalStore(root), console, wait)
    text = out.getvalue()
    assert text.count("  not complete  ") == 1 and text.count("  complete  ") == 1
    assert text.index("  not complete  ") < text.index("  complete  ")
    assert min(waits) >= WATCH_S


def test_terminal_is_drawn_anew_at_every_look(root: Path) -> None:
    console, out = consoles(is_terminal=True)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            finish(root)

    watch(LocalStore(root), console, wait)
    assert out.getvalue().count("not complete") == 2
    assert out.getvalue().count("\x1b[2J") == 3


@pytest.mark.parametrize("error", [TransientStoreError("slow down"), ObjectMissingError("x: gone")])
def test_store_that_does_not_answer_is_asked_again(
    root: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(root)
    read, failures = watch_module.read_status, [error]

    def failing(*arguments: object) -> object:
        if failures:
            raise failures.pop()
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(watch_module, "read_status", failing)
    console, out = consoles(is_terminal=False)
    watch(LocalStore(root), console, lambda seconds: None)
    assert f"not read, tried again soon: {error}" in out.getvalue()
    assert "  complete  " in out.getvalue()


def test_look_that_takes_long_is_followed_by_a_longer_pause(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter([100.0, 103.0, 200.0, 200.0])
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: next(moments))
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        finish(root)

    console, _ = consoles(is_terminal=False)
    watch(LocalStore(root), console, wait)
    assert waits == [30.0]


def test_place_without_a_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a run root"):
        watch(MemoryStore("watch-nothing"), consoles(is_terminal=False)[0])
