"""A finished run root, made once, and a Hub to publish it on."""

import shutil
from pathlib import Path

import pytest

from tests.jobs.command import ROUNDED, arguments, invoke
from tests.servers.hub import hub  # noqa: F401 (a fixture)


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with a finished run. Not to be changed."""
    root = tmp_path_factory.mktemp("to-publish") / "run"
    outcome = invoke(*arguments(root, ROUNDED))
    assert outcome.code == 0, outcome
    return root


@pytest.fixture(scope="session")
def finished_sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with output.storage: sparse."""
    root = tmp_path_factory.mktemp("to-publish-sparse") / "run"
    outcome = invoke(*arguments(root, ROUNDED | {"output.storage": "sparse"}))
    assert outcome.code == 0, outcome
    return root


def copied(finished: Path, root: Path) -> Path:
    """A copy of what publishing looks at."""
    for name in ("checkpoint", "verification"):
        shutil.copytree(finished / name, root / name)
    shutil.copy(finished / "plan.json", root)
    return root


@pytest.fixture
def root(finished_once: Path, tmp_path: Path) -> Path:
    return copied(finished_once, tmp_path / "run")


@pytest.fixture
def sparse_root(finished_sparse: Path, tmp_path: Path) -> Path:
    return copied(finished_sparse, tmp_path / "run")
