"""The finished run that the stages' tests look at."""

import pytest

from tests.stages.small_run import SmallRun, finished_run
from tests.store.servers import aws_identity, seaweedfs

__all__ = ["aws_identity", "seaweedfs"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return finished_run(tmp_path_factory.getbasetemp() / "small-run")
