"""The page of a run that is still going on, and what it must not touch."""

import re
import shutil
from pathlib import Path

import pytest

from p48ray.errors import ConfigError
from p48ray.report.snapshot import write_snapshot
from p48ray.stages.prepare import prepare
from p48ray.store import LocalStore, MemoryStore
from tests.report.test_html import Page
from tests.stages.small_run import SmallRun, configure


@pytest.fixture
def root(finished: SmallRun, tmp_path: Path) -> Path:
    """The finished run as it was with half of its units."""
    kept = shutil.ignore_patterns("residuals", "checkpoint", "verification", "report", "L00[34]-*")
    shutil.copytree(finished.root, tmp_path / "run", ignore=kept)
    return tmp_path / "run"


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def words_of(path: Path) -> dict[str, str]:
    return {k: re.sub(r"\s+", " ", v) for k, v in Page(path.read_text()).words.items()}


def test_page_of_a_run_that_goes_on_says_so_and_shows_what_there_is(root: Path) -> None:
    before, output = files(root), root.parent / "page.html"
    status = write_snapshot(LocalStore(root), output)
    words = words_of(output)
    assert not status.is_complete
    assert "Not finished: this page has what there was when a piece of work" in words["top"]
    assert "capture 12 of 12, compress 4 of 8, reduce not begun, verify not begun," in words["top"]
    assert "96 of 4 units of 8" in words["top"] and "checkpoint, planned" in words["top"]
    assert {"timeline", "errors", "routing", "outcomes", "cost"} <= set(words)
    assert "quality" not in words and "masks" not in words
    assert "solved 96" in words["outcomes"]
    assert files(root) == before, "the run root is only read"
    assert [p.name for p in root.parent.iterdir()] in (["run", "page.html"], ["page.html", "run"])


def test_page_of_a_run_without_a_unit_has_what_streams_left(root: Path) -> None:
    shutil.rmtree(root / "units")
    write_snapshot(LocalStore(root), root.parent / "page.html")
    words = words_of(root.parent / "page.html")
    assert "compress 0 of 8" in words["top"] and "0 of 0 units of 8" in words["top"]
    assert set(words) == {"top", "timeline", "cost", "made"}


def test_page_of_a_run_that_has_only_begun_can_be_drawn(root: Path) -> None:
    for folder in ("units", "activations"):
        shutil.rmtree(root / folder)
    write_snapshot(LocalStore(root), root.parent / "page.html")
    assert "capture 0 of 12" in words_of(root.parent / "page.html")["top"]


def test_page_of_a_pilot_that_goes_on_promises_no_checkpoint(
    finished: SmallRun, root: Path
) -> None:
    pilot = prepare(configure(finished.source, "/nowhere", "run.layers=[1,3]")).plan
    (root / "plan.json").write_bytes(pilot.to_json())
    write_snapshot(LocalStore(root), root.parent / "page.html")
    words = words_of(root.parent / "page.html")
    assert "A pilot of some layers: there is no checkpoint." in words["top"]
    assert "checkpoint, planned" not in words["top"] and "bytes of tensors" not in words["cost"]


def test_page_of_a_complete_run_is_the_jobs_own(finished: SmallRun, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    output.write_text("an older one")
    assert write_snapshot(LocalStore(finished.root), output).is_complete
    assert output.read_bytes() == (finished.root / "report" / "report.html").read_bytes()


@pytest.mark.parametrize("place", ["page.html", "report/report.html", "report.html"])
def test_place_in_the_run_root_is_refused(root: Path, place: str) -> None:
    (root / "report").mkdir()
    before = files(root)
    with pytest.raises(ConfigError, match="expected a file outside the run root"):
        write_snapshot(LocalStore(root), root / place)
    (root.parent / "link").symlink_to(root)
    with pytest.raises(ConfigError, match="expected a file outside the run root"):
        write_snapshot(LocalStore(root), root.parent / "link" / place)
    assert files(root) == before


def test_place_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    store = MemoryStore("snapshot-nothing")
    with pytest.raises(ConfigError, match="found a folder"):
        write_snapshot(store, tmp_path)
    with pytest.raises(ConfigError, match=f"found no folder {tmp_path}/nowhere"):
        write_snapshot(store, tmp_path / "nowhere" / "page.html")
    with pytest.raises(ConfigError, match=r"expected a run root with plan\.json"):
        write_snapshot(store, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
