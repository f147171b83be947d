"""What report.html says about the run as a whole: quality, timeline, cost, how it was made.

A function per section gives the values of the template of its name (templates/*.html.j2).
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import chain, repeat
from typing import NamedTuple

from p48ray.report import charts
from p48ray.report.charts import Part
from p48ray.report.fold import MERGED_SHARE, Facts, Values
from p48ray.report.gains import gains
from p48ray.report.report import Report, texts_words
from p48ray.report.scales import time_ticks
from p48ray.report.spans import Span, busy, merged_spans, most_at_once, shared_seconds
from p48ray.report.work import Work, duration, gpu_hours, pilot_words
from p48ray.stages.evaluate import EvaluationResult
from p48ray.stages.table import COMPRESS_STAGE, stages_of

BUSY_STEPS = 160
PHASE_COLOURS = ("s3", "s2", "s1", "s4", "s5")
SHOWN_SECTIONS = {"calibration", "compression", "evaluation", "output"}
"""Sections of the configuration that the page shows."""


class QualityRow(NamedTuple):
    """One checkpoint on held-out text. `more`: perplexity over the source's, as a share of it.

    `share`: length of the bar, as a share of the longest on the page.
    """

    name: str
    kl: float
    perplexity: float
    more: float
    accuracy: float
    share: float
    css: str
    is_own: bool


def quality(facts: Facts) -> Values | None:
    """Source, baseline and result on held-out text; None where nothing was evaluated."""
    r = facts.report
    settings = facts.context.plan.config.evaluation
    if r.quality is None or settings is None:
        return None
    worst = worst_kl(r)
    rows = [quality_row(f"{r.solver}, {r.sparsity}", r.quality, worst, is_own=True)]
    if r.baseline is not None:
        rows.insert(0, quality_row("one-shot baseline", r.baseline, worst, is_own=False))
    if (other := r.quality.in_groups_of_32) is not None:
        more = other.perplexity / r.quality.source_perplexity - 1
        figures = (other.kl, other.perplexity, more, other.accuracy, other.kl / worst)
        rows.append(QualityRow("the same on sparse kernels", *figures, "s2", is_own=False))
    return {
        "num_tokens": r.quality.num_tokens,
        "sequence_length": settings.sequence_length,
        "is_nvfp4": settings.activations == "nvfp4",
        "has_sparse_kernels": other is not None,
        "source_perplexity": r.quality.source_perplexity,
        "source_accuracy": r.quality.source_accuracy,
        "rows": rows,
        "has_bars": len(rows) > 1,
    }


def worst_kl(report: Report) -> float:
    """The largest KL on the page: what a full bar stands for, wherever there is one of a KL."""
    found = [report.baseline, report.quality, report.quality and report.quality.in_groups_of_32]
    return max((q.kl for q in found if q is not None), default=0.0) or 1.0


def quality_row(name: str, q: EvaluationResult, worst: float, is_own: bool) -> QualityRow:
    """A row of the table.

    Args:
        name: of the row.
        q: what it shows.
        worst: the KL that has the longest bar.
        is_own: it is this run's result, not the baseline's.
    """
    return QualityRow(
        name=name,
        kl=q.kl,
        perplexity=q.compressed_perplexity,
        more=q.compressed_perplexity / q.source_perplexity - 1,
        accuracy=q.compressed_accuracy,
        share=q.kl / worst,
        css="s1" if is_own else "s5",
        is_own=is_own,
    )


def timeline(facts: Facts) -> Values | None:
    """Who worked when, on which layer; None where no work has left its times."""
    spans = facts.spans
    if not spans:
        return None
    start, end = min(s.start for s in spans), max(s.end for s in spans)
    whole = max(end - start, 1e-3)
    marks = [(at / whole, label) for at, label in time_ticks(whole)]
    stages = timed_stages(facts)
    rows = [(layer, layer_segments(spans, stages, layer, start, whole)) for layer in facts.layers]
    last = end if end > start else start + whole
    own = {stage: [s for s in spans if s.stage == stage] for stage, _ in stages}
    at_work = [(css, busy(own[stage], start, last, BUSY_STEPS)) for stage, css in stages]
    there = num_workers(facts)
    streams = [s for s in spans if s.stage != COMPRESS_STAGE.name]
    words = f"workers at work: up to {most_at_once(spans):,} of {there:,}"
    begun, ended = (datetime.fromtimestamp(t, UTC) for t in (start, end))
    return {
        "begun": f"{begun:%Y-%m-%d %H:%M}",
        "ended": f"{ended:%Y-%m-%d %H:%M}",
        "seconds": whole,
        "idle": idle(facts),
        "shared_seconds": shared_seconds(streams, own[COMPRESS_STAGE.name]),
        "title": words,
        "workers": charts.stacked_area(at_work, words, there),
        "layers": charts.segment_rows(rows, marks, "when each layer was worked on, by stage"),
        "stages": [(css, stage) for stage, css in stages if own[stage]],
    }


def num_workers(facts: Facts) -> int:
    """How many there were: those that the run asks for, or more that were seen at work at once
    (before it was resumed with fewer)."""
    return max(facts.context.plan.config.run.num_workers, most_at_once(facts.spans))


def timed_stages(facts: Facts) -> list[tuple[str, str]]:
    """(name, CSS class) of the plan's stages whose records say who worked when."""
    return [(s.name, s.colour) for s in stages_of(facts.context.plan) if s.manifest]


