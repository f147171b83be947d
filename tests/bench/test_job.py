"""The benchmark of the whole job, on a CPU: every stage has its time, and a process that is killed
changes no byte."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bench.job_report import PLANNED, STAGES
from p48ray.estimate.plan_cost import Estimate
from tests.conftest import REPO

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EXPERTS, MIXTURES, EXPERTS_PER_UNIT = 8, 2, 4
SIZES = [
    "--width=small",
    "--device=cpu",
    f"--experts={EXPERTS}",
    f"--mixture-layers={MIXTURES}",
    "--sequences=8",
    "--length=64",
]
SETTINGS = ["--set=compression.refine_steps=1", "--set=compression.sweeps=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


def measure(folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    """What the benchmark wrote, and what it printed."""
    out = folder / "job.json"
    command = [
        sys.executable,
        "bench/job.py",
        *SIZES,
        *SETTINGS,
        f"--folder={folder}",
        "--keep-source",
        f"--json={out}",
        *more,
    ]
    ended = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=500, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(out.read_text()), ended.stdout


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[dict[str, Any], str]:
    return measure(folder)


def test_every_stage_has_its_time(undisturbed: tuple[dict[str, Any], str]) -> None:
    facts, printed = undisturbed
    assert facts["exit_codes"] == [0]
    assert tuple(facts["stages"]) == STAGES
    for stage, found in facts["stages"].items():
        assert 0 < found["seconds"] < facts["job"]["seconds"], stage
        assert found["host_seconds"]["task"] > 0, stage
        assert found["gpu_busy"] is None or 0 <= found["gpu_busy"] <= 1
        assert stage in printed
    assert {"task", "write"} <= set(facts["job"]["host_seconds"])
    assert facts["stages"]["capture"]["bytes"]["write"] > 0
    starts = [facts["stages"][stage]["start_s"] for stage in STAGES]
    assert starts == sorted(starts)
    assert len(printed) < 12_000


def test_units_memory_and_plan_are_told(undisturbed: tuple[dict[str, Any], str]) -> None:
    facts, _ = undisturbed
    units = EXPERTS * MIXTURES // EXPERTS_PER_UNIT
    assert facts["units"]["count"] == len(facts["unit_digests"]) == units
    assert facts["units"]["per_minute"] > 0
    assert {"fetch", "solve"} <= set(facts["units"]["mean_seconds"])
    assert facts["peaks"]["worker_private_bytes"] > 50e6
    assert facts["peaks"]["run_root_bytes"] >= facts["objects_bytes"]["checkpoint"]
    plan = {row["name"]: row for row in facts["plan"]}
    assert {
        f.name for f in fields(Estimate) if f.name.endswith("_bytes") and f.name.endswith(PLANNED)
    } <= set(plan)
    for name in ("unit_bytes", "checkpoint_bytes"):
        assert plan[name]["actual"] == pytest.approx(plan[name]["planned"], rel=0.05), name


def test_killed_worker_changes_no_byte(
    undisturbed: tuple[dict[str, Any], str], folder: Path
) -> None:
    killed, _ = measure(folder, "--kill=worker", "--kill-in=compress")
    assert killed["killed"]["what"] == "worker"
    assert killed["killed"]["units"] < killed["units"]["count"]
    assert killed["exit_codes"] == [0, 0]
    assert killed["digest"] == undisturbed[0]["digest"]
    assert killed["unit_digests"] == undisturbed[0]["unit_digests"]
