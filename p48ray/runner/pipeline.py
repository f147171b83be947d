"""The job: the stages of stages.table, then the report, of a prepared plan on whatever runner it is
given. Every stage does what the bucket lacks."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import groupby

from p48ray.config.load import baseline_config
from p48ray.errors import CorruptObjectError, StageFailedError
from p48ray.numerics.solvers import SOLVERS
from p48ray.report.card import model_card
from p48ray.report.html import report_html
from p48ray.report.report import Report, build_report
from p48ray.run import run_root
from p48ray.run.benchmark_results import read_table
from p48ray.run.changing_hands import check_still_ours
from p48ray.run.checked import load_unit_manifests
from p48ray.run.cleanup import ABANDONED_S, delete_lost_attempts
from p48ray.run.manifest import UnitManifest
from p48ray.run.needs import read_needs
from p48ray.run.plan import RunPlan
from p48ray.run.scales import check_units, known_scales
from p48ray.runner.base import RedoError, Runner, TaskList, delete_corrupt, run_all
from p48ray.runner.layer_by_layer import LayerByLayer
from p48ray.runner.overlap import Overlap
from p48ray.runner.progress import Progress
from p48ray.runner.run_log import RunLog
from p48ray.runner.stage_times import StageTimes
from p48ray.stages.evaluate import EvaluationResult
from p48ray.stages.greedy import GreedyAgreement, share_continuations
from p48ray.stages.inputs import check_run_root, write_inputs
from p48ray.stages.prepare import Prepared, prepare
from p48ray.stages.table import EVALUATE_STAGE, GREEDY_STAGE, Stage, stages_of
from p48ray.store.view import SubStore
from p48ray.unit.context import StageContext

log = logging.getLogger("p48ray.progress")

RunnerFactory = Callable[[RunPlan, str], AbstractContextManager[Runner]]


def run_job(prepared: Prepared, make_runner: RunnerFactory) -> Report:
    """Run what is missing, from the first stage to the report.

    Raises: UserError, StageFailedError or VerificationError; whatever was finished stays, and the
        same call goes on from there.
    """
    start = time.monotonic()
    plan, store = prepared.plan, prepared.store
    check_run_root(prepared)
    store.sweep(ABANDONED_S)
    seconds: dict[str, float] = {}
    with RunLog(store) as run_log:
        made = make_runner(plan, store.uri)  # refuses what this machine lacks
        with made as runner:
            # While workers start, and not before: Ray's processes are forked by now. A fork closes
            # the Hub client's connections in the child, and waits for ever for a lock that a thread
            # which reads from the Hub holds.
            write_inputs(prepared)
            run_log.begin()
            job = Job(prepared, runner, seconds)
            result = run_stages(job)
    check_still_ours(plan, store)
    baseline = theirs = None
    if plan.config.evaluation is not None and plan.config.evaluation.baseline and not plan.is_pilot:
        log.info("baseline  the published one-shot reference, under %s/baseline", store.uri)
        share_continuations(store)
        theirs = run_job(prepare(baseline_config(plan.config)), make_runner)
        baseline = theirs.quality
    seconds["total"] = round(time.monotonic() - start, 1)
    report = build_report(job.context, job.units, prepared.shards, result, seconds)
    benchmarks = None if plan.is_pilot else read_table(store)
    greedy = {"greedy": job.agreement, "baseline_greedy": theirs and theirs.greedy}
    report = report.model_copy(update={"baseline": baseline, "benchmarks": benchmarks} | greedy)
    write_report(prepared.context, report, job.units)
    return report


def write_report(context: StageContext, report: Report, units: Sequence[UnitManifest]) -> None:
    """The card, the page and the report itself, which comes last: a run root with it is
    complete."""
    store = context.store
    if not context.plan.is_pilot:
        card = model_card(context, units, report.quality, report.baseline, report.benchmarks)
        store.put(run_root.checkpoint_file("README.md"), card.encode())
    page = report_html(
        context, report, units, SubStore(store, run_root.BASELINE) if report.baseline else None
    )
    store.put(run_root.REPORT_PAGE, page.encode())
    store.put(run_root.REPORT, report.to_json())


def run_stages(job: "Job") -> EvaluationResult | None:
    """All stages in order. Objects found corrupt on the way are deleted, and the stages run again
    from the first that misses one.

    Raises: StageFailedError for an object that is corrupt as often as run.max_attempts says; a long
        run may meet any number of others.
    """
    most, found = job.plan.config.run.max_attempts, Counter[str]()
    while True:
        try:
            return job.run()
        except CorruptObjectError as error:
            if not isinstance(error, RedoError):  # the driver's own look
                delete_corrupt(job.store, str(error), error.keys)
            found.update(set(error.keys))
            again = [key for key in error.keys if found[key] >= most]
            if again:
                raise StageFailedError(
                    f"{again[0]}: found corrupt {most} times: {error}"
                ) from error
            check_still_ours(job.plan, job.store)  # else it would be taken back here
            write_inputs(job.prepared)  # the packed texts may be among what was deleted


class Job:
    """The stages of one run. `run` does what the run root lacks and returns when the stage is
    complete."""

    def __init__(
        self,
        prepared: Prepared,
        runner: Runner,
        seconds: dict[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """No stage has begun.

        Args:
            prepared: the run, opened.
            runner: for the tasks of every stage.
            seconds: taken by each stage, added to.
            clock: monotonic seconds.
        """
        self.prepared = prepared
        self.plan, self.store, self.shards = prepared.plan, prepared.store, prepared.shards
        self.context, self.runner, self.seconds, self.clock = (
            prepared.context,
            runner,
            seconds,
            clock,
        )
        self.units: list[UnitManifest] = []  # of all units, once they are done
        self.agreement: GreedyAgreement | None = None  # if the plan has any, likewise

    def run(self) -> EvaluationResult | None:
        """Stages that stream go on beside each other, the others one after the other. Returns: what
        evaluation comes to, if the plan has any."""
        results: dict[str, object] = {}
        for streams, stages in groupby(stages_of(self.plan), lambda stage: stage.work is None):
            if streams:
                self.stream_and_compress()
                continue
            for stage in stages:
                results[stage.name] = self.run_stage(stage)
        result, agreement = (results.get(s.name) for s in (EVALUATE_STAGE, GREEDY_STAGE))
        assert result is None or isinstance(result, EvaluationResult)
        assert agreement is None or isinstance(agreement, GreedyAgreement)
        self.agreement = agreement
        return result

    def run_stage(self, stage: Stage) -> object:
        """A stage's tasks. Progress, and whether it is complete, is how many of its markers are
        there."""
        assert stage.work is not None
        check_still_ours(self.plan, self.store)
        tasks, times = stage.work(self.context, self.shards), StageTimes(self.clock)
        with self.progress(stage, self.markers(stage), times) as progress:
            run_all(self.runner, TaskList(tasks), self.store, times)
        self.check_complete(progress)
        return stage.finish(self.context, self.shards, self.units) if stage.finish else None

    def markers(self, stage: Stage) -> list[str]:
        if stage.markers is not None:
            return stage.markers(self.plan, [s.name for s in self.shards])
        assert stage.markers_in is not None, stage.name
        return stage.markers_in(self.context)

    def progress(self, stage: Stage, markers: Sequence[str], times: StageTimes) -> Progress:
        expected = set(markers)
        return Progress(
            stage.name,
            stage.noun,
            len(expected),
            lambda: len(expected & self.list_keys(stage.prefix)),
            lambda: times.seconds(stage.name),
        )

    def check_complete(self, progress: Progress) -> None:
        """Raises: StageFailedError when a stage that came to its end is not complete."""
        if progress.final != progress.total:
            raise StageFailedError(
                f"{progress.stage}: expected {progress.total} {progress.noun} in {self.store.uri},"
                f" found {progress.final}"
            )
        before = self.seconds.get(progress.stage, 0.0)
        self.seconds[progress.stage] = round(before + progress.worked_s, 1)

    def list_keys(self, prefix: str) -> set[str]:
        return {info.key for info in self.store.list(prefix)}

    def stream_and_compress(self) -> None:
        """Capture, gradients and compress, each layer's units as soon as its parts are there
        (runner.overlap), or layer by layer (runner.layer_by_layer)."""
        needs = read_needs(self.plan, self.store)
        kind = LayerByLayer if self.plan.propagates else Overlap
        work, times = kind(self.context, needs), StageTimes(self.clock)
        done = {
            key
            for n in self.plan.layers
            if n not in needs.open_layers
            for key in layer_markers(self.plan, n)
        }
        shown = []
        # of layers that are done, what is gone is not missed
        for stage in (stage for stage in stages_of(self.plan) if stage.work is None):
            markers = [key for key in self.markers(stage) if key not in done or key in needs.keys]
            shown.append(self.progress(stage, markers, times))
        with ExitStack() as stack:
            for progress in shown:
                stack.enter_context(progress)
            run_all(self.runner, work, self.store, times)
        self.check_nothing_is_lost()
        for progress in shown:
            self.check_complete(progress)
        self.units = load_unit_manifests(self.plan, self.store)
        check_units(self.units, known_scales(self.plan, self.store))
        delete_lost_attempts(self.plan, self.store)
        check_fallbacks(self.plan, self.units)

    def check_nothing_is_lost(self) -> None:
        """Raises: CorruptObjectError where units could not begin because what streams had left for
        them is gone, so that it is made again."""
        if lost := read_needs(self.plan, self.store).lost:
            raise CorruptObjectError(
                f"{self.store.uri}: {len(lost)} blobs that open layers' units read are gone, the"
                f" first of {lost[0]}",
                *lost,
            )


def layer_markers(plan: RunPlan, layer: int) -> list[str]:
    """Of what streams leave of a layer."""
    return [
        name(layer, p.part)
        for name in (run_root.activation_manifest, run_root.gradient_manifest)
        for p in plan.parts
    ]


def check_fallbacks(plan: RunPlan, units: Sequence[UnitManifest]) -> None:
    """Refuse a checkpoint of which too many linears could only be rounded.

    Linears that are zero are not counted: rounding is right for them.

    Raises: StageFailedError with the share, the limit and the first reasons.
    """
    records = [r for unit in units for r in unit.linears if r.outcome != "zero"]
    expected = not SOLVERS[plan.config.compression.solver].needs_hessian
    rounded = [r for r in records if r.outcome == "round_to_nearest" and not expected]
    limit = plan.config.compression.max_fallback_share
    if len(rounded) > limit * len(records):
        reasons = json.dumps([f"{r.name}: {r.reason}" for r in rounded[:3]])
        raise StageFailedError(
            f"compress: {len(rounded)} of {len(records)} linears fell back to rounding, more than"
            f" compression.max_fallback_share = {limit:g} allows: {reasons}"
        )
