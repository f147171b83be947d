"""The job: plan, mirror, capture, compress, reduce, verify, evaluate, report, on whatever runner it is given. Every stage does what the bucket lacks."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

from p48ray import run_root
from p48ray.checkpoint.index import INDEX_FILE
from p48ray.config import baseline_config
from p48ray.errors import StageFailedError, VerificationError
from p48ray.manifest import EvaluationPart, ShardVerdict, UnitManifest
from p48ray.numerics.solvers import SOLVERS
from p48ray.plan import RunPlan, cut
from p48ray.report.card import model_card
from p48ray.report.html import report_html
from p48ray.report.report import Report, build_report
from p48ray.runner.base import RedoError, Runner, run_all
from p48ray.runner.in_turn import InTurn
from p48ray.runner.overlap import Overlap
from p48ray.runner.progress import Progress
from p48ray.stages.benchmarks import read_table
from p48ray.stages.capture import finish_layer
from p48ray.stages.collect import ABANDONED_S, collect_losers, collect_units, delete_all
from p48ray.stages.context import StageContext
from p48ray.stages.evaluate import EvaluationResult, combine, evaluation_digest
from p48ray.stages.inputs import settle, write_inputs
from p48ray.stages.mirror import MirrorItem, look
from p48ray.stages.needs import Needs, read_needs
from p48ray.stages.prepare import Prepared, prepare
from p48ray.stages.reduce import file_bytes, finish_checkpoint
from p48ray.stages.tasks import MIRROR_STAGE, Task
from p48ray.stages.verify import check_index
from p48ray.store.base import Store
from p48ray.store.hub import HubStore
from p48ray.store.view import SubStore

log = logging.getLogger("p48ray.progress")

LISTED_PROBLEMS = 20

RunnerFactory = Callable[[RunPlan, str], AbstractContextManager[Runner]]


def run_job(prepared: Prepared, make_runner: RunnerFactory) -> Report:
    """Run what is missing, from the first stage to the report.

    Raises: UserError, StageFailedError or VerificationError; whatever was finished stays, and the same call goes on from there.
    """
    start = time.monotonic()
    plan, store = prepared.plan, prepared.store
    settle(prepared)
    store.sweep(ABANDONED_S)
    seconds: dict[str, float] = {}
    with ThreadPoolExecutor(1) as beside:
        inputs = beside.submit(write_inputs, prepared)  # while workers start
        with make_runner(plan, store.uri) as runner:
            inputs.result()
            result = run_stages(Job(prepared, runner, seconds))
    baseline = None
    if plan.config.evaluation is not None and plan.config.evaluation.baseline and not plan.is_pilot:
        log.info("baseline  the published one-shot reference, under %s/baseline", store.uri)
        baseline = run_job(prepare(baseline_config(plan.config)), make_runner).quality
    seconds["total"] = round(time.monotonic() - start, 1)
    units = read_units(prepared)
    report = build_report(prepared.context, units, prepared.shards, result, seconds)
    benchmarks = None if plan.is_pilot else read_table(store)
    report = report.model_copy(update={"baseline": baseline, "benchmarks": benchmarks})
    write_report(prepared.context, report, units)
    return report


def write_report(context: StageContext, report: Report, units: Sequence[UnitManifest]) -> None:
    """The card, the page and the report itself, which comes last: a run root with it is complete."""
    store = context.store
    if not context.plan.is_pilot:
        card = model_card(context, units, report.quality, report.baseline, report.benchmarks)
        store.put(run_root.checkpoint_file("README.md"), card.encode())
    page = report_html(context, report, units, SubStore(store, run_root.BASELINE) if report.baseline else None)
    store.put(run_root.REPORT_PAGE, page.encode())
    store.put(run_root.REPORT, report.to_json())


def run_stages(job: "Job") -> EvaluationResult | None:
    """All stages in order. Objects found corrupt on the way are deleted, and the stages run again from the first that misses one."""
    rounds = job.plan.config.run.max_attempts
    for left in reversed(range(rounds)):
        try:
            return job.run()
        except RedoError as error:
            if not left:
                raise StageFailedError(f"objects were found corrupt {rounds} times in a row: {error}") from error
            write_inputs(job.prepared)  # the packed texts may be among what was deleted
    raise AssertionError


class Job:
    """The stages of one run. Each method does what its stage lacks and returns when the stage is complete.

    Args: seconds: taken by each stage, added to. clock: monotonic seconds.
    """

    def __init__(self, prepared: Prepared, runner: Runner, seconds: dict[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.prepared = prepared
        self.plan, self.store, self.shards = prepared.plan, prepared.store, prepared.shards
        self.context, self.runner, self.seconds, self.clock = prepared.context, runner, seconds, clock

    def run(self) -> EvaluationResult | None:
        self.mirror()
        self.compress()
        if self.plan.is_pilot:
            return None
        self.reduce()
        self.verify()
        return self.evaluate()

    def stage(self, name: str, noun: str, markers: Sequence[str], prefix: str, tasks: Sequence[Task]) -> None:
        """Run a stage's tasks. Progress, and whether it is complete, is how many of its markers are there."""
        start = time.monotonic()
        with self.progress(name, noun, markers, prefix) as progress:
            run_all(self.runner, tasks, self.store)
        self.end(progress, time.monotonic() - start)

    def progress(self, name: str, noun: str, markers: Sequence[str], prefix: str) -> Progress:
        expected = set(markers)
        return Progress(name, noun, len(expected), lambda: len(expected & self.keys(prefix)))

    def end(self, progress: Progress, seconds: float) -> None:
        """Raises: StageFailedError when a stage that came to its end is not complete."""
        if progress.final != progress.total:
            raise StageFailedError(
                f"{progress.stage}: expected {progress.total} {progress.noun} in {self.store.uri}, found {progress.final}"
            )
        self.seconds[progress.stage] = round(self.seconds.get(progress.stage, 0.0) + seconds, 1)

    def keys(self, prefix: str) -> set[str]:
        return {info.key for info in self.store.list(prefix)}

    def mirror(self) -> None:
        """Copy a hf:// source into the run root; the largest files first, so that the last to end is a small one."""
        if not self.plan.source.mirror:
            return
        source = HubStore(self.plan.config.source.checkpoint)
        found = look(self.plan, self.store)
        delete_all(self.store, found.void)
        tasks = [
            Task(
                stage=MIRROR_STAGE,
                id=f.path,
                item=MirrorItem(source, f),
                marker=run_root.mirror_manifest(f.path),
                load=float(f.size_bytes),
            )
            for f in found.missing
        ]
        every = [run_root.mirror_manifest(f.path) for f in self.plan.source.mirror]
        self.stage(MIRROR_STAGE, "files of the source", every, run_root.MIRROR, tasks)

    def compress(self) -> None:
        """Capture, gradients and compress, each layer's units as soon as its parts are there (runner.overlap), or layers in turn (runner.in_turn)."""
        needs = read_needs(self.plan, self.store)
        overlap = (InTurn if self.plan.propagates else Overlap)(self.context, needs, self.clock)
        stage = "propagate" if self.plan.propagates else "capture"
        shown = [self.stream_progress(stage, "activation parts", run_root.activation_manifest, run_root.ACTIVATIONS, needs)]
        if self.plan.config.compression.output_curvature:
            shown.append(self.stream_progress("gradients", "gradient parts", run_root.gradient_manifest, run_root.GRADIENTS, needs))
        every = [run_root.unit_manifest(u.id) for u in self.plan.units]
        shown.append(self.progress("compress", "units", every, run_root.UNITS))
        with ExitStack() as stack:
            for progress in shown:
                stack.enter_context(progress)
            run_all(self.runner, overlap.more(False), self.store, overlap.on_done, overlap.more)
        for progress in shown:
            first, last = overlap.spans.get(progress.stage, (0.0, 0.0))
            self.end(progress, last - first)
        for layer in self.plan.layers:  # one that was complete long ago may have lost its scales, which evaluation reads
            finish_layer(self.context, layer)
        collect_losers(self.plan, self.store)
        check_fallbacks(self.plan, self.store)

    def stream_progress(self, stage: str, noun: str, manifest: Callable[[int, int], str], prefix: str, needs: Needs) -> Progress:
        """Of a stage whose tasks walk through the layers. Of layers that are done, what is gone is not missed."""
        every = [(n, manifest(n, p.part)) for n in self.plan.layers for p in self.plan.parts]
        return self.progress(stage, noun, [key for n, key in every if n in needs.open_layers or key in needs.keys], prefix)

    def reduce(self) -> None:
        held = {info.key: info.size_bytes for info in self.store.list(run_root.CHECKPOINT)}
        missing = [s for s in self.shards if held.get(run_root.checkpoint_file(s.name)) != file_bytes(s, self.context.layout)]
        if missing:  # no index over shards that are not all there, and no verdict on one that will be another
            self.store.delete(run_root.checkpoint_file(INDEX_FILE))
            delete_all(self.store, [run_root.shard_verdict(s.name) for s in missing])
        tasks = [Task(stage="reduce", id=s.name, item=s) for s in missing]
        self.stage("reduce", "shards", [run_root.checkpoint_file(s.name) for s in self.shards], run_root.CHECKPOINT, tasks)

    def verify(self) -> None:
        held = self.keys(run_root.VERIFICATION)
        for key in sorted(held):  # a verdict that found problems is not the last word: its shard may have been mended since
            if ShardVerdict.load(self.store, key).problems:
                self.store.delete(key)
                held.remove(key)
        missing = [s for s in self.shards if run_root.shard_verdict(s.name) not in held]
        tasks = [Task(stage="verify", id=s.name, item=s) for s in missing]
        every = [run_root.shard_verdict(s.name) for s in self.shards]
        self.stage("verify", "shards", every, run_root.VERIFICATION, tasks)
        verdicts = ShardVerdict.load_all(self.store, every)
        problems = [p if p.startswith(v.shard) else f"{v.shard}: {p}" for v in verdicts for p in v.problems]
        if not problems:
            finish_checkpoint(self.context, self.shards, verdicts)
            problems += check_index(SubStore(self.store, run_root.CHECKPOINT), self.shards, self.context.layout)
        if problems:
            listed = "\n".join(f"  {p}" for p in problems[:LISTED_PROBLEMS])
            rest = f"\n  and {len(problems) - LISTED_PROBLEMS} more" if len(problems) > LISTED_PROBLEMS else ""
            where = f"{self.store.uri}/{run_root.CHECKPOINT}"
            raise VerificationError(
                f"{where}: {len(problems)} problems; delete the files named here and run the same command again to have them made anew\n{listed}{rest}"
            )
        if self.plan.config.run.keep == "checkpoint":
            collect_units(self.store)

    def evaluate(self) -> EvaluationResult | None:
        settings = self.plan.config.evaluation
        if settings is None:
            return None
        digest = evaluation_digest(self.plan, settings)
        parts = cut(settings.num_sequences, settings.sequences_per_part)
        every = [run_root.evaluation_part(digest, p.part) for p in parts]
        held = self.keys(run_root.EVALUATION)
        tasks = [
            Task(stage="evaluate", id=f"part-{p.part:04d}", item=(digest, p))
            for p, key in zip(parts, every, strict=True)
            if key not in held
        ]
        self.stage("evaluate", "held-out parts", every, run_root.EVALUATION, tasks)
        return combine(EvaluationPart.load_all(self.store, every))


def read_units(run: Prepared | StageContext) -> list[UnitManifest]:
    return UnitManifest.load_all(run.store, [run_root.unit_manifest(u.id) for u in run.plan.units])


def check_fallbacks(plan: RunPlan, store: Store) -> None:
    """Refuse a checkpoint of which too many linears could only be rounded.

    Raises: StageFailedError with the share, the limit and the first reasons.
    """
    manifests = UnitManifest.load_all(store, [run_root.unit_manifest(u.id) for u in plan.units])
    records = [r for manifest in manifests for r in manifest.linears]
    expected = not SOLVERS[plan.config.compression.solver].needs_hessian
    rounded = [r for r in records if r.outcome == "round_to_nearest" and not expected]
    limit = plan.config.compression.max_fallback_share
    if len(rounded) > limit * len(records):
        reasons = json.dumps([f"{r.name}: {r.reason}" for r in rounded[:3]])
        raise StageFailedError(
            f"compress: {len(rounded)} of {len(records)} linears fell back to rounding, more than compression.max_fallback_share = {limit:g} allows: {reasons}"
        )
