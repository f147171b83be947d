"""Compress one unit: fetch its experts, gather their tokens, curvature, masks, codes, shard,
manifest.

Units are independent: any order, any machine, any number of times. Gate and up share inputs,
curvature and global scale and are solved as one stacked matrix. down_proj comes second: its inputs
are recomputed from the compressed gate and up, its target from the original weights (DESIGN 7.4).

Legend: N experts of the unit, O outputs, I inputs, H hidden size, F intermediate size, Z = 2 F
(gate's rows, then up's), G scale groups (I/16), B packed bytes (I/2).
"""

import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from p48ray import __version__
from p48ray.checkpoint.decode import fetch_experts
from p48ray.checkpoint.header import dtype_name
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.checkpoint.tensors import TensorFile
from p48ray.errors import ShardCorruptError
from p48ray.model.experts import ExpertWeights
from p48ray.numerics.asymmetric import compensated_target
from p48ray.numerics.headroom import SMALLEST_NORMAL, ScaleMasks, group_amax
from p48ray.numerics.nvfp4 import SCALE_GROUP
from p48ray.numerics.solution import Solution, SolverSettings
from p48ray.numerics.solvers import SOLVERS, solve
from p48ray.run import run_root
from p48ray.run.manifest import LadderStep, LayerScales, LinearRecord, Phase, UnitManifest
from p48ray.run.output_layout import unit_bytes, unit_rows
from p48ray.run.plan import WorkUnit
from p48ray.run.scale_counts import ScaleCounts, counted
from p48ray.run.scales import own_shifts
from p48ray.unit.compute_lock import idle_seconds
from p48ray.unit.context import StageContext
from p48ray.unit.ladder import Ladder
from p48ray.unit.linear_records import describe_linears
from p48ray.unit.moments import (
    Curvature,
    down_curvature,
    gate_up_curvature,
    output_side,
)
from p48ray.unit.refinement import refine_experts
from p48ray.unit.routed_tokens import RoutedTokens

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "compressed-tensors")


@dataclass(slots=True)
class Clock:
    """Seconds and a GPU's peak memory by phase. A phase lasts until the device has done what was
    asked of it, or the next one would pay for it."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gpu_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        is_gpu, start = self.device.type == "cuda", time.perf_counter()
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
            if is_gpu:
                torch.cuda.synchronize(self.device)
                self.peak_gpu_bytes[name] = max(
                    self.peak_gpu_bytes.get(name, 0), torch.cuda.max_memory_allocated(self.device)
                )
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 4)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a unit is computed from: its experts and its tokens, both as stored. Tokens may lie on
    the device already."""

    scales: LayerScales
    experts: dict[str, Tensor]
    tokens: RoutedTokens


@dataclass(frozen=True, slots=True)
class Solved:
    """What a unit came to: its shard's tensors on the CPU, and what its manifest says of them."""

    tensors: dict[str, Tensor]
    scales: LayerScales
    linears: tuple[LinearRecord, ...]
    ladder: tuple[LadderStep, ...]
    clipped: tuple[float, float]
    weight_scales: ScaleCounts


@torch.no_grad()
def compress_unit(context: StageContext, unit: WorkUnit) -> UnitManifest:
    """Compress the experts of one unit and store them.

    Only one computes at a time: other threads of the process may read what their units need, or
    write what theirs came to, meanwhile. So the seconds of "fetch" are those in which the device
    had nothing to compute (the wait for kernels that are being compiled too), and decoding the
    originals.
    Returns: the manifest that counts: ours, or that of an attempt that was faster.
    Raises: SourceError, CalibrationError or NumericsError with the unit's input at fault;
        ShardCorruptError when what was stored differs.
    """
    clock, begun_at = Clock(context.device), time.perf_counter()
    fetched = fetch_unit(context, unit)
    if context.compiling is not None:
        # counted with "fetch"; a second process would only compile the same once more
        context.compiling.wait()
    fetched_at = time.perf_counter()
    with context.compute_lock.held() as free_since:
        clock.seconds["fetch"] = round(idle_seconds(begun_at, fetched_at, free_since), 4)
        solved = solve_unit(context, unit, fetched, clock)
    del fetched  # the next unit has room for its tokens while this one is written
    return store_unit(context, unit, solved, clock)


def fetch_unit(context: StageContext, unit: WorkUnit) -> Fetched:
    """Read what a unit needs. Computes nothing on the device, where another unit may be at work."""
    scales = context.layer_scales(unit.layer)
    experts = fetch_experts(context.source, context.layout, unit.layer, unit.experts)
    return Fetched(scales, experts, RoutedTokens(context, unit, scales))


def solve_unit(context: StageContext, unit: WorkUnit, fetched: Fetched, clock: Clock) -> Solved:
    """All that is computed of a unit; nothing of it is left on the device.

    Args:
        context, unit: of the run, and the unit at hand.
        fetched: what fetch_unit read for it.
        clock: of this attempt; every phase is added to it.
    """
    ladder, tokens = Ladder(context), fetched.tokens
    with clock.phase("fetch"):
        gate_up_NOI, down_NOI = decode_originals(context, unit, fetched)
    size = context.layout.moe_intermediate_size
    originals = [
        ExpertWeights(w_ZH[:size], w_ZH[size:], down_HF)
        for w_ZH, down_HF in zip(gate_up_NOI, down_NOI, strict=True)
    ]
    with clock.phase("curvature"):
        side = output_side(tokens, originals)
        inputs, clipped_input = gate_up_curvature(tokens, side)
    with clock.phase("solve"):
        gate_up = solve_batch(context, gate_up_NOI, inputs)
    with clock.phase("ladder"):
        gate_up = ladder.solved("gate_up", gate_up_NOI, gate_up, inputs)
    with clock.phase("curvature"):
        intermediates, clipped_intermediate = down_curvature(
            tokens, side, originals, gate_up.values_NOI
        )
    with clock.phase("solve"):
        down = solve_batch(context, down_NOI, intermediates)
    with clock.phase("ladder"):
        down = ladder.solved("down", down_NOI, down, intermediates)
    if context.plan.config.compression.refine_steps:
        with clock.phase("refine"):
            refined = refine_experts(
                tokens, side, (gate_up_NOI, down_NOI), gate_up, down, intermediates
            )
            gate_up, down = gate_up.with_codes(refined.gate_up), down.with_codes(refined.down)
            intermediates, clipped_intermediate = down_curvature(
                tokens, side, originals, gate_up.values_NOI
            )
        with clock.phase("ladder"):
            ladder.refined("gate_up", gate_up_NOI, gate_up, inputs)
            ladder.refined("down", down_NOI, down, intermediates)
    with clock.phase("describe"):
        records = describe_linears(
            context, unit, (gate_up_NOI, gate_up, inputs), (down_NOI, down, intermediates)
        )
        tensors = pack_unit(context, unit, fetched.scales, gate_up, down)
    clipped = (clipped_input, clipped_intermediate)
    weight_scales = count_weight_scales(gate_up_NOI, gate_up) + count_weight_scales(down_NOI, down)
    return Solved(tensors, fetched.scales, records, ladder.steps(), clipped, weight_scales)


def count_weight_scales(weight_NOI: Tensor, solution: Solution) -> ScaleCounts:
    """What became of blocks of weights.

    Args:
        weight_NOI: the originals.
        solution: what they became, with scale_NOG of the blocks.
    """
    scale_G = solution.scale_NOG.float().flatten()
    is_there_G = group_amax(weight_NOI.flatten(0, 1), SCALE_GROUP) > 0
    masks = ScaleMasks(
        saturated=torch.zeros_like(is_there_G),
        subnormal=(scale_G > 0) & (scale_G < SMALLEST_NORMAL),
        zero=scale_G == 0,
    )
    return counted(masks, is_there_G.long())


def decode_originals(
    context: StageContext, unit: WorkUnit, fetched: Fetched
) -> tuple[Tensor, Tensor]:
    """Gate above up (N, 2 F, H), and down (N, H, F), of all experts of the unit, float32 on the
    device; of loud experts as they are shifted."""
    layout, n = context.layout, unit.num_experts
    gate_up_NOI = torch.empty(
        n, 2 * layout.moe_intermediate_size, layout.hidden_size, device=context.device
    )
    down_NOI = torch.empty(
        n, layout.hidden_size, layout.moe_intermediate_size, device=context.device
    )
    for gate_up_OI, down_OI, expert in zip(gate_up_NOI, down_NOI, unit.experts, strict=True):
        gate_FH, up_FH, down_HF = context.decoded(unit.layer, expert, fetched.experts)
        torch.cat([gate_FH.float(), up_FH.float()], out=gate_up_OI)
        down_OI.copy_(down_HF)
        if shift := fetched.scales.shifts.get(expert):
            gate_up_OI[layout.moe_intermediate_size :] *= 2.0**-shift
            down_OI *= 2.0**shift
    return gate_up_NOI, down_NOI


def solve_batch(context: StageContext, weight_NOI: Tensor, curvature: list[Curvature]) -> Solution:
    arguments = solver_arguments(context, weight_NOI, curvature)
    return solve(*arguments, sees_zeros=[c.sees_zeros for c in curvature])


def solver_arguments(
    context: StageContext, weight_NOI: Tensor, curvature: list[Curvature]
) -> tuple[Tensor, Tensor, list[float], SolverSettings, Tensor | None, Tensor | None]:
    """What solvers.solve takes, as the configuration asks for it: weight, H, tokens per input,
    settings, target, G."""
    settings = context.plan.config.compression
    hessian_NII = torch.stack([c.hessian_II for c in curvature])
    target_NOI = None
    solver = SOLVERS[settings.solver]
    if solver.uses_model_loss and curvature[0].cross_II is not None:
        cross_NII = torch.stack([c.cross_II for c in curvature if c.cross_II is not None])
        target_NOI = compensated_target(weight_NOI, hessian_NII, cross_NII)
    output_hessian_NOO = None
    if settings.output_curvature:
        output_hessian_NOO = torch.stack(
            [c.output_hessian_OO for c in curvature if c.output_hessian_OO is not None]
        )
    asked = SolverSettings(
        solver=settings.solver,
        sparsity=settings.sparsity,
        scale_span=settings.scale_span,
        damp=solver.default_damp if settings.damp == "auto" else settings.damp,
        output_damp=None if settings.output_damp == "auto" else settings.output_damp,
        sweeps=settings.sweeps,
        code_sweeps=settings.code_sweeps,
    )
    tokens_per_input = [c.tokens / weight_NOI.shape[2] for c in curvature]
    return weight_NOI, hessian_NII, tokens_per_input, asked, target_NOI, output_hessian_NOO


