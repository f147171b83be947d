"""What a plan will cost before it is run: bytes read, written and stored, time, memory. Arithmetic
on the plan, nothing measured on the spot."""

from dataclasses import asdict, dataclass

from p48ray.checkpoint.fp8 import stored_floats
from p48ray.checkpoint.header import DTYPE_BYTES
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout
from p48ray.estimate.duration import (
    Bytes,
    Times,
    num_nodes,
    stage_times,
)
from p48ray.estimate.memory import (
    Memory,
    memory_of,
    routed_token_bytes,
    row_bytes,
    tokens_of_unit,
    waves_of_worker,
)
from p48ray.estimate.nearness import are_streams_near, is_near, is_source_near
from p48ray.estimate.rates import H200_NODE, Rates
from p48ray.estimate.stored import num_boundaries, peak_stored_bytes
from p48ray.run.output_layout import OutputShard, layer_of, unit_bytes, untouched_tensors
from p48ray.run.plan import RunPlan

ROUTING_BYTES = 2 + 4  # expert id and router weight of one routed token


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate(Times):
    """Bytes, seconds and memory of one plan.

    `_read_bytes`: of streams a node, of units all workers together. `network_`: what passes between
    nodes and stores that are not theirs, of all nodes: units as they are written and the checkpoint
    as it is verified; small records, texts, what is compared on held-out text and what a bucket
    copies on its own side are not counted. peak_stored_bytes: in the run root;
    peak_scratch_bytes: in run.scratch. stream_peak_bytes: the most that activations,
    gradients and boundaries take at a time. `_seconds`: see duration.Times;
    `_gpu_hours` of computing alone, paid_gpu_hours for as long as the job takes. memory: of one
    worker at its peaks.
    """

    num_tokens: int
    source_bytes: int
    mirror_bytes: int
    scan_bytes: int
    stream_read_bytes: int
    activation_bytes: int
    residual_bytes: int
    gradient_bytes: int
    unit_read_bytes: int
    unit_bytes: int
    untouched_bytes: int
    checkpoint_bytes: int
    peak_stored_bytes: int
    peak_scratch_bytes: int
    network_source_bytes: int
    network_stream_bytes: int
    network_output_bytes: int
    stream_peak_bytes: int
    memory: Memory

    @property
    def gpu_hours(self) -> float:
        """In which something is computed."""
        return self.stream_gpu_hours + self.solver_gpu_hours

    @property
    def gpu_bytes(self) -> int:
        """GPU memory of a worker; 0 without a GPU."""
        return self.memory.gpu

    @property
    def host_bytes(self) -> int:
        """Other memory of a worker."""
        return self.memory.host


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedBytes:
    """What the streaming stages read and leave, bytes.

    boundary: one, of all tokens. seen, felt: activations and gradients of one layer. read: of the
    source, a node. read_again: boundaries, by the backward pass. passes: of all layers, a backward
    pass counted as two.
    """

    num_tokens: int
    boundary: int
    seen: int
    felt: int
    read: int
    activations: int
    residuals: int
    gradients: int
    read_again: int
    passes: float

    @property
    def layer_tokens(self) -> int:
        return self.seen + self.felt


def streamed_bytes(plan: RunPlan, layout: ModelLayout, source: int, units: int) -> StreamedBytes:
    """Of one plan.

    Args:
        plan, layout: of the run.
        source, units: bytes of the source, and of all units.
    """
    c, moe, passes = plan.config.calibration, len(plan.layers), plan.passes
    tokens = c.num_sequences * c.sequence_length
    boundary = tokens * layout.hidden_size * (4 if c.compute_dtype == "float32" else 2)
    seen = tokens * (row_bytes(layout.hidden_size, c.stored_bits) + ROUTING_BYTES * layout.top_k)
    felt = tokens * row_bytes(layout.hidden_size, c.stored_bits) * passes.draws
    felt *= plan.uses_gradients
    boundaries_back = passes.draws * len(passes.gradient_boundaries)
    # each layer as the source has it, then compressed
    layer_by_layer = plan.propagates * (plan.layers[-1] + 1) / layout.num_layers
    # A wave goes through a segment before the next one does.
    read_back = waves_of_worker(plan) * passes.num_read_back
    return StreamedBytes(
        num_tokens=tokens,
        boundary=boundary,
        seen=seen,
        felt=felt,
        read=round(
            source * ((passes.num_up + read_back) / layout.num_layers + layer_by_layer)
            + units * plan.propagates
        ),
        activations=moe * seen,
        residuals=num_boundaries(plan) * boundary,
        gradients=moe * felt + boundaries_back * boundary,
        read_again=(len(passes.bases) + boundaries_back) * boundary,
        passes=passes.num_computed / layout.num_layers + 2 * layer_by_layer,
    )


