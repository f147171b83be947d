"""How much memory a worker needs at its peak, on its GPU and beside it. Counts of copies are fitted
to measured peaks (docs/PERFORMANCE.md).

    streaming, GPU    residual of the worker's tokens, or in the backward pass what enters each
                      layer of a segment of a wave's; so many copies of a wave's and of a part's,
                      packed experts on their way, a layer's other weights
    a unit, GPU       its tokens as stored (those read ahead too), so many copies of its weights and
                      of its moments
    host              CUDA and torch, a layer's packed experts and two boundaries of a part (pinned
                      while they are copied), a unit's experts and shard

On a CPU all of it is in the host's memory.
"""

from dataclasses import dataclass

from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout
from p48ray.config import RunConfig
from p48ray.numerics import block_int8
from p48ray.run.output_layout import layer_of, unit_bytes, untouched_tensors
from p48ray.run.plan import RunPlan

WAVE_TOKENS = 2**18
"""Tokens that a streaming worker takes through a layer together, unless one part has more
(stages.streaming)."""
WAVE_COPIES = 6  # of (tokens of a wave, hidden)
# of (tokens of a part, hidden) on top: 14.2 to 15.6 GB forward, 18.0 to 36.3 GB backward at 131k
# tokens, 4 parts to 1
PART_COPIES_UP, PART_COPIES_BACK = 1, 13
WRITES_BEHIND = 2  # blobs of a part's residual that wait to be written
EXPERT_SLOTS = 10  # packed experts on the device: those on their way, one in use
# of an expert's weights in float32: until it is solved, and more while it is refined
UNIT_WEIGHT_COPIES, UNIT_REFINE_COPIES = 6, 5
# of H, and of G where gradients are used, in float32: 31.2 GB for 8 experts of Kimi-K2.5
UNIT_MOMENT_COPIES = 2.5
USED_SHARE = 0.85  # of a GPU's memory, that is given out; pieces that do not fit a gap are the rest
LIBRARIES_GPU, LIBRARIES_HOST = 10**9, 3 * 10**9  # a context and its libraries; CUDA and torch
LIBRARIES_CPU = 7 * 10**8  # torch without CUDA


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one worker. gpu_stream and gpu_unit are 0 for workers without a GPU. tokens: of the
    units that it holds, whose place is on the GPU as long as there is room (token_room_bytes).
    """

    gpu_stream: int
    gpu_unit: int
    host: int
    tokens: int = 0

    @property
    def gpu(self) -> int:
        return max(self.gpu_stream, self.gpu_unit)


def row_bytes(width: int, bits: int) -> int:
    """One token's activations, or its gradients, as parts store them (calibration.stored_bits)."""
    return 2 * width if bits == 16 else round(width * block_int8.BYTES_PER_VALUE)


def routed_token_bytes(hidden_size: int, config: RunConfig) -> int:
    """What a unit holds of one token of an expert: x, delta where gradients are used, router
    weight."""
    each = row_bytes(hidden_size, config.calibration.stored_bits)
    return (1 + config.compression.output_curvature) * each + 4


def memory_of(plan: RunPlan, index: CheckpointIndex, layout: ModelLayout) -> Memory:
    """Peaks of one worker that streams and solves."""
    run = plan.config.run
    packed = index.expert_bytes(layout) // max(1, len(layout.moe_layers))
    outside: dict[int, int] = {}
    for e in untouched_tensors(index, layout):
        if (layer := layer_of(layout, e.name)) is not None:
            outside[layer] = outside.get(layer, 0) + e.num_bytes
    stream = stream_bytes(
        plan, layout, packed // layout.num_experts, max(outside.values(), default=0)
    )
    tokens, unit = unit_tokens_bytes(plan), unit_peak_bytes(plan, layout)
    shard = max(unit_bytes(layout, u) for u in plan.units)
    staged = WRITES_BEHIND * part_tokens(plan) * layout.hidden_size * value_bytes(plan)
    experts = packed * run.experts_per_unit // layout.num_experts
    host = packed + staged + (1 + run.prefetch_units) * experts + 2 * shard
    if not run.gpus_per_worker:
        return Memory(
            gpu_stream=0, gpu_unit=0, host=LIBRARIES_CPU + host + max(stream, unit), tokens=tokens
        )
    return Memory(
        gpu_stream=stream + LIBRARIES_GPU,
        gpu_unit=unit + LIBRARIES_GPU,
        host=LIBRARIES_HOST + host,
        tokens=tokens,
    )


