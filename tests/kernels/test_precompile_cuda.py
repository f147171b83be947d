"""On a GPU: after p48ray.kernels.precompile a process compiles nothing of what a run launches."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from p48ray.kernels.precompile import Launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REPO = Path(__file__).resolve().parents[2]
ODD, SMALL, KIMI = (224, 96), (512, 256), (7168, 2048)


def ran(cache: Path, *arguments: str) -> float:
    """Seconds that a fresh interpreter took, which writes Triton's cache there."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(REPO)}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(
        done.stdout,
        done.stderr,
        f"{arguments[0]}: {time.monotonic() - start:.1f} s with the interpreter's start",
        sep="\n",
    )
    assert done.returncode == 0, done.stderr
    return time.monotonic() - start


def cached(folder: Path) -> set[str]:
    """Kernels' code and launchers; the key of each is the name of its folder."""
    return {
        str(path.relative_to(folder))
        for pattern in ("*.cubin", "*.so")
        for path in folder.rglob(pattern)
    }


@pytest.mark.parametrize(("hidden", "intermediate"), [ODD, SMALL, KIMI])
def test_run_compiles_nothing_that_was_not_compiled_ahead(
    hidden: int, intermediate: int, tmp_path: Path
) -> None:
    wanted = Launches(
        hidden=hidden,
        intermediate=intermediate,
        descends=True,
        two_sided=True,
        refines=True,
        int4_group=32,
        streams=True,
    )
    major, minor = torch.cuda.get_device_capability()
    ran(
        tmp_path,
        "p48ray.kernels.precompile",
        "--arch",
        str(10 * major + minor),
        *wanted.arguments(),
    )
    before = cached(tmp_path)
    ran(tmp_path, "tests.kernels.real_calls", str(hidden), str(intermediate))
    assert cached(tmp_path) - before == set()
    print(f"{len(before)} objects in the cache")
