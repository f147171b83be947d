"""What a plan will cost before it is run: bytes read, written and stored, GPU time. Arithmetic on the plan, nothing measured on the spot."""

from dataclasses import dataclass

from p48ray.checkpoint.header import DTYPE_BYTES
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout
from p48ray.numerics import code_descent
from p48ray.numerics.paired48 import INPUTS_IN_GROUP
from p48ray.numerics.refine import BATCH_TOKENS
from p48ray.numerics.two_sided import ROW_GROUPS
from p48ray.output_layout import OutputShard, layer_of, unit_bytes, untouched_tensors
from p48ray.plan import RunPlan

# Behind the GPU-hours: what this project's torch code took on one H100 80GB with Kimi-K2.5's shapes (docs/PERFORMANCE.md). Its column loops are bound by kernel
# launches, so they cost per step of a unit, nearly whatever the unit holds (1 to 8 experts measured); products cost by their FLOP.
COLUMN_STEP_S = 3.5e-4  # one column of a one-shot pass
PAIR_GROUP_STEP_S = 3.1e-4  # one pair_group of a descent sweep, of all rows or of a row group
CODE_STEP_FACTOR = 5  # a pair_group of code descent against one of descent, by count of kernels: not measured
MATMUL_FLOPS = 5.1e13  # float32 products of that card (DESIGN 8)
REFINE_FLOPS = 8.0e12  # refinement: 11 ms an expert and step
STREAM_FLOPS = 2.4e14  # the streaming stages: an assumption, 30 % of the card's bf16 matmul rate
ROUTING_BYTES = 2 + 4  # expert id and router weight of one routed token


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes and hours of one plan."""

    num_tokens: int
    source_bytes: int
    stream_read_bytes: int
    activation_bytes: int
    residual_bytes: int
    gradient_bytes: int
    unit_read_bytes: int
    unit_bytes: int
    untouched_bytes: int
    checkpoint_bytes: int
    peak_stored_bytes: int
    stream_gpu_hours: float
    solver_gpu_hours: float

    @property
    def gpu_hours(self) -> float:
        return self.stream_gpu_hours + self.solver_gpu_hours


def estimate(plan: RunPlan, index: CheckpointIndex, layout: ModelLayout, shards: tuple[OutputShard, ...]) -> Estimate:
    """Estimate a plan; of a pilot, its own layers. Manifests and headers are not counted."""
    c, moe = plan.config.calibration, len(plan.layers)
    tokens = c.num_sequences * c.sequence_length
    goes_back = plan.config.compression.output_curvature
    boundary = tokens * layout.hidden_size * (4 if c.compute_dtype == "float32" else 2)
    seen = tokens * (2 * layout.hidden_size + ROUTING_BYTES * layout.top_k)
    felt = tokens * 2 * layout.hidden_size if goes_back else 0
    boundaries_back = layout.num_layers - plan.layers[0] if goes_back else 0
    units = sum(unit_bytes(layout, u) for u in plan.units)
    source = sum(e.num_bytes for e in index.tensors.values())
    untouched = untouched_tensors(index, layout)
    untouched_bytes = sum(e.num_bytes for e in untouched)
    checkpoint = sum(s.num_bytes for s in shards)
    dense = sum(e.num_bytes // DTYPE_BYTES[e.dtype] for e in untouched if layer_of(layout, e.name) is not None)
    # On the way back every layer is run again, then differentiated with respect to its activations.
    directions = 3 if goes_back else 0 if plan.propagates else 1
    streamed = plan.num_streamed_layers / layout.num_layers
    in_turn = plan.propagates * (plan.layers[-1] + 1) / layout.num_layers  # each layer as the source has it, then compressed
    return Estimate(
        num_tokens=tokens,
        source_bytes=source,
        stream_read_bytes=round(source * (streamed * min(directions, 2) + in_turn) + units * plan.propagates),
        activation_bytes=moe * seen,
        residual_bytes=num_boundaries(plan) * boundary,
        gradient_bytes=moe * felt + boundaries_back * boundary,
        unit_read_bytes=(source - untouched_bytes) * moe // len(layout.moe_layers) + len(plan.units) * (seen + felt),
        unit_bytes=units,
        untouched_bytes=untouched_bytes,
        checkpoint_bytes=checkpoint,
        peak_stored_bytes=peak_stored_bytes(plan, boundary, boundaries_back, moe * seen, moe * felt, units, checkpoint),
        stream_gpu_hours=(directions * streamed + 2 * in_turn) * forward_flops(tokens, layout, dense) / STREAM_FLOPS / 3600,
        solver_gpu_hours=(loop_seconds(plan, layout) + product_seconds(plan, layout)) / 3600,
    )


def peak_stored_bytes(plan: RunPlan, boundary: int, boundaries_back: int, seen: int, felt: int, units: int, checkpoint: int) -> int:
    """The most that the run root holds at a time under run.keep (stages.collect).

    With keep: all the sum of everything. Otherwise the largest over all states that streams and units can be in together: so many layers streamed (from the
    top where there is a way back, else from the bottom), so many of them finished, whose tokens are gone, and units under way in as many more as there are
    workers that do not stream. Last, unit shards beside the checkpoint.
    """
    if plan.config.run.keep == "all":
        return seen + num_boundaries(plan) * boundary + felt + boundaries_back * boundary + units + checkpoint
    if plan.propagates:
        return max(peak_in_turn(plan, boundary, boundaries_back, seen, felt, units), units + checkpoint)
    layers, workers = len(plan.layers), plan.config.run.num_workers
    goes_back = plan.config.compression.output_curvature
    most = seen + (boundaries_back + 1) * boundary if goes_back else 0  # the head has answered with a first gradient
    for streamed in range(1, layers + 1):
        streams = boundaries_under_way(plan, streamed) * boundary
        solvers = workers - 1  # whoever does not stream, while anybody does
        for finished in range(streamed + 1 if solvers else 1):
            tokens = seen * (layers - finished if goes_back else streamed - finished) + felt * (streamed - finished)
            begun = min(streamed, finished + solvers)
            most = max(most, (tokens + units * begun) // layers + streams)
    for finished in range(layers + 1):
        most = max(most, ((seen + felt) * (layers - finished) + units * min(layers, finished + workers)) // layers)
    return max(most, units + checkpoint)


def peak_in_turn(plan: RunPlan, boundary: int, boundaries_back: int, seen: int, felt: int, units: int) -> int:
    """The same where layers take turns: first the gradients of all layers, then one layer's activations at a time beside those that still wait."""
    layers = len(plan.layers)
    most = (boundaries_back + 1) * boundary if felt else 0
    for streamed in range(1, layers + 1 if felt else 1):
        most = max(most, felt * streamed // layers + boundaries_under_way(plan, streamed) * boundary)
    for finished in range(layers):
        waiting = felt * (layers - finished)
        streaming = (waiting + units * finished) // layers + 2 * boundary
        most = max(most, streaming, (waiting + seen + units * (finished + 1)) // layers + boundary)
    return most


def num_boundaries(plan: RunPlan) -> int:
    """Of the residual stream: the source's own, unless it is not run, and those behind compressed layers."""
    is_run = not plan.propagates or plan.config.compression.output_curvature
    return is_run * len(plan.boundaries) + plan.propagates * plan.layers[-1]


def boundaries_under_way(plan: RunPlan, streamed: int) -> int:
    """Layer boundaries stored for each part that has just been through `streamed` of the planned layers.

    Up: the one that the next layer starts from and the one that it writes. Back: a gradient in hand and the next one coming, and the boundaries of all layers
    below, which are still to be read.
    """
    layers = plan.layers
    is_last = streamed == len(layers)
    below = layers[-streamed] - layers[0] if plan.config.compression.output_curvature else 0
    return below + (1 if is_last else 2)


def forward_flops(tokens: int, layout: ModelLayout, dense_elements: int) -> float:
    """Two FLOP per weight that a token meets, layer weights outside the experts and top_k experts a layer."""
    routed = len(layout.moe_layers) * layout.top_k * 3 * layout.hidden_size * layout.moe_intermediate_size
    return 2.0 * tokens * (dense_elements + routed)


def loop_seconds(plan: RunPlan, layout: ModelLayout) -> float:
    """The column loops of all units: one-shot passes and descent sweeps of gate and up (hidden inputs) and of down (intermediate inputs)."""
    c = plan.config.compression
    inputs = layout.hidden_size + layout.moe_intermediate_size
    row_groups = ROW_GROUPS if c.output_curvature else 1
    code_groups = code_descent.ROW_GROUPS if c.output_curvature else 1
    descends = c.solver == "block_descent"
    passes = {"block_descent": 2, "round_to_nearest": 0}.get(c.solver, 1)
    sweeps = descends * (c.sweeps * row_groups + c.code_sweeps * code_groups * CODE_STEP_FACTOR)
    return len(plan.units) * inputs * (passes * COLUMN_STEP_S + sweeps / INPUTS_IN_GROUP * PAIR_GROUP_STEP_S)


def product_seconds(plan: RunPlan, layout: ModelLayout) -> float:
    """The products of all experts: moments and expert forwards, factors, the gradients' side, refinement."""
    h, f = layout.hidden_size, layout.moe_intermediate_size
    calibration, c = plan.config.calibration, plan.config.compression
    routed = calibration.num_sequences * calibration.sequence_length * layout.top_k / layout.num_experts
    flops = 2 * routed * (h * h + 3 * f * f + 6 * h * f) + (h**3 + f**3) * (c.solver != "round_to_nearest")
    if c.output_curvature:
        flops += 2 * routed * (4 * f * f + h * h + 6 * h * f) + 2 * c.sweeps * (4 * f * f * h + h * h * f)
    refinement = 24 * c.refine_steps * BATCH_TOKENS * h * f
    return sum(u.num_experts for u in plan.units) * (flops / MATMUL_FLOPS + refinement / REFINE_FLOPS)
