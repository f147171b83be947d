"""jobs/evaluate.py from the command line on: a real server process without a model, and a harness
that plays back what the real one has written.

tests/clients has the same job with a model behind it and the harness itself.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from jobs import evaluate
from p48ray.benchmarks import harness
from p48ray.benchmarks.server_process import ServerProcess
from p48ray.config.load import assign, read_yaml
from p48ray.run.run_root import BENCHMARK_TABLE
from tests.conftest import REPO
from tests.jobs.command import CONFIG, Outcome, own_logging, small
from tests.run.recorded_harness import SINGLE

pytestmark = pytest.mark.slow

PLAYER = """#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
if sys.argv[1] == "-c":
    print((folder / "version").read_text())
    sys.exit()
options = dict(zip(sys.argv[4:], sys.argv[5:]))
task = options["--tasks"]
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
recorded = folder / (task + ".json")
if not recorded.exists():
    print("requests failed for", task)
    sys.exit(1)
to = pathlib.Path(options["--output_path"]) / "model"
to.mkdir(parents=True)
(to / "results_2026-01-01.json").write_text(recorded.read_text())
"""


@dataclass(frozen=True)
class Workshop:
    """A finished run, its configuration, and a harness that plays back; `tasks` are those that it
    can."""

    root: Path
    folder: Path
    config: Path

    @property
    def calls(self) -> list[list[str]]:
        log = self.folder / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def asked(self) -> list[str]:
        return [call[call.index("--tasks") + 1] for call in self.calls]

    def record(self, task: str, value: float, **changes: object) -> None:
        output = copy.deepcopy(SINGLE) | changes
        output["results"] = {task: output["results"]["endings"] | {"acc_norm,none": value}}
        for key in ("versions", "n-shot", "n-samples"):
            output[key] = {task: output[key]["endings"]}
        (self.folder / f"{task}.json").write_text(json.dumps(output))

    def configure(self, **benchmarks: object) -> None:
        tree = yaml.safe_load(self.config.read_text())
        tree["benchmarks"] |= benchmarks
        self.config.write_text(yaml.safe_dump(tree))

    def evaluate(self, *more: str) -> Outcome:
        app = typer.Typer(add_completion=False)
        app.command()(evaluate.main)
        with chdir(REPO), own_logging():
            result = CliRunner().invoke(
                app, ["--config", str(self.config), "--run-root", str(self.root), *more]
            )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    def column(self, role: str) -> dict[str, Any]:
        report = json.loads((self.root / "report" / "report.json").read_text())
        return next(c for c in report["benchmarks"]["columns"] if c["role"] == role)


@pytest.fixture
def workshop(finished_run: Path, tmp_path: Path) -> Workshop:
    folder = tmp_path / "harness"
    folder.mkdir()
    (folder / "version").write_text("0.4.13")
    player = folder / "python"
    player.write_text(PLAYER.format(python=sys.executable, folder=str(folder)))
    player.chmod(0o755)
    tree = read_yaml(CONFIG)
    for key, value in small().items():
        assign(tree, key, yaml.safe_load(value))
    tasks = [
        {"task": task, "shots": 1, "metric": "acc_norm"} for task in ("first", "second", "third")
    ]
    tree["benchmarks"] = {
        "tasks": tasks,
        "harness_python": str(player),
        "max_length": 2048,
        "server": {"gpus": 0},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    found = Workshop(finished_run, folder, config)
    for i, task in enumerate(("first", "second", "third")):
        found.record(task, 0.25 * (i + 1))
    return found


@pytest.fixture
def server(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerProcess]:
    """Of the run's checkpoint, by its folder."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    started = ServerProcess(
        [sys.executable, "-m", "tests.benchmarks.small_server", str(workshop.root / "checkpoint")]
    )
    try:
        while not started.state().is_healthy:
            assert started.process.poll() is None, started.last_lines()
        yield started
    finally:
        started.end()


