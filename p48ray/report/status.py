"""How far a run has come, from its run root alone."""

import time
from collections import Counter
from typing import Literal

from rich.console import Console
from rich.table import Table

from p48ray.checkpoint.index import INDEX_FILE
from p48ray.report.report import Report
from p48ray.report.work import (
    Extrapolation,
    Manifest,
    Work,
    duration,
    extrapolate,
    gpu_hours,
    measure,
    pilot_words,
    spans_of,
    stage_manifests,
)
from p48ray.run import run_root
from p48ray.run.changing_hands import read_plan
from p48ray.run.manifest import Failure
from p48ray.run.output_layout import shard_count, shard_names
from p48ray.run.plan import RunPlan
from p48ray.run.records import Record, load_readable
from p48ray.run.scratch import known_scratch
from p48ray.stages.table import EVALUATE_STAGE, GREEDY_STAGE, count_markers
from p48ray.store.base import Store
from p48ray.store.local import LocalStore
from p48ray.store.view import SubStore


class StageStatus(Record):
    """Done-markers of one stage; of the one-shot baseline, its stages. A total of 0 is not known
    yet."""

    stage: str
    done: int
    total: int

    @property
    def is_complete(self) -> bool:
        return 0 < self.total == self.done


class RunStatus(Record):
    """What the run root says.

    has_index: the checkpoint has its index, which verification writes last. has_report: the job has
    written its report. last_finished_at: Unix time of the last piece of work that takes hours.
    is_complete: by the counts and the index, whatever report there is. scratch: of every folder of
    run.scratch that the run has had, its name and the bytes of blobs in it; None where this machine
    does not see it.
    """

    schema_version: Literal[1] = 1
    name: str
    plan_digest: str
    stages: tuple[StageStatus, ...]
    work: tuple[Work, ...]
    gpu_hours: float
    cost: float | None
    layers: tuple[tuple[int, int, int], ...]  # layer, activation parts, units
    pilot: Extrapolation | None = None
    failures: tuple[str, ...]
    stored_bytes: int
    scratch: tuple[tuple[str, int | None], ...] = ()
    has_index: bool
    has_report: bool
    last_finished_at: float | None
    is_complete: bool


def read_status(store: Store, known: dict[str, Manifest] | None = None) -> RunStatus:
    """One listing of the run root, counted against its plan.

    Args:
        known: manifests that were read before, by key; those that are read now are added.
    Raises: ConfigError when there is no plan.
    """
    plan = read_plan(store)
    sizes = {info.key: info.size_bytes for info in store.list()}
    keys = set(sizes)
    parts = Counter(
        n
        for n in plan.layers
        for p in plan.parts
        if run_root.activation_manifest(n, p.part) in keys
    )
    units = Counter(u.layer for u in plan.units if run_root.unit_manifest(u.id) in keys)
    found = stage_manifests(plan, store, keys, known)
    work = measure(plan, spans_of(plan, found))
    price = plan.config.run.gpu_hour_price
    stages = read_stages(plan, store, keys)
    has_index = run_root.checkpoint_file(INDEX_FILE) in keys
    failures = sorted(k for k in keys if k.startswith(run_root.FAILURES))
    return RunStatus(
        name=plan.config.name,
        plan_digest=plan.digest,
        stages=stages,
        work=work,
        gpu_hours=gpu_hours(plan, work),
        cost=gpu_hours(plan, work) * price if price else None,
        layers=tuple((n, parts[n], units[n]) for n in plan.layers),
        pilot=(
            extrapolate(plan, work)
            if plan.is_pilot and all(w.done == w.total for w in work)
            else None
        ),
        failures=tuple(
            f"{k.removeprefix(run_root.FAILURES)}: {f.error}"
            for k, f in load_readable(Failure, store, failures).items()
        ),
        stored_bytes=sum(sizes.values()),
        scratch=scratch_bytes(store),
        has_index=has_index,
        has_report=run_root.REPORT in keys,
        last_finished_at=max((m.finished_at for ms in found.values() for m in ms), default=None),
        is_complete=all(s.is_complete for s in stages) and (has_index or plan.is_pilot),
    )


def scratch_bytes(store: Store) -> tuple[tuple[str, int | None], ...]:
    """What lies in a run's scratch folders."""
    known = known_scratch(store)
    seen = [(str(f), sum(i.size_bytes for i in LocalStore(f).list())) for f in known.folders]
    return (*seen, *((folder, None) for folder in known.unseen))


MEASURED = {EVALUATE_STAGE.name: "quality", GREEDY_STAGE.name: "greedy"}
"""Fields of the report that have the figures of stages."""


