"""What report.html says about the experts: errors, tokens, outcomes, regularization, masks and scales."""

import math
from collections import Counter
from collections.abc import Sequence

from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.manifest import LinearRecord
from p48ray.numerics.paired48 import PATTERNS
from p48ray.report import charts
from p48ray.report.charts import Scale, esc
from p48ray.report.fold import Facts, binned, quantiles
from p48ray.report.inspect import pattern_names
from p48ray.report.report import FEW_TOKENS_SHARE
from p48ray.report.sample import LinearSample, total

LISTED = 10
BINS = 24
OUTCOMES = (("solved", "s1"), ("one_shot", "s2"), ("round_to_nearest", "s4"))
SIDES = (("gate and up", "gate_proj"), ("down", "down_proj"))
"""Gate and up are solved as one matrix and share both."""


def section(anchor: str, title: str, intro: str, *body: str) -> str:
    """A card. `intro` is HTML already."""
    return f'<section id="{anchor}"><h2>{esc(title)}</h2><p>{intro}</p>{"".join(body)}</section>\n'


def figure(title: str, body: str, readout: bool = False) -> str:
    live = '<output aria-live="polite"></output>' if readout else ""
    return f"<figure><figcaption>{esc(title)}{live}</figcaption>{body}</figure>"


def error_section(facts: Facts) -> str:
    """A heat map per projection, layers in numbers, the worst linears."""
    maps = []
    for p in PROJECTIONS:
        found, cells = facts.report.relative_output_error[p], facts.errors(p)
        values = [v for row in cells for v in row if v is not None and math.isfinite(v) and v > 0] or [0.1]
        scale = Scale(min(values), max(max(values), 1.01 * min(values)), "log")
        words = f"mean {found.mean:.4f}, worst {found.worst:.4f}"
        alt = f"{p}: relative output error of {len(facts.layers)} layers by {facts.context.layout.num_experts} experts, {words}"
        legend = charts.legend(scale, charts.ERROR_RAMP, f"{scale.low:.4f}", f"{scale.high:.4f}")
        picture = charts.heat_map(p, alt, cells, facts.layers, scale, charts.ERROR_RAMP)
        maps.append(figure(f"{p}: {words}", legend + picture, readout=True))
    intro = (
        "How far each linear's outputs moved over its calibration tokens: mean |Wh − Qh′|² over mean |Wh|². Each picture has a logarithmic scale of its "
        "own, from its best expert to its worst. Point at a cell, or focus a picture and use the arrow keys, to read it. down_proj also answers for what "
        "gate and up lost before it."
    )
    return section("errors", "Error of every expert", intro, *maps, layer_table(facts), worst_table(facts))


def layer_table(facts: Facts) -> str:
    rows = []
    for i, layer in enumerate(facts.layers):
        cells = [str(layer)]
        for p in PROJECTIONS:
            own = [r.relative_output_error for r in facts.records[p][i] if r is not None]
            cells += [f"{sum(own) / len(own):.4f}", f"{max(own):.4f}"] if own else ["-", "-"]
        tokens = [t for t in facts.tokens[i] if t is not None]
        rows.append([*cells, f"{min(tokens, default=0):,}", f"{sum(t < facts.few_tokens for t in tokens):,}"])
    head = [
        "layer",
        *(f"{p.removesuffix('_proj')} {what}" for p in PROJECTIONS for what in ("mean", "worst")),
        "least tokens",
        "under-calibrated",
    ]
    return f"<details><summary>layer by layer in numbers</summary>{charts.table(head, rows)}</details>"


def worst_table(facts: Facts) -> str:
    worst = sorted(facts.all_records, key=lambda r: (-r.relative_output_error, r.name))[:LISTED]
    head = ("linear", "output error", "weight error", "tokens", "damping", "shrinkage", "outcome")
    return f"<details><summary>the {len(worst)} linears that moved most</summary>{charts.table(head, [record_row(r) for r in worst])}</details>"


