"""Workers, nodes, drivers and the store's server are killed in the middle of each stage: the run
ends with the bytes of one that nothing happened to."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.checks import assert_same_end, failures
from tests.chaos.harness import (
    DELETING,
    Scene,
    Site,
    corrupt_a_unit,
    freeze_a_node,
    kill_a_node,
    kill_a_worker,
    kill_a_writer,
    kill_all_workers,
    kill_the_driver,
    launch_slow,
    stop_the_driver,
    thaw,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STREAMING = ["capture", "gradients", "compress"]


def test_workers_and_a_node_killed_and_a_shard_corrupted(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    damaged: list[str] = []
    scene.submit()
    scene.hit("worker", "capture", scene.rng.uniform(0, 0.5), kill_a_worker)
    scene.hit("worker", "gradients", scene.rng.uniform(0, 0.5), kill_a_worker)
    # first what takes no time: while a new node comes up, the other may solve all units
    scene.hit("bit flip", "compress", scene.rng.uniform(0, 0.2), corrupt_a_unit(damaged))
    scene.hit("node", "compress", scene.rng.uniform(0.2, 0.5), kill_a_node)
    assert_same_end(scene, undisturbed, tmp_path, redone=damaged)
    assert "made anew" in scene.logs
    # preemption is nobody's fault
    assert "compress" not in [failure.stage for failure in failures(scene.store)]
    assert "its node is gone, it goes to another" in scene.logs


def test_workers_killed_while_they_write(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    scene.settings, scene.start = DELETING, launch_slow(0.3, log)
    scene.submit()
    scene.hit(
        "writer", "capture", scene.rng.uniform(0, 0.5), kill_a_writer("activations", "residuals")
    )
    scene.hit(
        "writer",
        "gradients",
        scene.rng.uniform(0, 0.5),
        kill_a_writer("gradients", "residual-gradients"),
    )
    assert_same_end(scene, undisturbed, tmp_path)
    deleted = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["deleted"].split("/")[0] for line in deleted} == {
        "residuals",
        "residual-gradients",
    }
    assert all(line["is_replaced"] for line in deleted), deleted


@pytest.mark.chaos_long
def test_workers_killed_in_every_stage(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    scene.submit()
    for stage in STREAMING:
        scene.hit("worker", stage, scene.rng.uniform(0, 0.5), kill_a_worker)
    assert_same_end(scene, undisturbed, tmp_path)
    assert len(failures(scene.store)) <= 3


@pytest.mark.chaos_long
@pytest.mark.parametrize("stage", STREAMING)
def test_all_workers_killed_at_once(
    stage: str, scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    scene.submit()
    scene.hit("all workers", stage, scene.rng.uniform(0, 0.6), kill_all_workers)
    assert_same_end(scene, undisturbed, tmp_path)


@pytest.fixture
def slow_to_notice(aws_identity: None, scene: Scene) -> Iterator[None]:
    """A cluster of its own, with Ray's default health checks: for some fifteen seconds a node that
    is gone looks as if it were there."""
    shared, scene.site = scene.site, Site({})
    yield
    for driver in scene.drivers:
        driver.finish()
    scene.site.close()
    scene.site = shared


@pytest.mark.chaos_long
@pytest.mark.usefixtures("slow_to_notice")
def test_node_lost_before_ray_knows_is_no_failed_attempt(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    scene.settings = {"run.max_attempts": "1"}
    scene.submit()
    scene.hit("node", "compress", scene.rng.uniform(0, 0.5), kill_a_node)
    assert_same_end(scene, undisturbed, tmp_path)
    assert [failure.task for failure in failures(scene.store)] == []


@pytest.mark.chaos_long
@pytest.mark.parametrize("stage", STREAMING)
def test_node_frozen_and_back_when_the_run_is_over(
    stage: str, scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    scene.submit()
    scene.hit("frozen node", stage, scene.rng.uniform(0, 0.4), freeze_a_node)
    assert scene.finish() == 0, (scene.driver.out, scene.driver.err)
    thaw(scene)
    scene.submit()  # what the frozen did at the end may be theirs alone to know
    assert_same_end(scene, undisturbed, tmp_path)


@pytest.mark.chaos_long
@pytest.mark.parametrize("keep", ["units", "checkpoint"])
def test_driver_killed_while_data_is_deleted(
    keep: str, scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    scene.settings = {"run.keep": keep}
    scene.submit()
    for stage in ("capture", "gradients", "compress", "compress"):
        scene.hit(
            "driver",
            stage,
            0.4 * (stage in {hit.stage for hit in scene.hits}) + scene.rng.uniform(0, 0.3),
            kill_the_driver,
        )
    assert_same_end(scene, undisturbed, tmp_path)


@pytest.mark.chaos_long
def test_nodes_killed_in_every_stage(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    scene.submit()
    for stage in STREAMING:
        scene.hit("node", stage, scene.rng.uniform(0, 0.5), kill_a_node)
    assert_same_end(scene, undisturbed, tmp_path)
    assert [failure.task for failure in failures(scene.store)] == []


def test_driver_killed_in_gradients_and_compress(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    scene.submit()
    for stage in ("gradients", "compress"):
        scene.hit("driver", stage, scene.rng.uniform(0, 0.6), kill_the_driver)
    assert_same_end(scene, undisturbed, tmp_path)


def test_driver_asked_to_end_says_how_to_go_on(
    scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """SIGTERM, as a job system sends it before it takes a machine."""
    first = scene.submit()
    scene.hit("driver", "compress", scene.rng.uniform(0, 0.6), stop_the_driver)
    assert first.finish() == 128 + signal.SIGTERM
    assert first.err.splitlines()[-1].startswith(
        "stopped by SIGTERM; what is done stays. Resume with: python"
    )
    assert_same_end(scene, undisturbed, tmp_path)


@pytest.mark.chaos_long
@pytest.mark.parametrize(
    "stages", [("capture", "capture", "compress", "compress"), ("reduce", "verify")], ids="+".join
)
def test_driver_killed_again_and_again(
    stages: tuple[str, ...], scene: Scene, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    scene.submit()
    for nth, stage in enumerate(stages):
        scene.hit("driver", stage, min(1.0, 0.3 * nth + scene.rng.uniform(0, 0.2)), kill_the_driver)
    assert_same_end(scene, undisturbed, tmp_path)
