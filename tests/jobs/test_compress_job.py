"""jobs/compress.py: its flags, its dry run, its exit codes, and running it again."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from p48ray.checkpoint.layout import ModelLayout
from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.run import changing_hands
from p48ray.run.output_layout import OutputShard
from p48ray.stages.table import STAGES
from p48ray.store import LocalStore
from p48ray.unit.context import StageContext
from tests.conftest import REPO
from tests.jobs.command import HELD_OUT, ROUNDED, arguments, attempts, invoke, run_process, snapshot

pytestmark = pytest.mark.slow

ONE_SHOT = {
    "compression.solver": "sparsegpt_gptq",
    "compression.router_weight_exponent": "0",
    "compression.damp": "0.1",
}


@pytest.fixture
def root(finished_run: Path) -> Path:
    """A finished run, to be damaged."""
    return finished_run


def test_flags_are_six_and_help() -> None:
    outcome = invoke("--help")
    assert outcome.code == 0
    assert set(re.findall(r"--[a-z][a-z-]*", outcome.out)) == {
        "--config",
        "--run-root",
        "--set",
        "--dry-run",
        "--texts",
        "--verbose",
        "--help",
    }


def test_command_without_configuration_is_a_users_mistake() -> None:
    outcome = invoke()
    assert (outcome.code, "--config" in outcome.err) == (2, True)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    outcome = invoke(*arguments(tmp_path / "run"), "--dry-run")
    assert outcome.code == 0
    rows = (
        "16 of up to 4 experts",
        "192 (4 layers x 16 experts x 3, stored as int4)",
        "4 x 64 = 256 tokens in 2 parts",
        "6 shards, 1.87 MB",
    )
    for words in rows:
        assert words in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_plan_looks_once_at_the_name_of_an_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model has 200,000 of them."""
    asked: Counter[str] = Counter()
    looks = ModelLayout.is_expert_tensor

    def counting(layout: ModelLayout, name: str) -> bool:
        asked[name] += ".mlp.experts." in name
        return looks(layout, name)

    monkeypatch.setattr(ModelLayout, "is_expert_tensor", counting)
    assert invoke(*arguments(tmp_path / "run"), "--dry-run").code == 0
    assert len(+asked) == 4 * 16 * 3 * 3 and max(asked.values()) == 1


def test_dry_run_leaves_a_run_root_of_another_plan_alone(root: Path) -> None:
    before = snapshot(root)
    assert invoke(*arguments(root, {"compression.sweeps": "7"}), "--dry-run").code == 0
    assert snapshot(root) == before


# Through a small process between: Linux counts the memory of whoever starts a process as that
# process's own peak.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.slow
def test_dry_run_of_kimi_k25_prints_its_plan_within_a_gigabyte(tmp_path: Path) -> None:
    write_kimi_k25_skeleton(tmp_path / "kimi")
    command = [
        *(sys.executable, "-X", "importtime"),
        "jobs/compress.py",
        "--config",
        "configs/kimi_k25_p48_nvfp4.yaml",
        "--dry-run",
    ]
    command += ["--set", f"source.checkpoint={tmp_path / 'kimi'}"]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert measured.returncode == 0, measured.stderr
    assert re.search(r"\| +torch$", measured.stderr, re.MULTILINE)
    assert not re.search(r"\| +ray$", measured.stderr, re.MULTILINE)
    *lines, peak_rss = measured.stdout.splitlines()
    printed = "\n".join(lines)
    values = (
        "595.15 GB, 64 shards",
        "69,120 (60 layers x 384 experts x 3",
        "2,880 of up to 8 experts",
        "61 shards, 595.15 GB",
        "GPU-hours",
    )
    for words in (
        *values,
        "read before the first unit",
        "read by streaming stages",
        "read by units",
        "written",
        "stored at the peak",
    ):
        assert words in printed
    assert int(peak_rss) * 1024 < 10**9
    assert {path.name for path in tmp_path.iterdir()} == {"kimi"}


