"""One Ray for all tests of this folder, and the small job run once on each runner."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.conftest import REPO
from tests.jobs.command import arguments, invoke

# Every stage there is, the way back down the layers too.
ALL_STAGES = {"compression.output_curvature": "true", "compression.refine_steps": "1"}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two CPUs, which the runners find and leave running."""
    path = {"env_vars": {"PYTHONPATH": str(REPO)}}  # workers import the workers that tests define
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False, runtime_env=path)
    yield
    ray.shutdown()


def finished(root: Path, settings: dict[str, str], on_ray: bool) -> Path:
    outcome = invoke(*arguments(root, ALL_STAGES | settings), on_ray=on_ray)
    assert outcome.code == 0, outcome
    return root


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run root of the small job, done by LocalRunner. Not to be changed, as the others below."""
    return finished(tmp_path_factory.mktemp("local") / "run", {}, on_ray=False)


@pytest.fixture(scope="session")
def one_worker_run(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Done by RayRunner with one worker."""
    return finished(tmp_path_factory.mktemp("one") / "run", {"run.num_workers": "1"}, on_ray=True)


@pytest.fixture(scope="session")
def two_worker_run(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Done by RayRunner with two workers."""
    return finished(tmp_path_factory.mktemp("two") / "run", {"run.num_workers": "2"}, on_ray=True)
