"""What a plan will cost before it is run: bytes read, written and stored, GPU time. Arithmetic on the plan, nothing measured on the spot."""

from dataclasses import dataclass

from p48ray.checkpoint.header import DTYPE_BYTES
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout
from p48ray.output_layout import OutputShard, layer_of, unit_bytes, untouched_tensors
from p48ray.plan import RunPlan

# Rates behind the GPU-hour estimate, FLOP/s. The solver's is what this project's torch code reached on one H100 80GB with one Kimi-K2.5 expert at a time
# (bench/solver.py, docs/PERFORMANCE.md); the stream's is an assumption, not a measurement: 30 % of that card's bf16 matmul rate.
SOLVER_FLOPS = 1.25e12
STREAM_FLOPS = 2.4e14
ROUTING_BYTES = 2 + 4  # expert id and router weight of one routed token


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes and hours of one plan."""

    num_tokens: int
    source_bytes: int
    capture_read_bytes: int
    activation_bytes: int
    residual_bytes: int
    unit_read_bytes: int
    unit_bytes: int
    untouched_bytes: int
    checkpoint_bytes: int
    peak_stored_bytes: int
    capture_gpu_hours: float
    solver_gpu_hours: float

    @property
    def gpu_hours(self) -> float:
        return self.capture_gpu_hours + self.solver_gpu_hours


def estimate(plan: RunPlan, index: CheckpointIndex, layout: ModelLayout, shards: tuple[OutputShard, ...]) -> Estimate:
    """Estimate a plan. Peak storage counts everything that run.keep: all leaves in the run root."""
    c = plan.config.calibration
    tokens = c.num_sequences * c.sequence_length
    moe = len(layout.moe_layers)
    layer_activations = tokens * (2 * layout.hidden_size + ROUTING_BYTES * layout.top_k)
    activations = moe * layer_activations
    residuals = len(plan.boundaries) * tokens * layout.hidden_size * (4 if c.compute_dtype == "float32" else 2)
    units = sum(unit_bytes(layout, u) for u in plan.units)
    source = sum(e.num_bytes for e in index.tensors.values())
    untouched = untouched_tensors(index, layout)
    untouched_bytes = sum(e.num_bytes for e in untouched)
    checkpoint = sum(s.num_bytes for s in shards)
    return Estimate(
        num_tokens=tokens,
        source_bytes=source,
        capture_read_bytes=source,
        activation_bytes=activations,
        residual_bytes=residuals,
        unit_read_bytes=source - untouched_bytes + len(plan.units) * layer_activations,
        unit_bytes=units,
        untouched_bytes=untouched_bytes,
        checkpoint_bytes=checkpoint,
        peak_stored_bytes=activations + residuals + units + checkpoint,
        capture_gpu_hours=capture_flops(
            tokens, layout, [e.num_bytes // DTYPE_BYTES[e.dtype] for e in untouched if layer_of(layout, e.name) is not None]
        )
        / STREAM_FLOPS
        / 3600,
        solver_gpu_hours=solver_flops(plan, layout) / SOLVER_FLOPS / 3600,
    )


def capture_flops(tokens: int, layout: ModelLayout, dense_elements: list[int]) -> float:
    """Two FLOP per weight that a token meets, layer weights outside the experts and top_k experts a layer."""
    routed = len(layout.moe_layers) * layout.top_k * 3 * layout.hidden_size * layout.moe_intermediate_size
    return 2.0 * tokens * (sum(dense_elements) + routed)


def solver_flops(plan: RunPlan, layout: ModelLayout) -> float:
    """Second moments, expert forwards, factors, one-shot passes and descent sweeps of all experts."""
    h, f = layout.hidden_size, layout.moe_intermediate_size
    c = plan.config
    routed = c.calibration.num_sequences * c.calibration.sequence_length * layout.top_k / layout.num_experts
    moments = 2 * routed * (h * h + 3 * f * f)
    forwards = 2 * routed * 2 * 3 * h * f
    passes = {"block_descent": 2 + c.compression.sweeps, "round_to_nearest": 0}.get(c.compression.solver, 1)
    loops = 2 * passes * (2 * f * h * h + h * f * f)
    factors = (h**3 + f**3) * (passes > 0)
    return len(layout.moe_layers) * layout.num_experts * (moments + forwards + loops + factors)
