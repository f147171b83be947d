"""doctor, status and clean of a run whose blobs lie in run.scratch: where the folder is seen, and
where it is not."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p48ray.cli import app
from p48ray.run import run_root
from tests.jobs.command import arguments, invoke, snapshot

SETTINGS = {
    "compression.output_curvature": "true",
    "compression.sweeps": "0",
    "run.keep": "all",
}


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def finished(root: Path, scratch: Path, **more: str) -> Path:
    """A run root whose run is at its end; all is kept."""
    settings = SETTINGS | {"run.scratch": str(scratch)}
    settings |= {key.replace("__", "."): value for key, value in more.items()}
    outcome = invoke(*arguments(root, settings))
    assert outcome.code == 0, outcome
    return root


@pytest.fixture
def root(tmp_path: Path, scratch: Path) -> Path:
    """A run that is to do a unit of layer 2 again, for which its streams are there."""
    root = finished(tmp_path / "run", scratch)
    (root / run_root.unit_manifest("L002-E000-003")).unlink()
    return root


def command(*words: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())  # lines are folded


def blob_in(scratch: Path, kind: str = "residuals") -> Path:
    return next(path for path in sorted(scratch.rglob("*.arrow")) if kind in path.parts)


def test_doctor_reads_what_it_sees(root: Path, scratch: Path) -> None:
    said = command("doctor", root)
    assert "0 unsound" in said and "not seen" not in said and "1 of 16 units" in said
    blob = blob_in(scratch)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    said = command("doctor", root, code=1)
    assert f"unsound: {blob}: expected" in said
    command("doctor", root, "--fix")
    assert not blob.exists()
    assert "0 unsound" in command("doctor", root)


@pytest.mark.parametrize("there", ["nothing", "a folder of the same name"])
def test_doctor_calls_nothing_missing_or_unsound_that_it_can_not_see(
    there: str, root: Path, scratch: Path, tmp_path: Path
) -> None:
    """On another machine, which may have a folder of that name from an earlier job."""
    (folder,) = scratch.iterdir()
    scratch.rename(tmp_path / "elsewhere")
    if there != "nothing":
        settings = SETTINGS | {"run.scratch": str(scratch), "run.layers": "[1]"}
        assert invoke(*arguments(tmp_path / "other", settings)).code == 0
        (strange,) = scratch.iterdir()
        strange.rename(folder)
    said = command("doctor", root)
    assert "0 unsound" in said
    assert f"not seen from here: {folder} (run.scratch)" in said
    assert "1 of 16 units" in said and "pass forward" not in said and "pass backward" not in said
    before = snapshot(root)
    command("doctor", root, "--fix")
    assert snapshot(root) == before


def test_doctor_calls_nothing_unsound_of_which_another_machine_may_have_the_blob(
    root: Path, scratch: Path, tmp_path: Path
) -> None:
    """The job was here, then went on elsewhere, where a part came to other bytes."""
    (folder,) = scratch.iterdir()
    elsewhere = {"id": "0" * 16, "folder": str(folder), "schema_version": 1}
    (root / run_root.scratch_record("0" * 16)).write_text(json.dumps(elsewhere))
    blob = blob_in(scratch)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    assert "0 unsound" in command("doctor", root)


def test_doctor_says_what_is_made_again_where_the_disk_was_wiped(root: Path, scratch: Path) -> None:
    for path in scratch.rglob("*.arrow"):
        path.unlink()
    said = command("doctor", root)
    assert "0 unsound" in said
    assert "2 of 2 parts pass forward" in said and "2 of 2 parts pass backward" in said


def test_status_counts_records_and_says_where_blobs_lie(
    root: Path, scratch: Path, tmp_path: Path
) -> None:
    (folder,) = scratch.iterdir()
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    said = command("status", root)
    assert f"run.scratch: {folder}: {held:,} bytes" in said
    scratch.rename(tmp_path / "elsewhere")
    said = command("status", root)
    assert f"run.scratch: {folder}: not seen from here" in said
    assert (
        "capture │ 8 │ 8" in said and "gradients │ 8 │ 8" in said and "compress │ 15 │ 16" in said
    )


def test_clean_deletes_streams_where_they_lie_and_nothing_that_an_open_unit_needs(
    root: Path, scratch: Path
) -> None:
    said = command("clean", root, "--dry-run")
    assert "streams" in said and "may go" in said
    before = snapshot(scratch)
    assert command("clean", root, "--dry-run") and snapshot(scratch) == before
    command("clean", root)
    left = {path.parts[-3:-1] for path in scratch.rglob("*.arrow")}
    assert {kind for kind, layer in left if layer != "layer-002"} <= set()
    assert ("activations", "layer-002") in left and ("gradients", "layer-002") in left


def test_clean_says_what_other_runs_left_there_and_deletes_it_when_told(
    root: Path, scratch: Path, tmp_path: Path
) -> None:
    other = finished(tmp_path / "other", scratch, calibration__seed="7")
    folders = set(scratch.iterdir())
    said = command("clean", root)
    (theirs,) = (folder for folder in folders if f"{folder}: of another run" in said)
    assert "bytes: may go, with --scratch" in said
    assert blob_in(theirs, "activations")
    said = command("clean", root, "--scratch", "--dry-run")
    assert theirs.exists() and "may go, with --scratch" in said
    said = command("clean", root, "--scratch")
    assert f"{theirs}: of another run" in said and "deleted" in said
    assert set(scratch.iterdir()) == folders - {theirs}
    assert "0 unsound" in command("doctor", other)


def test_clean_on_another_machine_deletes_no_record_of_what_it_can_not_see(
    root: Path, scratch: Path, tmp_path: Path
) -> None:
    scratch.rename(tmp_path / "elsewhere")
    said = command("clean", root)
    assert "not seen from here" in said
    assert len(list((root / "residuals").rglob("*.json"))) == 8  # boundaries 1 to 4 of both parts
