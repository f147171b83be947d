"""`ray job submit` against a running Ray, with the commands of docs/run-on-one-node.md."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from p48ray import __version__
from tests.conftest import REPO, TINY
from tests.jobs.command import HELD_OUT, arguments, attempts

pytestmark = pytest.mark.ray

RAY = str(Path(sys.executable).parent / "ray")
START_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Head:
    """A running Ray and what a shell needs to talk to it."""

    url: str
    folder: Path
    env: dict[str, str]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, above those that Ray's workers take (10000 to 19999) and below
    those that the system gives to connections: one of these may be gone before the head listens on
    it, on a busy machine often."""
    found: list[int] = []
    for port in random.Random().sample(range(20000, 32000), 200):
        with socket.socket() as each, suppress(OSError):
            each.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def wait_for(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a job that does nothing has succeeded: the job server answers before it can take jobs,
    on a busy machine long before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    command = [RAY, "job", "submit", "--address", head.url, "--", "true"]
    while True:
        done = subprocess.run(
            command, env=head.env, cwd=head.folder, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return
        said = f"{done.stdout}{done.stderr}{log.read_text()}"
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(1)


def end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Ask the head to stop, then end what it left: what it started, and whatever names its
    folder."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    for other in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in other.cmdline()):
                family.append(other)
    for other in family:
        with suppress(psutil.NoSuchProcess):
            other.kill()
    process.wait(timeout=20)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` as docs/run-on-one-node.md has it, with a token, ports and a folder of its
    own."""
    # pytest's own folders are too long for the names of sockets
    folder = Path(tempfile.mkdtemp(prefix="p48ray-"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    env |= {
        "HOME": str(folder),
        "PATH": f"{Path(RAY).parent}{os.pathsep}{env['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    subprocess.run([RAY, "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    dashboard, agent, client = free_ports(3)
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--object-store-memory={100 * 2**20}",
        f"--temp-dir={folder}/ray",
    ]
    command += ["--port=0"]
    command += [
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}",
    ]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        head = Head(f"http://127.0.0.1:{dashboard}", folder, env)
        wait_for(head, process, folder / "head.log")
        yield head
    finally:
        end(process, folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository that can be told from it, with an environment and old runs that are
    not to be sent anywhere."""
    folder = tmp_path_factory.mktemp("checkout") / "repo"
    shutil.copytree(
        REPO,
        folder,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "runs", ".*_cache", "*__pycache__*", "*.egg-info"
        ),
    )
    init = folder / "p48ray" / "__init__.py"
    init.write_text(init.read_text().replace(__version__, f"{__version__}+submitted"))
    for ignored in (".venv/bin/python", "runs/tiny/plan.json"):
        (folder / ignored).parent.mkdir(parents=True)
        (folder / ignored).write_text("stays at home")
    return folder


def submit(head: Head, checkout: Path, *args: str) -> subprocess.Popen[str]:
    command = [
        RAY,
        "job",
        "submit",
        "--address",
        head.url,
        "--working-dir",
        ".",
        "--",
        "python",
        "jobs/compress.py",
        *args,
    ]
    return subprocess.Popen(
        command,
        env=head.env,
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that has run."""

    code: int
    printed: str
    root: Path


@pytest.fixture(scope="module")
def submitted(head: Head, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    root = tmp_path_factory.mktemp("submitted") / "run"
    process = submit(
        head,
        checkout,
        *arguments(root, {"evaluation": HELD_OUT}, config=Path("configs/tiny.yaml")),
    )
    printed, _ = process.communicate(timeout=240)
    return Submitted(process.returncode, printed, root)


def test_submitted_job_succeeds_and_logs_progress_and_report(submitted: Submitted) -> None:
    assert submitted.code == 0, submitted.printed
    assert re.search(r"Job 'raysubmit_\w+' succeeded", submitted.printed)
    for words in (
        "compress  16 units",
        "16/16 units in",
        "6/6 shards in",
        "KL to source",
        f"checkpoint: {submitted.root}/checkpoint/",
    ):
        assert words in submitted.printed


def test_driver_and_workers_run_the_submitted_code(submitted: Submitted) -> None:
    manifests = [
        json.loads(path.read_text()) for path in submitted.root.glob("units/*/manifest.json")
    ]
    assert len(manifests) == 16
    assert {manifest["versions"]["p48ray"] for manifest in manifests} == {
        f"{__version__}+submitted"
    }
    assert (
        f"p48ray {__version__}+submitted"
        in (submitted.root / "checkpoint" / "README.md").read_text()
    )


@pytest.mark.usefixtures("submitted")
def test_environment_and_old_runs_stay_at_home(head: Head) -> None:
    packages = [
        path
        for path in head.folder.glob(
            "ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*"
        )
        if path.is_dir()
    ]
    assert len(packages) == 1
    names = {path.name for path in packages[0].iterdir()}
    assert names >= {"jobs", "p48ray", "configs", "examples"}
    assert not names & {".venv", "runs", ".git"}


def test_mistake_fails_the_job_and_is_named_in_its_log(
    head: Head, checkout: Path, tmp_path: Path
) -> None:
    unknown_key = submit(
        head,
        checkout,
        *arguments(tmp_path / "run", {"compression.dampp": "1"}, config=Path("configs/tiny.yaml")),
    )
    relative_root = submit(head, checkout, "--config", "configs/tiny.yaml")
    for process, words in (
        (
            unknown_key,
            (
                "error: configs/tiny.yaml: compression.dampp: unknown key; did you mean"
                " compression.damp?"
            ),
        ),
        (
            relative_root,
            "error: run.root: expected an absolute path under `ray job submit`, found 'runs/tiny'",
        ),
    ):
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 1, printed
        assert re.search(r"Job 'raysubmit_\w+' failed", printed)
        assert words in printed
    assert not (tmp_path / "run").exists()


def read_until(process: subprocess.Popen[str], pattern: str, read: list[str]) -> re.Match[str]:
    """Follow a submitted job's log to the first line that matches."""
    assert process.stdout is not None
    for line in process.stdout:
        read.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError("".join(read))


def test_stopped_job_resubmitted_finishes_and_does_no_unit_twice(
    head: Head, checkout: Path, tmp_path: Path
) -> None:
    """Each unit is slow enough to be stopped among them. Ray calls a stopped job a success of the
    submission: what counts is in the run root."""
    root = tmp_path / "run"
    slow = {"source.checkpoint": str(TINY), "compression.sweeps": "20", "run.num_workers": "1"}
    command = arguments(root, slow, config=Path("configs/tiny.yaml"))
    log: list[str] = []
    process = submit(head, checkout, *command)
    job = read_until(process, r"raysubmit_\w+", log)[0]
    read_until(process, r"compress  [1-9]\d*/16 units  \d+ %", log)
    subprocess.run(
        [RAY, "job", "stop", "--address", head.url, job],
        env=head.env,
        check=True,
        capture_output=True,
        cwd=checkout,
    )
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped" in "".join(log) + rest
    assert not (root / "checkpoint" / "model.safetensors.index.json").exists()
    before = attempts(root)
    assert 0 < len(before) < 16
    again = submit(head, checkout, *command)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert f"compress  16 units, {len(before)} already done" in printed
    after = attempts(root)
    assert len(after) == 16
    assert {unit: after[unit] for unit in before} == before
    assert f"checkpoint: {root}/checkpoint/" in printed
