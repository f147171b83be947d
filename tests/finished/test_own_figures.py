"""The evaluation results that the Hub is told beside the card."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResultEntry
from huggingface_hub._eval_results import parse_eval_result_entries

from p48ray.config.benchmarks import LEADERBOARD
from p48ray.finished.own_figures import EVAL_RESULTS_FILE, eval_results
from p48ray.run import run_root
from p48ray.run.benchmark_results import BenchmarkColumn, BenchmarkTable, identify
from p48ray.store import LocalStore
from tests.finished.publish_command import (
    REPO_NAME,
    checkpoint_files,
    invoke_publish,
    published,
)
from tests.servers.hub import Hub


def table_of(identity: str, limit: int | None = None) -> BenchmarkTable:
    values = {task.task: 50.0 for task in LEADERBOARD} | {"gsm8k": 61.234567}
    ours = BenchmarkColumn(
        role="ours",
        title="this checkpoint",
        identity=identity,
        harness="0.4.13",
        servers=("vllm 0.32.0",),
        values=values,
    )
    base = BenchmarkColumn(role="base", title="base", values=values)
    return BenchmarkTable(tasks=LEADERBOARD, columns=(base, ours), limit=limit)


def with_benchmarks(root: Path, limit: int | None = None) -> None:
    identity = identify(LocalStore(root / "checkpoint"))
    LocalStore(root).put(run_root.BENCHMARK_TABLE, table_of(identity, limit).to_json())


def test_hub_is_told_of_its_own_benchmarks_and_of_no_other(root: Path, hub: Hub) -> None:
    with_benchmarks(root)
    outcome = invoke_publish(root, hub)
    assert outcome.code == 0, outcome
    files = published(hub)
    told = parse_eval_result_entries(yaml.safe_load(files.pop(EVAL_RESULTS_FILE)))
    assert told == [
        EvalResultEntry(
            dataset_id="openai/gsm8k",
            task_id="gsm8k",
            value=61.2346,
            notes=("5-shot exact_match (strict-match), lm-evaluation-harness 0.4.13, vllm 0.32.0"),
        )
    ]
    assert files == checkpoint_files(root)
    assert invoke_publish(root, hub).code == 0 and len(hub.commits(REPO_NAME)) == 2


def test_figures_of_another_checkpoint_are_taken_away_in_the_same_commit(
    root: Path, hub: Hub
) -> None:
    """Others' results beside them are left alone."""
    with_benchmarks(root)
    assert invoke_publish(root, hub).code == 0
    theirs = {".eval_results/theirs.yaml": b"[]"}
    hub.commit(REPO_NAME, hub.files(REPO_NAME) | theirs)
    (root / run_root.BENCHMARK_TABLE).unlink()
    dry = invoke_publish(root, hub, "--dry-run")
    assert dry.out.count("to delete") == 1 and EVAL_RESULTS_FILE in dry.out
    assert invoke_publish(root, hub).code == 0
    assert published(hub) == checkpoint_files(root) | theirs


@pytest.mark.parametrize("case", ["trial", "another checkpoint"])
def test_hub_is_not_told_what_is_no_figure_of_this_checkpoint(
    root: Path, hub: Hub, case: str
) -> None:
    with_benchmarks(root, limit=10 if case == "trial" else None)
    if case == "another checkpoint":
        LocalStore(root).put(run_root.BENCHMARK_TABLE, table_of("0" * 64).to_json())
    assert invoke_publish(root, hub).code == 0
    assert EVAL_RESULTS_FILE not in published(hub)


def test_nothing_is_told_of_tasks_that_are_no_benchmark_of_the_hub() -> None:
    table = table_of("0" * 64)
    known = [t.model_copy(update={"hub_dataset": None, "hub_task": None}) for t in table.tasks]
    assert eval_results(table) and eval_results(None) is None
    assert eval_results(table.model_copy(update={"tasks": tuple(known)})) is None
