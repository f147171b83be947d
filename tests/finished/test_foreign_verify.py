"""A checkpoint of others as it is: what is wrong with it, by file and tensor, through the command
too."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p48ray.cli import app
from p48ray.errors import ConfigError
from p48ray.finished.verifier import verify_folder
from tests.reference.foreign import foreign_checkpoint
from tests.stages.damage import Folder
from tests.stages.small_run import SmallRun

EXPERTS = "language_model.model.layers.1.mlp.experts"
UP = f"{EXPERTS}.3.up_proj"
OTHER = f"{EXPERTS}.12.down_proj"
PLAIN = "language_model.model.norm.weight"


@pytest.fixture(scope="module")
def foreign(finished: SmallRun) -> Folder:
    return Folder(foreign_checkpoint(Folder.read(finished.checkpoint).files))


def test_sound_one_has_no_problems(foreign: Folder) -> None:
    verdict = verify_folder(foreign.store(), None)
    assert (verdict.problems, verdict.notes) == ((), ())
    assert (verdict.num_shards, verdict.num_linears) == (6, 192)


def test_all_that_is_wrong_is_told(foreign: Folder) -> None:
    bad = (
        foreign.with_bytes(f"{UP}.weight_sparse_mask", 5, b"\x77")
        .with_bytes(f"{OTHER}.weight_scale", 7, b"\x7f")
        .with_bytes(PLAIN, 2, b"\xc0\x7f")
    )
    verdict = verify_folder(bad.store(), None)
    place = "model-00003-of-00006.safetensors: tensor"
    assert len(verdict.problems) == 2
    assert f"{place} {UP}.weight_sparse_mask" in verdict.problems[0]
    assert f"{place} {OTHER}.weight_scale" in verdict.problems[1]
    assert verdict.notes == (
        f"model-00001-of-00006.safetensors: {PLAIN}: holds 1 NaN, the first at [1]",
    )


def test_source_is_for_what_has_a_manifest(foreign: Folder, finished: SmallRun) -> None:
    with pytest.raises(ConfigError, match=r"--source: expected a checkpoint with a p48ray.json"):
        verify_folder(foreign.store(), Folder.read(finished.source).store())


def written(folder: Folder, place: Path) -> Path:
    place.mkdir()
    for name, data in folder.files.items():
        (place / name).write_bytes(data)
    return place


def test_commands_take_it(foreign: Folder, tmp_path: Path) -> None:
    theirs, out = written(foreign, tmp_path / "theirs"), tmp_path / "out"
    run = CliRunner().invoke
    found = run(app, ["verify", str(theirs)])
    assert found.exit_code == 0 and json.loads(found.stdout)["problems"] == []
    found = run(app, ["inspect", str(theirs), "--linear", UP])
    assert found.exit_code == 0 and "weight_global_scale" in found.stdout
    found = run(app, ["convert", str(theirs), str(out), "--storage", "dense"])
    assert found.exit_code == 0, found.output
    assert "gate and up share a global scale: 0 of 64 experts are exactly" in found.stdout
    assert run(app, ["verify", str(out), "--source", str(theirs)]).exit_code == 0
    found = run(app, ["inspect", str(out), "--linear", UP, "--source", str(theirs)])
    assert found.exit_code == 0 and "relative weight error" in found.stdout


def test_bad_one_is_exit_2_and_one_line(foreign: Folder, tmp_path: Path) -> None:
    file = foreign.shards[2]
    short = foreign.with_file(file, foreign.files[file][:-1000])
    theirs = written(short, tmp_path / "theirs")
    for command in (["verify"], ["convert", "OUT", "--storage", "dense"], ["inspect"]):
        places = [str(tmp_path / "out") if word == "OUT" else word for word in command[1:]]
        found = CliRunner().invoke(app, [command[0], str(theirs), *places])
        assert found.exit_code == 2 and f"{file}: expected" in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1, found.stderr
    assert not (tmp_path / "out").exists()