def value_bytes(plan: RunPlan) -> int:
    """Of one value of the residual stream."""
    return 4 if plan.config.calibration.compute_dtype == "float32" else 2


def part_tokens(plan: RunPlan) -> int:
    """Of the largest part."""
    return max(p.num_sequences for p in plan.parts) * plan.config.calibration.sequence_length


def worker_tokens(plan: RunPlan) -> int:
    """Of the worker that streams most."""
    run = plan.config.run
    workers = min(run.stream_workers, len(plan.parts))
    return -(-len(plan.parts) // workers) * part_tokens(plan)


def wave_tokens(plan: RunPlan) -> int:
    part = part_tokens(plan)
    return max(part, min(worker_tokens(plan), WAVE_TOKENS // part * part))


def waves_of_worker(plan: RunPlan) -> int:
    """Times that a worker's tokens go through a segment."""
    return -(-worker_tokens(plan) // wave_tokens(plan))


def stream_bytes(plan: RunPlan, layout: ModelLayout, packed_expert: int, other_weights: int) -> int:
    """Of the worker that has the most parts, in the pass that takes more.

    Args:
        plan, layout: of the run.
        packed_expert: bytes of one expert as stored.
        other_weights: bytes of a layer's tensors outside its experts, at most.
    """
    own, part, wave = worker_tokens(plan), part_tokens(plan), wave_tokens(plan)
    tokens = own + PART_COPIES_UP * part
    if plan.uses_gradients:
        # the gradient in hand, and what enters the layers of a segment; of one of them the count of
        # copies knows
        held = min(plan.config.run.boundary_every, plan.source.num_layers)
        tokens = max(tokens, held * wave + PART_COPIES_BACK * part)
    tokens += WAVE_COPIES * wave + WRITES_BEHIND * part
    decoded = 3 * layout.hidden_size * layout.moe_intermediate_size * value_bytes(plan)
    return (
        tokens * layout.hidden_size * value_bytes(plan)
        + EXPERT_SLOTS * packed_expert
        + decoded
        + other_weights
    )


def tokens_of_unit(plan: RunPlan) -> float:
    """Routed tokens of a unit, on average."""
    c, source = plan.config.calibration, plan.source
    return (
        c.num_sequences
        * c.sequence_length
        * source.top_k
        / source.num_experts
        * plan.config.run.experts_per_unit
    )


def unit_peak_bytes(plan: RunPlan, layout: ModelLayout) -> int:
    """Of a unit with the average number of tokens, and the tokens of those that are read ahead."""
    return unit_tokens_bytes(plan) + solving_bytes(plan, layout)


def unit_tokens_bytes(plan: RunPlan) -> int:
    """Tokens of a unit that has the average number, and of those that are read ahead."""
    each = tokens_of_unit(plan) * routed_token_bytes(plan.source.hidden_size, plan.config)
    return round((1 + plan.config.run.prefetch_units) * each)


def solving_bytes(plan: RunPlan, layout: ModelLayout) -> int:
    """Of a unit that is solved, its tokens apart."""
    c, h, f = plan.config.compression, layout.hidden_size, layout.moe_intermediate_size
    moments = h * h + 3 * f * f + c.output_curvature * (h * h + 4 * f * f)
    weights = (UNIT_WEIGHT_COPIES + UNIT_REFINE_COPIES * (c.refine_steps > 0)) * 3 * h * f
    each = 4 * (weights + UNIT_MOMENT_COPIES * moments)
    return round(plan.config.run.experts_per_unit * each)


def token_room_bytes(plan: RunPlan, layout: ModelLayout, gpu_bytes: int) -> int:
    """What a unit may hold of its tokens on a GPU, beside what solving takes and the tokens of
    units that are read ahead.

    Args:
        plan, layout: of the run.
        gpu_bytes: memory of the GPU.
    """
    run = plan.config.run
    own = gpu_bytes * min(1.0, run.gpus_per_worker or 1.0) * USED_SHARE
    left = own - LIBRARIES_GPU - solving_bytes(plan, layout)
    return max(0, int(left / (1 + run.prefetch_units)))
