"""How long a plan will take: the stages' FLOP, steps and bytes over the rates of `Rates`.

    start | mirror | streams ............... | units left | reduce | verify | evaluate | greedy
                        units of layers that are complete, by the workers that do not stream

A worker streams at the slowest of computing, reading, hashing and writing, which lie beside each
other, once its first layer is through. A unit takes as long as its computation, or as fetching the
next one where that is longer and units are read ahead. Transfers through a node's link are shared
by the node's workers. Nothing is lost or repeated, and all units are alike.
"""

import math
from dataclasses import dataclass

from p48ray.checkpoint.layout import ModelLayout
from p48ray.config import RunConfig
from p48ray.estimate.held_out import evaluate_seconds, forward_flops, greedy_seconds
from p48ray.estimate.memory import tokens_of_unit
from p48ray.estimate.nearness import are_streams_near, is_near, is_source_near
from p48ray.estimate.rates import H200_NODE, Rates
from p48ray.numerics import code_descent
from p48ray.numerics.paired48 import INPUTS_IN_GROUP
from p48ray.numerics.refine_tokens import BATCH_TOKENS
from p48ray.numerics.solvers import SOLVERS
from p48ray.numerics.two_sided import ROW_GROUPS
from p48ray.run.plan import RunPlan

HASHING_THREADS = 4  # of a streaming worker (stages.blobs.WRITERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """What the stages move, all workers and nodes together; stream_read, of the source, a node."""

    source: int
    mirror: int
    stream_read: int
    stream_written: int
    boundaries_read: int  # by the backward pass
    unit_read: int
    layer_tokens: int  # activations and gradients of one layer
    routed_token: int  # one token of one expert, as stored
    unit_experts: int  # of a unit, in the source
    checkpoint: int
    verified: int
    num_shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of every stage as if it had the workers for itself; job_seconds has the overlap."""

    start_seconds: float
    mirror_seconds: float
    stream_seconds: float
    unit_seconds: float
    reduce_seconds: float
    verify_seconds: float
    evaluate_seconds: float
    greedy_seconds: float
    job_seconds: float
    stream_gpu_hours: float
    solver_gpu_hours: float
    paid_gpu_hours: float


def num_nodes(workers: int, config: RunConfig, rates: Rates) -> int:
    """Nodes that so many workers fill; a folder of a node's own means that there is one."""
    if is_near(config.run.root, config.run.root_is_shared):
        return 1
    return max(1, math.ceil(workers * config.run.gpus_per_worker / rates.gpus_a_node))


def stage_times(
    plan: RunPlan,
    layout: ModelLayout,
    moved: Bytes,
    layer_passes: float,
    dense_elements: int,
    rates: Rates = H200_NODE,
) -> Times:
    """Seconds of every stage.

    Args:
        plan, layout, moved, rates: of the run and its hardware.
        layer_passes: of all layers, by the streams, a backward pass counted as two.
        dense_elements: weights of all layers outside the experts.
    """
    run = plan.config.run
    workers = run.num_workers
    tokens = plan.config.calibration.num_sequences * plan.config.calibration.sequence_length
    flops = layer_passes * forward_flops(tokens, layout, dense_elements)
    computed = loop_seconds(plan, layout, rates) + product_seconds(plan, layout, rates)
    near, nodes = is_near(run.root, run.root_is_shared), num_nodes(workers, plan.config, rates)
    stream = stream_seconds(plan, moved, flops, rates)
    unit = unit_seconds(plan, moved, computed, rates)
    start = rates.ray_start_s + rates.worker_start_s
    mirror = moved.mirror / (rates.link * nodes)
    reduce = moved.checkpoint / ((rates.near_copy if near else rates.far_copy) * nodes)
    read = rates.near_read if near else rates.link
    checkers = max(1, min(workers, moved.num_shards))
    verify = max(moved.verified / (read * nodes), moved.verified / (rates.check_bytes * checkers))
    evaluate = evaluate_seconds(plan, layout, dense_elements, rates)
    greedy = greedy_seconds(plan, layout, moved.source, dense_elements, rates)
    job = (
        start
        + mirror
        + overlapped_seconds(plan, stream, moved, computed, rates)
        + reduce
        + verify
        + evaluate
        + greedy
    )
    return Times(
        start_seconds=start,
        mirror_seconds=mirror,
        stream_seconds=stream,
        unit_seconds=unit,
        reduce_seconds=reduce,
        verify_seconds=verify,
        evaluate_seconds=evaluate,
        greedy_seconds=greedy,
        job_seconds=job,
        stream_gpu_hours=flops / rates.stream_flops / 3600,
        solver_gpu_hours=computed / 3600,
        paid_gpu_hours=workers * run.gpus_per_worker * job / 3600,
    )


def stream_seconds(plan: RunPlan, moved: Bytes, flops: float, rates: Rates) -> float:
    """From the first layer up to the last one back, of the worker that has the most parts.

    Args:
        plan, moved, rates: as for `stage_times`.
        flops: of all parts.
    """
    run = plan.config.run
    workers = min(run.stream_workers, len(plan.parts))
    share = math.ceil(len(plan.parts) / workers) / len(plan.parts)
    nodes = num_nodes(workers, plan.config, rates)
    near = are_streams_near(run)
    source_near = is_source_near(plan)
    written = moved.stream_written / ((rates.near_write if near else rates.link) * nodes)
    read = moved.stream_read / (rates.near_read if source_near else rates.link)
    read += moved.boundaries_read / ((rates.near_read if near else rates.link) * nodes)
    hashed = moved.stream_written * share / (rates.hash_bytes * HASHING_THREADS)
    return rates.stream_begin_s + max(flops * share / rates.stream_flops, written, read, hashed)


