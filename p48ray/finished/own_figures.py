"""What the run has measured of the checkpoint that is published, and what the Hub is told of it.

The Hub shows evaluation results of `.eval_results/*.yaml`, each under the benchmark's own data set.
They are made anew from the table of benchmarks whenever a checkpoint is published, as the card is
from the run: a file of that name in the folder would be anybody's. Of the run's own evaluation (KL,
perplexity) the Hub has no benchmark, so it stays in the card.
"""

from dataclasses import dataclass

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from p48ray.report.report import Report
from p48ray.run import run_root
from p48ray.run.benchmark_results import BenchmarkTable, identify
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.stages.evaluate import EvaluationResult
from p48ray.store.base import Store

EVAL_RESULTS_FILE = ".eval_results/p48ray.yaml"


@dataclass(frozen=True, slots=True)
class OwnFigures:
    """quality: on held-out text. table: of benchmarks. None where nothing was measured."""

    quality: EvaluationResult | None = None
    table: BenchmarkTable | None = None


def read_own_figures(root: Store, checkpoint: Store, manifest: CheckpointManifest) -> OwnFigures:
    """Figures of this checkpoint, and of no other that the run root may have had. Benchmarks are of
    one storage, since servers quantize activations otherwise in the other.

    Args:
        root: the run root.
        checkpoint, manifest: what is published.
    """
    quality = table = None
    if root.head(run_root.REPORT) is not None:
        report = Report.load(root, run_root.REPORT)
        quality = report.quality if report.plan_digest == manifest.plan_digest else None
    if root.head(run_root.BENCHMARK_TABLE) is not None:
        found = BenchmarkTable.load(root, run_root.BENCHMARK_TABLE)
        ours = found.column("ours")
        table = found if ours and ours.identity == identify(checkpoint) else None
    return OwnFigures(quality, table)


def eval_results(table: BenchmarkTable | None) -> bytes | None:
    """EVAL_RESULTS_FILE, in per cent as the card has them; None where there is nothing to tell: no
    benchmark of the Hub was run, or only a few documents of each."""
    ours = table.column("ours") if table else None
    if table is None or ours is None or table.limit is not None:
        return None
    entries = [
        EvalResultEntry(
            dataset_id=task.hub_dataset,
            task_id=task.hub_task,
            value=round(ours.values[task.task], 4),
            notes=(
                f"{task.shots}-shot {task.metric} ({task.filter}), lm-evaluation-harness"
                f" {ours.harness}, {', '.join(ours.servers)}"
            ),
        )
        for task in table.tasks
        if task.hub_dataset and task.hub_task and task.task in ours.values
    ]
    told = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return told.encode() if entries else None