def layer_segments(
    spans: Sequence[Span],
    stages: Sequence[tuple[str, str]],
    layer: int,
    start: float,
    whole: float,
) -> list[charts.TimelineBar]:
    """A layer's stretches of work.

    Args:
        spans: of all layers and stages.
        stages: see timed_stages.
        layer: the layer's number.
        start, whole: where the timeline begins, Unix seconds, and how many seconds it has.
    """
    found = []
    for stage, css in stages:
        own = [s for s in spans if s.layer == layer and s.stage == stage]
        for a, b, count in merged_spans(own, MERGED_SHARE * whole):
            times = f"{duration(b - a)}, from {duration(a - start)} on"
            words = f"layer {layer}, {stage}: {count} pieces of work in {times}"
            found.append((css, (a - start) / whole, (b - start) / whole, words))
    return found


class CostRow(NamedTuple):
    """Finished work. `cost` is None without a price."""

    stage: str
    done: int
    worker_seconds: float
    gpu_hours: float
    cost: float | None


def cost(facts: Facts) -> Values:
    """Work by stage, what it cost, where the units' time went, and the sizes."""
    r, price = facts.report, facts.context.plan.config.run.gpu_hour_price
    phases = sorted(r.unit_seconds.items(), key=lambda item: -item[1])
    whole = sum(r.unit_seconds.values()) or 1.0
    return {
        "price": price,
        "pilot": None if r.pilot is None else pilot_words(r.pilot),
        "idle": idle(facts),
        "stages": [cost_row(facts, w.stage, [w]) for w in facts.work],
        "all": cost_row(facts, "all", facts.work),
        "phases": [
            Part(css, name, s / whole, f"{duration(s)}, {s / whole:.0%}")
            for css, (name, s) in zip(chain(PHASE_COLOURS, repeat("s5")), phases, strict=False)
        ],
        "sizes": None if facts.context.plan.is_pilot else sizes(facts),
        "driver_seconds": r.stage_seconds,
    }


def cost_row(facts: Facts, stage: str, work: Sequence[Work]) -> CostRow:
    hours, price = gpu_hours(facts.context.plan, work), facts.context.plan.config.run.gpu_hour_price
    seconds = sum(w.worker_seconds for w in work)
    done = sum(w.done for w in work)
    return CostRow(stage, done, seconds, hours, hours * price if price else None)


def idle(facts: Facts) -> Values | None:
    """What workers are paid for from the first piece of work to the last, and did not work.

    None where no time has passed. `whole_s`: from first to last. `idle_s`: of all workers together.
    `share`: of all that they could have worked. `gpu_hours`: None without GPUs.
    """
    if not facts.spans:
        return None
    run = facts.context.plan.config.run
    whole = max(s.end for s in facts.spans) - min(s.start for s in facts.spans)
    if whole <= 0:
        return None
    there = num_workers(facts)
    seconds = whole * there - sum(s.end - s.start for s in facts.spans)
    return {
        "num_workers": there,
        "whole_s": whole,
        "idle_s": seconds,
        "share": seconds / (whole * there),
        "gpu_hours": seconds / 3600 * run.gpus_per_worker if run.gpus_per_worker else None,
    }


def sizes(facts: Facts) -> Values:
    """Bytes of tensors: source, checkpoint, and of it experts and the rest; bars to the largest."""
    r, found = facts.report, gains(facts.context)
    bits = found.sparse if r.storage == "sparse" and found.sparse else found.dense
    return {
        "most": max(r.source_bytes, r.checkpoint_bytes),
        "source": r.source_bytes,
        "checkpoint": r.checkpoint_bytes,
        "experts": r.expert_bytes,
        "expert_bits": bits,
        "untouched": r.checkpoint_bytes - r.expert_bytes,
        "source_form": facts.context.layout.expert_storage,
        "gains": found,
    }


def made(facts: Facts) -> Values:
    """What the page is about, exactly."""
    config = facts.context.plan.config
    settings = config.model_dump(mode="json", include=SHOWN_SECTIONS)
    return {
        "report": facts.report,
        "is_pilot": facts.context.plan.is_pilot,
        "calibration": config.calibration,
        "texts": texts_words(facts.report),
        "settings": json.dumps(settings, indent=1),
    }
