"""What a run has cost so far, from its manifests: seconds that workers spent, how fast things get
done, and what the rest will take.

Seconds are those of finished work; attempts that were lost, workers that waited and stages after
compression are not among them.
"""

from collections.abc import Mapping, Sequence

from p48ray.report.spans import Span, WorkPiece, merged_spans, spans_by_worker
from p48ray.run.manifest import ActivationPart, GradientPart, UnitManifest
from p48ray.run.plan import RunPlan
from p48ray.run.records import Record, load_readable
from p48ray.stages.evaluate import EvaluationResult
from p48ray.stages.table import COMPRESS_STAGE, stages_of
from p48ray.store.base import Store

PAUSE_S = 900.0
"""For so long nobody was at work on a stage: it was interrupted, and the time does not count."""


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
    numbers of workers, none idle. `pilot_kl`, `kl`: nats a held-out token from the source, with the
    pilot's layers compressed as measured, and with all as forecast."""

    layers: int
    of_layers: int
    worker_hours: float
    wall_hours: float
    gpu_hours: float
    cost: float | None
    pilot_kl: float | None = None
    kl: float | None = None


Manifest = ActivationPart | GradientPart | UnitManifest
ManifestsByStage = Mapping[str, Sequence[Manifest]]
"""Manifests of finished work by stage, those of every stage that takes hours."""


def stage_manifests(
    plan: RunPlan, store: Store, keys: set[str], known: dict[str, Manifest] | None = None
) -> ManifestsByStage:
    """What is finished of the stages that take hours.

    Args:
        plan: of the run.
        store: the run root.
        keys: of it.
        known: manifests by key that need not be read again; what is read is added.
    """
    known, found = {} if known is None else known, {}
    for stage in stages_of(plan):
        if stage.manifest is not None and stage.markers is not None:
            names = [k for k in stage.markers(plan, ()) if k in keys]
            new = [k for k in names if k not in known]
            known.update(load_readable(stage.manifest, store, new))
            found[stage.name] = [known[k] for k in names if k in known]
    return found


def read_work(plan: RunPlan, store: Store, keys: set[str]) -> tuple[Work, ...]:
    """Work of the stages that take hours. `keys`: of the run root."""
    return measure(plan, spans_of(plan, stage_manifests(plan, store, keys)))


def spans_of(plan: RunPlan, found: ManifestsByStage) -> list[Span]:
    """Who worked when, over all stages: a worker that streamed may have compressed next."""
    layer_of = {u.id: u.layer for u in plan.units}
    pieces = [
        WorkPiece(
            stage,
            layer_of[m.unit] if isinstance(m, UnitManifest) else m.layer,
            seconds_of(m),
            m.finished_at,
            m.worker,
        )
        for stage, manifests in found.items()
        for m in manifests
    ]
    return spans_by_worker(pieces, plan.config.run.num_workers)


def measure(plan: RunPlan, spans: Sequence[Span]) -> tuple[Work, ...]:
    """Work of the stages that take hours. `spans`: of all of them."""
    return tuple(
        measure_work(
            stage.name, [s for s in spans if s.stage == stage.name], len(stage.markers(plan, ()))
        )
        for stage in stages_of(plan)
        if stage.manifest is not None and stage.markers is not None
    )


def measure_work(stage: str, spans: Sequence[Span], total: int) -> Work:
    """Worker seconds, rate and time left of one stage, of which `spans` are finished."""
    rate = per_second(spans)
    left = total - len(spans)
    return Work(
        stage=stage,
        done=len(spans),
        total=total,
        worker_seconds=round(sum(s.end - s.start for s in spans), 1),
        per_minute=None if rate is None else round(60 * rate, 2),
        seconds_left=0.0 if not left else None if rate is None else round(left / rate, 1),
    )


def seconds_of(manifest: Manifest) -> float:
    return (
        sum(manifest.seconds.values()) if isinstance(manifest, UnitManifest) else manifest.seconds
    )


def per_second(spans: Sequence[Span]) -> float | None:
    """How many a second since the first of them was begun, interruptions apart; None while there is
    none."""
    active_s = sum(end - start for start, end, _ in merged_spans(spans, PAUSE_S))
    return len(spans) / active_s if active_s > 0 else None


def gpu_hours(plan: RunPlan, work: Sequence[Work]) -> float:
    return sum(w.worker_seconds for w in work) / 3600 * plan.config.run.gpus_per_worker


def extrapolate(
    plan: RunPlan, work: Sequence[Work], quality: EvaluationResult | None = None
) -> Extrapolation:
    """From the pilot's layers to all of them; every layer is taken to cost the same.

    KL too: it is quadratic in small errors of the logits, and those of different layers are taken
    to be independent, so that the squares add up.

    Args:
        plan, work: of the pilot.
        quality: of the model with its layers compressed, if it was evaluated.
    """
    run = plan.config.run
    factor = len(plan.source.moe_layers) / len(plan.layers)
    streams = sum(w.worker_seconds for w in work if w.stage != COMPRESS_STAGE.name) * factor / 3600
    solving = sum(w.worker_seconds for w in work if w.stage == COMPRESS_STAGE.name) * factor / 3600
    hours = (streams + solving) * run.gpus_per_worker
    return Extrapolation(
        layers=len(plan.layers),
        of_layers=len(plan.source.moe_layers),
        worker_hours=streams + solving,
        wall_hours=streams / run.stream_workers + solving / run.num_workers,
        gpu_hours=hours,
        cost=hours * run.gpu_hour_price if run.gpu_hour_price else None,
        pilot_kl=quality.kl if quality else None,
        kl=quality.kl * factor if quality else None,
    )


def pilot_words(p: Extrapolation) -> str:
    on_gpus = f", {p.gpu_hours:.1f} GPU-hours" if p.gpu_hours else ""
    price = f", {p.cost:,.2f} at the configured price" if p.cost is not None else ""
    forecast = (
        f"; KL from the source {p.kl:.3g} nats a token by forecast ({p.pilot_kl:.3g} with"
        f" {p.layers} layers compressed, as if the layers' errors added up)"
        if p.kl is not None
        else ""
    )
    return (
        f"pilot of {p.layers} layers, no checkpoint; all {p.of_layers} would take"
        f" {duration(3600 * p.worker_hours)} of workers' time{on_gpus}{price},"
        f" {duration(3600 * p.wall_hours)} with the configured workers and none idle{forecast}"
    )


def duration(seconds: float) -> str:
    """1 h 02 min, 3 min 05 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