def test_every_task_is_asked_of_the_server_and_lands_where_people_read(
    workshop: Workshop, server: ServerProcess
) -> None:
    outcome = workshop.evaluate("--server", f"{server.url}/")
    assert outcome.code == 0, outcome
    assert workshop.asked == ["first", "second", "third"]
    call = workshop.calls[0]
    assert call[:4] == ["-m", "lm_eval", "run", "--model"]
    for words in (
        f"model={workshop.root}/checkpoint",
        f"base_url={server.url}/v1/completions",
        f"tokenizer={workshop.root}/checkpoint",
        "num_concurrent=32",
        "max_length=2048",
        "timeout=1200",
    ):
        assert words in call
    assert (
        call[call.index("--num_fewshot") + 1] == "1"
        and "--limit" not in call
        and "trust_remote_code=True" not in call
    )
    ours = workshop.column("ours")
    assert ours["values"] == {"first": 25.0, "second": 50.0, "third": 75.0}
    assert (ours["servers"], ours["harness"]) == (["small 1.5"], "0.4.13")
    assert (
        "| average | of 3 of 3 tasks |  |  | 50.00 |  |  |"
        in (workshop.root / "checkpoint" / "README.md").read_text()
    )
    assert "Benchmarks" in (workshop.root / "report" / "report.html").read_text()
    assert "50.00" in outcome.out


def test_what_failed_is_named_and_alone_is_asked_again(
    workshop: Workshop, server: ServerProcess
) -> None:
    (workshop.folder / "second.json").unlink()
    outcome = workshop.evaluate("--server", server.url)
    assert outcome.code == 1
    assert "1 failures; run the same command again to go on" in outcome.err
    assert (
        "this checkpoint: second: second: lm-evaluation-harness ended with code 1 and 0"
        " results:\nrequests failed for second" in outcome.err
    )
    assert workshop.column("ours")["values"] == {"first": 25.0, "third": 75.0}
    workshop.record("second", 0.5)
    assert workshop.evaluate("--server", server.url).code == 0
    assert workshop.asked == ["first", "second", "third", "second"]
    assert workshop.column("ours")["values"] == {"first": 25.0, "second": 50.0, "third": 75.0}


def test_long_task_says_how_far_it_is(
    workshop: Workshop, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "REPORT_EVERY_S", 0.2)
    player = workshop.folder / "python"
    bar = 'import time; print("  1/9\\r  4/9", end="", flush=True); time.sleep(1); task'
    player.write_text(player.read_text().replace("\ntask = options", f"\n{bar} = options"))
    outcome = workshop.evaluate("--server", server.url)
    assert outcome.code == 0, outcome
    assert "evaluate  first:   4/9" in outcome.out or "evaluate  first: 4/9" in outcome.out


def test_another_setting_or_checkpoint_is_asked_anew(
    workshop: Workshop, server: ServerProcess
) -> None:
    assert workshop.evaluate("--server", server.url).code == 0
    assert workshop.evaluate("--server", server.url, "--set", "benchmarks.limit=5").code == 0
    assert workshop.asked == ["first", "second", "third"] * 2
    assert workshop.calls[-1][workshop.calls[-1].index("--limit") + 1] == "5"
    manifest = workshop.root / "checkpoint" / "p48ray.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    assert workshop.evaluate("--server", server.url, "--set", "benchmarks.limit=5").code == 0
    assert len(workshop.asked) == 9


def test_server_of_something_else_is_refused(
    workshop: Workshop, server: ServerProcess, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (other / name).write_text("{}")
    workshop.configure(baseline={"checkpoint": str(other)})
    outcome = workshop.evaluate("--server", server.url, "--checkpoint", "baseline")
    assert outcome.code == 2
    assert (
        f"expected a server of '{other}', it serves '{workshop.root}/checkpoint' from"
        f" '{workshop.root}/checkpoint'" in outcome.err
    )
    assert "benchmarks.baseline.served_name" in outcome.err
    assert workshop.asked == [] and not (workshop.root / BENCHMARK_TABLE).exists()


def test_column_that_is_out_of_reach_keeps_its_figures(
    workshop: Workshop, server: ServerProcess, tmp_path: Path
) -> None:
    """Measured on one machine, shown by another; a column that was never measured and is not there
    is refused only when it is asked for."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (other / name).write_text("{}")
    workshop.configure(
        baseline={"checkpoint": str(other), "served_name": f"{workshop.root}/checkpoint"}
    )
    assert workshop.evaluate("--server", server.url, "--checkpoint", "baseline").code == 0
    other.rename(tmp_path / "elsewhere")
    workshop.configure(base={"checkpoint": str(tmp_path / "never")})
    assert workshop.evaluate("--server", server.url).code == 0
    assert (
        workshop.column("baseline")["values"]
        == workshop.column("ours")["values"]
        == {
            "first": 25.0,
            "second": 50.0,
            "third": 75.0,
        }
    )
    assert workshop.column("base")["values"] == {}
    workshop.configure(baseline={"checkpoint": str(tmp_path / "another")})
    assert workshop.evaluate("--server", server.url).code == 0
    assert workshop.column("baseline")["values"] == {}
    outcome = workshop.evaluate("--server", server.url, "--checkpoint", "base")
    assert outcome.code == 2
    assert f"{tmp_path}/never: expected a checkpoint" in outcome.err


def test_servers_own_name_for_the_checkpoint_is_taken(
    workshop: Workshop, server: ServerProcess, tmp_path: Path
) -> None:
    """As of a server that has a copy of the checkpoint elsewhere; here it is the other way
    round."""
    moved = tmp_path / "moved"
    (workshop.root / "checkpoint").rename(moved)
    (workshop.root / "checkpoint").symlink_to(moved)
    workshop.configure(
        ours={"checkpoint": str(moved), "served_name": f"{workshop.root}/checkpoint"}
    )
    outcome = workshop.evaluate("--server", server.url)
    assert outcome.code == 0, outcome
    assert (
        f"model={workshop.root}/checkpoint" in workshop.calls[0]
        and f"tokenizer={moved}" in workshop.calls[0]
    )


def test_figures_of_another_checkpoint_than_the_runs_are_in_neither_card_nor_report(
    workshop: Workshop, server: ServerProcess, tmp_path: Path
) -> None:
    """As of its sparse storage: the same p48ray.json, another config.json."""
    other = tmp_path / "sparse"
    other.mkdir()
    (other / "p48ray.json").write_bytes((workshop.root / "checkpoint" / "p48ray.json").read_bytes())
    (other / "config.json").write_text("{}")
    before = (workshop.root / "checkpoint" / "README.md").read_bytes()
    workshop.configure(
        ours={"checkpoint": str(other), "served_name": f"{workshop.root}/checkpoint"}
    )
    outcome = workshop.evaluate("--server", server.url)
    assert outcome.code == 0, outcome
    assert "its report and card stay as they are" in outcome.out and "50.00" in outcome.out
    assert (workshop.root / "checkpoint" / "README.md").read_bytes() == before
    assert json.loads((workshop.root / "report" / "report.json").read_text())["benchmarks"] is None


def test_requests_longer_than_the_server_takes_are_refused(
    workshop: Workshop, server: ServerProcess
) -> None:
    outcome = workshop.evaluate("--server", server.url, "--set", "benchmarks.max_length=8192")
    assert outcome.code == 2
    assert (
        "benchmarks.max_length: expected at most the server's 4096 tokens, found 8192"
        in outcome.err
    )


def test_harness_of_another_version_is_refused(workshop: Workshop) -> None:
    (workshop.folder / "version").write_text("0.4.9")
    outcome = workshop.evaluate("--server", "http://127.0.0.1:9")
    assert outcome.code == 2
    assert "expected lm-evaluation-harness 0.4.13, found 0.4.9; " in outcome.err
    assert "-m pip install 'lm_eval[api]==0.4.13'" in outcome.err


def test_server_that_is_not_there_is_refused(workshop: Workshop) -> None:
    outcome = workshop.evaluate("--server", "http://127.0.0.1:9")
    assert outcome.code == 2
    assert "http://127.0.0.1:9/v1/models: expected the list of models" in outcome.err


def test_figures_of_the_base_stand_beside_with_their_source(
    workshop: Workshop, server: ServerProcess, tmp_path: Path
) -> None:
    figures = tmp_path / "figures.yaml"
    figures.write_text("source: a paper\nfigures: {first: 50, second: 100}\n")
    workshop.configure(base={"figures": str(figures)})
    assert workshop.evaluate("--server", server.url).code == 0
    card = (workshop.root / "checkpoint" / "README.md").read_text()
    assert "| first | 1-shot acc_norm | 50.00 |  | 25.00 | -25.00 | 50.0% |" in card
    assert "| average | of 2 of 3 tasks | 75.00 |  | 37.50 | -37.50 | 50.0% |" in card
    assert "Base: published figures, not measured here: a paper." in card
    outcome = workshop.evaluate("--checkpoint", "base")
    assert outcome.code == 2
    assert "--checkpoint base: expected a checkpoint under benchmarks.base" in outcome.err


def test_dry_run_prints_the_servers_command_and_touches_nothing(workshop: Workshop) -> None:
    before = {path: path.read_bytes() for path in workshop.root.rglob("*") if path.is_file()}
    outcome = workshop.evaluate("--dry-run")
    assert outcome.code == 0, outcome
    assert (
        f"server: vllm serve {workshop.root}/checkpoint --tensor-parallel-size 1"
        " --mm-encoder-tp-mode data --trust-remote-code --tool-call-parser kimi_k2"
        " --reasoning-parser kimi_k2 --moe-backend flashinfer_trtllm" in outcome.out
    )
    assert (
        "to measure: first (1-shot acc_norm), second (1-shot acc_norm), third (1-shot acc_norm)"
        in outcome.out
    )
    assert {
        path: path.read_bytes() for path in workshop.root.rglob("*") if path.is_file()
    } == before
    assert workshop.calls == []


def test_base_on_the_hub_would_be_served_by_its_name_and_revision(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its identity is asked of the Hub, which is not there."""
    monkeypatch.setattr("p48ray.benchmarks.job.identify", lambda store: f"identity of {store.uri}")
    workshop.configure(base={"checkpoint": "hf://owner/name@0123abc"})
    outcome = workshop.evaluate(
        "--dry-run", "--checkpoint", "base", "--set", "benchmarks.server.gpus=8"
    )
    assert "vllm serve owner/name --revision 0123abc --tensor-parallel-size 8" in outcome.out
    assert "--moe-backend" not in outcome.out


def test_checkpoint_in_a_bucket_needs_a_server_that_is_given(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p48ray.benchmarks.job.identify", lambda store: f"identity of {store.uri}")
    workshop.configure(ours={"checkpoint": "s3://bucket/checkpoint"})
    outcome = workshop.evaluate()
    assert outcome.code == 2
    assert (
        "benchmarks.ours.checkpoint: s3://bucket/checkpoint: expected a folder or"
        " hf://owner/name@revision" in outcome.err
    )
    outcome = workshop.evaluate("--server", "http://127.0.0.1:9")
    assert outcome.code == 2
    assert "benchmarks.tokenizer: expected a folder" in outcome.err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "report" / "report.json").unlink(), "expected a finished run in"),
        (
            lambda root: (root / "plan.json").write_text(
                (root / "plan.json").read_text().replace('"name": "tiny', '"name": "other')
            ),
            "found 'other-",
        ),
    ],
)
def test_run_root_that_is_not_this_finished_run_is_refused(
    workshop: Workshop, damage: Any, words: str
) -> None:
    damage(workshop.root)
    outcome = workshop.evaluate()
    assert outcome.code == 2
    assert words in outcome.err


def test_help_is_that_of_a_command(workshop: Workshop) -> None:
    """As a person starts it: a process of its own."""
    shown = subprocess.run(
        [sys.executable, "jobs/evaluate.py", "--help"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(option in shown.stdout for option in ("--checkpoint", "--server", "--dry-run"))
