"""jobs/evaluate.py whole: vLLM's own server as a Ray actor, lm-evaluation-harness, and two small
tasks in its form.

The job runs in the main environment; the server and the harness in this one. The real tasks' data
sets can not be had here, and were not run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.clients.conftest import main_python
from tests.conftest import REPO, TINY

SERVE = [sys.executable, "-m", "tests.clients.serve_on_cpu", "serve"]
FLAGS = [
    *(
        "--dtype",
        "float32",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--compilation-config",
        '{"custom_ops": ["-rotary_embedding"]}',
    ),
    *("--max-model-len", "512", "--max-num-batched-tokens", "512", "--max-num-seqs", "4"),
]
FIGURES = {
    "base": {"source": "a paper that does not exist", "figures": {"endings": 80.0}},
    "baseline": {"source": "its reply", "figures": {"endings": 40.0, "words": 3.125}},
}
NUM_ENDINGS, NUM_WORDS, CHOICES, CONTEXT_WORDS, ENDING_WORDS = 24, 8, 4, 24, 8
ENDINGS = """
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/endings.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3.0}}
"""
WORDS = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{word}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, ignore_case: true}}]
filter_list:
  - name: first-word
    filter: [{{function: regex, regex_pattern: '(\\S+)'}}, {{function: take_first}}]
metadata: {{version: 1.0}}
"""
pytestmark = pytest.mark.timeout(1800)


