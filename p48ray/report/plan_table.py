"""A plan in print: what a person wants to know before paying for it."""

from rich.console import Console
from rich.table import Table

from p48ray.estimate import Estimate, estimate
from p48ray.run_root import SOURCE
from p48ray.stages.prepare import Prepared


def print_plan(prepared: Prepared, console: Console) -> None:
    """Counts, bytes and hours of a prepared run."""
    plan, layout = prepared.plan, prepared.layout
    e = estimate(plan, prepared.source, layout, prepared.shards)
    table = Table(title=f"plan of {plan.config.name} ({plan.digest[:12]})", title_justify="left", show_header=False)
    for name, value in plan_rows(prepared, e):
        table.add_row(name, value)
    console.print(table)


def plan_rows(prepared: Prepared, e: Estimate) -> list[tuple[str, str]]:
    plan, layout = prepared.plan, prepared.layout
    linears = len(plan.layers) * layout.num_experts * 3
    layers = f"{len(plan.layers)} layers" + (f" of {len(layout.moe_layers)}" if plan.is_pilot else "")
    c, r = plan.config.calibration, plan.config.run
    written = {
        "activations": e.activation_bytes,
        "residuals": e.residual_bytes,
        "gradients": e.gradient_bytes,
        "units": e.unit_bytes,
        "checkpoint": e.checkpoint_bytes,
    }
    mirror = (
        [("mirrored first", f"{len(plan.source.mirror)} files, {size(e.mirror_bytes)}, into {r.root}/{SOURCE}")]
        if plan.source.mirror
        else []
    )
    storage = "" if plan.config.output.storage == "dense" else f", {plan.config.output.storage} storage"
    rows = [
        ("source", f"{prepared.source.store.uri} ({layout.family}, {size(e.source_bytes)}, {len(prepared.source.files)} shards)"),
        *((place, f"commit {commit}, as found when the run was first planned") for place, commit in plan.revisions.items()),
        *mirror,
        ("run root", plan.config.run.root),
        (
            "expert linears",
            f"{linears:,} ({layers} x {layout.num_experts} experts x 3, stored as {layout.expert_storage})",
        ),
        ("units", f"{len(plan.units):,} of up to {r.experts_per_unit} experts"),
        ("calibration", f"{c.num_sequences:,} x {c.sequence_length:,} = {e.num_tokens:,} tokens in {len(plan.parts):,} parts"),
        ("workers", f"{r.num_workers:,} x {r.threads_per_worker} threads, {r.gpus_per_worker:g} GPUs each"),
        ("read by streaming stages", f"{size(e.stream_read_bytes)} a node"),
        ("read by units", f"{size(e.unit_read_bytes)} at most (a node reads a layer once for all its units while its cache has room)"),
        (
            "written",
            ", ".join(f"{name} {size(value)}" for name, value in written.items()),
        ),
        ("stored at the peak", f"{size(e.peak_stored_bytes)} (run.keep: {r.keep})"),
        ("output", "none: a pilot of some layers (run.layers)")
        if plan.is_pilot
        else ("output", f"{len(prepared.shards)} shards, {size(e.checkpoint_bytes)}, of it untouched {size(e.untouched_bytes)}{storage}"),
    ]
    if count := plan.source.num_fp8_outside_experts:
        rows.append(("FP8 outside the experts", f"{count:,} weights become BF16 in the output, among the untouched"))
    if r.gpus_per_worker:
        hours = f"{e.gpu_hours:.1f} GPU-hours on H100s (streaming {e.stream_gpu_hours:.1f}, solver {e.solver_gpu_hours:.1f}; input and output apart)"
        price = f", {e.gpu_hours * r.gpu_hour_price:,.0f} at {r.gpu_hour_price:g} an hour" if r.gpu_hour_price else ""
        rows.append(("estimated", hours + price))
    return rows


def size(num_bytes: int) -> str:
    """1.23 GB and so on, decimal units."""
    value = float(num_bytes)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError
