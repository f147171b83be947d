"""The report: what was made and how good it is, from manifests and evaluation sums alone."""

import math
from collections import Counter
from typing import Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.checkpoint.sparse_storage import Storage
from p48ray.numerics.zeros import ZERO_INPUTS
from p48ray.report.domain_section import print_domains
from p48ray.report.greedy_section import print_agreements
from p48ray.report.scale_figures import (
    LayerScaleFigures,
    headroom_words,
    scale_figures,
    scale_warnings,
)
from p48ray.report.work import Extrapolation, duration, extrapolate, pilot_words, read_work
from p48ray.run import run_root
from p48ray.run.benchmark_results import BenchmarkTable
from p48ray.run.manifest import LinearRecord, SourceTexts, UnitManifest
from p48ray.run.output_layout import OutputShard, unit_bytes
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.run.records import Record
from p48ray.stages.evaluate import EvaluationResult
from p48ray.stages.greedy import GreedyAgreement
from p48ray.stages.inputs import spell_texts, texts_read
from p48ray.stages.scan import router_notes, scans_so_far
from p48ray.unit.context import StageContext

FEW_TOKENS_SHARE = 0.25  # of the average expert's: below it, an expert has few


class ProjectionErrors(Record):
    """Relative output errors of one kind of linear over all experts."""

    mean: float
    worst: float
    worst_linear: str


class LadderMean(Record):
    """Errors of experts' linears after one step of their solve: means over the expert that each
    unit has measured."""

    step: str
    experts: int
    output_error: dict[str, float]
    loss_error: dict[str, float]


class Report(Record):
    """report/report.json. few_tokens: an expert with fewer calibration tokens counts among
    experts_with_few_tokens, or among those without. zero_inputs, zero_intermediates: layers in
    which no expert saw another value."""

    schema_version: Literal[1] = 1
    name: str
    plan_digest: str
    source: str
    checkpoint: str
    solver: str
    sparsity: str
    scale_span: int
    activation_group: int
    num_linears: int
    outcomes: dict[str, int]
    zero_inputs: tuple[int, ...] = ()
    zero_intermediates: tuple[int, ...] = ()
    experts_without_tokens: int
    experts_with_few_tokens: int
    few_tokens: int = 0
    calibration_tokens: int
    relative_output_error: dict[str, ProjectionErrors]
    ladder: tuple[LadderMean, ...] = ()
    clipped_input_share: float
    clipped_intermediate_share: float
    scales: tuple[LayerScaleFigures, ...] = ()
    storage: Storage = "dense"
    checkpoint_bytes: int
    source_bytes: int
    expert_bytes: int
    quality: EvaluationResult | None
    baseline: EvaluationResult | None = None
    greedy: GreedyAgreement | None = None
    baseline_greedy: GreedyAgreement | None = None
    benchmarks: BenchmarkTable | None = None
    pilot: Extrapolation | None = None
    source_notes: tuple[str, ...] = ()
    texts: dict[str, tuple[SourceTexts, ...]] = Field(
        {}, description="What was read, by section: calibration, evaluation."
    )
    stage_seconds: dict[str, float]
    unit_seconds: dict[str, float]
    devices: dict[str, int]
    versions: dict[str, str]

    @property
    def own_name(self) -> str:
        """Of what this run has made, beside other checkpoints."""
        return f"{self.solver}, {self.sparsity}"

    @property
    def agreements(self) -> dict[str, GreedyAgreement]:
        """The baseline's, if there is one, and this run's."""
        found = {"one-shot baseline": self.baseline_greedy, self.own_name: self.greedy}
        return {name: agreement for name, agreement in found.items() if agreement is not None}


