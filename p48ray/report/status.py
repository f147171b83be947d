"""How far a run has come, from its run root alone."""

from collections import Counter
from typing import Literal

from rich.console import Console
from rich.table import Table

from p48ray.report.work import (
    Extrapolation,
    Work,
    duration,
    extrapolate,
    gpu_hours,
    pilot_words,
    read_work,
)
from p48ray.run import run_root
from p48ray.run.changing_hands import read_plan
from p48ray.run.manifest import Failure
from p48ray.run.output_layout import shard_count, shard_names
from p48ray.run.records import Record
from p48ray.stages.table import count_markers
from p48ray.store.base import Store


class StageStatus(Record):
    """Done-markers of one stage."""

    stage: str
    done: int
    total: int


class RunStatus(Record):
    """What the run root says."""

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
    is_complete: bool


def read_status(store: Store) -> RunStatus:
    """One listing of the run root, counted against its plan.

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
    shards = shard_names(
        next((n for k in keys if (n := shard_count(k.removeprefix(run_root.CHECKPOINT)))), 0)
    )
    work = read_work(plan, store, keys)
    price = plan.config.run.gpu_hour_price
    counts = count_markers(plan, keys, shards)
    stages = tuple(
        StageStatus(stage=name, done=done, total=total) for name, (done, total) in counts.items()
    )
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
            for k, f in zip(failures, Failure.load_all(store, failures), strict=True)
        ),
        stored_bytes=sum(sizes.values()),
        is_complete=run_root.REPORT in keys,
    )


def print_status(status: RunStatus, console: Console) -> None:
    """Stages, layers that are not finished, failures."""
    state = "complete" if status.is_complete else "not complete"
    console.print(
        f"{status.name}  plan {status.plan_digest[:12]}  {state}  {status.stored_bytes:,} bytes"
        " stored"
    )
    table = Table("stage", "done", "of")
    for stage in status.stages:
        table.add_row(
            stage.stage, str(stage.done), str(stage.total) if stage.total else "not known yet"
        )
    console.print(table)
    for w in status.work:
        if w.done < w.total and w.per_minute is not None and w.seconds_left is not None:
            console.print(
                f"{w.stage}: {w.per_minute:g} a minute of late, {duration(w.seconds_left)} left at"
                " that rate"
            )
    worked = duration(sum(w.worker_seconds for w in status.work))
    spent = f", {status.gpu_hours:.1f} GPU-hours" if status.gpu_hours else ""
    price = f", {status.cost:,.2f} spent on them" if status.cost is not None else ""
    console.print(
        f"finished work: {worked} of workers' time{spent}{price} (waiting and lost attempts not"
        " counted)"
    )
    if status.pilot is not None:
        console.print(pilot_words(status.pilot), soft_wrap=True)
    layers = Table("layer", "activation parts", "units")
    for layer, parts, units in status.layers:
        layers.add_row(str(layer), str(parts), str(units))
    console.print(layers)
    for failure in status.failures:
        console.print(f"failed attempt: {failure}", soft_wrap=True, markup=False)
