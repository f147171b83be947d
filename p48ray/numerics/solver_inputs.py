"""What a solver can not work with: wrong shapes, values that are not finite, a Hessian that can not
be factored; and the damping of the output side.

Legend: N experts, O out, I in."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics import nvfp4
from p48ray.numerics.curvature import damp, mean_diagonal, output_damp_from_tokens
from p48ray.numerics.factor import Factor
from p48ray.numerics.paired48 import INPUTS_IN_GROUP
from p48ray.numerics.solution import (
    SolverSettings,
)


def damped_output_hessian(
    output_hessian: Float32[Tensor, "n o o"],
    tokens_per_input: Sequence[float],
    num_inputs: int,
    output_damp: float | None,
) -> Float32[Tensor, "n o o"]:
    """G with its diagonal raised (output_damp, else from tokens per output); the identity for an
    expert whose G is zero or not finite.

    Args:
        output_hessian: G, (N, O, O), undamped.
        tokens_per_input: one number per expert.
        num_inputs: I, by which tokens per input become tokens per output.
        output_damp: fraction of the mean diagonal; None to take it from the tokens.
    """
    num_outputs = output_hessian.shape[1]
    automatic = [output_damp_from_tokens(t * num_inputs / num_outputs) for t in tokens_per_input]
    rels = automatic if output_damp is None else [output_damp] * len(automatic)
    damped_NOO = damp(output_hessian, torch.tensor(rels, device=output_hessian.device))
    is_usable_N = torch.isfinite(output_hessian).all(-1).all(-1) & (
        mean_diagonal(output_hessian) > 0
    )
    return torch.where(
        is_usable_N[:, None, None],
        damped_NOO,
        torch.eye(num_outputs, device=output_hessian.device),
        out=damped_NOO,
    )


def failure_reasons(hessian_NII: Tensor, factor: Factor) -> tuple[str, ...]:
    """Why each expert has no factor; "" where it has one."""
    if not any(factor.failed):
        return ("",) * len(factor.failed)
    finite = torch.isfinite(hessian_NII).all(-1).all(-1).tolist()
    positive = (mean_diagonal(hessian_NII) > 0).tolist()
    texts = []
    for is_failed, is_finite, is_positive, rel in zip(
        factor.failed, finite, positive, factor.damp_rel, strict=True
    ):
        why = (
            "is not finite"
            if not is_finite
            else "is zero"
            if not is_positive
            else f"has no Cholesky factor up to damping {rel:g}"
        )
        texts.append(f"the Hessian {why}" if is_failed else "")
    return tuple(texts)


def check_problem(
    weight: Tensor,
    hessian: Tensor,
    tokens_per_input: Sequence[float],
    settings: SolverSettings,
    target: Tensor | None,
    known: Mapping[str, tuple[str, ...]],
) -> None:
    """Raises: NumericsError for what no solver can work with.

    Args:
        weight, hessian, tokens_per_input, settings, target: as solvers.solve takes them.
        known: sparsities that each solver takes, by its name.
    """
    if settings.sparsity not in known.get(settings.solver, ()):
        raise NumericsError(
            f"solver {settings.solver!r} with sparsity {settings.sparsity!r}: expected one of"
            f" {known}"
        )
    if (
        settings.scale_span not in nvfp4.SCALE_SPANS
        or weight.shape[2] % settings.scale_span
        or weight.shape[2] % INPUTS_IN_GROUP
    ):
        raise NumericsError(
            f"solve: expected scale_span 16 or 32 dividing {weight.shape[2]} inputs, found"
            f" {settings.scale_span}"
        )
    n, _, i = weight.shape
    if hessian.shape != (n, i, i) or len(tokens_per_input) != n:
        raise NumericsError(
            f"solve: expected {n} Hessians of {i} inputs and as many token counts, found"
            f" {tuple(hessian.shape)}, {len(tokens_per_input)}"
        )
    for name, values in (("weight", weight), ("target", target)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise NumericsError(f"solve: {name} holds values that are not finite")