def pack_unit(
    context: StageContext, unit: WorkUnit, scales: LayerScales, gate_up: Solution, down: Solution
) -> dict[str, Tensor]:
    """The unit's shard: tensors on the CPU, in the order of output_layout.unit_rows.

    Args:
        context, unit: as solve_unit takes them.
        scales: of the unit's layer; they become the input global scales.
        gate_up, down: final solutions of all experts of the unit, in its order.
    """
    size = context.layout.moe_intermediate_size
    parts = {
        "gate_proj": (gate_up, slice(0, size), scales.gate_up),
        "up_proj": (gate_up, slice(size, 2 * size), scales.gate_up),
    }
    parts["down_proj"] = (down, slice(None), scales.down)
    tensors: dict[str, Tensor] = {}
    for n, expert in enumerate(unit.experts):
        for projection, (solution, rows, input_scale) in parts.items():
            name = context.layout.expert_linear_name(unit.layer, expert, projection)
            tensors[f"{name}.weight_packed"] = solution.packed_NOB[n, rows]
            tensors[f"{name}.weight_scale"] = solution.scale_NOG[n, rows]
            tensors[f"{name}.weight_global_scale"] = solution.global_scale_N1[n]
            tensors[f"{name}.input_global_scale"] = torch.tensor([input_scale], dtype=torch.float32)
    rows_of_unit = unit_rows(context.layout, unit)
    assert len(rows_of_unit) == len(tensors)
    for name, dtype, shape in rows_of_unit:
        found = (dtype_name(tensors[name].dtype), tuple(tensors[name].shape))
        assert found == (dtype, shape), f"{name}: expected {(dtype, shape)}, found {found}"
    return {name: tensors[name].cpu().contiguous() for name, _, _ in rows_of_unit}


def store_unit(context: StageContext, unit: WorkUnit, solved: Solved, clock: Clock) -> UnitManifest:
    """Shard first, checked; manifest last, first writer wins.

    Args:
        context, unit, clock: as solve_unit takes them.
        solved: what solve_unit returned.
    Returns: the manifest that counts, as compress_unit does. Raises: ShardCorruptError.
    """
    attempt = uuid.uuid4().hex[:12]
    key = run_root.unit_shard(unit.id, attempt)
    shard = context.store.write_once(key, TensorFile(solved.tensors))
    stored = context.store.head(key)
    if stored is None or stored.size_bytes != shard.size_bytes:
        raise ShardCorruptError(
            f"{context.store.uri}/{key}: expected {shard.size_bytes} bytes, found"
            f" {stored.size_bytes if stored else 'nothing'}"
        )
    manifest = UnitManifest(
        units_digest=context.plan.units_digest,
        unit=unit.id,
        attempt=attempt,
        size_bytes=shard.size_bytes,
        sha256=shard.sha256,
        data_offset=shard.size_bytes - unit_bytes(context.layout, unit),
        input_global_scales=(solved.scales.gate_up, solved.scales.down),
        shifts=own_shifts(solved.scales, unit.experts),
        linears=solved.linears,
        ladder=solved.ladder,
        clipped_input_share=solved.clipped[0],
        clipped_intermediate_share=solved.clipped[1],
        weight_scales=solved.weight_scales,
        seconds=clock.seconds,
        peak_gpu_bytes=clock.peak_gpu_bytes,
        finished_at=round(time.time(), 3),
        worker=context.worker,
        device=context.device_name,
        versions={"p48ray": __version__} | {name: library_version(name) for name in LIBRARIES},
    )
    if not context.store.put_if_absent(run_root.unit_manifest(unit.id), manifest.to_json()):
        # an attempt that was faster counts; ours is referenced by nothing
        context.store.delete(key)
        return context.finished_unit(unit).manifest
    log.info(unit_line(manifest))
    return manifest


@cache
def library_version(name: str) -> str:
    """Of an installed package; looking it up reads and parses a file, 15 ms each time."""
    return metadata.version(name)


def unit_line(manifest: UnitManifest) -> str:
    """One JSON line per finished unit."""
    linears = manifest.linears
    return json.dumps(
        {
            "unit": manifest.unit,
            "attempt": manifest.attempt,
            "seconds": manifest.seconds,
            "tokens": sum(r.tokens for r in linears) // len(PROJECTIONS),
            "outcomes": {
                o: sum(r.outcome == o for r in linears)
                for o in sorted({r.outcome for r in linears})
            },
            "worst_relative_output_error": round(
                max((r.relative_output_error for r in linears), default=0.0), 5
            ),
            "peak_gpu_bytes": manifest.peak_gpu_bytes,
        }
    )
