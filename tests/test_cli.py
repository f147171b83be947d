"""p48ray's commands: exit codes and what they print. 0 for good news, 1 for damage, 2 for a mistake
of the caller's."""

import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from p48ray.cli import app
from tests.stages.damage import INDEX, Folder
from tests.stages.small_run import SmallRun

LINEAR = "language_model.model.layers.1.mlp.experts.3.up_proj"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands configure the process's logging, onto a stream that ends with the test."""
    logger = logging.getLogger("p48ray")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(result: Result, exit_code: int, *words: str) -> None:
    """One error on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == exit_code, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""


def write(folder: Folder, path: Path) -> Path:
    path.mkdir()
    for name, data in folder.files.items():
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def clean(finished: SmallRun) -> Folder:
    return Folder.read(finished.checkpoint)


# doctor and clean


def copied(finished: SmallRun, tmp_path: Path) -> Path:
    shutil.copytree(finished.root, tmp_path / "run")
    return tmp_path / "run"


def test_doctor_names_what_to_delete_and_deletes_it(finished: SmallRun, tmp_path: Path) -> None:
    root = copied(finished, tmp_path)
    assert call("doctor", root).exit_code == 0
    manifest = root / "units/L001-E000-007/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    (root / "notes.txt").write_text("whose?")
    found = call("doctor", root)
    assert found.exit_code == 1
    for words in (
        "1 unsound",
        f"unsound: {manifest}: gone or unreadable",
        "delete: units/L001-E000-007/manifest.json",
        "unknown: notes.txt",
        "the next run makes: 1 of 8 units, of layers 1",
        "the same command with --fix",
    ):
        assert words in found.stdout
    assert manifest.exists()
    fixed = call("doctor", root, "--fix")
    assert fixed.exit_code == 0
    assert "deleted 1 objects" in fixed.stdout
    assert not manifest.exists() and (root / "notes.txt").exists()
    assert call("doctor", root).exit_code == 0


def test_doctor_reads_bytes_unless_told_not_to(finished: SmallRun, tmp_path: Path) -> None:
    root = copied(finished, tmp_path)
    (shard,) = (root / "units/L002-E008-015").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert call("doctor", root, "--sizes-only").exit_code == 0
    found = call("doctor", root)
    assert found.exit_code == 1
    assert f"unsound: {shard}: expected {len(data)} bytes with SHA-256" in found.stdout


@pytest.mark.parametrize("command", ["doctor", "clean"])
def test_place_without_a_run_is_refused(command: str, tmp_path: Path) -> None:
    refused(call(command, tmp_path), 2, "expected a run root with plan.json, found none")


def test_clean_deletes_what_nobody_reads_and_says_what_more_may_go(
    finished: SmallRun, tmp_path: Path
) -> None:
    root = copied(finished, tmp_path)
    before = {p.relative_to(root) for p in root.rglob("*") if p.is_file()}
    shown = call("clean", root, "--dry-run")
    assert shown.exit_code == 0
    assert {p.relative_to(root) for p in root.rglob("*") if p.is_file()} == before
    streams = [p for p in before if p.parts[0] in ("activations", "residuals")]
    blobs = [p for p in streams if p.suffix == ".arrow" or p.parts[0] == "residuals"]
    assert f"streams   {len(blobs)} objects" in shown.stdout
    for words in ("may go", "units     8 objects", "mirror    0 objects, 0 bytes: none"):
        assert words in shown.stdout
    assert call("clean", root).exit_code == 0
    assert before - {p.relative_to(root) for p in root.rglob("*") if p.is_file()} == set(blobs)
    assert call("clean", root, "--units").exit_code == 0
    assert not list((root / "units").rglob("*.safetensors"))
    assert len(list((root / "units").rglob("manifest.json"))) == 8
    assert call("doctor", root).exit_code == 0, "a finished run needs no unit shards"


def test_clean_keeps_units_until_the_run_is_at_its_end(finished: SmallRun, tmp_path: Path) -> None:
    root = copied(finished, tmp_path)
    shutil.rmtree(root / "report")
    before = {p for p in root.rglob("*") if p.is_file()}
    refused(call("clean", root, "--units"), 2, "--units: ", "the end of the run", "nothing was")
    assert {p for p in root.rglob("*") if p.is_file()} == before


# status


def test_status_of_a_finished_run_exits_0_and_says_so(finished: SmallRun) -> None:
    result = call("status", finished.root)
    assert result.exit_code == 0
    assert (
        f"{finished.prepared.plan.config.name}  plan {finished.prepared.plan.digest[:12]}  complete"
        in result.stdout
    )
    for stage in ("capture", "compress", "reduce", "verify", "evaluate"):
        assert stage in result.stdout


def test_status_of_an_unfinished_run_exits_0_too(finished: SmallRun, tmp_path: Path) -> None:
    shutil.copy(finished.root / "plan.json", tmp_path / "plan.json")
    result = call("status", tmp_path)
    assert result.exit_code == 0
    assert "not complete" in result.stdout


def test_status_that_watches_ends_with_the_run(finished: SmallRun) -> None:
    result = call("status", "--watch", finished.root)
    assert result.exit_code == 0
    assert result.stdout.count("  complete  ") == 1


def test_status_that_watches_is_ended_by_ctrl_c_as_a_shell_says_it(
    finished: SmallRun, tmp_path: Path
) -> None:
    shutil.copy(finished.root / "plan.json", tmp_path / "plan.json")
    command = [sys.executable, "-m", "p48ray.cli", "status", "--watch", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert b"not complete" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 130
        finally:
            process.kill()
        assert process.stderr.read() == b""


def test_report_of_a_run_that_goes_on_is_written_where_it_is_asked_for(
    finished: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(finished.root / "plan.json", tmp_path / "run" / "plan.json")
    result = call("report", tmp_path / "run", "--output", tmp_path / "page.html")
    name = finished.prepared.plan.config.name
    assert result.exit_code == 0
    assert result.stdout == f"wrote {tmp_path}/page.html: {name}, not complete\n"
    assert "Not finished" in (tmp_path / "page.html").read_text()
    monkeypatch.chdir(tmp_path)
    assert call("report", finished.root).stdout == f"wrote report.html: {name}, complete\n"
    page = (finished.root / "report" / "report.html").read_bytes()
    assert (tmp_path / "report.html").read_bytes() == page
    refused(call("report", "run", "--output", "run/page.html"), 2, "outside the run root")
    refused(call("report", "nowhere"), 2, "expected a run root with plan.json")
    refused(call("report", "hf://owner/name"), 2, "found a repository on the Hub")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("place", ["nowhere", ".", "hf://owner/name", "ftp://host/run"])
def test_status_of_a_place_that_is_no_run_root_exits_2(tmp_path: Path, place: str) -> None:
    path = place if "://" in place else str(tmp_path / place)
    words = {
        "hf://owner/name": "found a repository on the Hub",
        "ftp://host/run": "unknown scheme ftp://",
    }.get(place, "expected a run root with plan.json")
    refused(call("status", path), 2, path, words)


def test_status_of_a_damaged_plan_says_what_to_delete(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    refused(call("status", tmp_path), 2, "plan.json: not JSON", "delete this object")


def test_status_counts_around_records_that_can_not_be_read(
    finished: SmallRun, tmp_path: Path
) -> None:
    root = copied(finished, tmp_path)
    manifest = root / "units/L001-E000-007/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:50])
    result = call("status", root)
    assert result.exit_code == 0
    assert f"{manifest}: not a UnitManifest" in result.stderr
    assert "p48ray doctor" in result.stderr


# verify


@pytest.mark.parametrize("with_source", [False, True])
def test_verify_of_a_clean_checkpoint_exits_0_and_prints_its_verdict(
    finished: SmallRun, with_source: bool
) -> None:
    result = call(
        "verify", finished.checkpoint, *(["--source", finished.source] if with_source else [])
    )
    assert result.exit_code == 0
    verdict = json.loads(result.stdout)
    assert verdict == {
        "checkpoint": str(finished.checkpoint),
        "compared_with_source": with_source,
        "num_shards": 6,
        "num_linears": 192,
        "problems": [],
        "notes": [],
    }


def test_verify_of_a_damaged_checkpoint_exits_1_and_names_the_tensor(
    finished: SmallRun, clean: Folder, tmp_path: Path
) -> None:
    path = write(clean.with_bytes(f"{LINEAR}.weight_scale", 0, b"\x7f"), tmp_path / "damaged")
    for arguments in ((path,), (path, "--source", finished.source)):
        result = call("verify", *arguments)
        assert result.exit_code == 1
        assert any(
            f"{LINEAR}.weight_scale" in problem for problem in json.loads(result.stdout)["problems"]
        )


def test_verify_finds_an_untouched_byte_with_and_without_the_source(
    finished: SmallRun, clean: Folder, tmp_path: Path
) -> None:
    name = "vision_tower.patch_embed.proj.weight"
    path = write(clean.flipped(name, 100, 0x40), tmp_path / "damaged")
    for source in ((), ("--source", finished.source)):
        result = call("verify", path, *source)
        assert result.exit_code == 1
        assert [name in problem for problem in json.loads(result.stdout)["problems"]] == [True]


@pytest.mark.parametrize("damage", ["no shard", "no index", "truncated"])
def test_verify_of_an_incomplete_checkpoint_exits_1_and_names_the_file(
    clean: Folder, tmp_path: Path, damage: str
) -> None:
    shard = clean.shards[2]
    folders = {
        "no shard": (clean.without_file(shard), shard),
        "no index": (clean.without_file(INDEX), INDEX),
        "truncated": (clean.with_file(shard, clean.files[shard][:-1]), shard),
    }
    folder, name = folders[damage]
    result = call("verify", write(folder, tmp_path / "damaged"))
    assert result.exit_code == 1
    assert any(name in problem for problem in json.loads(result.stdout)["problems"])


def test_verify_of_a_place_that_is_no_checkpoint_exits_2(
    finished: SmallRun, tmp_path: Path
) -> None:
    for path in (tmp_path / "nowhere", tmp_path, finished.root, finished.source):
        refused(call("verify", path), 2, str(path), "p48ray.json")


def test_verify_against_a_place_that_is_no_source_exits_2(
    finished: SmallRun, tmp_path: Path
) -> None:
    refused(
        call("verify", finished.checkpoint, "--source", tmp_path / "nowhere"),
        2,
        "config.json",
        "nowhere",
    )


def test_verify_of_a_damaged_manifest_exits_1(clean: Folder, tmp_path: Path) -> None:
    refused(
        call("verify", write(clean.with_file("p48ray.json", b"{}"), tmp_path / "damaged")),
        1,
        "p48ray.json: not a CheckpointManifest",
    )


# inspect


def test_inspect_prints_one_linear_and_its_error(finished: SmallRun) -> None:
    result = call("inspect", finished.checkpoint, "--linear", LINEAR, "--source", finished.source)
    assert result.exit_code == 0
    for words in (
        f"{LINEAR}  128 x 256",
        "relative weight error",
        "pairs kept of four",
        "E4M3 scales",
        "E2M1 codes",
    ):
        assert words in result.stdout
    without = call("inspect", finished.checkpoint)
    assert without.exit_code == 0
    assert "relative weight error" not in without.stdout


def test_inspect_of_what_is_not_there_exits_2(finished: SmallRun, tmp_path: Path) -> None:
    refused(call("inspect", tmp_path / "nowhere"), 2, "config.json", "nowhere")
    refused(
        call("inspect", finished.checkpoint, "--linear", "experts.99"),
        2,
        "no compressed linear 'experts.99'",
    )
    refused(call("inspect", finished.source), 2, "expected compressed expert linears, found none")
    refused(call("inspect", finished.checkpoint, "--source", tmp_path), 2, "config.json")


# convert


def test_convert_there_and_back_exits_0_and_tells_the_sizes(
    finished: SmallRun, clean: Folder, tmp_path: Path
) -> None:
    there = call("convert", finished.checkpoint, tmp_path / "sparse", "--storage", "sparse")
    assert there.exit_code == 0
    assert there.stdout.startswith(
        f"wrote {tmp_path / 'sparse'}: sparse storage, 6 shards\nexperts "
    )
    assert "(0.611x)" in there.stdout.splitlines()[1]
    back = call("convert", tmp_path / "sparse", tmp_path / "dense", "--storage", "dense")
    assert back.exit_code == 0 and "(1.636x)" in back.stdout.splitlines()[1]
    assert Folder.read(tmp_path / "dense").changed_from(clean) == []
    again = call("convert", finished.checkpoint, tmp_path / "sparse", "--storage", "sparse")
    assert again.exit_code == 0 and again.stdout.startswith("found ")
    assert call("verify", tmp_path / "sparse").exit_code == 0
    assert call("verify", tmp_path / "sparse", "--source", finished.source).exit_code == 0
    dense, sparse = (
        call("inspect", tmp_path / storage, "--linear", LINEAR) for storage in ("dense", "sparse")
    )
    assert sparse.exit_code == 0 and sparse.stdout == dense.stdout


def test_convert_of_what_it_can_not_read_or_write_exits_2(
    finished: SmallRun, tmp_path: Path
) -> None:
    storage = ("--storage", "sparse")
    refused(
        call("convert", tmp_path / "nowhere", tmp_path / "out", *storage),
        2,
        "nowhere",
        "p48ray.json",
    )
    refused(
        call("convert", finished.checkpoint, tmp_path / "out", "--storage", "dense"),
        2,
        "has dense storage already",
    )
    refused(
        call("convert", finished.checkpoint, finished.checkpoint, *storage),
        2,
        "expected a folder apart from the checkpoint",
    )
    refused(
        call("convert", finished.checkpoint, "hf://owner/name", *storage),
        2,
        "OUT: expected a place that can be written to",
    )
    assert (
        call("convert", finished.checkpoint, tmp_path / "out", "--storage", "thin").exit_code == 2
    )
    assert not (tmp_path / "out").exists()


def test_convert_to_modelopts_layout_and_back_exits_0(
    finished: SmallRun, clean: Folder, tmp_path: Path
) -> None:
    there = call("convert", finished.checkpoint, tmp_path / "there", "--format", "modelopt")
    assert there.exit_code == 0
    assert there.stdout.startswith(f"wrote {tmp_path / 'there'}: ModelOpt's layout, 6 shards\n")
    assert "(1.000x)" in there.stdout.splitlines()[1]
    back = ("convert", tmp_path / "there", tmp_path / "back", "--format", "compressed-tensors")
    assert call(*back).stdout.startswith(f"wrote {tmp_path / 'back'}: dense storage")
    assert Folder.read(tmp_path / "back").changed_from(clean) == []
    assert call("verify", tmp_path / "there").exit_code == 0
    refused(
        call("verify", tmp_path / "there", "--source", finished.source),
        2,
        "--source: expected a checkpoint in compressed-tensors' format",
    )
    dense, other = (
        call("inspect", place, "--linear", LINEAR)
        for place in (finished.checkpoint, tmp_path / "there")
    )
    assert other.exit_code == 0 and other.stdout == dense.stdout
    (tmp_path / "there" / "p48ray.json").unlink()
    refused(call("inspect", tmp_path / "there"), 2, "p48ray.json: expected modelopt.global_scales")


def test_convert_without_a_form_or_with_two_exits_2(finished: SmallRun, tmp_path: Path) -> None:
    command = ("convert", finished.checkpoint, tmp_path / "out")
    refused(call(*command), 2, "expected --storage or --format, found neither")
    both = ("--storage", "sparse", "--format", "modelopt")
    refused(call(*command, *both), 2, "expected --storage or --format, found both")
    sparse = ("convert", finished.checkpoint, tmp_path / "sparse", "--storage", "sparse")
    assert call(*sparse).exit_code == 0
    refused(
        call("convert", tmp_path / "sparse", tmp_path / "out", "--format", "modelopt"),
        2,
        "expected dense storage",
        "found sparse storage",
    )
    assert not (tmp_path / "out").exists()


# skeleton


def test_skeleton_writes_a_new_folder_and_says_where(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "skeleton"
    result = call("skeleton", folder)
    assert (result.exit_code, result.stdout) == (0, f"wrote {folder}\n")
    assert len(list(folder.glob("*.safetensors"))) == 64
    assert json.loads((folder / "config.json").read_text())["model_type"] == "kimi_k25"


def test_skeleton_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    refused(call("skeleton", tmp_path), 2, str(tmp_path), "new or empty folder")
    assert (tmp_path / "config.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    refused(call("skeleton", tmp_path / "config.json"), 2, "config.json")


# all


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    result = call(*arguments)
    for command in ("status", "verify", "convert", "inspect", "skeleton"):
        assert command in result.output


@pytest.mark.parametrize(
    "arguments", [["status"], ["verify"], ["unknown"], ["status", "a", "--loud"]]
)
def test_wrong_arguments_exit_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2
