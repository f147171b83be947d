"""lm-evaluation-harness as a process: one task against one server, its own results as they are.

A process a task, because the harness may need another Python than ours, and what it has finished
must not go with what fails later.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p48ray.benchmarks.server_process import SHOWN_LINES, tail
from p48ray.config.benchmarks import BenchmarksConfig, BenchmarkTask
from p48ray.errors import ConfigError, StageFailedError
from p48ray.run.benchmark_results import HARNESS_VERSION

log = logging.getLogger("p48ray.progress")

REPORT_EVERY_S = 60.0
VERSION_TIMEOUT_S = 120
REQUEST_ATTEMPTS = 5
VERSION_CODE = "import importlib.metadata as m; print(m.version('lm_eval'))"


@dataclass(frozen=True, slots=True)
class Harness:
    """The harness with what is the same for all tasks of one checkpoint.

    Args:
        url: base URL of the server.
        model: the id under which it serves the checkpoint.
        tokenizer: folder or owner/name;
        revision: of the latter.
    """

    config: BenchmarksConfig
    url: str
    model: str
    tokenizer: str
    revision: str | None
    trust_remote_code: bool

    def command(self, task: BenchmarkTask, output: str) -> list[str]:
        c = self.config
        arguments: dict[str, object] = {
            "model": self.model,
            "base_url": f"{self.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": self.tokenizer,
            **({"revision": self.revision} if self.revision else {}),
            **({"trust_remote_code": True} if self.trust_remote_code else {}),
            "num_concurrent": c.concurrency,
            "max_length": c.max_length,
            "max_retries": REQUEST_ATTEMPTS,
            "timeout": c.timeout_s,
        }
        return [
            *(c.harness_python or sys.executable, "-m", "lm_eval", "run"),
            *(
                "--model",
                "local-completions",
                "--model_args",
                *(f"{name}={value}" for name, value in arguments.items()),
            ),
            *(
                "--tasks",
                task.task,
                "--num_fewshot",
                str(task.shots),
                "--batch_size",
                str(c.batch_size),
            ),
            *(
                ("--include_path", str(Path(c.include_path).expanduser().resolve()))
                if c.include_path
                else ()
            ),
            *(("--limit", str(c.limit)) if c.limit else ()),
            *("--output_path", output),
        ]

    def run(self, task: BenchmarkTask) -> dict[str, Any]:
        """The harness's results of a task; now and then a line of how far it is. Raises:
        StageFailedError with its last lines."""
        with tempfile.TemporaryDirectory(prefix="p48ray-harness-") as folder:
            output, printed = f"{folder}/output", f"{folder}/log"
            code = follow(self.command(task, output), printed, task.label)
            found = sorted(Path(output).rglob("results_*.json"))
            if code or len(found) != 1:
                last = "\n".join(tail(printed).splitlines()[-SHOWN_LINES:])
                raise StageFailedError(
                    f"{task.task}: lm-evaluation-harness ended with code {code} and {len(found)}"
                    f" results:\n{last}"
                )
            results: dict[str, Any] = json.loads(found[0].read_bytes())
            return results


def follow(command: Sequence[str], printed: str, label: str) -> int:
    """Run a command to its end, its output in the file `printed`; returns its exit code. It does
    not outlive this process."""
    with (
        open(printed, "wb") as out,
        subprocess.Popen(
            [sys.executable, "-m", "p48ray.benchmarks.process_group", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        ) as process,
    ):
        try:
            while True:
                try:
                    return process.wait(REPORT_EVERY_S)
                except subprocess.TimeoutExpired:
                    log.info(
                        "evaluate  %s: %s", label, (tail(printed).splitlines() or [""])[-1][:160]
                    )
        finally:
            process.terminate()  # it takes the harness along


def check_harness(config: BenchmarksConfig) -> None:
    """Raises: ConfigError unless the configured Python has the harness at the pinned version."""
    python = config.harness_python or sys.executable
    key = f"benchmarks.harness_python: {python}"
    try:
        done = subprocess.run(
            [python, "-c", VERSION_CODE],
            capture_output=True,
            text=True,
            check=False,
            timeout=VERSION_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{key}: can not be run: {error}") from error
    found = done.stdout.strip()
    if found != HARNESS_VERSION:
        raise ConfigError(
            f"{key}: expected lm-evaluation-harness {HARNESS_VERSION}, found {found or 'none'}; "
            f"{python} -m pip install 'lm_eval[api]=={HARNESS_VERSION}'"
        )
