"""run.scratch on Ray: a node that has a disk of its own there is refused by its name, one that
shares the driver's works, and whoever dies leaves the same bytes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.conftest import REPO
from tests.jobs.command import arguments, attempts, launch, run_process, snapshot
from tests.runner.conftest import ALL_STAGES

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOM = {"object_store_memory": 80 * 2**20}
JOIN_S = 60.0


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """A cluster whose head has no room for workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO), prepend=os.pathsep)
        head_node = ROOM | {"num_cpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head_node)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def node_with_its_own_disk(head: Cluster, disk: Path) -> subprocess.Popen[bytes]:
    """A node that has another file system where the driver has the scratch folder. Only root may
    start one."""
    ray = Path(sys.executable).with_name("ray")
    start = f"{ray} start --address={head.address} --num-cpus=1 --block"
    script = f"mount -t tmpfs -o size=64m p48ray-scratch {disk} && exec {start}"
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + JOIN_S
    while sum(node["alive"] for node in nodes_of(head)) < 2:
        if process.poll() is not None:
            assert process.stderr is not None
            pytest.skip(f"needs the right to mount a file system: {process.stderr.read()!r}")
        assert time.monotonic() < deadline, "the node does not come up"
        time.sleep(0.2)
    return process


def nodes_of(head: Cluster) -> list[dict[str, bool]]:
    state = head.global_state
    return [{"alive": bool(node["Alive"])} for node in state.node_table()]


def job(root: Path, disk: Path) -> list[str]:
    more = {"run.scratch": str(disk), "run.keep": "units", "run.root_is_shared": "true"}
    return arguments(root, ALL_STAGES | more)


def test_node_with_a_disk_of_its_own_ends_the_job_with_2_and_is_named(
    head: Cluster, disk: Path, tmp_path: Path
) -> None:
    node = node_with_its_own_disk(head, disk)
    try:
        outcome = run_process(*job(tmp_path / "run", disk), env={"RAY_ADDRESS": head.address})
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
    assert outcome.code == 2, outcome
    assert f"run.scratch: {disk}/" in outcome.err
    address = head.address.partition(":")[0]
    assert f"({address})" in outcome.err and "expected node " in outcome.err
    assert "Traceback" not in outcome.err
    assert list(disk.iterdir()) == [], "nothing was made there, and nothing is left"


def test_killed_driver_whose_scratch_is_lost_is_resumed_to_the_same_bytes(
    disk: Path, tmp_path: Path, local_run: Path
) -> None:
    """All workers die with it, and the disk is another one afterwards."""
    root = tmp_path / "run"
    process = launch(*job(root, disk))
    deadline = time.monotonic() + 120
    while not (before := attempts(root)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(disk.rglob("*.arrow"))
    disk.rename(tmp_path / "lost")
    outcome = run_process(*job(root, disk))
    assert outcome.code == 0, outcome
    assert snapshot(root / "checkpoint") == snapshot(local_run / "checkpoint")
    assert not before.items() - attempts(root).items(), "a unit that was done was done again"
    assert list(disk.iterdir()) == [], "with run.keep: units nothing is left of a finished run"
