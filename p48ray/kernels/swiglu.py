"""The elementwise half of a routed expert for CUDA tensors: SwiGLU, its backward pass, and the sum
over a token's experts, one launch each.

A mixture of 384 experts is thousands of visits of a few hundred tokens; as separate torch
operations these steps take longer than the matrix products. model.experts has the torch code that
defines them. Results are rounded where that code rounds; sums over a row are taken in float32.

Legend: T tokens of a visit, F intermediate size, H hidden size. Stacked (T, 2 F): gate's outputs,
then up's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(ab_ptr, h_ptr, amax_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.arange(0, BLOCK)
    inside_F = f_F < width
    a_F = tl.load(ab_ptr + row * 2 * width + f_F, mask=inside_F, other=0.0).to(tl.float32)
    b_F = tl.load(ab_ptr + row * 2 * width + width + f_F, mask=inside_F, other=0.0).to(tl.float32)
    silu_F = (a_F * tl.sigmoid(a_F)).to(h_ptr.dtype.element_ty).to(tl.float32)
    h_F = (silu_F * b_F).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + row * width + f_F, h_F, mask=inside_F)
    # a maximum does not depend on the order
    tl.atomic_max(amax_ptr, tl.max(tl.abs(h_F.to(tl.float32)), 0))


@triton.jit
def _backward(ab_ptr, u_ptr, weight_ptr, dab_ptr, dweight_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.arange(0, BLOCK)
    inside_F = f_F < width
    a_F = tl.load(ab_ptr + row * 2 * width + f_F, mask=inside_F, other=0.0).to(tl.float32)
    b_F = tl.load(ab_ptr + row * 2 * width + width + f_F, mask=inside_F, other=0.0).to(tl.float32)
    u_F = tl.load(u_ptr + row * width + f_F, mask=inside_F, other=0.0).to(tl.float32)
    s_F = tl.sigmoid(a_F)
    silu_F = a_F * s_F
    tl.store(dweight_ptr + row, tl.sum(silu_F * b_F * u_F, 0))
    u_F *= tl.load(weight_ptr + row).to(tl.float32)
    da_F = u_F * b_F * s_F * (1 + a_F * (1 - s_F))
    tl.store(dab_ptr + row * 2 * width + f_F, da_F.to(dab_ptr.dtype.element_ty), mask=inside_F)
    tl.store(
        dab_ptr + row * 2 * width + width + f_F,
        (u_F * silu_F).to(dab_ptr.dtype.element_ty),
        mask=inside_F,
    )


@triton.jit
def _add_rows(
    out_ptr, rows_ptr, y_ptr, weight_ptr, width, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    c_H = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_H = c_H < width
    y_H = tl.load(y_ptr + i * width + c_H, mask=inside_H, other=0.0)
    if HAS_WEIGHT:
        y_H = (y_H.to(tl.float32) * tl.load(weight_ptr + i).to(tl.float32)).to(
            out_ptr.dtype.element_ty
        )
    place_H = out_ptr + tl.load(rows_ptr + i) * width + c_H
    out_H = tl.load(place_H, mask=inside_H, other=0.0).to(tl.float32) + y_H.to(tl.float32)
    tl.store(place_H, out_H.to(out_ptr.dtype.element_ty), mask=inside_H)


def swiglu(ab: Tensor, amax: Tensor) -> Tensor:
    """silu(a) * b of stacked (T, 2 F) -> (T, F); `amax`, a float32 scalar, is raised to the largest
    magnitude of the result."""
    h = ab.new_empty(ab.shape[0], ab.shape[1] // 2)
    _forward[(ab.shape[0],)](ab, h, amax, h.shape[1], BLOCK=triton.next_power_of_2(h.shape[1]))
    return h


def swiglu_backward(ab: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at the stacked outputs (T, 2 F) and at the router's weights (T,) float32; u (T, F)
    is the gradient at h before the router's weight."""
    dab, dweight = torch.empty_like(ab), torch.empty(len(ab), dtype=torch.float32, device=ab.device)
    _backward[(ab.shape[0],)](
        ab, u, weight, dab, dweight, u.shape[1], BLOCK=triton.next_power_of_2(u.shape[1])
    )
    return dab, dweight


def add_rows(out: Tensor, rows: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
    """out[rows] += y * weight, rows (T,) int64 all different, y (T, H), weight (T,)."""
    block = 1024
    grid = (len(rows), triton.cdiv(out.shape[1], block))
    _add_rows[grid](
        out,
        rows,
        y,
        y if weight is None else weight,
        out.shape[1],
        HAS_WEIGHT=weight is not None,
        BLOCK=block,
    )
