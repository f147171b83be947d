"""From a batch of weights and their curvature to NVFP4 codes: the solvers by name, and what happens
where a Hessian cannot be used.

    round_to_nearest   magnitude mask, searched scales, nearest codes; needs no curvature
    gptq               column loop with error feedback, dense ([Frantar2022gptq])
    sparsegpt_gptq     the same with the paired-4:8 mask chosen on the way ([Frantar2023sparsegpt])
    block_descent      sparsegpt_gptq as the start -> block descent on the damped Hessian -> gptq of
                       the descended values with their mask; per expert whichever of start and end
                       has the lower tr(G (T - Q) H (T - Q)^T), H undamped, G damped or the identity

The global scale belongs to the whole (O, I) matrix of an expert: gate and up come stacked, so that
they share it. Its amax is that of what is quantized. A solver never falls back in silence:
`Solution.outcome` and `.reason` say per expert what was done. What is zero is rounded, and is no
fallback (zeros).

SOLVERS has one record a solver. Configuration, curvature, estimate, error ladder and report read it
there; a new solver is a function and a record here.

Sources: arXiv 2210.17323 (GPTQ), 2301.00774 (SparseGPT), DESIGN 7.

Legend: N experts, O out, I in, P pairs (I/2), G scale groups (I/16), B packed bytes (I/2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics import e2m1, nvfp4
from p48ray.numerics.block_descent import block_descent
from p48ray.numerics.code_descent import code_descent
from p48ray.numerics.curvature import damp, damp_from_tokens
from p48ray.numerics.factor import inverse_factor
from p48ray.numerics.paired48 import keep_top_pairs, pairs_to_inputs
from p48ray.numerics.refine import QuantizedLinear
from p48ray.numerics.solution import (
    NO_SPARSITY,
    PAIRED_48,
    Draft,
    Problem,
    Solution,
    SolverSettings,
)
from p48ray.numerics.solver_inputs import check_problem, damped_output_hessian, failure_reasons
from p48ray.numerics.sparsegpt import prune_columns, quantize_columns
from p48ray.numerics.two_sided import two_sided_descent
from p48ray.numerics.zeros import enlargement, vanishes, zero_reasons

ONE_SHOT_DAMP = 0.1
"""The published one-shot reference's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """All that the program asks of a solver, apart from its numbers.

    name: in the configuration. label: in the report. body: from a problem to codes. sparsities:
    that it can make. needs_hessian: it works on H and its factor. descends: `sweeps` and
    `code_sweeps` are its own. uses_model_loss: takes G, a target that makes up for compressed
    inputs, and refinement, and always borrows from its layer where tokens are few (a published
    one-shot solver stays what its paper describes). default_damp: where `damp` is auto; None: from
    the token count. column_passes: column loops of a solve, for the estimate of time. last_step:
    its name in the error ladder, "" for `name`.
    """

    name: str
    label: str
    body: Callable[[Problem], Draft]
    sparsities: tuple[str, ...]
    needs_hessian: bool = True
    descends: bool = False
    uses_model_loss: bool = False
    default_damp: float | None = ONE_SHOT_DAMP
    column_passes: int = 1
    last_step: str = ""

    @property
    def step(self) -> str:
        """The name of what it ends with in the error ladder."""
        return self.last_step or self.name


def solve(
    weight: Float32[Tensor, "n o i"],
    hessian: Float32[Tensor, "n i i"],
    tokens_per_input: Sequence[float],
    settings: SolverSettings,
    target: Float32[Tensor, "n o i"] | None = None,
    output_hessian: Float32[Tensor, "n o o"] | None = None,
    sees_zeros: Sequence[bool] = (),
) -> Solution:
    """Quantize a batch of linears.

    Args:
        weight: the original weights, (N, O, I).
        hessian: mean second moment of each expert's inputs, (N, I, I), undamped.
        tokens_per_input: per expert; decides the damping where settings.damp is None.
        settings: of all experts of the batch.
        target: what the values aim at (asymmetric.compensated_target), None for the weight itself.
        output_hessian: G, mean second moment of the gradients at the outputs, (N, O, O), undamped;
            block_descent then works on both sides. None for the identity.
        sees_zeros: per expert, whether its inputs are all zero: its Hessian is zero because there
            is nothing to lose. Empty for none.
    Returns: new tensors on weight's device; values_NOI is what the codes decode to. An expert whose
        Hessian is zero, not finite or indefinite beyond the damping ladder is rounded to nearest
        from its WEIGHT, because its target came from the same statistics. So is one whose weights
        or inputs are zero.
    Raises: NumericsError for unknown or unfitting settings, bad shapes, weights or targets that are
        not finite.
    """
    check_problem(weight, hessian, tokens_per_input, settings, target, _sparsities())
    aim_NOI = weight if target is None else target
    solver, zero = SOLVERS[settings.solver], zero_reasons(weight, sees_zeros)
    if not solver.needs_hessian:
        draft = solver.body(
            Problem(target_NOI=aim_NOI, hessian_NII=hessian, factor=None, settings=settings)
        )
        return _solution(draft, zero, ("",) * len(weight), (0.0,) * len(weight))
    if any(zero):  # squares of such weights are 0 in float32, and quotients of them no numbers
        aim_NOI = torch.where(vanishes(weight)[:, None, None], 0.0, aim_NOI)
    problem = _problem(aim_NOI, hessian, tokens_per_input, settings, output_hessian)
    draft = solver.body(problem)
    factor = problem.factor
    assert factor is not None
    is_rounded = [f or bool(z) for f, z in zip(factor.failed, zero, strict=True)]
    if any(is_rounded):
        draft = draft.replaced(
            torch.tensor(is_rounded, device=weight.device),
            _round_to_nearest(
                Problem(target_NOI=weight, hessian_NII=hessian, factor=None, settings=settings)
            ),
        )
    return _solution(draft, zero, failure_reasons(hessian, factor), factor.damp_rel)


def sparse_values(
    weight: Float32[Tensor, "n o i"],
    hessian: Float32[Tensor, "n i i"],
    tokens_per_input: Sequence[float],
    settings: SolverSettings,
    target: Float32[Tensor, "n o i"] | None = None,
    output_hessian: Float32[Tensor, "n o o"] | None = None,
) -> Float32[Tensor, "n o i"]:
    """The paired-4:8 values that a solver would go on to quantize: bench/quality.py's row of
    sparsity alone.

    Args:
        weight, hessian, tokens_per_input, settings, target, output_hessian: as for `solve`.
    Raises: as `solve`; NumericsError too for a solver without sparsity or a Hessian without a
        factor.
    """
    check_problem(weight, hessian, tokens_per_input, settings, target, _sparsities())
    solver = SOLVERS[settings.solver]
    if PAIRED_48 not in solver.sparsities or not solver.needs_hessian:
        raise NumericsError(
            "sparse_values: expected a solver that chooses masks by a Hessian, found"
            f" {settings.solver!r}"
        )
    problem = _problem(
        weight if target is None else target, hessian, tokens_per_input, settings, output_hessian
    )
    assert problem.factor is not None
    if any(problem.factor.failed):
        raise NumericsError(
            f"sparse_values: {'; '.join(filter(None, failure_reasons(hessian, problem.factor)))}"
        )
    values_NOI, keep_NOP = prune_columns(problem.target_NOI, problem.factor.upper_NII)
    return _descend(problem, values_NOI, keep_NOP)[0] if solver.descends else values_NOI


def _problem(
    target_NOI: Tensor,
    hessian_NII: Tensor,
    tokens_per_input: Sequence[float],
    settings: SolverSettings,
    output_hessian_NOO: Tensor | None,
) -> Problem:
    """Factor and damped G; a Hessian without a factor is replaced by the identity, so that the
    batch stays whole."""
    damp_rel = [
        damp_from_tokens(t) if settings.damp is None else settings.damp for t in tokens_per_input
    ]
    factor = inverse_factor(hessian_NII, damp_rel)
    num_inputs, usable_NII = target_NOI.shape[2], hessian_NII
    if any(factor.failed):
        failed_N = torch.tensor(factor.failed, device=target_NOI.device)
        usable_NII = torch.where(
            failed_N[:, None, None], torch.eye(num_inputs, device=target_NOI.device), hessian_NII
        )
    damped_NOO = None
    if output_hessian_NOO is not None:
        damped_NOO = damped_output_hessian(
            output_hessian_NOO, tokens_per_input, num_inputs, settings.output_damp
        )
    return Problem(
        target_NOI=target_NOI,
        hessian_NII=usable_NII,
        factor=factor,
        settings=settings,
        output_hessian_NOO=damped_NOO,
    )


def _round_to_nearest(problem: Problem) -> Draft:
    settings, factor_N = problem.settings, enlargement(problem.target_NOI)
    target_NOI = problem.target_NOI * factor_N[:, None, None]
    if settings.sparsity == PAIRED_48:
        keep_NOP = keep_top_pairs(target_NOI.square().unflatten(2, (-1, 2)).sum(-1))
    else:
        keep_NOP = torch.ones_like(target_NOI[:, :, ::2], dtype=torch.bool)
    masked_NOI = target_NOI * pairs_to_inputs(keep_NOP)
    largest_N = torch.full_like(factor_N, nvfp4.MAX_GLOBAL_SCALE) / factor_N
    global_scale_N = torch.minimum(_global_scale(target_NOI), largest_N)
    scale_NOG = nvfp4.choose_scales(masked_NOI, global_scale_N, settings.scale_span, search=True)
    codes_NOI = nvfp4.quantize(masked_NOI, scale_NOG, global_scale_N)
    return Draft(
        codes_NOI=codes_NOI,
        scale_NOG=scale_NOG,
        global_scale_N=global_scale_N * factor_N,
        keep_NOP=keep_NOP,
        is_start_N=_all_false(target_NOI),
    )


def _sparsegpt_gptq(problem: Problem) -> Draft:
    return _column_loop(problem, problem.target_NOI, keep_NOP=None)


def _block_descent(problem: Problem) -> Draft:
    start = _sparsegpt_gptq(problem)
    start_values_NOI = start.values()
    descended_NOI, keep_NOP = _descend(problem, start_values_NOI, start.keep_NOP)
    kept = QuantizedLinear(
        codes_NOI=start.codes_NOI,
        scale_NOG=start.scale_NOG,
        global_scale_N=start.global_scale_N,
        keep_NOP=start.keep_NOP,
    )
    end = replace(
        _descend_codes(problem, _column_loop(problem, descended_NOI, keep_NOP)), start=kept
    )
    is_worse_N = ~(problem.loss(end.values()) <= problem.loss(start_values_NOI))  # a NaN is worse
    marked = Draft(
        codes_NOI=start.codes_NOI,
        scale_NOG=start.scale_NOG,
        global_scale_N=start.global_scale_N,
        keep_NOP=start.keep_NOP,
        is_start_N=~start.is_start_N,
    )
    return end.replaced(is_worse_N, marked)


def _damped(problem: Problem) -> Tensor:
    assert problem.factor is not None
    return damp(
        problem.hessian_NII, torch.tensor(problem.factor.damp_rel, device=problem.target_NOI.device)
    )


def _descend(problem: Problem, values_NOI: Tensor, keep_NOP: Tensor) -> tuple[Tensor, Tensor]:
    """Values and kept pairs after settings.sweeps of block descent, on both sides where G is
    known."""
    target_NOI, damped_NII, sweeps = problem.target_NOI, _damped(problem), problem.settings.sweeps
    if problem.output_hessian_NOO is None:
        return block_descent(target_NOI, values_NOI, keep_NOP, damped_NII, sweeps)
    return two_sided_descent(
        target_NOI, values_NOI, keep_NOP, damped_NII, problem.output_hessian_NOO, sweeps
    )


def _descend_codes(problem: Problem, draft: Draft) -> Draft:
    """The draft after settings.code_sweeps of code descent."""
    if not problem.settings.code_sweeps:
        return draft
    codes_NOI, scale_NOG, keep_NOP = code_descent(
        problem.target_NOI,
        draft.codes_NOI,
        draft.scale_NOG,
        draft.global_scale_N,
        draft.keep_NOP,
        _damped(problem),
        problem.output_hessian_NOO,
        span=problem.settings.scale_span,
        sweeps=problem.settings.code_sweeps,
    )
    return replace(draft, codes_NOI=codes_NOI, scale_NOG=scale_NOG, keep_NOP=keep_NOP)


def _column_loop(problem: Problem, values_NOI: Tensor, keep_NOP: Tensor | None) -> Draft:
    assert problem.factor is not None
    settings = problem.settings
    global_scale_N = _global_scale(values_NOI)
    is_sparse = settings.sparsity == PAIRED_48
    codes = quantize_columns(
        values_NOI,
        problem.factor.upper_NII,
        global_scale_N,
        span=settings.scale_span,
        keep=keep_NOP,
        sparsity=is_sparse,
    )
    return Draft(
        codes_NOI=codes.codes,
        scale_NOG=codes.scale,
        global_scale_N=global_scale_N,
        keep_NOP=codes.keep,
        is_start_N=_all_false(values_NOI),
    )


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver(
            name="block_descent",
            label="block descent",
            body=_block_descent,
            sparsities=(PAIRED_48,),
            descends=True,
            uses_model_loss=True,
            default_damp=None,
            column_passes=2,
        ),
        Solver(
            name="sparsegpt_gptq",
            label="one-shot",
            body=_sparsegpt_gptq,
            sparsities=(PAIRED_48,),
            last_step="one_shot",
        ),
        Solver(name="gptq", label="GPTQ, dense", body=_sparsegpt_gptq, sparsities=(NO_SPARSITY,)),
        Solver(
            name="round_to_nearest",
            label="rounded to nearest",
            body=_round_to_nearest,
            sparsities=(PAIRED_48, NO_SPARSITY),
            needs_hessian=False,
            column_passes=0,
        ),
    )
}
"""By name, the default first."""


def _sparsities() -> dict[str, tuple[str, ...]]:
    return {name: solver.sparsities for name, solver in SOLVERS.items()}


def _global_scale(values_NOI: Tensor) -> Tensor:
    return nvfp4.global_scale_from_amax(values_NOI.abs().amax((1, 2)))


def _all_false(values_NOI: Tensor) -> Tensor:
    return torch.zeros(len(values_NOI), dtype=torch.bool, device=values_NOI.device)


def _solution(
    draft: Draft, zero: tuple[str, ...], failures: tuple[str, ...], damp_rel: tuple[float, ...]
) -> Solution:
    worse = "the quantized result of block descent had a higher loss than its one-shot start"
    starts = [worse if is_start else "" for is_start in draft.is_start_N.tolist()]
    causes = list(zip(zero, failures, starts, strict=True))
    outcome = tuple(
        "zero" if z else "round_to_nearest" if f else "one_shot" if s else "solved"
        for z, f, s in causes
    )
    return Solution(
        packed_NOB=e2m1.pack(draft.codes_NOI),
        scale_NOG=draft.scale_NOG,
        global_scale_N1=draft.global_scale_N[:, None],
        values_NOI=draft.values(),
        keep_NOP=draft.keep_NOP,
        outcome=outcome,
        reason=tuple(z or f or s for z, f, s in causes),
        damp_rel=tuple(0.0 if z else rel for z, rel in zip(zero, damp_rel, strict=True)),
        start=draft.start,
    )