def fetch_seconds(plan: RunPlan, unit_tokens: float, moved: Bytes, rates: Rates) -> float:
    """What one worker needs for one unit, without what waits for a shared link: hashing its share
    of parts from afar (who wrote near ones hashed them), gathering rows, experts from near.

    Args:
        plan, moved, rates: as for `stage_times`.
        unit_tokens: routed tokens of the unit.
    """
    is_hashed_by_writers = are_streams_near(plan.config.run)
    hashed = (
        0.0 if is_hashed_by_writers else moved.layer_tokens * len(plan.layers) / len(plan.units)
    )
    return (
        hashed / rates.hash_bytes
        + unit_tokens * moved.routed_token / rates.gather_bytes
        + moved.unit_experts / rates.near_read
    )


def unit_seconds(
    plan: RunPlan, moved: Bytes, computed: float, rates: Rates, units: int | None = None
) -> float:
    """Of units by all workers, and the first fetch, which nothing is computed beside.

    Args:
        plan, moved, rates: as for `stage_times`.
        computed: seconds that all units of the plan compute, together.
        units: so many of them; None for all.
    """
    run, total = plan.config.run, len(plan.units)
    left = total if units is None else units
    if not left:
        return 0.0
    nodes = num_nodes(run.num_workers, plan.config, rates)
    far, first_far = moved.unit_read, moved.layer_tokens + moved.unit_experts
    if are_streams_near(run):
        first_far = 0 if is_source_near(plan) else moved.unit_experts
        far = first_far * total
    one, fetch = computed / total, fetch_seconds(plan, tokens_of_unit(plan), moved, rates)
    each = max(one, fetch) if run.prefetch_units else one + fetch
    wall = math.ceil(left / run.num_workers) * each
    wall = max(wall, far * left / total / (rates.link * nodes))
    return wall + fetch + first_far / rates.link


def overlapped_seconds(
    plan: RunPlan, stream: float, moved: Bytes, computed: float, rates: Rates
) -> float:
    """Streams, and the units that are left when they end: workers that do not stream solve what is
    complete by then. In a run layer by layer nothing overlaps.

    Args:
        plan, moved, computed, rates: as for unit_seconds.
        stream: seconds of the streams.
    """
    run, total = plan.config.run, len(plan.units)
    if plan.propagates:
        return stream + unit_seconds(plan, moved, computed, rates)
    solvers = run.num_workers - min(run.stream_workers, len(plan.parts))
    each = max(computed / total, fetch_seconds(plan, tokens_of_unit(plan), moved, rates))
    begins = stream * plan.passes.first_complete / plan.passes.num_computed
    done = int(max(0, solvers) * (stream - begins) / each)
    last_layer = math.ceil(total / len(plan.layers))
    return stream + unit_seconds(plan, moved, computed, rates, max(total - done, last_layer))


def loop_seconds(plan: RunPlan, layout: ModelLayout, rates: Rates = H200_NODE) -> float:
    """The column loops of all units, over hidden inputs (gate, up) and intermediate ones (down)."""
    c = plan.config.compression
    inputs = layout.hidden_size + layout.moe_intermediate_size
    row_groups = ROW_GROUPS if c.output_curvature else 1
    code_groups = code_descent.CODE_ROW_GROUPS if c.output_curvature else 1
    solver = SOLVERS[c.solver]
    sweeps, code_sweeps = c.sweeps * solver.descends, c.code_sweeps * solver.descends
    passes = solver.column_passes
    steps = (
        sweeps * row_groups * rates.pair_group_step_s
        + code_sweeps * code_groups * rates.code_step_s
    )
    seconds_of_unit = inputs * (passes * rates.column_step_s + steps / INPUTS_IN_GROUP)
    weights = 3 * layout.hidden_size * layout.moe_intermediate_size
    sweep_s = rates.two_sided_weight_s if c.output_curvature else rates.weight_s
    seconds_of_expert = weights * (passes * rates.weight_s + sweeps * sweep_s)
    return sum(seconds_of_unit + u.num_experts * seconds_of_expert for u in plan.units)


def product_seconds(plan: RunPlan, layout: ModelLayout, rates: Rates = H200_NODE) -> float:
    """Products outside the loops: moments, expert forwards, factors, gradients, refinement."""
    h, f = layout.hidden_size, layout.moe_intermediate_size
    calibration, c = plan.config.calibration, plan.config.compression
    routed = (
        calibration.num_sequences * calibration.sequence_length * layout.top_k / layout.num_experts
    )
    moments, forwards = 2 * routed * (h * h + 3 * f * f), 2 * routed * 6 * h * f
    if c.output_curvature:
        moments += 2 * routed * (4 * f * f + h * h)
        forwards += 2 * routed * 6 * h * f
    factors = (h**3 + f**3) * SOLVERS[c.solver].needs_hessian
    refinement = 24 * c.refine_steps * BATCH_TOKENS * h * f
    seconds = (
        moments / rates.moment_flops
        + forwards / rates.matmul_flops
        + factors / rates.factor_flops
        + refinement / rates.refine_flops
    )
    return seconds * sum(u.num_experts for u in plan.units)
