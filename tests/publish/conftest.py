"""A finished run root, made once, and a Hub to publish it on."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.command import ROUNDED, arguments, invoke
from tests.publish.hub_server import Hub


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with a finished run. Not to be changed."""
    root = tmp_path_factory.mktemp("to-publish") / "run"
    outcome = invoke(*arguments(root, ROUNDED))
    assert outcome.code == 0, outcome
    return root


@pytest.fixture
def root(finished_once: Path, tmp_path: Path) -> Path:
    """A copy of what publishing looks at."""
    for name in ("checkpoint", "verification"):
        shutil.copytree(finished_once / name, tmp_path / "run" / name)
    shutil.copy(finished_once / "plan.json", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Shards of the small model go up in one part or in two: the limit lies between their sizes."""
    server = Hub(tmp_path / "hub", part_bytes=1_500_000)
    yield server
    server.close()
