"""What a plan will cost before it is run: bytes read, written and stored, GPU time. Arithmetic on the plan, nothing measured on the spot."""

from dataclasses import dataclass

from p48ray.checkpoint.header import DTYPE_BYTES
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout
from p48ray.numerics import block_int8, code_descent
from p48ray.numerics.paired48 import INPUTS_IN_GROUP
from p48ray.numerics.refine import BATCH_TOKENS
from p48ray.numerics.two_sided import ROW_GROUPS
from p48ray.output_layout import OutputShard, layer_of, unit_bytes, untouched_tensors
from p48ray.plan import RunPlan

# Behind the GPU-hours: what this project's kernels took on one H100 80GB with Kimi-K2.5's shapes (docs/PERFORMANCE.md), from batches of 1 and 8 experts:
# a part that a unit pays whatever it holds, because columns wait for each other, and a part for every weight.
COLUMN_STEP_S = 1.2e-6  # one column of a one-shot pass
PAIR_GROUP_STEP_S = 3.5e-6  # one pair_group of a descent sweep, of all rows or of a row group
WEIGHT_S = 1.0e-10  # one weight of a one-shot pass or of a one-sided sweep, with its share of what lies between them
TWO_SIDED_WEIGHT_S = 2.3e-10  # one weight of a two-sided sweep
CODE_STEP_S = (
    1.6e-3  # a pair_group of code descent, which is torch code: five descent steps of that kind, by count of kernels: not measured
)
MATMUL_FLOPS = (
    1.2e14  # expert forwards and gradients in TF32, with all that lies between products in a unit: decoding, quantizing, casts, blends
)
MOMENT_FLOPS = 6.5e14  # second moments, counted as whole squares
FACTOR_FLOPS = 2.8e13  # factors, counted as one cube
REFINE_FLOPS = 1.25e14  # refinement: 0.72 ms an expert and step
STREAM_FLOPS = 2.4e14  # the streaming stages: an assumption, 30 % of the card's bf16 matmul rate
ROUTING_BYTES = 2 + 4  # expert id and router weight of one routed token


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes and hours of one plan."""

    num_tokens: int
    source_bytes: int
    mirror_bytes: int
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
    seen = tokens * (stored_bytes(layout.hidden_size, c.stored_bits) + ROUTING_BYTES * layout.top_k)
    felt = tokens * stored_bytes(layout.hidden_size, c.stored_bits) if goes_back else 0
    boundaries_back = layout.num_layers - plan.layers[0] if goes_back else 0
    units = sum(unit_bytes(layout, u) for u in plan.units)
    source = sum(e.num_bytes for e in index.tensors.values())
    untouched = untouched_tensors(index, layout)
    untouched_bytes = sum(e.num_bytes for e in untouched)
    experts_bytes = sum(e.num_bytes for e in index.tensors.values() if layout.is_expert_tensor(e.name))
    checkpoint = sum(s.num_bytes for s in shards)
    dense = sum(e.num_bytes // DTYPE_BYTES[e.dtype] for e in untouched if layer_of(layout, e.name) is not None)
    # On the way back every layer is run again, then differentiated with respect to its activations.
    directions = 3 if goes_back else 0 if plan.propagates else 1
    streamed = plan.num_streamed_layers / layout.num_layers
    again = layers_run_again(plan)
    in_turn = plan.propagates * (plan.layers[-1] + 1) / layout.num_layers  # each layer as the source has it, then compressed
    mirror = sum(f.size_bytes for f in plan.source.mirror)
    return Estimate(
        num_tokens=tokens,
        source_bytes=source,
        mirror_bytes=mirror,
        stream_read_bytes=round(source * (streamed * min(directions, 2) + again / layout.num_layers + in_turn) + units * plan.propagates),
        activation_bytes=moe * seen,
        residual_bytes=(num_boundaries(plan) + again) * boundary,
        gradient_bytes=moe * felt + boundaries_back * boundary,
        unit_read_bytes=experts_bytes * moe // len(layout.moe_layers) + len(plan.units) * (seen + felt),
        unit_bytes=units,
        untouched_bytes=untouched_bytes,
        checkpoint_bytes=checkpoint,
        peak_stored_bytes=mirror + peak_stored_bytes(plan, boundary, moe * seen, moe * felt, units, checkpoint),
        stream_gpu_hours=(directions * streamed + again / layout.num_layers + 2 * in_turn)
        * forward_flops(tokens, layout, dense)
        / STREAM_FLOPS
        / 3600,
        solver_gpu_hours=(loop_seconds(plan, layout) + product_seconds(plan, layout)) / 3600,
    )


def stored_bytes(width: int, bits: int) -> int:
    """One token's activations, or its gradients, as parts store them (calibration.stored_bits)."""
    return 2 * width if bits == 16 else round(width * block_int8.BYTES_PER_VALUE)


