"""Fixtures shared by all tests: the small model, a configuration for it, and a run of it that many tests look at."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "examples" / "tiny-kimi-k2.5"


TIMES = re.compile(rb' "(seconds|write_seconds|finished_at)": [0-9.e+-]+,?\n')


def timeless(data: bytes) -> bytes:
    """A manifest without what the clock wrote into it; anything else as it is."""
    return TIMES.sub(b"", data) if data.startswith(b"{") else data


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
