"""The job's command as tests run it: inside this process with tasks in the same process, or as a
process of its own on Ray."""

import atexit
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import typer
from typer.testing import CliRunner

from jobs import compress
from p48ray.runner import ray_runner
from p48ray.runner.local_runner import LocalRunner
from tests.conftest import REPO, TINY, timeless
from tests.reference.narrow import write_narrow

CONFIG = REPO / "configs" / "tiny.yaml"

# A narrow sample model end to end in seconds: 256 calibration tokens in two parts, one sweep, no
# held-out text. All that the tests' numbers rest on is said here, whatever configs/tiny.yaml is set
# to.
SMALL = {
    "calibration.num_sequences": "4",
    "calibration.sequence_length": "64",
    "calibration.sequences_per_part": "2",
    "compression.sweeps": "1",
    "compression.code_sweeps": "0",
    "compression.refine_steps": "0",
    "compression.output_curvature": "false",
    "output.max_shard_size": "400KB",
    "run.experts_per_unit": "4",
    "run.num_workers": "2",
    "evaluation": "null",
}
ROUNDED = {"compression.solver": "round_to_nearest"}  # where the numbers do not matter
HELD_OUT = (
    "{documents: examples/tiny-kimi-k2.5/heldout.jsonl, num_sequences: 2, sequence_length: 64}"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the command ended."""

    code: int
    out: str
    err: str


def arguments(
    root: Path | str, settings: dict[str, str] | None = None, config: Path = CONFIG
) -> list[str]:
    """The command's arguments for the small run. settings: on top of `small()`, dotted key ->
    YAML."""
    chosen = small() | (settings or {})
    return [
        "--config",
        str(config),
        "--run-root",
        str(root),
        *(a for key, value in chosen.items() for a in ("--set", f"{key}={value}")),
    ]


def small() -> dict[str, str]:
    """The small run's settings, its source's folder among them."""
    return SMALL | {"source.checkpoint": str(narrow_model())}


@cache
def narrow_model() -> Path:
    """The narrow model's folder, made once a process. Not to be changed."""
    folder = Path(tempfile.mkdtemp(prefix="p48ray-narrow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_narrow(folder / "narrow")


def invoke(*args: str, on_ray: bool = False) -> Outcome:
    """The command in this process, from the command line on. Its tasks run in this process too, or
    on the Ray that a fixture has started."""
    app = typer.Typer(add_completion=False)
    app.command()(compress.main)
    local = mock.patch.object(
        ray_runner, "RayRunner", lambda plan, root, *_: nullcontext(LocalRunner(plan, root))
    )
    with nullcontext() if on_ray else local, chdir(REPO), own_logging():
        result = CliRunner().invoke(app, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@contextmanager
def own_logging() -> Iterator[None]:
    """The command points p48ray's log at the standard output it finds, which a test takes away
    again."""
    logger = logging.getLogger("p48ray")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def launch(
    *args: str, env: dict[str, str] | None = None, cwd: Path = REPO
) -> subprocess.Popen[str]:
    """The command as a person starts it: a process (and a process group) of its own."""
    return subprocess.Popen(
        [sys.executable, str(REPO / "jobs" / "compress.py"), *args],
        cwd=cwd,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_process(*args: str, env: dict[str, str] | None = None) -> Outcome:
    """`launch`, to its end."""
    process = launch(*args, env=env)
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file under a folder -> SHA-256 of its bytes, times left out; empty if there is no
    folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(timeless(path.read_bytes())).hexdigest()
        for path in files
    }


def copy_model(folder: Path, model: Path = TINY) -> Path:
    """A model without its texts, to be damaged."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.jsonl"))
    return folder


def attempts(root: Path) -> dict[str, bytes]:
    """Unit -> its manifest's bytes, which name the attempt that counts."""
    return {
        path.parent.name: path.read_bytes() for path in (root / "units").glob("*/manifest.json")
    }
