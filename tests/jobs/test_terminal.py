"""What the command prints, what it leaves under logs/, and how it ends when it is stopped: as a
process of its own, on a Ray of its own."""

import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from p48ray.errors import TransientStoreError
from p48ray.store.base import Store
from p48ray.store.local import LocalStore
from tests.conftest import TINY
from tests.jobs.command import HELD_OUT, ROUNDED, Outcome, arguments, invoke, launch, run_process

UNIT_LINE = re.compile(r'\{"unit": "(L\d+-E\d+-\d+)"')
# slow enough to be stopped among the units
SLOW = {"source.checkpoint": str(TINY), "compression.sweeps": "240", "run.num_workers": "1"}


def logged(root: Path) -> str:
    """The text of the one log of a run root."""
    (path,) = (root / "logs").iterdir()
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}\.log", path.name)
    return path.read_text()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    root = tmp_path_factory.mktemp("quiet") / "run"
    outcome = run_process(*arguments(root, ROUNDED | {"evaluation": HELD_OUT}))
    assert outcome.code == 0, outcome
    return outcome, root


@pytest.mark.ray
def test_unit_lines_go_to_the_log_and_not_to_the_terminal(quiet: tuple[Outcome, Path]) -> None:
    outcome, root = quiet
    text = logged(root)
    assert len(set(UNIT_LINE.findall(text))) == len(UNIT_LINE.findall(text)) == 16
    assert "compress  16/16 units in" in text
    assert UNIT_LINE.findall(outcome.out + outcome.err) == []
    assert "compress  16/16 units in" in outcome.out


@pytest.mark.ray
def test_file_gets_no_colour_codes(quiet: tuple[Outcome, Path]) -> None:
    outcome, root = quiet
    assert "\x1b" not in outcome.out + outcome.err + logged(root)


@pytest.mark.ray
def test_start_of_ray_is_said(quiet: tuple[Outcome, Path]) -> None:
    lines = quiet[0].out.splitlines()
    (start,) = (i for i, line in enumerate(lines) if "ray       starting on this machine" in line)
    (up,) = (i for i, line in enumerate(lines) if re.search(r"ray       up after \d+ s$", line))
    (work,) = (i for i, line in enumerate(lines) if line.endswith("compress  16 units"))
    assert start < up < work


@pytest.mark.ray
def test_last_lines_say_what_there_is_and_what_comes_next(quiet: tuple[Outcome, Path]) -> None:
    outcome, root = quiet
    report = json.loads((root / "report" / "report.json").read_text())
    lines = outcome.out.splitlines()
    last = lines[lines.index(next(line for line in lines if line.startswith("done in "))) :]
    assert re.fullmatch(r"done in \d+ s|done in \d+ min \d\d s", last[0])
    assert last[1].startswith("verified    6 shards, ")
    assert last[2:6] == [
        f"checkpoint  {root}/checkpoint/",
        f"card        {root}/checkpoint/README.md",
        f"report      {root}/report/report.html",
        "next:",
    ]
    for place in last[2:5]:
        assert Path(place.split()[1]).exists()
    serve, verify, publish = (shlex.split(line) for line in last[6:])
    assert serve[:3] == ["vllm", "serve", f"{root}/checkpoint"] and "--moe-backend" in serve
    assert verify == ["p48ray", "verify", f"{root}/checkpoint", "--source", report["source"]]
    assert publish[:3] == ["HF_TOKEN=...", "python", "jobs/publish.py"]
    assert publish[3:] == ["--run-root", str(root), "--repo", "OWNER/NAME"]


@pytest.mark.ray
def test_verbose_prints_a_line_a_unit(tmp_path: Path) -> None:
    outcome = run_process(*arguments(tmp_path / "run", ROUNDED), "--verbose")
    assert outcome.code == 0, outcome
    assert len(set(UNIT_LINE.findall(outcome.out))) == 16
    assert "\x1b" not in outcome.out + outcome.err
    assert len(UNIT_LINE.findall(logged(tmp_path / "run"))) == 16


def test_every_driver_has_a_log_of_its_own_and_a_mistake_leaves_none(tmp_path: Path) -> None:
    root = tmp_path / "run"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("plain words\n")
    assert invoke(*arguments(root, {"calibration.documents": str(bad)})).code == 2
    assert not root.exists()
    for count in (1, 2):
        assert invoke(*arguments(root, ROUNDED)).code == 0
        assert len(list((root / "logs").iterdir())) == count


def test_log_that_can_not_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalStore.put

    def refusing(self: Store, key: str, data: bytes) -> None:
        if key.startswith("logs/"):
            raise TransientStoreError("no answer")
        put(self, key, data)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStore, "put", refusing)
    assert invoke(*arguments(tmp_path / "run", ROUNDED)).code == 0
    assert not (tmp_path / "run" / "logs").exists()


# Ends.


@pytest.fixture
def slow_job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in the middle of its units."""
    process = launch(*arguments(tmp_path / "run", SLOW), env={"P48RAY_TEST_MARK": str(tmp_path)})
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run").glob("units/*/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def family(mark: Path) -> list[psutil.Process]:
    """Processes that are alive and inherited the job's mark."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_ours = process.environ().get("P48RAY_TEST_MARK") == str(mark)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for_none(mark: Path) -> list[str]:
    """What is left of a job after a while; a raylet's agents notice late that it is gone."""
    deadline = time.monotonic() + 150
    while (left := family(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [process.name() for process in left]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_signal_ends_the_job_with_one_line_that_says_how_to_resume(
    number: signal.Signals, name: str, slow_job: subprocess.Popen[str], tmp_path: Path
) -> None:
    slow_job.send_signal(number)
    out, err = slow_job.communicate(timeout=100)
    assert slow_job.returncode == 128 + number, (out, err)
    assert err.count("stopped by") == 1 and "Traceback" not in out + err, err
    line = err.splitlines()[-1]  # Ray may have said something when it started
    said, _, command = line.partition(" Resume with: ")
    assert said == f"stopped by {name}; what is done stays."
    assert shlex.split(command) == ["python", *slow_job.args[1:]]  # type: ignore[index]
    assert wait_for_none(tmp_path) == []
    assert "ended by KeyboardInterrupt" in logged(tmp_path / "run")


@pytest.mark.ray
def test_raylet_that_dies_ends_the_job_with_a_message(
    slow_job: subprocess.Popen[str], tmp_path: Path
) -> None:
    (raylet,) = (process for process in family(tmp_path) if process.name() == "raylet")
    raylet.kill()
    out, err = slow_job.communicate(timeout=150)
    assert slow_job.returncode == 1, (out, err)
    assert "error: the Ray that this job started on this machine has ended (its raylet died" in err
    assert "run the same command again to resume" in err
    assert wait_for_none(tmp_path) == []


@pytest.mark.ray
def test_no_process_outlives_a_killed_driver(
    slow_job: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert len(family(tmp_path)) > 3
    slow_job.kill()
    assert wait_for_none(tmp_path) == []
