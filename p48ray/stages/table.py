"""The stages: one record each, in the order in which a job has them.

Runner, status, timeline, report and plan read them here. Stages that go on beside each other
(capture or propagate, gradients, compress) have no `work`: their tasks follow from each other and
are named by a WorkSource (runner.overlap, runner.layer_by_layer). Every other names what is missing
of it, all at once. docs/EXTENDING.md says how to add one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from p48ray.run import run_root
from p48ray.run.manifest import ActivationPart, GradientPart, UnitManifest
from p48ray.run.output_layout import OutputShard
from p48ray.run.plan import RunPlan, cut_parts
from p48ray.stages.capture import capture_parts
from p48ray.stages.evaluate import (
    evaluate_and_record,
    evaluation_markers,
    finish_evaluation,
    parts_to_evaluate,
)
from p48ray.stages.gradients import gradient_parts
from p48ray.stages.greedy import (
    agreement_markers,
    agreements_to_find,
    finish_agreement,
    follow_and_record,
    greedy_settings,
    wants_agreement,
)
from p48ray.stages.mirror import files_to_copy, mirror_file
from p48ray.stages.propagate import propagate_parts
from p48ray.stages.reduce import shards_to_stitch, stitch_shard
from p48ray.stages.scan import files_to_scan, finish_scan, scan_file
from p48ray.stages.tasks import Task
from p48ray.stages.verify import finish_verification, shards_to_verify, verify_and_record
from p48ray.unit.compress import compress_unit
from p48ray.unit.context import StageContext

Finish = Callable[[StageContext, tuple[OutputShard, ...], Sequence[UnitManifest]], object]
StageManifest = type[ActivationPart] | type[GradientPart] | type[UnitManifest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """All that the program asks of a stage.

    name: in logs, status and report, and of its tasks. noun: what its markers count. body: does one
    task, (StageContext, item); (Store, item) where it does not open the source (opens_source).
    is_used: by a plan. markers: keys that are there once a plan's work is done, given the names of
    the output shards (none while nobody knows them); None where more than the plan is needed: then
    markers_in gives them from what a job has open, and count tells how many of how many keys there
    are. prefix: of all markers. work: (context, output shards) -> tasks for what is missing; None
    for a stage that streams. finish: (context, output shards, manifests of all units) -> what the
    stage comes to, once all its markers are there. manifest: of a marker that says who worked how
    long on which layer, for the timeline and the costs. colour: there. cost: a word, and the field
    of Estimate that has its seconds.
    """

    name: str
    noun: str
    body: Callable[[Any, Any], object]
    prefix: str
    markers: Callable[[RunPlan, Sequence[str]], list[str]] | None
    is_used: Callable[[RunPlan], bool]
    opens_source: bool = True
    work: Callable[[StageContext, tuple[OutputShard, ...]], Sequence[Task]] | None = None
    finish: Finish | None = None
    markers_in: Callable[[StageContext], list[str]] | None = None
    count: Callable[[RunPlan, set[str]], tuple[int, int]] | None = None
    manifest: StageManifest | None = None
    colour: str = ""
    cost: tuple[str, str] | None = None


def of_parts(name: Callable[[int, int], str]) -> Callable[[RunPlan, Sequence[str]], list[str]]:
    """A marker a layer and part of the calibration sequences."""
    return lambda plan, shards: [
        name(layer, part.part) for layer in plan.layers for part in plan.parts
    ]


def has_checkpoint(plan: RunPlan) -> bool:
    return not plan.is_pilot


def count_evaluated(plan: RunPlan, keys: set[str]) -> tuple[int, int]:
    settings = plan.config.evaluation
    total = len(cut_parts(settings.num_sequences, settings.sequences_per_part)) if settings else 0
    return count_furthest(run_root.EVALUATION, keys, total)


def count_agreements(plan: RunPlan, keys: set[str]) -> tuple[int, int]:
    settings = greedy_settings(plan)
    total = len(cut_parts(settings.prompts, settings.prompts_per_part)) if settings else 0
    return count_furthest(run_root.GREEDY, keys, total)


def count_furthest(prefix: str, keys: set[str], total: int) -> tuple[int, int]:
    """Of the evaluation that has come furthest: which one is the newest only its texts could
    tell."""
    parts = (k for k in keys if k.startswith(prefix) and "/part-" in k)
    found = Counter(key.rpartition("/")[0] for key in parts)
    return min(total, max(found.values(), default=0)), total


def is_evaluated(plan: RunPlan) -> bool:
    return plan.config.evaluation is not None


MIRROR_STAGE = Stage(
    name="mirror",
    noun="files of the source",
    body=mirror_file,
    prefix=run_root.MIRROR,
    markers=lambda plan, shards: [
        run_root.mirror_manifest(file.path) for file in plan.source.mirror
    ],
    is_used=lambda plan: bool(plan.source.mirror),
    opens_source=False,
    work=files_to_copy,
    cost=("mirror", "mirror_seconds"),
)
SCAN_STAGE = Stage(
    name="scan",
    noun="files of the source",
    body=scan_file,
    prefix=run_root.SCAN,
    markers=lambda plan, shards: [run_root.scan_manifest(file) for file in plan.source.scanned],
    is_used=lambda plan: bool(plan.source.scanned),
    work=files_to_scan,
    finish=finish_scan,
)
CAPTURE_STAGE = Stage(
    name="capture",
    noun="activation parts",
    body=capture_parts,
    prefix=run_root.ACTIVATIONS,
    markers=of_parts(run_root.activation_manifest),
    is_used=lambda plan: not plan.propagates,
    manifest=ActivationPart,
    colour="s3",
)
# The same markers, as the compressed model below sees its inputs.
PROPAGATE_STAGE = replace(
    CAPTURE_STAGE, name="propagate", body=propagate_parts, is_used=lambda plan: plan.propagates
)
GRADIENTS_STAGE = Stage(
    name="gradients",
    noun="gradient parts",
    body=gradient_parts,
    prefix=run_root.GRADIENTS,
    markers=of_parts(run_root.gradient_manifest),
    is_used=lambda plan: plan.uses_gradients,
    manifest=GradientPart,
    colour="s2",
    cost=("streams", "stream_seconds"),
)
COMPRESS_STAGE = Stage(
    name="compress",
    noun="units",
    body=compress_unit,
    prefix=run_root.UNITS,
    markers=lambda plan, shards: [run_root.unit_manifest(unit.id) for unit in plan.units],
    is_used=lambda plan: True,
    manifest=UnitManifest,
    colour="s1",
    cost=("units", "unit_seconds"),
)
REDUCE_STAGE = Stage(
    name="reduce",
    noun="shards",
    body=stitch_shard,
    prefix=run_root.CHECKPOINT,
    markers=lambda plan, shards: [run_root.checkpoint_file(name) for name in shards],
    is_used=has_checkpoint,
    work=shards_to_stitch,
    cost=("reduce", "reduce_seconds"),
)
VERIFY_STAGE = Stage(
    name="verify",
    noun="shards",
    body=verify_and_record,
    prefix=run_root.VERIFICATION,
    markers=lambda plan, shards: [run_root.shard_verdict(name) for name in shards],
    is_used=has_checkpoint,
    work=shards_to_verify,
    finish=finish_verification,
    cost=("verify", "verify_seconds"),
)
EVALUATE_STAGE = Stage(
    name="evaluate",
    noun="held-out parts",
    body=evaluate_and_record,
    prefix=run_root.EVALUATION,
    markers=None,
    markers_in=evaluation_markers,
    count=count_evaluated,
    is_used=is_evaluated,
    work=parts_to_evaluate,
    finish=finish_evaluation,
    cost=("evaluate", "evaluate_seconds"),
)
GREEDY_STAGE = Stage(
    name="greedy",
    noun="prompt parts",
    body=follow_and_record,
    prefix=run_root.GREEDY,
    markers=None,
    markers_in=agreement_markers,
    count=count_agreements,
    is_used=wants_agreement,
    work=agreements_to_find,
    finish=finish_agreement,
    cost=("greedy", "greedy_seconds"),
)
# Those that stream stand together: they are one step of the job.
STAGES = {
    stage.name: stage
    for stage in (
        MIRROR_STAGE,
        SCAN_STAGE,
        CAPTURE_STAGE,
        PROPAGATE_STAGE,
        GRADIENTS_STAGE,
        COMPRESS_STAGE,
        REDUCE_STAGE,
        VERIFY_STAGE,
        EVALUATE_STAGE,
        GREEDY_STAGE,
    )
}


def stages_of(plan: RunPlan) -> list[Stage]:
    """Those of a plan, in order."""
    return [stage for stage in STAGES.values() if stage.is_used(plan)]


def count_markers(
    plan: RunPlan, keys: Iterable[str], shards: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Stage -> (markers that are there, markers of the plan)."""
    held, found = set(keys), {}
    for stage in stages_of(plan):
        if stage.count:
            found[stage.name] = stage.count(plan, held)
            continue
        markers = set(stage.markers(plan, shards)) if stage.markers else set()
        found[stage.name] = (len(markers & held), len(markers))
    return found
