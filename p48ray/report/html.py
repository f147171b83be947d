"""report/report.html: a run as one page to look at. Self-contained: its own policy forbids the browser to fetch anything.

A pure function of what the run root holds; the clock of the machine that writes it plays no part. Drawing is in charts.py, folding in fold.py, the look into
the checkpoint in sample.py, and what the page says about experts in expert_sections.py.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources

from p48ray import __version__
from p48ray.manifest import UnitManifest
from p48ray.numerics.solution import PAIRED_48
from p48ray.report import charts
from p48ray.report.benchmark_section import benchmark_section
from p48ray.report.charts import esc
from p48ray.report.expert_sections import (
    error_section,
    figure,
    outcome_section,
    regularization_section,
    routing_section,
    sample_section,
    section,
)
from p48ray.report.fold import MERGED_SHARE, Facts, busy, gather, merged, shared_seconds
from p48ray.report.ladder_section import ladder_section
from p48ray.report.plan_table import size
from p48ray.report.report import Report
from p48ray.report.work import duration, gpu_hours, pilot_words
from p48ray.stages.context import StageContext
from p48ray.stages.evaluate import EvaluationResult
from p48ray.stages.table import COMPRESS, stages_of
from p48ray.store.base import Store

BUSY_STEPS = 160
PHASE_COLOURS = ("s3", "s2", "s1", "s4", "s5")


def report_html(context: StageContext, report: Report, units: Sequence[UnitManifest], baseline_store: Store | None = None) -> str:
    """The page.

    Args: units: manifests of all the run's units. baseline_store: run root of the one-shot reference, for the overlap of masks.
    """
    facts = gather(context, report, units, baseline_store)
    sections = [
        quality_section(facts),
        benchmark_section(facts.report.benchmarks),
        ladder_section(facts),
        timeline_section(facts),
        error_section(facts),
        routing_section(facts),
        outcome_section(facts),
        regularization_section(facts),
        sample_section(facts),
        cost_section(facts),
        made_section(facts),
    ]
    return page(facts, [s for s in sections if s])


def page(facts: Facts, sections: Sequence[str]) -> str:
    """Frame, policy, style and script around the sections."""
    script = "\n" + asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    style = asset("report.css") + charts.ramp_styles((charts.ERROR_RAMP, charts.LOAD_RAMP))
    links = "".join(f'<a href="#{anchor}">{esc(anchor.capitalize())}</a>' for anchor in map(anchor_of, sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{esc(facts.report.name)}: report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'{top(facts)}<nav aria-label="sections">{links}</nav></header>\n<main>\n{"".join(sections)}</main>\n'
        f"<footer>p48ray {esc(__version__)}, plan {esc(facts.report.plan_digest)}</footer>\n"
        f'<script type="application/json" id="data">{data(facts)}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def asset(name: str) -> str:
    return resources.files("p48ray.report").joinpath(name).read_text(encoding="utf-8")


def anchor_of(card: str) -> str:
    """As `section` wrote it."""
    return card.partition('id="')[2].partition('"')[0]


def data(facts: Facts) -> str:
    """What the script reads out: four digits of every error, and every token count. Numbers alone, so that nothing in it can end the element."""
    errors = {p: [[None if v is None else finite(v) for v in row] for row in facts.errors(p)] for p in facts.records}
    fields = {
        "layers": list(facts.layers),
        "experts": facts.context.layout.num_experts,
        "few": facts.few_tokens,
        "tokens": facts.tokens,
        "error": errors,
    }
    return json.dumps(fields, separators=(",", ":"))


def finite(value: float) -> float | None:
    return float(f"{value:.4g}") if value - value == 0 else None


def top(facts: Facts) -> str:
    r = facts.report
    form = "paired-4:8 sparse, NVFP4 weights and activations (W4A4)" if r.sparsity == PAIRED_48 else "NVFP4 weights and activations (W4A4)"
    experts = f"{len(facts.layers)} layers × {facts.context.layout.num_experts} experts"
    pilot = " A pilot of some layers: there is no checkpoint." if r.pilot else ""
    tiles = "".join(
        f'<div class="tile"><span>{esc(name)}</span><strong>{esc(value)}</strong><span>{esc(words)}</span></div>'
        for name, value, words in tile_texts(facts)
    )
    return f'<header><h1>{esc(r.name)}</h1><p>{esc(experts)}, {form}, by {esc(r.solver)}.{pilot}</p><div class="tiles">{tiles}</div>'


def tile_texts(facts: Facts) -> list[tuple[str, str, str]]:
    """(name, figure, words) of the figures that a person asks for first."""
    r, found = facts.report, []
    if r.quality is not None:
        beside = (
            f"{r.quality.kl / r.baseline.kl:.2f} × the one-shot's {r.baseline.kl:.4f}" if r.baseline and r.baseline.kl else "nats a token"
        )
        found.append(("KL to the source", f"{r.quality.kl:.4f}", beside))
        found.append(("perplexity", f"{r.quality.compressed_perplexity:.4f}", f"source {r.quality.source_perplexity:.4f}"))
    if r.pilot is None:
        found.append(("checkpoint", size(r.checkpoint_bytes), f"source {size(r.source_bytes)}"))
    others = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(r.outcomes.items()) if name != "solved")
    found.append(("expert linears", f"{r.num_linears:,}", others or "all solved"))
    hours = gpu_hours(facts.context.plan, facts.work)
    price = facts.context.plan.config.run.gpu_hour_price
    if hours:
        found.append(
            (
                "GPU-hours",
                f"{hours:,.1f}" if hours >= 10 else f"{hours:.3g}",
                f"{hours * price:,.2f} at {price:g} an hour" if price else "of finished work",
            )
        )
    else:
        found.append(("workers' time", duration(sum(w.worker_seconds for w in facts.work)), "of finished work"))
    return found


def quality_section(facts: Facts) -> str:
    r = facts.report
    settings = facts.context.plan.config.evaluation
    if r.quality is None or settings is None:
        return ""
    rows: list[tuple[str, EvaluationResult]] = [(f"{r.solver}, {r.sparsity}", r.quality)]
    if r.baseline is not None:
        rows.insert(0, ("one-shot baseline", r.baseline))
    worst = max(result.kl for _, result in rows) or 1.0
    body = [["source", "0", f"{r.quality.source_perplexity:.4f}", "", f"{r.quality.source_accuracy:.4f}", charts.bar(0.0)]]
    for name, result in rows:
        css = "s1" if result is r.quality else "s5"
        more = result.compressed_perplexity / result.source_perplexity - 1
        numbers = [f"{result.kl:.4f}", f"{result.compressed_perplexity:.4f}", f"{more:+.2%}", f"{result.compressed_accuracy:.4f}"]
        strong = [f"<strong>{v}</strong>" if result is r.quality else v for v in (esc(name), *numbers)]
        body.append([*strong, charts.bar(result.kl / worst, css)])
    if (other := r.quality.in_groups_of_32) is not None:
        more = other.perplexity / r.quality.source_perplexity - 1
        numbers = [f"{other.kl:.4f}", f"{other.perplexity:.4f}", f"{more:+.2%}", f"{other.accuracy:.4f}"]
        body.append(["the same on sparse kernels", *numbers, charts.bar(min(1.0, other.kl / worst), "s2")])
    how = "NVFP4 activations emulated, as served" if settings.activations == "nvfp4" else "original activations"
    intro = (
        f"{r.quality.num_tokens:,} held-out tokens in sequences of {settings.sequence_length:,} through the source and through the written checkpoint, "
        f"side by side ({how}). KL: how far the checkpoint's distribution of the next token is from the source's, nats a token."
    )
    if r.quality.in_groups_of_32 is not None:
        intro += " On sparse kernels 32 inputs share an activation scale, 16 on those of stock servers."
    return section(
        "quality", "Quality", intro, charts.table(("", "KL to source", "perplexity", "over source", "token accuracy", "KL"), body, (0, 5))
    )


def timeline_section(facts: Facts) -> str:
    """Who worked when, on which layer."""
    if not facts.spans:
        return ""
    start, end = min(s.start for s in facts.spans), max(s.end for s in facts.spans)
    whole = max(end - start, 1e-3)
    marks = [(at / whole, label) for at, label in charts.time_ticks(whole)]
    stages = [(s.name, s.colour) for s in stages_of(facts.context.plan) if s.manifest]
    rows = []
    for layer in facts.layers:
        segments = []
        for stage, css in stages:
            mine = [s for s in facts.spans if s.layer == layer and s.stage == stage]
            for a, b, count in merged(mine, MERGED_SHARE * whole):
                words = f"layer {layer}, {stage}: {count} pieces of work in {duration(b - a)}, from {duration(a - start)} on"
                segments.append((css, (a - start) / whole, (b - start) / whole, words))
        rows.append((layer, segments))
    at_work = [
        (css, busy([s for s in facts.spans if s.stage == stage], start, end if end > start else start + whole, BUSY_STEPS))
        for stage, css in stages
    ]
    most = max(sum(v) for v in zip(*(v for _, v in at_work), strict=True))
    shared = shared_seconds(*([s for s in facts.spans if (s.stage == COMPRESS.name) == is_unit] for is_unit in (False, True)))
    at_once = f", {esc(duration(shared))} of it with streams and units at once" if shared else ""
    begun, ended = (datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M") for t in (start, end))
    present = [(css, stage) for stage, css in stages if any(s.stage == stage for s in facts.spans)]
    intro = (
        f"{begun} to {ended} UTC, {esc(duration(whole))} from the first piece of work to the last{at_once}. Above: workers busy at once. Below: when "
        "each layer was captured, differentiated and compressed. A gap is waiting or an interruption; attempts that were lost leave no mark."
    )
    words = f"workers at work, up to {most:.3g}"
    area = charts.stacked_area(at_work, words, f"{most:.3g}")
    bars = charts.segment_rows(rows, marks, "when each layer was worked on, by stage")
    return section("timeline", "Timeline", intro, figure(words, area + bars + charts.key(present)))


def cost_section(facts: Facts) -> str:
    """Work by stage, what it cost, where the units' time went, and the sizes."""
    r, run = facts.report, facts.context.plan.config.run
    price = run.gpu_hour_price
    rows = []
    for w in facts.work:
        hours = gpu_hours(facts.context.plan, [w])
        cost = f"{hours * price:,.2f}" if price and hours else "-"
        rows.append([w.stage, f"{w.done:,}", duration(w.worker_seconds), f"{hours:,.2f}" if hours else "-", cost])
    hours = gpu_hours(facts.context.plan, facts.work)
    spent = [
        duration(sum(w.worker_seconds for w in facts.work)),
        f"{hours:,.2f}" if hours else "-",
        f"{hours * price:,.2f}" if price and hours else "-",
    ]
    rows.append([f"<strong>{v}</strong>" for v in ("all", f"{sum(w.done for w in facts.work):,}", *spent)])
    driver = ", ".join(f"{name} {duration(s)}" for name, s in r.stage_seconds.items())
    phases = sorted(r.unit_seconds.items(), key=lambda item: -item[1])
    whole = sum(r.unit_seconds.values()) or 1.0
    parts = [(PHASE_COLOURS[min(i, 4)], name, s, f"{duration(s)}, {s / whole:.0%}") for i, (name, s) in enumerate(phases)]
    intro = f"Time of finished work, summed over workers; attempts that were lost and waiting are not in it. {idle_words(facts)}"
    pilot = "" if r.pilot is None else f"<p>{esc(pilot_words(r.pilot))}</p>"
    return section(
        "cost",
        "Cost and size",
        intro,
        pilot,
        charts.table(("stage", "pieces of work", "workers' time", "GPU-hours", f"cost at {price:g} an hour" if price else "cost"), rows),
        figure("where the units' time went", charts.stack_bar(parts, "time of units by phase")),
        "" if r.pilot else size_figure(facts),
        f'<p style="margin:18px 0 0">The last driver waited: {esc(driver)}.</p>' if driver else "",
    )


