"""What a unit's manifest says of each of its linears.

Legend: N experts of the unit, O outputs, I inputs.
"""

import torch
from torch import Tensor

from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.numerics.relative_errors import relative_output_error, relative_weight_error
from p48ray.numerics.solution import Solution
from p48ray.numerics.zeros import enlargement, zero_reasons
from p48ray.run.manifest import LinearRecord
from p48ray.run.plan import WorkUnit
from p48ray.unit.context import StageContext
from p48ray.unit.moments import Curvature

SolvedLinears = tuple[Tensor, Solution, list[Curvature]]


def describe_linears(
    context: StageContext, unit: WorkUnit, gate_up: SolvedLinears, down: SolvedLinears
) -> tuple[LinearRecord, ...]:
    """One record per linear: tokens, outcome, damping and both errors.

    Gate and up are solved as one matrix, but either may be zero alone.

    Args:
        context, unit: of the run, and the unit at hand.
        gate_up, down: originals (N, O, I), their solution, and one curvature an expert.
    """
    size = context.layout.moe_intermediate_size
    rows = {
        "gate_proj": (gate_up, slice(0, size)),
        "up_proj": (gate_up, slice(size, 2 * size)),
        "down_proj": (down, slice(None)),
    }
    records = []
    for projection in PROJECTIONS:
        (weight_NOI, solution, curvature), of = rows[projection]
        w_NOI, q_NOI = weight_NOI[:, of], solution.values_NOI[:, of]
        zero = zero_reasons(w_NOI, [c.sees_zeros for c in curvature])
        weight_errors = relative_weight_error(w_NOI, q_NOI).tolist()
        output_errors = output_error(w_NOI, q_NOI, curvature).tolist()
        for n, expert in enumerate(unit.experts):
            records.append(
                LinearRecord(
                    name=context.layout.expert_linear_name(unit.layer, expert, projection),
                    tokens=curvature[n].tokens,
                    outcome="zero" if zero[n] else solution.outcome[n],
                    reason=zero[n] or solution.reason[n],
                    damp=solution.damp_rel[n],
                    shrinkage=curvature[n].shrinkage,
                    relative_weight_error=weight_errors[n],
                    relative_output_error=output_errors[n],
                )
            )
    return tuple(records)


def output_error(w_NOI: Tensor, q_NOI: Tensor, curvature: list[Curvature]) -> Tensor:
    """E|W h - Q h'|^2 / E|W h|^2 with h' what the compressed linear will see; without cross moments
    both sides see h'. Shape (N,)."""
    hessian_NII = torch.stack([c.hessian_II for c in curvature])
    if curvature[0].cross_II is None:
        return relative_output_error(w_NOI, q_NOI, hessian_NII)
    # what is too small to square is enlarged by a power of two, which the ratio does not show
    factor_N11 = enlargement(w_NOI)[:, None, None]
    w_NOI, q_NOI = w_NOI * factor_N11, q_NOI * factor_N11
    cross_NII = torch.stack([c.cross_II for c in curvature if c.cross_II is not None])
    energy_NII = torch.stack([c.energy_II for c in curvature if c.energy_II is not None])
    kept_N = ((w_NOI @ energy_NII) * w_NOI).sum((1, 2))
    error_N = (
        kept_N
        - 2 * ((w_NOI @ cross_NII) * q_NOI).sum((1, 2))
        + ((q_NOI @ hessian_NII) * q_NOI).sum((1, 2))
    )
    return error_N.clamp_min(0) / kept_N.clamp_min(torch.finfo(torch.float32).tiny)
