"""What a run has cost so far, from its manifests: seconds that workers spent, how fast things get
done, and what the rest will take.

Seconds are those of finished work; attempts that were lost, workers that waited and stages after
compression are not among them.
"""

from collections.abc import Sequence

from p48ray.run.manifest import ActivationPart, GradientPart, UnitManifest
from p48ray.run.plan import RunPlan
from p48ray.run.records import Record
from p48ray.stages.table import COMPRESS_STAGE, stages_of
from p48ray.store.base import Store

RECENT_S = 900.0  # the rate is that of the last quarter of an hour in which something was finished


class Work(Record):
    """Finished work of one stage."""

    stage: str
    done: int
    total: int
    worker_seconds: float
    per_minute: float | None
    seconds_left: float | None


class Extrapolation(Record):
    """What a pilot of some layers says about the whole model. `wall_hours` with the configured
    numbers of workers, none idle."""

    layers: int
    of_layers: int
    worker_hours: float
    wall_hours: float
    gpu_hours: float
    cost: float | None


Manifests = Sequence[ActivationPart] | Sequence[GradientPart] | Sequence[UnitManifest]


def read_work(plan: RunPlan, store: Store, keys: set[str]) -> tuple[Work, ...]:
    """Work of the stages that take hours. `keys`: of the run root."""
    found = []
    for stage in stages_of(plan):
        if stage.manifest is not None and stage.markers is not None:
            names = stage.markers(plan, ())
            found.append(
                measure_work(
                    stage.name,
                    stage.manifest.load_all(store, [k for k in names if k in keys]),
                    len(names),
                )
            )
    return tuple(found)


def measure_work(stage: str, manifests: Manifests, total: int) -> Work:
    """Worker seconds, rate and time left of one stage's finished manifests."""
    rate = per_second([m.finished_at for m in manifests])
    left = total - len(manifests)
    return Work(
        stage=stage,
        done=len(manifests),
        total=total,
        worker_seconds=round(sum(seconds_of(m) for m in manifests), 1),
        per_minute=None if rate is None else round(60 * rate, 2),
        seconds_left=0.0 if not left else None if rate is None else round(left / rate, 1),
    )


def seconds_of(manifest: ActivationPart | GradientPart | UnitManifest) -> float:
    return (
        sum(manifest.seconds.values()) if isinstance(manifest, UnitManifest) else manifest.seconds
    )


def per_second(finished_at: Sequence[float]) -> float | None:
    """How many a second, over the RECENT_S before the last one; None while there are not two to
    compare."""
    recent = [t for t in finished_at if t > max(finished_at) - RECENT_S]
    span = max(recent) - min(recent) if recent else 0.0
    return (len(recent) - 1) / span if span > 0 else None


def gpu_hours(plan: RunPlan, work: Sequence[Work]) -> float:
    return sum(w.worker_seconds for w in work) / 3600 * plan.config.run.gpus_per_worker


def extrapolate(plan: RunPlan, work: Sequence[Work]) -> Extrapolation:
    """From the pilot's layers to all of them; every layer is taken to cost the same."""
    run = plan.config.run
    factor = len(plan.source.moe_layers) / len(plan.layers)
    streams = sum(w.worker_seconds for w in work if w.stage != COMPRESS_STAGE.name) * factor / 3600
    solving = sum(w.worker_seconds for w in work if w.stage == COMPRESS_STAGE.name) * factor / 3600
    hours = (streams + solving) * run.gpus_per_worker
    return Extrapolation(
        layers=len(plan.layers),
        of_layers=len(plan.source.moe_layers),
        worker_hours=streams + solving,
        wall_hours=streams / (run.capture_workers or run.num_workers) + solving / run.num_workers,
        gpu_hours=hours,
        cost=hours * run.gpu_hour_price if run.gpu_hour_price else None,
    )


def pilot_words(p: Extrapolation) -> str:
    on_gpus = f", {p.gpu_hours:.1f} GPU-hours" if p.gpu_hours else ""
    price = f", {p.cost:,.2f} at the configured price" if p.cost is not None else ""
    return (
        f"pilot of {p.layers} layers, no checkpoint; all {p.of_layers} would take"
        f" {duration(3600 * p.worker_hours)} of workers' time{on_gpus}{price},"
        f" {duration(3600 * p.wall_hours)} with the configured workers and none idle"
    )


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 05 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
