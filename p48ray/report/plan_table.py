"""A plan in print: what a person wants to know before paying for it."""

from rich.console import Console
from rich.table import Table

from p48ray.estimate.fit import GB, lack_of_space, shortages
from p48ray.estimate.held_out import source_passes
from p48ray.estimate.memory import Memory
from p48ray.estimate.nearness import are_streams_near
from p48ray.estimate.plan_cost import Estimate, estimate
from p48ray.model.source_check import carried_through
from p48ray.report.work import duration
from p48ray.run.run_root import SOURCE
from p48ray.stages.inputs import sampled_texts
from p48ray.stages.prepare import Prepared
from p48ray.stages.table import STAGES

LISTED_FILES = 8
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


def print_texts(prepared: Prepared, console: Console, is_asking: bool) -> None:
    """What a dry run reads of the texts, a line for each source (inputs.sampled_texts)."""
    for line in sampled_texts(prepared, is_asking):
        console.print(line, soft_wrap=True, markup=False)


Rows = list[tuple[str, str]]


def plan_rows(prepared: Prepared, e: Estimate) -> Rows:
    """What and how much, line by line."""
    return [
        *source_rows(prepared, e),
        *work_rows(prepared, e),
        *traffic_rows(prepared, e),
        *greedy_rows(prepared, e),
        *output_rows(prepared, e),
        *cost_rows(prepared, e),
    ]


def source_rows(prepared: Prepared, e: Estimate) -> Rows:
    plan, source = prepared.plan, prepared.source
    form = f"{prepared.layout.family}, {size(e.source_bytes)}, {len(source.files)} shards"
    rows = [("source", f"{source.store.uri} ({form})")]
    for place, commit in plan.revisions.items():
        rows.append((place, f"commit {commit}, as found when the run was first planned"))
    if plan.source.mirror:
        copied = f"{len(plan.source.mirror)} files, {size(e.mirror_bytes)}"
        rows.append(("mirrored first", f"{copied}, into {plan.config.run.root}/{SOURCE}"))
    for words, tensors in carried_through(source, prepared.layout).items():
        held = f"{len(tensors):,} tensors, {size(sum(t.num_bytes for t in tensors))}"
        rows.append(("carried through", f"{words}: {held}, not used here"))
    return [*rows, ("run root", plan.config.run.root)]


def work_rows(prepared: Prepared, e: Estimate) -> Rows:
    plan, layout = prepared.plan, prepared.layout
    c, r = plan.config.calibration, plan.config.run
    linears = len(plan.layers) * layout.num_experts * 3
    of_all = f" of {len(layout.moe_layers)}" if plan.is_pilot else ""
    layers = f"{len(plan.layers)} layers{of_all} x {layout.num_experts} experts x 3"
    texts = f"{c.num_sequences:,} x {c.sequence_length:,} = {e.num_tokens:,} tokens"
    each = f"{r.threads_per_worker} threads, {r.gpus_per_worker:g} GPUs each"
    return [
        ("expert linears", f"{linears:,} ({layers}, stored as {layout.expert_storage})"),
        ("units", f"{len(plan.units):,} of up to {r.experts_per_unit} experts"),
        ("calibration", f"{texts} in {len(plan.parts):,} parts"),
        ("workers", f"{r.num_workers:,} x {each}"),
    ]


