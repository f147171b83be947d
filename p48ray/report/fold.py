"""What a page about a run needs, folded from its manifests once: records by layer and expert, who
worked when, tokens of every expert."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from p48ray.checkpoint.layout import EXPERT_NAME, PROJECTIONS
from p48ray.report.report import Report, few_tokens
from p48ray.report.sample import LinearSample, sample_checkpoint
from p48ray.report.spans import Span
from p48ray.report.work import Work, measure, spans_of, stage_manifests
from p48ray.run import run_root
from p48ray.run.manifest import LinearRecord, UnitManifest
from p48ray.stages.table import COMPRESS_STAGE, stages_of
from p48ray.store.base import Store
from p48ray.unit.context import StageContext

# pieces of work that are nearer than this share of the whole time are drawn as one
MERGED_SHARE = 0.004

Values = Mapping[str, object]
"""What a template of the page is given, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that the page shows. `records[projection][row][expert]` with rows in the order of
    `layers`."""

    context: StageContext
    report: Report
    units: Sequence[UnitManifest]
    layers: tuple[int, ...]
    records: dict[str, list[list[LinearRecord | None]]]
    spans: list[Span]
    work: tuple[Work, ...]
    samples: list[LinearSample]
    failed_attempts: int

    @property
    def all_records(self) -> list[LinearRecord]:
        return [r for u in self.units for r in u.linears]

    @property
    def tokens(self) -> list[list[int | None]]:
        """Calibration tokens by layer and expert."""
        return [[None if r is None else r.tokens for r in row] for row in self.records["gate_proj"]]

    @property
    def few_tokens(self) -> int:
        """Fewer than this and an expert counts as under-calibrated (report.few_tokens)."""
        return few_tokens(self.context.plan)

    def errors(self, projection: str) -> list[list[float | None]]:
        return [
            [None if r is None else r.relative_output_error for r in row]
            for row in self.records[projection]
        ]

    def units_by_layer(self) -> dict[int, list[UnitManifest]]:
        layer_of = {u.id: u.layer for u in self.context.plan.units}
        found: dict[int, list[UnitManifest]] = {n: [] for n in self.layers}
        for unit in self.units:
            found[layer_of[unit.unit]].append(unit)
        return found


def gather_facts(
    context: StageContext,
    report: Report,
    units: Sequence[UnitManifest],
    baseline_store: Store | None,
) -> Facts:
    """Read what the units' manifests do not hold, from the run root and the finished checkpoint.

    Args:
        context, report, units, baseline_store: as html.report_html takes them.
    """
    plan, store = context.plan, context.store
    timed = [stage for stage in stages_of(plan) if stage.manifest]
    streamed = [stage.prefix for stage in timed if stage.name != COMPRESS_STAGE.name]
    keys = {info.key for prefix in streamed for info in store.list(prefix)}
    spans = spans_of(plan, {**stage_manifests(plan, store, keys), COMPRESS_STAGE.name: units})
    return Facts(
        context=context,
        report=report,
        units=units,
        layers=plan.layers,
        records=arrange(plan.layers, context.layout.num_experts, units),
        spans=spans,
        work=measure(plan, spans),
        samples=[] if plan.is_pilot else sample_checkpoint(context, baseline_store),
        failed_attempts=sum(1 for _ in store.list(run_root.FAILURES)),
    )


def arrange(
    layers: Sequence[int], num_experts: int, units: Iterable[UnitManifest]
) -> dict[str, list[list[LinearRecord | None]]]:
    """Every record at its layer's row and its expert's column."""
    row_of = {layer: i for i, layer in enumerate(layers)}
    found: dict[str, list[list[LinearRecord | None]]] = {
        p: [[None] * num_experts for _ in layers] for p in PROJECTIONS
    }
    for unit in units:
        for record in unit.linears:
            name = EXPERT_NAME.fullmatch(f"{record.name}.weight")
            assert name is not None, record.name
            found[name[4]][row_of[int(name[2])]][int(name[3])] = record
    return found


def quantiles(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Least, tenth, half, nine tenths, most."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return (
        ordered[0],
        ordered[round(0.1 * last)],
        ordered[round(0.5 * last)],
        ordered[round(0.9 * last)],
        ordered[last],
    )


def binned(values: Sequence[float], low: float, high: float, bins: int, is_log: bool) -> list[int]:
    """Counts in equal bins between the ends, equal factors where `is_log` (values above 0).

    Args:
        values: one beyond an end counts in the bin there.
        low, high: the ends, low < high.
        bins: how many.
        is_log: ends and values are above 0.
    """
    counts = [0] * bins
    a, b = (math.log(low), math.log(high)) if is_log else (low, high)
    for value in values:
        at = ((math.log(value) if is_log else value) - a) / (b - a)
        counts[max(0, min(bins - 1, int(at * bins)))] += 1
    return counts