def record_row(r: LinearRecord) -> list[str]:
    name = f"<code>{esc(r.name)}</code>"
    numbers = [f"{r.relative_output_error:.4f}", f"{r.relative_weight_error:.4f}", f"{r.tokens:,}", f"{r.damp:.4g}", f"{r.shrinkage:.3f}"]
    return [name, *numbers, esc(r.outcome.replace("_", " "))]


def routing_section(facts: Facts) -> str:
    """Tokens of every expert against what calibration wants, and the least of them."""
    few = max(1, facts.few_tokens)
    tokens = [t for row in facts.tokens for t in row if t is not None]
    reach = max([math.log(t / few) for t in tokens if t] + [-math.log(t / few) for t in tokens if t] + [math.log(2)])
    scale = Scale(few * math.exp(-reach), few * math.exp(reach), "log")
    r = facts.report
    marks = [(scale.place(few * f) or 0.0, charts.number(few * f)) for f in legend_factors(reach)]
    empty = f'<li><i class="odd-load"></i>no tokens at all: {r.experts_without_tokens:,}</li>'
    legend = charts.legend(scale, charts.LOAD_RAMP, "fewer", "more", marks) + f'<ul class="key">{empty}</ul>'
    under = r.experts_with_few_tokens + r.experts_without_tokens
    alt = f"calibration tokens of {len(tokens):,} experts; {under:,} have fewer than {few:,}"
    spread = [(layer, quantiles([t for t in row if t is not None] or [0])) for layer, row in zip(facts.layers, facts.tokens, strict=True)]
    least = max(1.0, float(min((t for t in tokens if t), default=1)))
    axis = Scale(least * 0.9, 1.1 * max([*tokens, few]), "log")
    rows = charts.spread_rows(spread, axis, "tokens an expert, by layer", (axis.place(few) or 0.0, f"under-calibrated below {few:,}"))
    intro = (
        f"Calibration tokens that reached each expert. Below {few:,} ({FEW_TOKENS_SHARE:.0%} of what an expert has on average in this plan) it counts as "
        f"under-calibrated and is drawn in orange: <strong>{r.experts_with_few_tokens:,} of {len(tokens):,} experts have few, "
        f"{r.experts_without_tokens:,} have none</strong>. What such an expert lacks, it borrows from its layer (shrinkage, below)."
    )
    return section(
        "routing",
        "Routing load",
        intro,
        legend,
        figure("tokens of every expert", charts.heat_map("tokens", alt, facts.tokens, facts.layers, scale, charts.LOAD_RAMP), readout=True),
        figure(
            "spread within each layer: least, tenth, half, nine tenths, most",
            rows + charts.key([("s2", f"under-calibrated below {few:,} tokens")]),
        ),
        least_table(facts),
    )


def legend_factors(reach: float) -> list[float]:
    """Powers of a whole number around 1 that a scale of ± `reach` (natural logarithm) holds, five or so."""
    base = next(b for b in (2, 4, 10, 100, 10**4, 10**9) if reach / math.log(b) < 3)
    most = int(reach / math.log(base))
    return [float(base) ** n for n in range(-most, most + 1)]


def least_table(facts: Facts) -> str:
    gates = [r for row in facts.records["gate_proj"] for r in row if r is not None and r.tokens < facts.few_tokens]
    if not gates:
        return ""
    least = sorted(gates, key=lambda r: (r.tokens, r.name))[:LISTED]
    rows = [
        [f"<code>{esc(r.name.removesuffix('.gate_proj'))}</code>", f"{r.tokens:,}", f"{r.shrinkage:.3f}", f"{r.relative_output_error:.4f}"]
        for r in least
    ]
    table = charts.table(("expert", "tokens", "gate's shrinkage", "gate's output error"), rows)
    return f"<details><summary>the {len(rows)} experts with the fewest tokens</summary>{table}</details>"


def outcome_section(facts: Facts) -> str:
    """How linears came about, and what clipping there was."""
    r = facts.report
    parts = [
        (css, name.replace("_", " "), float(r.outcomes[name]), f"{r.outcomes[name]:,}") for name, css in OUTCOMES if r.outcomes.get(name)
    ]
    reasons = Counter(x.reason for x in facts.all_records if x.outcome != "solved" and x.reason)
    rows = [[esc(reason), f"{count:,}"] for reason, count in reasons.most_common(LISTED)]
    listed = charts.table(("reason", "linears"), rows) if rows else ""
    clipped = [
        clip_figure(facts, "inputs", "clipped_input_share", r.clipped_input_share),
        clip_figure(facts, "intermediates", "clipped_intermediate_share", r.clipped_intermediate_share),
    ]
    failed = (
        f"{facts.failed_attempts:,} attempts at tasks failed on the way and were made again."
        if facts.failed_attempts
        else "No attempt at a task failed."
    )
    intro = f"{r.num_linears:,} linears. Fallbacks to rounding are recorded with their reason, and above a configured share the job fails. {failed}"
    bar = charts.stack_bar(parts, ", ".join(f"{name} {words}" for _, name, _, words in parts))
    words = "<p>Values beyond what a layer's global scale can hold are clipped. Shares are means over a layer's units.</p>"
    clipping = f'<h3 style="margin-top:24px">Activations clipped</h3>{words}<div class="pair">{"".join(clipped)}</div>'
    return section("outcomes", "Outcomes and clipping", intro, bar, listed, clipping)