def idle_words(facts: Facts) -> str:
    """What workers are paid for from the first piece of work to the last, and did not work."""
    if not facts.spans:
        return ""
    run = facts.context.plan.config.run
    whole = max(s.end for s in facts.spans) - min(s.start for s in facts.spans)
    worked = sum(s.end - s.start for s in facts.spans)
    idle = max(0.0, whole * run.num_workers - worked)
    on_gpus = f", {idle / 3600 * run.gpus_per_worker:,.2f} GPU-hours" if run.gpus_per_worker else ""
    return (
        f"If all {run.num_workers:,} workers were there from the first of it to the last, {esc(duration(whole))}, they were idle for "
        f"{esc(duration(idle))} together{on_gpus} ({idle / (whole * run.num_workers):.0%})."
        if whole > 0
        else ""
    )


def size_figure(facts: Facts) -> str:
    r, source = facts.report, facts.context.plan.source
    weights = r.num_linears * source.hidden_size * source.moe_intermediate_size
    rest = r.checkpoint_bytes - r.expert_bytes
    most = max(r.source_bytes, r.checkpoint_bytes)
    rows = [
        ["source", f"{r.source_bytes:,}", charts.bar(r.source_bytes / most, "s5")],
        ["checkpoint", f"{r.checkpoint_bytes:,}", charts.bar(r.checkpoint_bytes / most)],
        [
            f"of it experts, {8 * r.expert_bytes / weights:.2f} bits a weight",
            f"{r.expert_bytes:,}",
            charts.bar(r.expert_bytes / most, "s2"),
        ],
        ["of it untouched", f"{rest:,}", charts.bar(rest / most, "s5")],
    ]
    return figure("bytes of tensors", charts.table(("", "bytes", ""), rows, (0, 2)))


def made_section(facts: Facts) -> str:
    """What the page is about, exactly."""
    r, config = facts.report, facts.context.plan.config
    entries = [
        ("source", r.source),
        ("checkpoint", "none: a pilot" if r.pilot else r.checkpoint),
        *([("storage", "sparse, for the kernels of paired-4:8")] if r.storage == "sparse" else []),
        ("calibration", f"{config.calibration.num_sequences:,} × {config.calibration.sequence_length:,} = {r.calibration_tokens:,} tokens"),
        ("scales", f"one for {r.scale_span} inputs of a weight, activations in groups of {r.activation_group}"),
        ("devices", ", ".join(f"{name} ({count:,} units)" for name, count in sorted(r.devices.items()))),
        ("versions", ", ".join(f"{name} {version}" for name, version in r.versions.items())),
        ("plan", r.plan_digest),
    ]
    listed = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in entries)
    settings = json.dumps(config.model_dump(mode="json", include={"calibration", "compression", "evaluation", "output"}), indent=1)
    folded = f'<details><summary>settings</summary><pre tabindex="0">{esc(settings)}</pre></details>'
    return section("made", "How it was made", "What went in, and what it was done with.", f"<dl>{listed}</dl>", folded)
