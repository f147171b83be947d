"""A worker's memory is bounded: a layer of Kimi-K2.5's real width, more experts than would fit
decoded, a hard limit, both directions (docs/PERFORMANCE.md)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.capture import write_layer
from p48ray.checkpoint import skeleton
from tests.conftest import REPO

EXPERTS, SEQUENCES, LENGTH = 14, 2, 32
# decoded, in float32, which a CPU multiplies fastest
EXPERT_BYTES = 3 * skeleton.HIDDEN * skeleton.MOE_INTERMEDIATE * 4
# what enters the layer, and the gradient at what leaves it
TOKEN_BYTES = 2 * SEQUENCES * LENGTH * skeleton.HIDDEN * 4
# the packed layer is mapped, so that RLIMIT_DATA does not count it
LIMIT = EXPERT_BYTES + TOKEN_BYTES + 2 * 10**9

NO_MEMORY = ("can't allocate memory", "could not create a primitive")
"""What PyTorch's allocator says, and oneDNN, whichever asks first."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"),
        reason="RLIMIT_DATA counts all anonymous memory on Linux only",
    ),
]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """1.3 GB; pytest keeps the folders of three sessions, so the file goes with the test."""
    folder = tmp_path_factory.mktemp("layer")
    write_layer(folder, EXPERTS)
    yield folder
    (folder / "model.safetensors").unlink()


def run(layer: Path, direction: str, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        str(layer),
        direction,
        f"--sequences={SEQUENCES}",
        f"--length={LENGTH}",
        f"--limit={LIMIT}",
        *more,
    ]
    command = [sys.executable, "-m", "tests.bench.layer_under_limit", *arguments]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("direction", ["up", "back"])
def test_layer_of_real_width_runs_within_one_expert_its_tokens_and_two_gigabytes(
    layer: Path, direction: str
) -> None:
    found = run(layer, direction)
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)
    assert facts["experts_met"] == EXPERTS and facts["is_finite"]
    assert EXPERTS * EXPERT_BYTES > LIMIT > facts["peak_bytes"] > EXPERT_BYTES


@pytest.mark.parametrize("direction", ["up", "back"])
def test_keeping_decoded_experts_breaks_the_limit(layer: Path, direction: str) -> None:
    """The limit is one: with it in force, a process that lets no expert go can not end well."""
    found = run(layer, direction, "--leaky")
    assert found.returncode != 0
    assert any(words in found.stderr for words in NO_MEMORY), found.stderr
