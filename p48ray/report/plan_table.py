"""A plan in print: what a person wants to know before paying for it."""

from rich.console import Console
from rich.table import Table

from p48ray.estimate.duration import is_near
from p48ray.estimate.fit import GB, shortages
from p48ray.estimate.memory import Memory
from p48ray.estimate.plan_cost import Estimate, estimate
from p48ray.report.work import duration
from p48ray.run.run_root import SOURCE
from p48ray.stages.prepare import Prepared
from p48ray.stages.table import STAGES

CARDS = (80e9, 141e9)  # bytes of an H100, of an H200


def print_plan(prepared: Prepared, console: Console) -> None:
    """Counts, bytes and hours of a prepared run."""
    plan, layout = prepared.plan, prepared.layout
    e = estimate(plan, prepared.source, layout, prepared.shards)
    table = Table(
        title=f"plan of {plan.config.name} ({plan.digest[:12]})",
        title_justify="left",
        show_header=False,
    )
    for name, value in plan_rows(prepared, e):
        table.add_row(name, value)
    console.print(table)


def plan_rows(prepared: Prepared, e: Estimate) -> list[tuple[str, str]]:
    plan, layout = prepared.plan, prepared.layout
    linears = len(plan.layers) * layout.num_experts * 3
    layers = f"{len(plan.layers)} layers" + (
        f" of {len(layout.moe_layers)}" if plan.is_pilot else ""
    )
    c, r = plan.config.calibration, plan.config.run
    written = {
        "activations": e.activation_bytes,
        "residuals": e.residual_bytes,
        "gradients": e.gradient_bytes,
        "units": e.unit_bytes,
        "checkpoint": e.checkpoint_bytes,
    }
    mirror = (
        [
            (
                "mirrored first",
                f"{len(plan.source.mirror)} files, {size(e.mirror_bytes)}, into {r.root}/{SOURCE}",
            )
        ]
        if plan.source.mirror
        else []
    )
    reading = (
        "each its own tokens"
        if is_near(r.root, r.root_is_shared)
        else "a node a layer once for all its units, while its cache has room"
    )
    storage = (
        "" if plan.config.output.storage == "dense" else f", {plan.config.output.storage} storage"
    )
    rows = [
        (
            "source",
            (
                f"{prepared.source.store.uri} ({layout.family}, {size(e.source_bytes)},"
                f" {len(prepared.source.files)} shards)"
            ),
        ),
        *(
            (place, f"commit {commit}, as found when the run was first planned")
            for place, commit in plan.revisions.items()
        ),
        *mirror,
        ("run root", plan.config.run.root),
        (
            "expert linears",
            (
                f"{linears:,} ({layers} x {layout.num_experts} experts x 3, stored as"
                f" {layout.expert_storage})"
            ),
        ),
        ("units", f"{len(plan.units):,} of up to {r.experts_per_unit} experts"),
        (
            "calibration",
            (
                f"{c.num_sequences:,} x {c.sequence_length:,} = {e.num_tokens:,} tokens in"
                f" {len(plan.parts):,} parts"
            ),
        ),
        (
            "workers",
            f"{r.num_workers:,} x {r.threads_per_worker} threads, {r.gpus_per_worker:g} GPUs each",
        ),
        ("read by streaming stages", f"{size(e.stream_read_bytes)} a node"),
        ("read by units", f"{size(e.unit_read_bytes)} ({reading})"),
        (
            "written",
            ", ".join(f"{name} {size(value)}" for name, value in written.items()),
        ),
        ("stored at the peak", f"{size(e.peak_stored_bytes)} (run.keep: {r.keep})"),
        (
            ("output", "none: a pilot of some layers (run.layers)")
            if plan.is_pilot
            else (
                "output",
                (
                    f"{len(prepared.shards)} shards, {size(e.checkpoint_bytes)}, of it untouched"
                    f" {size(e.untouched_bytes)}{storage}"
                ),
            )
        ),
    ]
    if count := plan.source.num_fp8_outside_experts:
        rows.append(
            (
                "FP8 outside the experts",
                f"{count:,} weights become BF16 in the output, among the untouched",
            )
        )
    if r.gpus_per_worker:
        rows += [
            ("time, estimated", time_words(e)),
            ("GPU-hours", hours_words(e, r.gpu_hour_price)),
            ("memory a worker", memory_words(e.memory)),
        ]
    return rows


def time_words(e: Estimate) -> str:
    """The whole and its stages."""
    costs = [stage.cost for stage in STAGES.values() if stage.cost]
    stages = {"start": e.start_seconds} | {word: getattr(e, field) for word, field in costs}
    return (
        f"{spell(e.job_seconds)}: "
        + ", ".join(f"{name} {spell(s)}" for name, s in stages.items() if s)
        + " (streams and units overlap)"
    )


def hours_words(e: Estimate, price: float | None) -> str:
    computing = (
        f"{two_digits(e.gpu_hours)} computing: streams {two_digits(e.stream_gpu_hours)}, units"
        f" {two_digits(e.solver_gpu_hours)}"
    )
    cost = f", {e.paid_gpu_hours * price:,.2f} at {price:g} an hour" if price else ""
    return f"{two_digits(e.paid_gpu_hours)} GPU-hours are paid ({computing}){cost}"


def memory_words(memory: Memory) -> str:
    """Needs, and what the smallest class of cards lacks of them."""
    needs = (
        f"needs about {memory.gpu / GB:.0f} GB of GPU memory (streaming"
        f" {memory.gpu_stream / GB:.0f}, a unit {memory.gpu_unit / GB:.0f}) and"
        f" {memory.host / GB:.0f} GB beside it"
    )
    lacking = [(card, short) for card in CARDS if (short := shortages(memory, card, None))]
    if not lacking:
        return needs
    card, short = lacking[-1]
    return f"{needs}; too much for cards of {card / GB:.0f} GB: " + "; ".join(
        line.partition(": ")[2] for line in short
    )


def spell(seconds: float) -> str:
    """0.03 s, 12 s, 3 min 05 s, 1 h 02 min."""
    return f"{two_digits(seconds)} s" if seconds < 10 else duration(seconds)


def two_digits(value: float) -> str:
    """Two significant digits, without an exponent."""
    return f"{float(f'{value:.2g}'):,.12f}".rstrip("0").rstrip(".")


def size(num_bytes: int) -> str:
    """1.23 GB and so on, decimal units."""
    value = float(num_bytes)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError
