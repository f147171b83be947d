"""What report.html says about the experts: errors, tokens, outcomes, regularization, masks, scales.

A function per section gives the values of the template of its name (templates/*.html.j2).
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.numerics.paired48 import PATTERNS
from p48ray.report import charts
from p48ray.report.charts import Chart, Part
from p48ray.report.fold import Facts, Values, binned, quantiles
from p48ray.report.heat import ERROR_RAMP, LOAD_RAMP, heat_map, legend
from p48ray.report.inspect import pattern_names
from p48ray.report.report import FEW_TOKENS_SHARE, zero_layer_words
from p48ray.report.sample import LinearSample, total
from p48ray.report.scales import Scale, number

LISTED = 10
BINS = 24
OUTCOMES = (("solved", "s1"), ("one_shot", "s2"), ("round_to_nearest", "s4"), ("zero", "s5"))
SIDE_PROJECTIONS = (("gate and up", "gate_proj"), ("down", "down_proj"))
"""Gate and up are solved as one matrix and share both."""


class Spread(NamedTuple):
    """How values are spread over experts. Without a chart there was nothing to spread."""

    title: str
    words: str
    chart: Chart | None


def errors(facts: Facts) -> Values | None:
    """A heat map per projection, layers in numbers, the worst linears; None
    before there is a unit."""
    if not facts.units:
        return None
    maps: list[Values] = []
    shape = f"{len(facts.layers)} layers by {facts.context.layout.num_experts} experts"
    for p in PROJECTIONS:
        found, cells = facts.report.relative_output_error[p], facts.errors(p)
        placed = [v for row in cells for v in row if v is not None and math.isfinite(v) and v > 0]
        low, high = min(placed, default=0.1), max(placed, default=0.1)
        scale = Scale(low, max(high, 1.01 * low), "log")
        words = f"mean {found.mean:.4f}, worst {found.worst:.4f}"
        alt = f"{p}: relative output error of {shape}, {words}"
        key = legend(scale, ERROR_RAMP, f"{scale.low:.4f}", f"{scale.high:.4f}")
        picture = heat_map(p, alt, cells, facts.layers, scale, ERROR_RAMP)
        maps.append({"title": f"{p}: {words}", "legend": key, "picture": picture})
    worst = sorted(facts.all_records, key=lambda r: (-r.relative_output_error, r.name))[:LISTED]
    return {"maps": maps, "layers": layer_rows(facts), "worst": worst}


def layer_rows(facts: Facts) -> list[Values]:
    """Layer by layer: (mean, worst) of each projection (None without a record), and tokens."""
    rows: list[Values] = []
    for i, layer in enumerate(facts.layers):
        found: list[tuple[float, float] | None] = []
        for p in PROJECTIONS:
            own = [r.relative_output_error for r in facts.records[p][i] if r is not None]
            found.append((sum(own) / len(own), max(own)) if own else None)
        tokens = [t for t in facts.tokens[i] if t is not None]
        under = sum(t < facts.few_tokens for t in tokens)
        least = min(tokens, default=0)
        rows.append({"layer": layer, "errors": found, "least": least, "under": under})
    return rows


def routing(facts: Facts) -> Values | None:
    """Tokens of every expert against what calibration wants, and the least of them; None
    before there is a unit."""
    if not facts.units:
        return None
    r, few = facts.report, max(1, facts.few_tokens)
    tokens = [t for row in facts.tokens for t in row if t is not None]
    reach = max([abs(math.log(t / few)) for t in tokens if t] + [math.log(2)])
    scale = Scale(few * math.exp(-reach), few * math.exp(reach), "log")
    factors = [few * f for f in legend_factors(reach)]
    marks = [(scale.place(f) or 0.0, number(f)) for f in factors]
    under = r.experts_with_few_tokens + r.experts_without_tokens
    alt = f"calibration tokens of {len(tokens):,} experts; {under:,} have fewer than {few:,}"
    return {
        "few": few,
        "few_share": FEW_TOKENS_SHARE,
        "num_few": r.experts_with_few_tokens,
        "num_without": r.experts_without_tokens,
        "num_experts": len(tokens),
        "legend": legend(scale, LOAD_RAMP, "fewer", "more", marks),
        "map": heat_map("tokens", alt, facts.tokens, facts.layers, scale, LOAD_RAMP),
        "spread": token_spread(facts, tokens, few),
        "least": least_records(facts),
    }


def token_spread(facts: Facts, tokens: Sequence[int], few: int) -> Chart:
    """Quantiles of tokens an expert, a row a layer. `tokens`: of all experts."""
    own = [[t for t in row if t is not None] or [0] for row in facts.tokens]
    spread = list(zip(facts.layers, map(quantiles, own), strict=True))
    least = max(1.0, float(min((t for t in tokens if t), default=1)))
    scale = Scale(least * 0.9, 1.1 * max([*tokens, few]), "log")
    mark = (scale.place(few) or 0.0, f"under-calibrated below {few:,}")
    return charts.spread_rows(spread, scale, "tokens an expert, by layer", mark)


def legend_factors(reach: float) -> list[float]:
    """Powers of a whole number around 1, five or so.

    Args: reach: the scale goes that far both ways, natural logarithm.
    """
    base = next(b for b in (2, 4, 10, 100, 10**4, 10**9) if reach / math.log(b) < 3)
    most = int(reach / math.log(base))
    return [float(base) ** n for n in range(-most, most + 1)]


def least_records(facts: Facts) -> list[Values]:
    """The under-calibrated experts with the fewest tokens."""
    gates = [r for row in facts.records["gate_proj"] for r in row if r is not None]
    under = [r for r in gates if r.tokens < facts.few_tokens]
    least = sorted(under, key=lambda r: (r.tokens, r.name))[:LISTED]
    return [{"expert": r.name.removesuffix(".gate_proj"), "gate": r} for r in least]


def outcomes(facts: Facts) -> Values | None:
    """How linears came about, and what clipping there was; None before there is a unit."""
    if not facts.units:
        return None
    r = facts.report
    known = [(name, css, r.outcomes[name]) for name, css in OUTCOMES if r.outcomes.get(name)]
    whole = sum(count for *_, count in known) or 1
    parts = [Part(css, name.replace("_", " "), n / whole, f"{n:,}") for name, css, n in known]
    fallen = [x.reason for x in facts.all_records if x.outcome != "solved" and x.reason]
    return {
        "num_linears": r.num_linears,
        "failed_attempts": facts.failed_attempts,
        "parts": parts,
        "reasons": Counter(fallen).most_common(LISTED),
        "has_zero": bool(r.outcomes.get("zero")),
        "zero_layers": zero_layer_words(r),
        "clipped": [
            clipping(facts, "inputs", "clipped_input_share"),
            clipping(facts, "intermediates", "clipped_intermediate_share"),
        ],
    }


def clipping(facts: Facts, name: str, field: str) -> Values:
    """Share of activations clipped: of all, and a column a layer (no chart where none was).

    Args:
        facts: of the run.
        name: of the activations.
        field: of the report, and of a unit's manifest.
    """
    by_layer = facts.units_by_layer()
    means = [sum(getattr(u, field) for u in us) / max(1, len(us)) for us in by_layer.values()]
    names = [f"layer {layer}: {mean:.2e}" for layer, mean in zip(by_layer, means, strict=True)]
    every = -(-len(means) // 8)
    named = [(i, str(layer)) for i, layer in enumerate(by_layer) if i % every == 0]
    marks = [((i + 0.5) / len(means), layer) for i, layer in named]
    most = max(means)
    label = f"share of {name} clipped by layer, up to {most:.2e}"
    chart = charts.columns(means, names, marks, label, f"{most:.1e}") if any(means) else None
    return {"name": name, "share": getattr(facts.report, field), "chart": chart}


def regularization(facts: Facts) -> Values | None:
    """Histograms of damping and shrinkage; None before there is a unit."""
    if not facts.units:
        return None
    found = []
    for side, projection in SIDE_PROJECTIONS:
        records = [r for row in facts.records[projection] for r in row if r is not None]
        found.append(spread_of(f"damping, {side}", [r.damp for r in records], is_log=True))
        found.append(spread_of(f"shrinkage, {side}", [r.shrinkage for r in records], is_log=False))
    return {"spreads": found}


def spread_of(title: str, values: Sequence[float], is_log: bool) -> Spread:
    """A histogram, or a sentence where there is nothing to spread.

    Zeros have no place on a logarithmic axis and are counted apart.
    """
    placed = [v for v in values if v > 0] if is_log else list(values)
    zeros = len(values) - len(placed)
    beside = f"; {zeros:,} without" if zeros else ""
    if not placed:
        return Spread(title, f"none{beside}.", None)
    if is_log and max(placed) == min(placed):
        return Spread(title, f"{placed[0]:.4g} for all of {len(placed):,}{beside}.", None)
    low, high = (min(placed), max(placed)) if is_log else (0.0, 1.0)
    scale = Scale(low, high, "log" if is_log else "linear")
    counts = binned(placed, low, high, BINS, is_log)
    shares = [i / BINS for i in range(BINS + 1)]
    at = [low * (high / low) ** share for share in shares] if is_log else shares
    bins = zip(at, at[1:], counts, strict=False)
    names = [f"{start:.3g} to {end:.3g}: {n:,} experts" for start, end, n in bins]
    marks = [(scale.place(t) or 0.0, number(t)) for t in scale.ticks()]
    words = f"{title}: median {quantiles(placed)[2]:.3g}{beside}"
    label = f"{words}, from {min(placed):.3g} to {max(placed):.3g}"
    return Spread(words, "", charts.columns(counts, names, marks, label, f"{max(counts):,}"))


def masks(facts: Facts) -> Values | None:
    """Masks and scales of the sampled rows; None where there is no checkpoint."""
    samples = facts.samples
    if not samples:
        return None
    return {
        "num_rows": sum(s.rows for s in samples),
        "num_linears": len(samples),
        "num_experts": len({(s.layer, s.expert) for s in samples}),
        "projections": PROJECTIONS,
        "patterns": pattern_rows(samples) if samples[0].patterns else [],
        "overlap": overlap(samples) if any(s.overlap is not None for s in samples) else None,
        "scales": [(p, scale_chart(samples, p)) for p in PROJECTIONS],
    }


def pattern_rows(samples: Sequence[LinearSample]) -> list[Values]:
    """How often each of the six patterns occurs, as shares and as lengths of bars.

    `sixth`: where a sixth lies on such a bar.
    """
    counts = {p: total(samples, p, "patterns") for p in PROJECTIONS}
    sums = {p: max(1, sum(found.values())) for p, found in counts.items()}
    shares = {p: {name: n / sums[p] for name, n in found.items()} for p, found in counts.items()}
    most = max(1 / 3, *(s for found in shares.values() for s in found.values()))
    rows: list[Values] = []
    for name, kept in zip(pattern_names(), PATTERNS, strict=True):
        own = [shares[p][name] for p in PROJECTIONS]
        bars = [(share, share / most) for share in own]
        rows.append({"name": name, "kept": kept, "shares": bars, "sixth": 1 / 6 / most})
    return rows


def overlap(samples: Sequence[LinearSample]) -> Values:
    """Kept pairs shared with the one-shot's masks, a dot a linear, and their means in words."""
    rows = []
    for p in PROJECTIONS:
        own = [s for s in samples if s.projection == p and s.overlap is not None]
        names = [f"layer {s.layer}, expert {s.expert}: {s.overlap:.2%}" for s in own]
        rows.append((p, list(zip([s.overlap or 0.0 for s in own], names, strict=True))))
    means = ", ".join(f"{p} {sum(v for v, _ in dots) / len(dots):.1%}" for p, dots in rows)
    ticks = [(v, f"{v:.0%}") for v in (0.5, 0.75, 1.0)]
    low = min(0.5, *(v for _, dots in rows for v, _ in dots))
    label = f"share of kept pairs that the one-shot keeps too: {means}"
    return {"means": means, "chart": charts.dots(rows, Scale(low, 1.0), label, ticks)}


def scale_chart(samples: Sequence[LinearSample], projection: str) -> Chart:
    """Local scales of a projection, a column a power of two."""
    counts = total(samples, projection, "scales")
    whole, most = sum(counts.values()) or 1, max(counts.values(), default=1)
    names = [f"{name}: {n / whole:.2%}" for name, n in counts.items()]
    every = -(-len(counts) // 7)
    named = [(i, superscript(name)) for i, name in enumerate(counts) if i % every == 0]
    marks = [((i + 0.5) / len(counts), name) for i, name in named]
    label = f"{projection}: local scales by power of two"
    return charts.columns(list(counts.values()), names, marks, label, f"{most / whole:.0%}")


def superscript(name: str) -> str:
    base, sign, power = name.partition("^")
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return base + power.translate(raised) if sign else name