def traffic_rows(prepared: Prepared, e: Estimate) -> Rows:
    r = prepared.plan.config.run
    peaks = {r.root: e.peak_stored_bytes} | ({r.scratch: e.peak_scratch_bytes} if r.scratch else {})
    lacks = [lack for place, peak in peaks.items() if (lack := lack_of_space(place, peak))]
    reading = "a node a layer once for all its units, while its cache has room"
    if are_streams_near(r):
        reading = "each its own tokens"
    written = {
        "activations": e.activation_bytes,
        "residuals": e.residual_bytes,
        "gradients": e.gradient_bytes,
        "units": e.unit_bytes,
        "checkpoint": e.checkpoint_bytes,
    }
    return [
        ("read before the first unit", f"{size(e.scan_bytes)} outside the experts, all finite?"),
        ("read by streaming stages", f"{size(e.stream_read_bytes)} a node"),
        ("read by units", f"{size(e.unit_read_bytes)} ({reading})"),
        ("written", ", ".join(f"{name} {size(value)}" for name, value in written.items())),
        ("over the network", network_words(e)),
        (
            "stored at the peak",
            f"{size(e.peak_stored_bytes)} (run.keep: {r.keep}), of streams alone"
            f" {size(e.stream_peak_bytes)}",
        ),
        *([("in run.scratch", scratch_words(r.scratch, e))] if r.scratch else []),
        *(("warning", lack) for lack in lacks),
    ]


def greedy_rows(prepared: Prepared, e: Estimate) -> Rows:
    """What greedy agreement reads, which may be more than all the rest."""
    parts, passes = source_passes(prepared.plan)
    evaluation = prepared.plan.config.evaluation
    if not parts or evaluation is None or evaluation.greedy is None:
        return []
    g = evaluation.greedy
    each = f"{parts:,} parts x" if parts > 1 else "one part x"
    words = f"at most {size(parts * (passes + 1) * e.source_bytes)} of the source: {each} at most"
    words += f" {passes:,} passes and one of the checkpoint"
    texts = f"{g.prompts:,} prompts of {g.prompt_tokens:,} tokens continued by {g.tokens:,}"
    return [("read for greedy agreement", f"{words} ({texts})")]


def network_words(e: Estimate) -> str:
    """What crosses it, by kind; of near folders nothing does."""
    crossing = {
        "source": e.network_source_bytes,
        "activations, gradients and boundaries": e.network_stream_bytes,
        "unit shards and checkpoint": e.network_output_bytes,
    }
    found = [f"{name} {size(value)}" for name, value in crossing.items() if value]
    return ", ".join(found) + ", and small records" if found else "nothing"


def scratch_words(folder: str, e: Estimate) -> str:
    return (
        f"activations, gradients and boundaries, {size(e.peak_scratch_bytes)} at the peak, in"
        f" {folder}: a disk or memory of one node, the driver's too, or a folder that nodes share"
    )


def output_rows(prepared: Prepared, e: Estimate) -> Rows:
    plan = prepared.plan
    storage = plan.config.output.storage
    words = f"{len(prepared.shards)} shards, {size(e.checkpoint_bytes)}, of it untouched"
    words += f" {size(e.untouched_bytes)}{'' if storage == 'dense' else f', {storage} storage'}"
    if plan.is_pilot:
        words = "none: a pilot of some layers (run.layers)"
    rows = [("output", words)]
    if left := prepared.source.left_behind:
        more = f" and {len(left) - LISTED_FILES} more" if len(left) > LISTED_FILES else ""
        named = ", ".join(left[:LISTED_FILES]) + more
        rows.append(("left behind", f"{len(left):,} files beside the weights: {named}"))
    if count := plan.source.num_fp8_outside_experts:
        became = f"{count:,} weights become BF16 in the output, among the untouched"
        rows.append(("FP8 outside the experts", became))
    return rows


def cost_rows(prepared: Prepared, e: Estimate) -> Rows:
    """None for a run on CPUs: rates are a GPU's."""
    r = prepared.plan.config.run
    if not r.gpus_per_worker:
        return []
    return [
        ("time, estimated", time_words(e)),
        ("GPU-hours", hours_words(e, r.gpu_hour_price)),
        ("memory a worker", memory_words(e.memory)),
    ]


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
        f" {memory.gpu_stream / GB:.0f}, a unit {memory.gpu_unit / GB:.0f}, of it tokens"
        f" {memory.tokens / GB:.0f}) and"
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