def read_stages(plan: RunPlan, store: Store, keys: set[str]) -> tuple[StageStatus, ...]:
    """The stages that the run was asked for, and the one-shot baseline as one more.

    What is measured afterwards may change when a run is resumed, and the plan keeps what was asked
    for first: a report without its figures, and no records, say that they are not wanted any more.
    """
    stages = count_stages(plan, keys)
    unwanted = {s.stage for s in stages if s.stage in MEASURED and not s.done}
    if unwanted and run_root.REPORT in keys:
        report = Report.load(store, run_root.REPORT)
        unwanted = {name for name in unwanted if getattr(report, MEASURED[name]) is None}
        stages = tuple(s for s in stages if s.stage not in unwanted)
    if EVALUATE_STAGE.name not in {s.stage for s in stages}:
        return stages
    settings = plan.config.evaluation
    if settings is None or not settings.baseline:
        return stages
    own = {k.removeprefix(run_root.BASELINE) for k in keys if k.startswith(run_root.BASELINE)}
    if run_root.PLAN not in own:
        return (*stages, StageStatus(stage="baseline", done=0, total=0))
    theirs = count_stages(read_plan(SubStore(store, run_root.BASELINE)), own)
    done = sum(s.is_complete for s in theirs)
    return (*stages, StageStatus(stage="baseline", done=done, total=len(theirs)))


def count_stages(plan: RunPlan, keys: set[str]) -> tuple[StageStatus, ...]:
    """Those of the plan. How many shards there will be, only the first of them tells."""
    names = (k.removeprefix(run_root.CHECKPOINT) for k in keys if k.startswith(run_root.CHECKPOINT))
    shards = shard_names(next((n for name in names if (n := shard_count(name))), 0))
    counts = count_markers(plan, keys, shards)
    return tuple(
        StageStatus(stage=n, done=done, total=total) for n, (done, total) in counts.items()
    )


def print_status(status: RunStatus, console: Console, has_layers: bool = True) -> None:
    """Stages, layers, failures. `has_layers`: with a line a layer."""
    state = "complete" if status.is_complete else "not complete"
    console.print(
        f"{status.name}  plan {status.plan_digest[:12]}  {state}  {status.stored_bytes:,} bytes"
        " stored"
    )
    for folder, num_bytes in status.scratch:
        held = "not seen from here" if num_bytes is None else f"{num_bytes:,} bytes"
        console.print(f"run.scratch: {folder}: {held}", soft_wrap=True, markup=False)
    table = Table("stage", "done", "of")
    for stage in status.stages:
        table.add_row(
            stage.stage, str(stage.done), str(stage.total) if stage.total else "not known yet"
        )
    console.print(table)
    for words in state_words(status):
        console.print(words, soft_wrap=True)
    worked = duration(sum(w.worker_seconds for w in status.work))
    spent = f", {status.gpu_hours:.1f} GPU-hours" if status.gpu_hours else ""
    price = f", {status.cost:,.2f} spent on them" if status.cost is not None else ""
    console.print(
        f"finished work: {worked} of workers' time{spent}{price} (waiting and lost attempts not"
        " counted)"
    )
    if status.pilot is not None:
        console.print(pilot_words(status.pilot), soft_wrap=True)
    if has_layers:
        layers = Table("layer", "activation parts", "units")
        for layer, parts, units in status.layers:
            layers.add_row(str(layer), str(parts), str(units))
        console.print(layers)
    for failure in status.failures:
        console.print(f"failed attempt: {failure}", soft_wrap=True, markup=False)


def state_words(status: RunStatus) -> list[str]:
    """How fast the stages under way are, since when nothing was finished, and what the counts do
    not tell."""
    rates = [
        f"{w.stage}: {w.per_minute:g} a minute since the first, {duration(w.seconds_left)} left at"
        " that rate"
        for w in status.work
        if w.done < w.total and w.per_minute is not None and w.seconds_left is not None
    ]
    if any(w.done < w.total for w in status.work) and status.last_finished_at is not None:
        quiet_s = max(0.0, time.time() - status.last_finished_at)
        return [*rates, f"last piece of work finished {duration(quiet_s)} ago"]
    if not status.is_complete and all(s.is_complete for s in status.stages):
        faults = "verification has not ended, or has found faults: the job's log names them"
        return [f"every stage is counted in full, but checkpoint/ has no index: {faults}"]
    if status.is_complete and not status.has_report:
        return ["the job has not written its report yet"]
    return rates