def build_report(
    context: StageContext,
    units: list[UnitManifest],
    shards: tuple[OutputShard, ...],
    quality: EvaluationResult | None,
    stage_seconds: dict[str, float],
) -> Report:
    """Fold manifests into one record.

    Args:
        context: of the run.
        units: manifests of its finished units, whose seconds are summed whoever did them.
        shards: all that the plan has.
        quality: on held-out text; None where nothing was evaluated.
        stage_seconds: by stage, of this driver.
    """
    plan = context.plan
    records = [r for u in units for r in u.linears]
    gates = [r for r in records if r.name.endswith("gate_proj")]
    few = few_tokens(plan)
    phases: Counter[str] = Counter()
    for unit in units:
        phases.update(unit.seconds)
    return Report(
        name=plan.config.name,
        plan_digest=plan.digest,
        source=context.source.store.uri,
        checkpoint=f"{context.store.uri}/{run_root.CHECKPOINT}",
        solver=plan.config.compression.solver,
        sparsity=plan.config.compression.sparsity,
        scale_span=plan.config.compression.scale_span,
        activation_group=plan.config.compression.activation_group,
        num_linears=len(records),
        outcomes=dict(Counter(str(r.outcome) for r in records)),
        zero_inputs=layers_of_zeros(units, "gate_proj"),
        zero_intermediates=layers_of_zeros(units, "down_proj"),
        experts_without_tokens=sum(r.tokens == 0 for r in gates),
        experts_with_few_tokens=sum(0 < r.tokens < few for r in gates),
        few_tokens=few,
        calibration_tokens=plan.config.calibration.num_sequences
        * plan.config.calibration.sequence_length,
        relative_output_error={p: projection_errors(records, p) for p in PROJECTIONS if records},
        ladder=mean_ladder(units),
        clipped_input_share=sum(u.clipped_input_share for u in units) / max(1, len(units)),
        clipped_intermediate_share=sum(u.clipped_intermediate_share for u in units)
        / max(1, len(units)),
        scales=scale_figures(
            context.store, units, quality.activation_scales if quality is not None else ()
        ),
        storage=plan.config.output.storage,
        checkpoint_bytes=sum(s.num_bytes for s in shards),
        source_bytes=context.source.num_bytes,
        expert_bytes=sum(
            unit_bytes(context.layout, u, plan.config.output.storage) for u in plan.units
        ),
        quality=None if plan.is_pilot else quality,
        pilot=(
            extrapolate(
                plan,
                read_work(plan, context.store, {info.key for info in context.store.list()}),
                quality,
            )
            if plan.is_pilot and len(units) == len(plan.units)
            else None
        ),
        source_notes=tuple(router_notes(scans_so_far(context))),
        texts=texts_read(context),
        stage_seconds=stage_seconds,
        unit_seconds={name: round(value, 1) for name, value in phases.items()},
        devices=dict(Counter(u.device for u in units)),
        versions=units[0].versions if units else {},
    )


def layers_of_zeros(units: list[UnitManifest], projection: str) -> tuple[int, ...]:
    """Layers in which all inputs of every expert's `projection` are zero."""
    sees_zeros: dict[int, bool] = {}
    for unit in units:
        own = [ZERO_INPUTS in r.reason for r in unit.linears if r.name.endswith(projection)]
        layer = WorkUnit.layer_of(unit.unit)
        sees_zeros[layer] = sees_zeros.get(layer, True) and all(own)
    return tuple(sorted(layer for layer, is_zero in sees_zeros.items() if is_zero))


def zero_layer_words(report: Report) -> list[str]:
    """A sentence for what whole layers see nothing but zeros of; none where none does."""
    kinds = (
        ("experts' inputs", "gate and up", report.zero_inputs),
        ("intermediates", "down", report.zero_intermediates),
    )
    return [
        f"Layers whose {what} are all zero: {', '.join(map(str, layers))}."
        f" The activation scale of {whose} is 1 there."
        for what, whose, layers in kinds
        if layers
    ]


def texts_words(report: Report) -> list[str]:
    """A line for each source of texts, with what was skipped and cut."""
    return [
        f"{section} texts: {spell_texts(found)}"
        for section, sources in report.texts.items()
        for found in sources
    ]


def few_tokens(plan: RunPlan) -> int:
    """An expert with fewer calibration tokens than this is under-calibrated: FEW_TOKENS_SHARE of
    what an expert has on average in this plan."""
    c, source = plan.config.calibration, plan.source
    return math.ceil(
        FEW_TOKENS_SHARE * c.num_sequences * c.sequence_length * source.top_k / source.num_experts
    )


def mean_ladder(units: list[UnitManifest]) -> tuple[LadderMean, ...]:
    """Step by step, over the units whose manifests have the steps of the first one that has any (a
    run has one solver)."""
    ladders = [u.ladder for u in units if u.ladder]
    names = [s.step for s in ladders[0]] if ladders else []
    ladders = [ladder for ladder in ladders if [s.step for s in ladder] == names]

    def mean(errors: list[dict[str, float]]) -> dict[str, float]:
        return {side: sum(e[side] for e in errors) / len(errors) for side in errors[0]}

    return tuple(
        LadderMean(
            step=name,
            experts=len(ladders),
            output_error=mean([ladder[i].output_error for ladder in ladders]),
            loss_error=mean([ladder[i].loss_error for ladder in ladders]),
        )
        for i, name in enumerate(names)
    )