def write_tasks(folder: Path) -> None:
    """Which of four endings is the held-out text's own, and which word comes next."""
    folder.mkdir()
    texts = [
        json.loads(line)["text"].split()
        for line in (TINY / "heldout.jsonl").read_text().splitlines()
    ]
    texts = [words for words in texts if len(words) >= CONTEXT_WORDS + ENDING_WORDS]
    endings, words = [], []
    for i, text in enumerate(texts[:NUM_ENDINGS]):
        others = [texts[(i + 5 * k) % len(texts)] for k in range(CHOICES)]
        found = [" ".join(other[CONTEXT_WORDS : CONTEXT_WORDS + ENDING_WORDS]) for other in others]
        right = i % CHOICES
        found[0], found[right] = found[right], found[0]
        context = " ".join(text[:CONTEXT_WORDS])
        endings.append({"context": context, "endings": found, "right": right})
        words.append({"context": context, "word": text[CONTEXT_WORDS]})
    for name, rows, form in (("endings", endings, ENDINGS), ("words", words[:NUM_WORDS], WORDS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(form.format(folder=folder))


@dataclass(frozen=True)
class Job:
    """A finished run, and the command that evaluates it."""

    root: Path
    command: list[str]
    log: Path

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        env = os.environ | {
            "PYTHONPATH": str(REPO),
            "HF_HOME": str(self.log.parent / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self.command, *more],
                cwd=REPO,
                env=env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, *more: str) -> tuple[int, str]:
        before = self.log.stat().st_size if self.log.exists() else 0
        code = self.start(*more).wait(timeout=800)
        return code, self.log.read_bytes()[before:].decode()

    def results(self) -> dict[str, Any]:
        return {
            path.parent.name: json.loads(path.read_text())
            for path in self.root.glob("benchmarks/*/result.json")
        }


@pytest.fixture(scope="module")
def job(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("evaluate")
    root = folder / "run"
    shutil.copytree(made / "run", root)
    write_tasks(folder / "tasks")
    for role, figures in FIGURES.items():
        (folder / f"{role}.yaml").write_text(yaml.safe_dump(figures))
    config = json.loads((root / "plan.json").read_text())["config"]
    config["benchmarks"] = {
        "base": {"title": "the source", "figures": str(folder / "base.yaml")},
        "baseline": {"figures": str(folder / "baseline.yaml")},
        "ours": {"flags": FLAGS},
        "tasks": [
            {"task": "endings", "title": "Endings", "shots": 1, "metric": "acc_norm"},
            {"task": "words", "shots": 1, "metric": "exact_match", "filter": "first-word"},
        ],
        "include_path": str(folder / "tasks"),
        "max_length": 512,
        "batch_size": 4,
        "concurrency": 4,
        "timeout_s": 120,
        "harness_python": sys.executable,
        "server": {"command": SERVE, "gpus": 0, "start_timeout_s": 300},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [
        main_python(),
        "jobs/evaluate.py",
        "--config",
        str(folder / "config.yaml"),
        "--run-root",
        str(root),
    ]
    return Job(root, command, folder / "log")


def servers(job: Job) -> list[psutil.Process]:
    """Living processes of servers of this test's checkpoints: the first of each, which has the
    checkpoint in its command."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "tests.clients.serve_on_cpu" in words and any(
            w.startswith(str(job.root.parent)) for w in words
        ):
            found.append(process)
    return found


def in_groups(groups: set[int]) -> list[int]:
    """Living processes of process groups, whatever they call themselves: an engine has its own
    name, and holds the memory."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) in groups and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def wait_for(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def test_killed_in_between_it_goes_on_where_it_was(job: Job) -> None:
    """Only the driver is killed, after the first figure: the server ends by itself, that figure is
    kept, and the second call asks for the other."""
    process = job.start()
    try:
        wait_for(lambda: job.results() or process.poll() is not None, 600)
        assert process.poll() is None, job.log.read_text()[-4000:]
        groups = {os.getpgid(server.pid) for server in servers(job)}
        assert len(in_groups(groups)) > 1, "the server and its engine"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not in_groups(groups), 90)
    before = {path: path.read_bytes() for path in job.root.glob("benchmarks/*/result.json")}
    assert len(before) == 1

    code, log = job.run()
    assert code == 0, log
    assert {path: path.read_bytes() for path in before} == before
    asked = [
        line
        for line in log.splitlines()
        if " % in " in line and re.search("(acc_norm|exact_match) ", line)
    ]
    assert len(asked) == 1, log
    assert len(job.results()) == 2
    assert not servers(job)


def test_table_has_the_harness_figures(job: Job) -> None:
    """Beside figures that are quoted; what has none is empty. The checkpoint must tell endings
    apart better than chance does."""
    table = json.loads((job.root / "report" / "report.json").read_text())["benchmarks"]
    base, baseline, ours = table["columns"]
    for role, column in (("base", base), ("baseline", baseline)):
        assert (column["values"], column["source"]) == (
            FIGURES[role]["figures"],
            FIGURES[role]["source"],
        )
    assert ours["servers"] == ["vllm 0.32.0"] and ours["harness"] == "0.4.13"
    raw = [json.loads(path.read_text()) for path in job.root.glob("benchmarks/*/harness.json")]
    assert {r["config"]["model_args"]["model"] for r in raw} == {str(job.root / "checkpoint")}
    figures = {task: values for r in raw for task, values in r["results"].items()}
    expected = {
        t: 100 * v[m]
        for t, v in figures.items()
        for m in v
        if m in ("acc_norm,none", "exact_match,first-word")
    }
    assert ours["values"] == pytest.approx(expected) and set(expected) == {"endings", "words"}
    assert {r["num_samples"] for r in job.results().values()} == {NUM_ENDINGS, NUM_WORDS}
    assert ours["values"]["endings"] > 2 * 100 / CHOICES
    card = (job.root / "checkpoint" / "README.md").read_text()
    recovery = 100 * ours["values"]["endings"] / 80
    row = f"| Endings | 1-shot acc_norm | 80.00 | 40.00 | {ours['values']['endings']:.2f} |"
    assert f"{row} {ours['values']['endings'] - 80:+.2f} | {recovery:.1f}% |" in card
    assert (
        f"| words | 1-shot exact_match (first-word) |  | 3.12 | {ours['values']['words']:.2f} | "
        " |  |" in card
    )
    assert (
        "a paper that does not exist" in card
        and "a paper that does not exist" in (job.root / "report" / "report.html").read_text()
    )


def test_finished_evaluation_starts_nothing(job: Job) -> None:
    """And with a server given that is not there, which it has no need to ask."""
    code, log = job.run("--server", "http://127.0.0.1:9")
    assert code == 0, log
    assert "2 of 2 tasks done already" in log and "server    " not in log