def estimate(
    plan: RunPlan,
    index: CheckpointIndex,
    layout: ModelLayout,
    shards: tuple[OutputShard, ...],
    rates: Rates = H200_NODE,
) -> Estimate:
    """Estimate a plan; of a pilot, its own layers. Manifests and headers are not counted.

    Args:
        plan, layout: of the run.
        index: of its source.
        shards: of the output, empty for a pilot.
        rates: of the hardware.
    """
    moe, untouched = len(plan.layers), untouched_tensors(index, layout)
    units = sum(unit_bytes(layout, u) for u in plan.units)
    source, experts = index.num_bytes, index.expert_bytes(layout)
    checkpoint = sum(s.num_bytes for s in shards)
    dense = sum(
        e.num_bytes // DTYPE_BYTES[e.dtype]
        for e in untouched
        if layer_of(layout, e.name) is not None
    )
    mirror = sum(f.size_bytes for f in plan.source.mirror)
    streams = streamed_bytes(plan, layout, source, units)
    own_experts = experts * moe // len(layout.moe_layers)
    unit_read = own_experts + token_bytes_read(plan, moe * streams.layer_tokens, rates)
    moved = Bytes(
        source=source,
        mirror=mirror,
        stream_read=streams.read,
        boundaries_read=streams.read_again,
        stream_written=streams.activations + streams.residuals + streams.gradients,
        unit_read=unit_read,
        layer_tokens=streams.layer_tokens,
        routed_token=routed_token_bytes(plan.source.hidden_size, plan.config),
        unit_experts=own_experts // len(plan.units),
        checkpoint=checkpoint,
        verified=checkpoint + source * bool(shards),
        num_shards=len(shards),
    )
    run = plan.config.run
    nodes = num_nodes(run.num_workers, plan.config, rates)
    scanned = sum(entry.num_bytes for entry in stored_floats(index, layout))
    # a mirror in a bucket is written there, then read as any source
    of_source = mirror + scanned + streams.read * nodes + own_experts + moved.verified - checkpoint
    peaks = (plan, streams.boundary, moe * streams.seen, moe * streams.felt)
    of_streams = peak_stored_bytes(*peaks, 0, 0)
    in_root, in_scratch = peak_stored_bytes(*peaks, units, checkpoint), 0
    if run.scratch is not None:
        in_root, in_scratch = units + checkpoint, of_streams
    return Estimate(
        num_tokens=streams.num_tokens,
        source_bytes=source,
        mirror_bytes=mirror,
        scan_bytes=scanned,
        stream_read_bytes=streams.read,
        activation_bytes=streams.activations,
        residual_bytes=streams.residuals,
        gradient_bytes=streams.gradients,
        unit_read_bytes=unit_read,
        unit_bytes=units,
        untouched_bytes=sum(e.num_bytes for e in untouched),
        checkpoint_bytes=checkpoint,
        peak_stored_bytes=mirror + in_root,
        peak_scratch_bytes=in_scratch,
        stream_peak_bytes=of_streams,
        network_source_bytes=mirror + (0 if is_source_near(plan) else of_source),
        network_stream_bytes=(
            0
            if are_streams_near(run)
            else moved.stream_written + moved.boundaries_read + unit_read - own_experts
        ),
        network_output_bytes=(0 if is_near(run.root, run.root_is_shared) else units + checkpoint),
        memory=memory_of(plan, index, layout),
        **asdict(stage_times(plan, layout, moved, streams.passes, dense, rates)),
    )


def token_bytes_read(plan: RunPlan, stored: int, rates: Rates) -> int:
    """What units read of the layers' tokens: from near each its own, from afar a node a layer once,
    for all its units (while its cache has room).

    Args:
        stored: all activations and gradients.
    """
    run = plan.config.run
    if are_streams_near(run):
        return round(
            len(plan.units)
            * tokens_of_unit(plan)
            * routed_token_bytes(plan.source.hidden_size, plan.config)
        )
    return round(
        stored * max(1.0, num_nodes(run.num_workers, plan.config, rates) / len(plan.layers))
    )