def layers_run_again(plan: RunPlan) -> int:
    """Layers that the way back runs up once more to get at boundaries that were not left to it (run.boundary_every)."""
    if plan.config.run.keep == "all" or not plan.config.compression.output_curvature:
        return 0
    read = range(plan.layers[0] + 1, plan.source.num_layers + 1)
    segments: dict[int, int] = {}
    for boundary in read:
        base = plan.base_of(boundary)
        segments[base] = max(segments.get(base, 0), boundary - base)
    return sum(segments.values())


def peak_stored_bytes(plan: RunPlan, boundary: int, seen: int, felt: int, units: int, checkpoint: int) -> int:
    """The most that the run root holds at a time under run.keep (stages.collect), the mirror apart, which stays.

    With keep: all the sum of everything. Otherwise the largest over all states that streams and units can be in together: so many layers streamed (from the
    top where there is a way back, else from the bottom), so many of them finished, whose tokens are gone, and units under way in as many more as there are
    workers that do not stream. Last, unit shards beside the checkpoint.
    """
    boundaries_back = plan.source.num_layers - plan.layers[0] if plan.config.compression.output_curvature else 0
    if plan.config.run.keep == "all":
        return seen + num_boundaries(plan) * boundary + felt + boundaries_back * boundary + units + checkpoint
    if plan.propagates:
        return max(peak_in_turn(plan, boundary, boundaries_back, seen, felt, units), units + checkpoint)
    layers, workers = len(plan.layers), plan.config.run.num_workers
    goes_back = plan.config.compression.output_curvature
    most = (
        seen + (len(boundaries_held(plan, plan.source.num_layers)) + 1) * boundary if goes_back else 0
    )  # the head has answered with a first gradient
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

    Up: the one that the next layer starts from and the one that it writes. Back: a gradient in hand and the next one coming, and the boundaries that are
    still to be read.
    """
    held = boundaries_held(plan, plan.layers[-streamed]) if plan.config.compression.output_curvature else set()
    return len(held) + (1 if streamed == len(plan.layers) else 2)


def boundaries_held(plan: RunPlan, number: int) -> set[int]:
    """Boundaries that the way back holds when it comes to layer `number` (num_layers: the head): those that are left to it (run.boundary_every) up to there,
    and of the segment that it is in those that are run again."""
    lowest = plan.layers[0]
    if number <= lowest:
        return set()
    left = {plan.base_of(b) for b in range(lowest + 1, number + 1)} - {0}
    return left | set(range(plan.base_of(number) + 1, number + 1))


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
    sweeps = c.sweeps * (c.solver == "block_descent")
    code_sweeps = c.code_sweeps * (c.solver == "block_descent")
    passes = {"block_descent": 2, "round_to_nearest": 0}.get(c.solver, 1)
    steps = sweeps * row_groups * PAIR_GROUP_STEP_S + code_sweeps * code_groups * CODE_STEP_S
    unit_seconds = inputs * (passes * COLUMN_STEP_S + steps / INPUTS_IN_GROUP)
    weights = 3 * layout.hidden_size * layout.moe_intermediate_size
    expert_seconds = weights * (passes * WEIGHT_S + sweeps * (TWO_SIDED_WEIGHT_S if c.output_curvature else WEIGHT_S))
    return sum(unit_seconds + u.num_experts * expert_seconds for u in plan.units)


def product_seconds(plan: RunPlan, layout: ModelLayout) -> float:
    """The products of all experts outside the loops: moments and expert forwards, factors, the gradients' side, refinement."""
    h, f = layout.hidden_size, layout.moe_intermediate_size
    calibration, c = plan.config.calibration, plan.config.compression
    routed = calibration.num_sequences * calibration.sequence_length * layout.top_k / layout.num_experts
    moments, forwards = 2 * routed * (h * h + 3 * f * f), 2 * routed * 6 * h * f
    if c.output_curvature:
        moments += 2 * routed * (4 * f * f + h * h)
        forwards += 2 * routed * 6 * h * f
    factors = (h**3 + f**3) * (c.solver != "round_to_nearest")
    refinement = 24 * c.refine_steps * BATCH_TOKENS * h * f
    seconds = moments / MOMENT_FLOPS + forwards / MATMUL_FLOPS + factors / FACTOR_FLOPS + refinement / REFINE_FLOPS
    return seconds * sum(u.num_experts for u in plan.units)