def clip_figure(facts: Facts, name: str, field: str, share: float) -> str:
    """Share of activations clipped, layer by layer."""
    by_layer = facts.units_by_layer()
    means = [sum(getattr(u, field) for u in units) / max(1, len(units)) for units in by_layer.values()]
    title = f"{name}: {share:.2e}" if share else f"{name}: none"
    if not any(means):
        return figure(title, "<p>In no layer.</p>")
    names = [f"layer {layer}: {mean:.2e}" for layer, mean in zip(by_layer, means, strict=True)]
    every = -(-len(means) // 8)
    marks = [((i + 0.5) / len(means), str(layer)) for i, layer in enumerate(by_layer) if i % every == 0]
    return figure(
        title, charts.columns(means, names, marks, f"share of {name} clipped by layer, up to {max(means):.2e}", f"{max(means):.1e}")
    )


def regularization_section(facts: Facts) -> str:
    """Histograms of damping and shrinkage."""
    figures = []
    for side, projection in SIDES:
        records = [r for row in facts.records[projection] for r in row if r is not None]
        figures.append(spread_figure(f"damping, {side}", [r.damp for r in records], is_log=True))
        figures.append(spread_figure(f"shrinkage, {side}", [r.shrinkage for r in records], is_log=False))
    intro = (
        "Damping: the fraction of the curvature's mean diagonal that was added to it. Shrinkage: the weight of the whole layer's statistics in an "
        "expert's own, 0 for an expert that stands alone, 1 for one that saw nothing. Columns count experts."
    )
    return section("regularization", "Damping and shrinkage", intro, f'<div class="pair">{"".join(figures)}</div>')


def spread_figure(title: str, values: Sequence[float], is_log: bool) -> str:
    """A histogram, or a sentence where there is nothing to spread. Zeros have no place on a logarithmic axis and are counted apart."""
    placed = [v for v in values if v > 0] if is_log else list(values)
    zeros = len(values) - len(placed)
    beside = f"; {zeros:,} without" if zeros else ""
    if not placed or (is_log and max(placed) == min(placed)):
        return figure(title, f"<p>{f'{placed[0]:.4g} for all of {len(placed):,}' if placed else 'none'}{beside}.</p>")
    low, high = (min(placed), max(placed)) if is_log else (0.0, 1.0)
    scale = Scale(low, high, "log" if is_log else "linear")
    counts = binned(placed, low, high, BINS, is_log)
    at = [low * (high / low) ** (i / BINS) if is_log else i / BINS for i in range(BINS + 1)]
    names = [f"{a:.3g} to {b:.3g}: {n:,} experts" for a, b, n in zip(at, at[1:], counts, strict=False)]
    marks = [(scale.place(t) or 0.0, charts.number(t)) for t in scale.ticks()]
    words = f"{title}: median {quantiles(placed)[2]:.3g}{beside}"
    return figure(words, charts.columns(counts, names, marks, f"{words}, from {min(placed):.3g} to {max(placed):.3g}", f"{max(counts):,}"))


def sample_section(facts: Facts) -> str:
    """Masks and scales of the sampled rows."""
    samples = facts.samples
    if not samples:
        return ""
    rows = sum(s.rows for s in samples)
    experts = len({(s.layer, s.expert) for s in samples})
    body = [pattern_figure(samples)] if samples[0].patterns else []
    body += [overlap_figure(samples)] if any(s.overlap is not None for s in samples) else []
    scales = [scale_figure(samples, p) for p in PROJECTIONS]
    intro = (
        f"Read back from the finished checkpoint: {rows:,} rows of {len(samples):,} linears ({experts:,} experts, some in every layer). A sample, the same "
        "for every run of this shape."
    )
    words = '<h3 style="margin-top:24px">Local scales</h3><p>One E4M3 scale for every 16 inputs, counted by power of two.</p>'
    return section("masks", "Masks and scales", intro, *body, f'{words}<div class="pair three">{"".join(scales)}</div>')


def pattern_figure(samples: Sequence[LinearSample]) -> str:
    """How often each of the six patterns occurs, a sixth marked."""
    counts = {p: total(samples, p, "patterns") for p in PROJECTIONS}
    shares = {p: {name: n / max(1, sum(found.values())) for name, n in found.items()} for p, found in counts.items()}
    most = max(1 / 3, *(s for found in shares.values() for s in found.values()))
    rows = []
    for name, kept in zip(pattern_names(), PATTERNS, strict=True):
        boxes = "".join(f'<i class="{"on" if k else ""}"></i>' for k in kept)
        cells = [share_cell(shares[p][name], most) for p in PROJECTIONS]
        rows.append([f'<span class="pattern" role="img" aria-label="{name}">{boxes}</span>', *cells])
    table = charts.table(("pairs kept of four", *PROJECTIONS), rows, (0, 1, 2, 3))
    return figure("patterns: which two pairs of four are kept; the line is a sixth", table)


def share_cell(share: float, most: float) -> str:
    return f'<div class="share"><span>{share:.2%}</span>{charts.bar(share / most, "s1", 1 / 6 / most)}</div>'


def overlap_figure(samples: Sequence[LinearSample]) -> str:
    """Kept pairs shared with the one-shot's masks, a dot a linear."""
    rows = []
    for p in PROJECTIONS:
        own = [s for s in samples if s.projection == p and s.overlap is not None]
        points = [(s.overlap or 0.0, f"layer {s.layer}, expert {s.expert}: {s.overlap:.2%}") for s in own]
        rows.append((p, points))
    means = ", ".join(f"{p} {sum(v for v, _ in points) / len(points):.1%}" for p, points in rows)
    ticks = [(v, f"{v:.0%}") for v in (0.5, 0.75, 1.0)]
    low = min(0.5, *(v for _, points in rows for v, _ in points))
    chart = charts.dots(rows, Scale(low, 1.0), f"share of kept pairs that the one-shot keeps too: {means}", ticks)
    words = "<p>Two random masks would share 50%; the line is the mean.</p>"
    return figure(f"overlap with the one-shot's masks: {means}", words + chart)


def scale_figure(samples: Sequence[LinearSample], projection: str) -> str:
    counts = total(samples, projection, "scales")
    whole, most = sum(counts.values()) or 1, max(counts.values(), default=1)
    names = [f"{name}: {n / whole:.2%}" for name, n in counts.items()]
    every = -(-len(counts) // 7)
    marks = [((i + 0.5) / len(counts), superscript(name)) for i, name in enumerate(counts) if i % every == 0]
    return figure(
        projection,
        charts.columns(list(counts.values()), names, marks, f"{projection}: local scales by power of two", f"{most / whole:.0%}"),
    )


def superscript(name: str) -> str:
    base, sign, power = name.partition("^")
    return base + power.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")) if sign else name
