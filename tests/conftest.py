"""Fixtures shared by all tests: the small model, a configuration for it, and a run of it that many tests look at."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "examples" / "tiny-kimi-k2.5"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads; tests that compare bytes must not depend on the machine's."""
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session", autouse=True)
def no_network() -> None:
    """Nothing in the tests may ask a Hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