def projection_errors(records: list[LinearRecord], projection: str) -> ProjectionErrors:
    own = [r for r in records if r.name.endswith(projection)]
    worst = max(own, key=lambda r: r.relative_output_error)
    mean = sum(r.relative_output_error for r in own) / len(own)
    return ProjectionErrors(mean=mean, worst=worst.relative_output_error, worst_linear=worst.name)


def print_report(report: Report, console: Console) -> None:
    """The report as tables for a person."""
    print_quality(report, console)
    print_domains(report.quality, console)
    print_agreements(report.agreements, console)
    print_linears(report, console)
    few = f"(under {report.few_tokens:,}, {FEW_TOKENS_SHARE:.0%} of the average)"
    console.print(
        f"experts without calibration tokens: {report.experts_without_tokens}, with few {few}:"
        f" {report.experts_with_few_tokens}"
    )
    console.print(
        f"activations clipped: {report.clipped_input_share:.2e} of inputs,"
        f" {report.clipped_intermediate_share:.2e} of intermediates"
    )
    if report.scales:
        console.print(headroom_words(report.scales))
    for words in scale_warnings(report.scales):
        console.print(f"warning: {words}", soft_wrap=True)
    for note in report.source_notes:
        console.print(f"source: {note}", soft_wrap=True)
    for words in texts_words(report):
        console.print(words, soft_wrap=True, markup=False)
    storage = f" in {report.storage} storage" if report.storage != "dense" else ""
    console.print(
        f"size: {report.checkpoint_bytes:,} bytes (source {report.source_bytes:,}), experts"
        f" {report.expert_bytes:,}{storage}"
    )
    spent = ", ".join(f"{name} {duration(s)}" for name, s in report.stage_seconds.items())
    console.print(f"time: {spent}")
    if report.pilot is None:
        console.print(f"checkpoint: {report.checkpoint}", soft_wrap=True)
        return
    console.print(pilot_words(report.pilot), soft_wrap=True)


def print_quality(report: Report, console: Console) -> None:
    """Nothing without an evaluation."""
    if (q := report.quality) is None:
        return
    table = Table(
        title=f"{report.name}: quality on {q.num_tokens:,} held-out tokens (W4A4 emulated)",
        title_justify="left",
    )
    for column in ("", "perplexity", "token accuracy", "KL to source"):
        table.add_column(column, justify="left" if not column else "right")

    def add(name: str, perplexity: float, accuracy: float, kl: float) -> None:
        table.add_row(name, f"{perplexity:.4f}", f"{accuracy:.4f}", f"{kl:.4f}")

    table.add_row("source", f"{q.source_perplexity:.4f}", f"{q.source_accuracy:.4f}", "0")
    if (b := report.baseline) is not None:
        add("one-shot baseline", b.compressed_perplexity, b.compressed_accuracy, b.kl)
    add(report.own_name, q.compressed_perplexity, q.compressed_accuracy, q.kl)
    if (other := q.in_groups_of_32) is not None:
        name = "the same, activations in groups of 32"
        add(name, other.perplexity, other.accuracy, other.kl)
    console.print(table)
    if b is not None and b.kl > 0:
        console.print(f"KL ratio to the one-shot baseline: {q.kl / b.kl:.3f}")


def print_linears(report: Report, console: Console) -> None:
    table = Table(title="expert linears", title_justify="left")
    for column in ("", "mean relative output error", "worst", "of"):
        table.add_column(column, justify="left" if column in ("", "of") else "right")
    for projection, errors in report.relative_output_error.items():
        table.add_row(projection, f"{errors.mean:.4f}", f"{errors.worst:.4f}", errors.worst_linear)
    console.print(table)
    outcomes = ", ".join(
        f"{count} {name.replace('_', ' ')}" for name, count in sorted(report.outcomes.items())
    )
    console.print(f"{report.num_linears} linears: {outcomes}")
    for words in zero_layer_words(report):
        console.print(words)
