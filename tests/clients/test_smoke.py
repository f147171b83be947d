"""p48ray smoke against vLLM's own HTTP server on a CPU: a checkpoint as it was made, and a copy
whose scales are no numbers.

The command runs in the main environment, the servers in this one.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from p48ray.benchmarks.server_process import ServerProcess
from tests.clients.conftest import main_python
from tests.clients.test_evaluate_job import FLAGS, SERVE
from tests.conftest import REPO

pytestmark = pytest.mark.timeout(1800)
NUM_PROMPTS = 20


@pytest.fixture(scope="module")
def checkpoint(made: Path) -> Path:
    return made / "run" / "checkpoint"


@pytest.fixture(scope="module")
def broken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every global scale of the experts' down projections is NaN."""
    folder = tmp_path_factory.mktemp("smoke") / "broken"
    shutil.copytree(checkpoint, folder)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if name.endswith("down_proj.weight_global_scale"):
                tensor.fill_(float("nan"))
        save_file(tensors, path, metadata)
    return folder


def served(folder: Path) -> Iterator[str]:
    server = ServerProcess([*SERVE, str(folder), *FLAGS])
    try:
        deadline = time.monotonic() + 600
        while not (state := server.state()).is_healthy:
            assert state.code is None and time.monotonic() < deadline, state.last_lines
            time.sleep(0.5)
        yield server.url
    finally:
        server.end()


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO))
        yield from served(checkpoint)


@pytest.fixture(scope="module")
def broken_url(broken: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO))
        yield from served(broken)


def smoke(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [main_python(), "-m", "p48ray.cli", "smoke", *map(str, arguments)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)


def test_server_agrees_with_itself_to_the_last_digit(checkpoint: Path, url: str) -> None:
    """The small model's greedy answers loop: so do the reference's."""
    found = smoke(checkpoint, "--server", url, "--reference", url)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "greedy answers, as chats" in found.stdout
    assert " 0.0000 nats a token apart" in found.stdout
    assert f"{NUM_PROMPTS} texts; the same first choice at 100.0%" in found.stdout
    assert f"nothing looks broken in {NUM_PROMPTS} prompts" in found.stdout


def test_scales_that_are_no_numbers_are_seen(broken: Path, url: str, broken_url: str) -> None:
    """vLLM answers with nothing, and refuses to tell log-probabilities."""
    found = smoke(broken, "--server", broken_url, "--reference", url)
    assert found.returncode == 1, found.stdout + found.stderr
    assert f"{NUM_PROMPTS} of {NUM_PROMPTS} prompts look broken" in found.stdout
    assert found.stdout.count("empty; log-probabilities: HTTP 400: ") == NUM_PROMPTS


def test_checkpoint_of_another_server_is_refused(broken: Path, checkpoint: Path, url: str) -> None:
    found = smoke(broken, "--server", url)
    assert found.returncode == 2 and found.stdout == ""
    assert f"expected a server of '{broken}', it serves '{checkpoint}'" in found.stderr