@pytest.mark.parametrize("root_setting", ["runs/somewhere", "./somewhere", "~/somewhere"])
def test_relative_run_root_is_refused_under_a_ray_job(
    root_setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    outcome = invoke(*arguments(root_setting))
    assert outcome.code == 2
    for words in ("run.root", "expected an absolute path", repr(root_setting), "--run-root"):
        assert words in outcome.err


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_absolute_run_root_is_taken_under_a_ray_job(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}}))
    assert invoke(*arguments(f"{prefix}{tmp_path}/run"), "--dry-run").code == 0


@pytest.mark.ray
def test_address_that_is_no_clusters_is_a_users_mistake(tmp_path: Path) -> None:
    outcome = run_process(
        *arguments(tmp_path / "run"), env={"RAY_ADDRESS": "http://127.0.0.1:8265"}
    )
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    assert (
        "error: RAY_ADDRESS: expected host:port of a running Ray cluster, found"
        " 'http://127.0.0.1:8265'" in outcome.err
    )


def test_address_where_nobody_listens_is_a_users_mistake_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Ray tries to join it, which fails a test without the mark."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by tests of this process
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        outcome = invoke(*arguments(tmp_path / "run"), on_ray=True)
    assert outcome.code == 2, outcome
    assert (
        f"error: RAY_ADDRESS: expected host:port of a running Ray cluster, found {address!r}: "
        in outcome.err
    )


def test_report_is_printed_and_stored(tmp_path: Path) -> None:
    root = tmp_path / "run"
    outcome = invoke(*arguments(root, ROUNDED | {"evaluation": HELD_OUT}))
    assert outcome.code == 0, outcome
    report = json.loads((root / "report" / "report.json").read_text())
    quality = report["quality"]
    assert quality["num_tokens"] == 128
    for shown in (
        f"{quality['source_perplexity']:.4f}",
        f"{quality['compressed_perplexity']:.4f}",
        f"{quality['kl']:.4f}",
    ):
        assert shown in outcome.out
    assert f"checkpoint: {root}/checkpoint/" in outcome.out
    assert outcome.err == ""


