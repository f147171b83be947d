"""One Ray for all tests of this folder, and the small job run once on each runner."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.conftest import REPO
from tests.jobs.command import arguments, invoke

# Every stage there is, the backward pass too. With sweeps and refinement Ray is held against one
# process in tests/stages/test_family_jobs.py.
ALL_STAGES = {"compression.output_curvature": "true", "compression.sweeps": "0"}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two CPUs, which the runners find and leave running."""
    with pytest.MonkeyPatch.context() as patch:
        # Workers import the workers that tests define. A runtime environment would do too, and make
        # Ray drop the processes it has at hand.
        patch.setenv("PYTHONPATH", str(REPO), prepend=os.pathsep)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


def run_to_end(root: Path, settings: dict[str, str], on_ray: bool) -> Path:
    outcome = invoke(*arguments(root, ALL_STAGES | settings), on_ray=on_ray)
    assert outcome.code == 0, outcome
    return root


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run root of the small job, done by LocalRunner. Not to be changed, as the others
    below."""
    return run_to_end(tmp_path_factory.mktemp("local") / "run", {}, on_ray=False)
