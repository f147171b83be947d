"""Serving clients, tested by an environment of their own (`make test-clients`); any other collects
nothing here."""

import os
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import REPO

HAS_VLLM = find_spec("vllm") is not None
collect_ignore = (
    []
    if HAS_VLLM
    else [
        "test_evaluate_job.py",
        "test_foreign.py",
        "test_ignore_lists.py",
        "test_smoke.py",
        "test_modelopt_layout.py",
        "test_modelopt_reader.py",
        "test_vllm.py",
        "test_vllm_families.py",
    ]
)

# vLLM reads these when it is imported. One process, so that tests can look into it; no compiler; no
# MLA, whose CPU code takes no float32.
if HAS_VLLM:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_MLA_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its twin, made by the main environment: that of P48RAY_PYTHON, or of `make
    setup`."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def made_families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same of a family's small random checkpoint, once a session."""
    return cache(lambda family: make(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="session")
def modelopt_checkpoint(made: Path) -> Path:
    """That checkpoint in ModelOpt's layout, by the command."""
    places = [str(made / "run" / "checkpoint"), str(made / "modelopt")]
    command = [main_python(), "-m", "p48ray.cli", "convert", *places, "--format", "modelopt"]
    subprocess.run(command, cwd=REPO, check=True)
    return made / "modelopt"


def main_python() -> str:
    return os.environ.get("P48RAY_PYTHON", str(REPO / ".venv" / "bin" / "python"))


def make(folder: Path, *family: str) -> Path:
    subprocess.run(
        [main_python(), "-m", "tests.clients.twin", str(folder), *family], cwd=REPO, check=True
    )
    return folder
