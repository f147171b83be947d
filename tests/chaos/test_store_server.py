"""The run root in a bucket: its server is killed and comes back on the same data, and everything
else that may die on the way."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.checks import assert_same_end
from tests.chaos.harness import Scene, kill_a_node, kill_a_worker, kill_the_driver
from tests.servers.s3 import BUCKET, SeaweedFS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# longer than a store that gives up early would bear, shorter than its ten attempts take
DOWN_S = (4.0, 8.0)


@pytest.fixture
def bucket_scene(scene: Scene, server: SeaweedFS) -> Scene:
    """A fresh prefix of the bucket."""
    scene.root, scene.endpoint_url = f"s3://{BUCKET}/chaos-{uuid.uuid4().hex}", server.endpoint_url
    scene.settings = {"run.root_is_shared": "false"}
    return scene


def kill_the_server(server: SeaweedFS) -> Callable[[Scene], int]:
    """For some seconds nobody answers at its address."""

    def strike(scene: Scene) -> int:
        num_writers = 1 + len(scene.site.busy_workers())
        server.kill()
        time.sleep(scene.rng.uniform(*DOWN_S))
        server.start()
        return num_writers

    return strike


def test_server_killed_in_compress(
    bucket_scene: Scene, server: SeaweedFS, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    bucket_scene.submit()
    bucket_scene.hit(
        "server", "compress", bucket_scene.rng.uniform(0, 0.5), kill_the_server(server)
    )
    assert_same_end(bucket_scene, undisturbed, tmp_path)


@pytest.mark.chaos_long
@pytest.mark.parametrize("stage", ["capture", "gradients", "reduce"])
def test_server_killed_in_other_stages(
    stage: str, bucket_scene: Scene, server: SeaweedFS, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    bucket_scene.submit()
    bucket_scene.hit("server", stage, bucket_scene.rng.uniform(0, 0.4), kill_the_server(server))
    assert_same_end(bucket_scene, undisturbed, tmp_path)


@pytest.mark.chaos_long
def test_all_kinds_of_processes_killed(
    bucket_scene: Scene, server: SeaweedFS, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    scene = bucket_scene
    scene.submit()
    scene.hit("worker", "capture", scene.rng.uniform(0, 0.4), kill_a_worker)
    scene.hit("driver", "gradients", scene.rng.uniform(0, 0.4), kill_the_driver)
    scene.hit("node", "compress", scene.rng.uniform(0, 0.2), kill_a_node)
    scene.hit("server", "compress", scene.rng.uniform(0.3, 0.5), kill_the_server(server))
    scene.hit("driver", "compress", scene.rng.uniform(0.6, 0.8), kill_the_driver)
    assert_same_end(scene, undisturbed, tmp_path)
