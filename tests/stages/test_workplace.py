"""What a dead process left is hashed once by the node that goes on with it; what a process of the
node wrote is not."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from p48ray import trace
from p48ray.config.load import load_config
from p48ray.run import run_root
from p48ray.run.plan import RunPlan
from p48ray.stages.inputs import write_inputs
from p48ray.stages.prepare import prepare
from p48ray.stages.tasks import Task
from p48ray.stages.workplace import Workplace
from p48ray.store.node_cache import node_folder
from tests.conftest import REPO
from tests.stages.test_capture import SETTINGS

pytestmark = pytest.mark.slow

SPAWN = multiprocessing.get_context("spawn")
WAIT_S = 120.0
NODE = "node-of-a-test"
LAYER, PART = 2, 0
KEY = run_root.activation_part(LAYER, PART)


@pytest.fixture(params=["run root", "scratch"])
def plan(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RunPlan:
    """Of a run whose processes say what they hash. Its blobs are files of this node in its run
    root, or in run.scratch, whose run root is everybody's."""
    monkeypatch.chdir(REPO)
    for folder in ("cache", "trace"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv(trace.TRACE_VARIABLE, str(tmp_path / "trace"))
    settings = (*SETTINGS, "run.threads_per_worker=1", f"run.node_cache={tmp_path / 'cache'}")
    if request.param == "scratch":
        settings = (*settings, "run.root_is_shared=true", f"run.scratch={tmp_path / 'scratch'}")
    prepared = prepare(load_config(REPO / "configs" / "tiny.yaml", settings, str(tmp_path / "run")))
    write_inputs(prepared)
    return prepared.plan


@pytest.fixture
def workplaces(plan: RunPlan) -> Iterator[list[Workplace]]:
    """Those that are opened; closed at the end."""
    opened: list[Workplace] = []
    yield opened
    for workplace in opened:
        workplace.close()


def open_workplace(plan: RunPlan) -> Workplace:
    return Workplace(plan, plan.config.run.root, NODE)


def read(workplace: Workplace) -> None:
    assert len(workplace.context.blob("activations", LAYER, PART)["hidden"]) == 128


def times_hashed(tmp_path: Path) -> int:
    """How often any process read the blob through its digest."""
    lines = [
        json.loads(line)
        for file in (tmp_path / "trace").iterdir()
        for line in file.read_text().splitlines()
    ]
    return sum(line["kind"] == "hash" and line["what"] == KEY for line in lines)


def capture_and_die(plan_json: bytes) -> None:
    workplace = open_workplace(RunPlan.from_json(plan_json, "the test's plan"))
    result = workplace.execute(Task(stage="capture", id="part-0", item=[PART]))
    assert result.is_done, result.error
    os.kill(os.getpid(), signal.SIGKILL)


def capture_in_a_process_that_dies(plan: RunPlan) -> None:
    process = SPAWN.Process(target=capture_and_die, args=(plan.to_json(),))
    process.start()
    process.join(WAIT_S)
    assert process.exitcode == -signal.SIGKILL


def read_at_once(plan_json: bytes, barrier: Barrier) -> None:
    workplace = open_workplace(RunPlan.from_json(plan_json, "the test's plan"))
    barrier.wait(WAIT_S)
    read(workplace)
    barrier.wait(WAIT_S)
    workplace.close()


def test_a_blob_of_a_dead_process_is_hashed_once_and_never_again_on_that_node(
    plan: RunPlan, workplaces: list[Workplace], tmp_path: Path
) -> None:
    capture_in_a_process_that_dies(plan)
    left = node_folder(plan.config.run.node_cache, NODE)
    assert list(left.glob("*.checked")), "what it wrote it noted"
    workplaces.append(open_workplace(plan))
    assert not list(left.glob("*.checked")), "notes of a node on which nobody was left"
    for _ in range(2):
        read(workplaces[0])
    assert times_hashed(tmp_path) == 1
    workplaces.append(open_workplace(plan))
    read(workplaces[1])
    assert times_hashed(tmp_path) == 1


def test_a_blob_of_a_dead_process_whose_node_lives_on_is_not_hashed(
    plan: RunPlan, workplaces: list[Workplace], tmp_path: Path
) -> None:
    workplaces.append(open_workplace(plan))
    capture_in_a_process_that_dies(plan)
    read(workplaces[0])
    assert times_hashed(tmp_path) == 0


def test_two_processes_at_once_hash_a_blob_once(plan: RunPlan, tmp_path: Path) -> None:
    capture_in_a_process_that_dies(plan)
    barrier = SPAWN.Barrier(2)
    processes = [
        SPAWN.Process(target=read_at_once, args=(plan.to_json(), barrier)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_S)
        assert process.exitcode == 0
    assert times_hashed(tmp_path) == 1
    assert list((tmp_path / "cache").iterdir()) == [], "the last one out took the notes along"
