"""The finished run that these tests look at."""

import pytest

from tests.stages.small_run import SmallRun, finished_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return finished_run(tmp_path_factory.getbasetemp() / "small-run")
