"""What solvers take and give: settings, the problem of a batch, a draft of its codes, and the
solution that a unit stores.

Legend: N experts, O out, I in, P pairs (I/2), G scale groups (I/16), B packed bytes (I/2).
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from p48ray.numerics import e2m1, nvfp4
from p48ray.numerics.factor import Factor
from p48ray.numerics.refine import QuantizedLinear
from p48ray.numerics.relative_errors import hessian_loss
from p48ray.numerics.two_sided import two_sided_loss

PAIRED_48 = "paired-4:8"
NO_SPARSITY = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverSettings:
    """solver: a key of SOLVERS. sparsity: "paired-4:8" or "none". scale_span: 16 or 32 inputs a
    scale. damp: fraction of the mean diagonal, None to take it from the token count. output_damp:
    the same for G. sweeps: of block descent. code_sweeps: of code descent afterwards."""

    solver: str
    sparsity: str
    scale_span: int
    damp: float | None
    sweeps: int
    output_damp: float | None = None
    code_sweeps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Quantized weights of a batch. Per expert: outcome "solved", "one_shot" (block descent was no
    better), "round_to_nearest" (no usable Hessian) or "zero" (nothing to solve, see zeros); the
    reason for all but the first, else ""; damp_rel, the damping its factor needed, 0 without a
    factor. start: what block descent began
    from, None for other solvers."""

    packed_NOB: Tensor
    scale_NOG: Tensor
    global_scale_N1: Tensor
    values_NOI: Tensor
    keep_NOP: Tensor
    outcome: tuple[str, ...]
    reason: tuple[str, ...]
    damp_rel: tuple[float, ...]
    start: QuantizedLinear | None = None

    def as_quantized(self) -> QuantizedLinear:
        """Codes instead of packed bytes, for refinement."""
        return QuantizedLinear(
            codes_NOI=e2m1.unpack(self.packed_NOB),
            scale_NOG=self.scale_NOG,
            global_scale_N=self.global_scale_N1[:, 0],
            keep_NOP=self.keep_NOP,
        )

    def with_codes(self, linear: QuantizedLinear) -> "Solution":
        """The same solution with other codes on the same scales."""
        values_NOI = nvfp4.dequantize(linear.codes_NOI, linear.scale_NOG, linear.global_scale_N)
        return replace(self, packed_NOB=e2m1.pack(linear.codes_NOI), values_NOI=values_NOI)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a solver works on: a target and, unless it is round_to_nearest, a Hessian that can be
    used and its factor."""

    target_NOI: Tensor
    hessian_NII: Tensor
    factor: Factor | None
    settings: SolverSettings
    output_hessian_NOO: Tensor | None = None

    def loss(self, values_NOI: Tensor) -> Tensor:
        """The objective per expert: tr((T - Q) H (T - Q)^T), with G in front where it is known. H
        undamped."""
        delta_NOI = self.target_NOI - values_NOI
        if self.output_hessian_NOO is None:
            return hessian_loss(delta_NOI, self.hessian_NII)
        return two_sided_loss(delta_NOI, self.hessian_NII, self.output_hessian_NOO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A quantized batch before packing; all tensors start with N."""

    codes_NOI: Tensor
    scale_NOG: Tensor
    global_scale_N: Tensor
    keep_NOP: Tensor
    is_start_N: Tensor  # block descent kept its one-shot start
    start: QuantizedLinear | None = None  # that start; no part of the result

    def values(self) -> Tensor:
        return nvfp4.dequantize(self.codes_NOI, self.scale_NOG, self.global_scale_N)

    def replaced(self, is_replaced_N: Tensor, other: "Draft") -> "Draft":
        """This draft with some experts taken from another."""
        taken: dict[str, Any] = {}
        for field in fields(self):
            if field.name == "start":
                continue
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            taken[field.name] = torch.where(
                is_replaced_N.view(-1, *[1] * (mine.dim() - 1)), theirs, mine
            )
        return replace(self, **taken)
