"""The error ladder of a unit: how far one expert's outputs are off after each step of its solve.

    dense           every weight kept, rounded to NVFP4
    one_shot        SparseGPT's masks and GPTQ (or the step that a one-shot solver is named for)
    block_descent   after the sweeps, quantized
    refined         after refinement of the whole expert

A step's error is that of the linear alone, E |W h - Q h'|^2_G / E |W h|^2_G over the calibration
tokens, from the moments that the solver worked with: h the original input, h' what the compressed
linear will see (for gate and up the same). G is the identity and, where gradients are used, the
output side of the loss's curvature, which is what the solver lowers. down's h' comes from behind
the solved gate and up, after refinement from behind the refined ones: down answers for the whole
expert.

Measured on one expert of a unit and on up to LADDER_ROWS of its rows, because that costs next to
nothing; nothing here takes part in the result.

Legend: N experts, O out, I in, R sampled rows, G scale groups (I/16).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from p48ray.numerics import nvfp4
from p48ray.numerics.refine import QuantizedLinear
from p48ray.numerics.solution import Solution
from p48ray.numerics.solver_inputs import damped_output_hessian
from p48ray.numerics.solvers import SOLVERS
from p48ray.run.manifest import LadderStep
from p48ray.unit.context import StageContext
from p48ray.unit.moments import Curvature

# of the stacked gate and up, or of down; the sum over rows is estimated from these
LADDER_ROWS = 512
DENSE, ONE_SHOT, REFINED = "dense", "one_shot", "refined"
SIDES = ("gate_up", "down")


class Ladder:
    """Collects a unit's steps while it is compressed. `position`: of the expert that is looked
    at."""

    def __init__(self, context: StageContext, position: int = 0) -> None:
        self.settings = context.plan.config.compression
        self.position = position
        self.errors: dict[str, dict[str, tuple[float, float | None]]] = {}

    def solved(
        self, side: str, weight_NOI: Tensor, solution: Solution, curvature: Sequence[Curvature]
    ) -> Solution:
        """Note the steps up to the solver's last; returns the solution without its start, which
        takes memory and has served.

        Args:
            side: "gate_up" or "down".
            weight_NOI: the originals of all experts.
            solution: of all experts.
            curvature: that the solver worked with, one an expert.
        """
        n = self.position
        self.note(
            DENSE,
            side,
            weight_NOI,
            rounded(weight_NOI[n : n + 1], self.settings.scale_span),
            curvature,
        )
        if solution.start is not None:
            self.note(ONE_SHOT, side, weight_NOI, decoded(solution.start, n), curvature)
        self.note(
            SOLVERS[self.settings.solver].step,
            side,
            weight_NOI,
            solution.values_NOI[n : n + 1],
            curvature,
        )
        return replace(solution, start=None)

    def refined(
        self, side: str, weight_NOI: Tensor, solution: Solution, curvature: Sequence[Curvature]
    ) -> None:
        """Note the step of refinement.

        Args:
            side, weight_NOI: as `solved` takes them.
            solution: with the refined codes.
            curvature: one an expert; for down from behind the refined gate and up.
        """
        n = self.position
        self.note(REFINED, side, weight_NOI, solution.values_NOI[n : n + 1], curvature)

    def note(
        self,
        step: str,
        side: str,
        weight_NOI: Tensor,
        values_1OI: Tensor,
        curvature: Sequence[Curvature],
    ) -> None:
        """Measure one step of one side for the expert that is looked at.

        Args:
            step: its name.
            side, weight_NOI, curvature: as `solved` takes them.
            values_1OI: that expert's weights after the step, decoded.
        """
        own, w_OI, q_OI = curvature[self.position], weight_NOI[self.position], values_1OI[0]
        weighted = None
        if own.output_hessian_OO is not None:
            output_damp = None if self.settings.output_damp == "auto" else self.settings.output_damp
            inputs = w_OI.shape[1]
            metric_OO = damped_output_hessian(
                own.output_hessian_OO[None], [own.tokens / inputs], inputs, output_damp
            )[0]
            weighted = linear_error(w_OI, q_OI, own, metric_OO)
        self.errors.setdefault(step, {})[side] = (linear_error(w_OI, q_OI, own, None), weighted)

    def steps(self) -> tuple[LadderStep, ...]:
        """In the order of the solve; none unless every error is a number (an expert without any
        statistics)."""
        found = []
        for step, sides in self.errors.items():
            plain = {side: sides[side][0] for side in SIDES}
            weighted = {side: value for side in SIDES if (value := sides[side][1]) is not None}
            found.append((step, plain, weighted))
        if not all(
            torch.isfinite(torch.tensor([*plain.values(), *weighted.values()])).all()
            for _, plain, weighted in found
        ):
            return ()
        return tuple(
            LadderStep(step=step, output_error=plain, loss_error=weighted)
            for step, plain, weighted in found
        )


def rounded(weight_NOI: Tensor, span: int) -> Tensor:
    """Every weight kept, at the nearest NVFP4 value under searched scales."""
    global_scale_N = nvfp4.global_scale_from_amax(weight_NOI.abs().amax((1, 2)))
    scale_NOG = nvfp4.choose_scales(weight_NOI, global_scale_N, span, search=True)
    return nvfp4.dequantize(
        nvfp4.quantize(weight_NOI, scale_NOG, global_scale_N), scale_NOG, global_scale_N
    )


def decoded(linear: QuantizedLinear, n: int) -> Tensor:
    """Values of one expert of a batch, (1, O, I)."""
    one = slice(n, n + 1)
    return nvfp4.dequantize(
        linear.codes_NOI[one], linear.scale_NOG[one], linear.global_scale_N[one]
    )


def linear_error(
    w_OI: Tensor,
    q_OI: Tensor,
    curvature: Curvature,
    metric_OO: Tensor | None,
    rows: int = LADDER_ROWS,
) -> float:
    """E (W h - Q h')^T G (W h - Q h') / E (W h)^T G (W h), from moments.

    Args:
        w_OI: W, the original.
        q_OI: Q, quantized and decoded.
        curvature: moments of h and h'; without cross moments h' stands for both.
        metric_OO: G; None for the identity.
        rows: at most so many, evenly spaced, stand for the outer sum over rows; with all of them
            the value is exact.
    Cost: R O I + R I^2 multiply-adds for each of a few products.
    """
    step = -(-len(w_OI) // rows)

    def energy(left_OI: Tensor, moment_II: Tensor, right_OI: Tensor) -> Tensor:
        """sum over rows r of (G left)_r M right_r^T."""
        weighted_RI = left_OI[::step] if metric_OO is None else metric_OO[::step] @ left_OI
        return ((weighted_RI @ moment_II) * right_OI[::step]).sum(dtype=torch.float64)

    hessian_II, cross_II, energy_II = curvature.hessian_II, curvature.cross_II, curvature.energy_II
    if cross_II is None or energy_II is None:
        whole, error = energy(w_OI, hessian_II, w_OI), energy(w_OI - q_OI, hessian_II, w_OI - q_OI)
    else:
        whole = energy(w_OI, energy_II, w_OI)
        error = (
            whole
            - energy(w_OI, cross_II, q_OI)
            - energy(q_OI, cross_II.mT, w_OI)
            + energy(q_OI, hessian_II, q_OI)
        )
    return float(error.clamp_min(0) / whole)