def test_run_again_after_success_does_no_unit_twice(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, units = snapshot(root), attempts(root)
    assert len(units) == 16
    worked: list[object] = []
    for stage in ("capture", "compress", "verify"):
        monkeypatch.setitem(
            STAGES, stage, replace(STAGES[stage], body=lambda _, item: worked.append(item))
        )
    outcome = invoke(*arguments(root))
    assert outcome.code == 0, outcome
    assert worked == []
    assert attempts(root) == units
    for stage in (
        "compress  16 units, 16 already done",
        "capture   8 activation parts, 8 already done",
    ):
        assert stage in outcome.out
    after = snapshot(root)
    (log,) = after.keys() - before.keys()
    assert log.startswith("logs/")
    assert {name for name in before if after[name] != before[name]} <= {
        "report/report.json",
        "report/report.html",
    }  # they tell this driver's seconds


def test_missing_pieces_are_made_again_and_nothing_else(root: Path) -> None:
    before, units = snapshot(root / "checkpoint"), attempts(root)
    (root / "units" / "L002-E004-007" / "manifest.json").unlink()
    for shard in (root / "checkpoint").glob("model-00003-*"):
        shard.unlink()
    assert invoke(*arguments(root)).code == 0
    assert snapshot(root / "checkpoint") == before
    assert {unit for unit, manifest in attempts(root).items() if manifest != units[unit]} == {
        "L002-E004-007"
    }


def test_output_shard_of_another_size_is_made_again(root: Path) -> None:
    before = snapshot(root / "checkpoint")
    shard = sorted((root / "checkpoint").glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert invoke(*arguments(root)).code == 0
    assert snapshot(root / "checkpoint") == before


def test_shard_that_is_made_again_is_verified_again_and_has_no_index_until_then(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted((root / "checkpoint").glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-100])
    verified: list[str] = []
    index = root / "checkpoint" / "model.safetensors.index.json"
    verify = STAGES["verify"].body

    def watch(context: StageContext, item: OutputShard) -> object:
        verified.append(item.name)
        assert not index.exists()
        return verify(context, item)

    monkeypatch.setitem(STAGES, "verify", replace(STAGES["verify"], body=watch))
    outcome = invoke(*arguments(root))
    assert outcome.code == 0, outcome
    assert verified == [shard.name]
    assert index.exists()


def test_settings_outside_the_digest_may_change_on_resume(root: Path) -> None:
    before = snapshot(root / "checkpoint")
    assert (
        invoke(
            *arguments(
                root, {"evaluation": HELD_OUT, "run.num_workers": "1", "run.max_attempts": "5"}
            )
        ).code
        == 0
    )
    after = snapshot(root / "checkpoint")
    # the card tells what was measured since
    assert {name for name in after if after[name] != before.get(name)} == {"README.md"}
    assert json.loads((root / "report" / "report.json").read_text())["quality"]["num_tokens"] == 128


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("place", ["a global scale", "a code", "an untouched tensor"])
def test_shard_that_verification_refuses_is_stitched_again(place: str, root: Path) -> None:
    before = snapshot(root / "checkpoint")
    shard = sorted((root / "checkpoint").glob("*.safetensors"))[1]
    start = data_start(shard)
    flip_bit(
        shard,
        {"a global scale": start, "a code": start + 200_000, "an untouched tensor": -1}[place],
    )
    verdict = root / "verification" / f"{shard.stem}.json"
    verdict.unlink()
    outcome = invoke(*arguments(root))
    assert outcome.code == 0, outcome
    assert f"  {shard.name}: " in outcome.out and "made anew next" in outcome.out
    assert json.loads(verdict.read_text())["problems"] == []
    assert snapshot(root / "checkpoint") == before


def test_take_over_that_dies_before_its_deletions_is_finished_by_the_next_start(
    root: Path, tmp_path: Path
) -> None:
    """Shards of another count, which verification would name as not planned."""
    (root / "checkpoint" / "model.safetensors.index.json").unlink()
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(root, undisturbed)
    wider = {"output.max_shard_size": "900KB"}
    assert invoke(*arguments(undisturbed, wider)).code == 0
    with mock.patch.object(changing_hands, "delete_all", side_effect=KeyboardInterrupt):
        assert invoke(*arguments(root, wider)).code == 130
    plans = [changing_hands.read_plan(LocalStore(run)) for run in (root, undisturbed)]
    assert plans[0].digest == plans[1].digest, "the new plan is there"
    left = {path.name for path in (root / "checkpoint").glob("*.safetensors")}
    outcome = invoke(*arguments(root, wider))
    assert outcome.code == 0, outcome
    found = snapshot(root / "checkpoint")
    assert left and not left & set(found)
    assert found == snapshot(undisturbed / "checkpoint")


def test_stray_weights_in_the_checkpoint_give_exit_code_1(root: Path) -> None:
    (root / "checkpoint" / "model-99999-of-99999.safetensors").write_bytes(
        b"\x02" + bytes(7) + b"{}"
    )
    outcome = invoke(*arguments(root))
    assert outcome.code == 1, outcome
    assert "model-99999-of-99999.safetensors: not planned" in outcome.err


def test_baseline_is_compressed_beside_the_result_and_reported_with_it(root: Path) -> None:
    settings = {"evaluation": HELD_OUT.replace("}", ", baseline: true}")}
    outcome = invoke(*arguments(root, settings))
    assert outcome.code == 0, outcome
    report = json.loads((root / "report/report.json").read_text())
    alone = invoke(*arguments(root / "alone", ONE_SHOT | {"evaluation": HELD_OUT}))
    assert alone.code == 0, alone
    expected = json.loads((root / "alone/report/report.json").read_text())["quality"]
    assert report["baseline"] == expected
    assert report["baseline"]["kl"] > 0
    assert report["baseline"] != report["quality"]
    assert (
        f"KL ratio to the one-shot baseline: {report['quality']['kl'] / expected['kl']:.3f}"
        in outcome.out
    )
    again = invoke(*arguments(root, settings))
    assert (again.code, json.loads((root / "report/report.json").read_text())["baseline"]) == (
        0,
        expected,
    )
