"""A finished run of the small job, made once."""

import shutil
from pathlib import Path

import pytest

from tests.jobs.command import arguments, invoke
from tests.servers.hub import hub  # noqa: F401 (a fixture)
from tests.servers.s3 import aws_identity, moto_server, seaweedfs  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with a finished run. Not to be changed."""
    root = tmp_path_factory.mktemp("finished") / "run"
    outcome = invoke(*arguments(root))
    assert outcome.code == 0, outcome
    return root


@pytest.fixture
def finished_run(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    root = tmp_path / "finished"
    shutil.copytree(finished_once, root)
    return root
