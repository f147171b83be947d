"""One pass over the columns: choose pairs (SparseGPT), choose scales, round (GPTQ), let the columns
to come make up for each error.

For column j, with U upper and inv(H) = U^T U:

    e = (w_j - q_j) / U_jj          w_k -= e U_jk   for all k > j

    columns   0 ............ start .... j .... stop ................ I
              done            [ column_block: ]   later columns get the whole
                              e pushed at once    column_block's e in one product

    span      | pair_group | pair_group |

At a span's first column: masks of its pair_groups, provisional; then the E4M3 scale, searched. At a
pair_group's first column: its mask again, from weights that by now carry the errors of the columns
before.

| paper                                        | here                                        |
|----------------------------------------------|---------------------------------------------|
| B, lazy batch of columns                     | `column_block`                              |
| E, errors of the block                       | `error_NCO`                                 |
| w^2 / [H^-1]_jj, saliency                    | pair score: sum of w^2 / U_jj^2 over the pair |
| M, mask                                      | `keep_NPO`                                  |

Sources: [Frantar2022gptq] GPTQ, arXiv 2210.17323, algorithm 1. [Frantar2023sparsegpt] SparseGPT,
arXiv 2301.00774, algorithm 1, and its joint pruning and quantization. Deliberate departures: 2
pairs of 4 instead of 2 weights of 4; scales chosen inside the loop from masked, already corrected
weights; no column reordering.

Inside, the input dimension comes before the output dimension: a column is then contiguous memory.

Legend: N experts, O out, I in, P pairs (I/2), G scale groups (I/16), S spans, C columns of the
column_block.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics import e2m1
from p48ray.numerics.e2m1 import round_to_e2m1
from p48ray.numerics.nvfp4 import SCALE_GROUP, SCALE_SPANS, choose_scales, effective_scale
from p48ray.numerics.paired48 import INPUTS_IN_GROUP, keep_top_pairs, pairs_to_inputs

COLUMN_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Quantized weights: E2M1 codes (N, O, I) uint8, E4M3 scales (N, O, G), kept pairs (N, O,
    P)."""

    codes: Tensor
    scale: Tensor
    keep: Tensor


@dataclass(slots=True, kw_only=True)
class _Pass:
    """Buffers and settings of one pass over the columns."""

    work_NIO: Tensor
    level_NIO: Tensor
    keep_NPO: Tensor
    scales_NOG: list[Tensor]  # one entry per span
    upper_NII: Tensor
    sharpness_NI: Tensor  # 1 / U_jj^2
    global_scale_N: Tensor
    span: int
    picks_masks: bool
    rounds: bool


def quantize_columns(
    weight: Float32[Tensor, "n o i"],
    upper: Float32[Tensor, "n i i"],
    global_scale: Float32[Tensor, "n"],
    *,
    span: int,
    keep: Bool[Tensor, "n o p"] | None,
    sparsity: bool,
    column_block: int = COLUMN_BLOCK,
) -> Codes:
    """Quantize to NVFP4 with error feedback; with `sparsity`, to paired-4:8.

    Args:
        weight: what to quantize, (N, O, I).
        upper: U with inv(H) = U^T U (factor.inverse_factor), (N, I, I).
        global_scale: the divisor, (N,).
        span: inputs per scale, 16 or 32.
        keep: a mask to hold on to, (N, O, P); None lets the pass choose it.
        sparsity: False keeps every pair (`keep` must then be None).
        column_block: columns whose errors go to later ones in one product; a GPU's kernel has its
            own.
    Raises: NumericsError if span is not 16 or 32, or does not divide i and column_block, or a mask
        comes without sparsity.
    Cost: O I^2 / 2 multiply-adds an expert, all but O I column_block / 2 of them in matrix
        products; no wait for the device.
    """
    i = weight.shape[2]
    if span not in SCALE_SPANS or i % span or column_block % span:
        raise NumericsError(
            f"quantize_columns: expected a span of 16 or 32 that divides {i} inputs and"
            f" column_block {column_block}, found {span}"
        )
    if keep is not None and not sparsity:
        raise NumericsError("quantize_columns: a fixed mask needs sparsity=True")
    state = _opened(
        weight,
        upper,
        keep,
        global_scale,
        span=span,
        picks_masks=sparsity and keep is None,
        rounds=True,
    )
    if weight.is_cuda:
        return _one_shot_by_kernel(state)
    _pass_(state, column_block)
    return Codes(
        codes=e2m1.encode(state.level_NIO.mT).contiguous(),
        scale=torch.cat(state.scales_NOG, dim=2),
        keep=state.keep_NPO.mT.contiguous(),
    )


def prune_columns(
    weight: Float32[Tensor, "n o i"],
    upper: Float32[Tensor, "n i i"],
    *,
    column_block: int = COLUMN_BLOCK,
) -> tuple[Float32[Tensor, "n o i"], Bool[Tensor, "n o p"]]:
    """SparseGPT alone: paired-4:8 masks with error feedback, kept values not rounded. No NVFP4
    checkpoint holds these; they are the error ladder's first rung.

    Returns: values (0 where dropped) and kept pairs.
    """
    unused = torch.ones(len(weight), device=weight.device)
    state = _opened(
        weight, upper, None, unused, span=INPUTS_IN_GROUP, picks_masks=True, rounds=False
    )
    if weight.is_cuda:
        values_NIO, _ = _pass_by_kernel(state)
        return values_NIO.mT.contiguous(), state.keep_NPO.mT.contiguous()
    _pass_(state, column_block)
    return state.level_NIO.mT.contiguous(), state.keep_NPO.mT.contiguous()


def _pass_by_kernel(state: _Pass) -> tuple[Tensor, Tensor]:
    """The pass on a GPU: (codes or values (N, I, O), scale per span (N, S, O))."""
    from p48ray.kernels import column_pass as kernel

    return kernel.pass_(
        state.work_NIO,
        state.keep_NPO,
        state.upper_NII,
        state.sharpness_NI,
        state.global_scale_N,
        span=state.span,
        picks_masks=state.picks_masks,
        rounds=state.rounds,
    )


def _one_shot_by_kernel(state: _Pass) -> Codes:
    codes_NIO, scale_NSO = _pass_by_kernel(state)
    scale_NOS = scale_NSO.mT.contiguous().to(torch.float8_e4m3fn)
    return Codes(
        codes=codes_NIO.mT.contiguous(),
        scale=scale_NOS.repeat_interleave(state.span // SCALE_GROUP, dim=2),
        keep=state.keep_NPO.mT.contiguous(),
    )


def _opened(
    weight: Tensor,
    upper: Tensor,
    keep: Tensor | None,
    global_scale: Tensor,
    *,
    span: int,
    picks_masks: bool,
    rounds: bool,
) -> _Pass:
    """Buffers of a new pass; all pairs are kept where no mask is given."""
    n, o, i = weight.shape
    start_keep = (
        torch.ones(n, o, i // 2, dtype=torch.bool, device=weight.device) if keep is None else keep
    )
    return _Pass(
        work_NIO=weight.mT.clone(memory_format=torch.contiguous_format),
        # kernels have an output of their own
        level_NIO=torch.empty(0 if weight.is_cuda else n, i, o, device=weight.device),
        keep_NPO=start_keep.mT.contiguous(),
        scales_NOG=[],
        upper_NII=upper,
        sharpness_NI=upper.diagonal(dim1=-2, dim2=-1).square().reciprocal(),
        global_scale_N=global_scale,
        span=span,
        picks_masks=picks_masks,
        rounds=rounds,
    )


def _pass_(state: _Pass, column_block: int) -> None:
    """All column_blocks in order; the errors of each go to all later columns in one product."""
    i = state.work_NIO.shape[1]
    for start in range(0, i, column_block):
        stop = min(start + column_block, i)
        error_NCO = _quantize_columns_(state, start, stop)
        if stop < i:
            state.work_NIO[:, stop:].baddbmm_(
                state.upper_NII[:, start:stop, stop:].mT, error_NCO, alpha=-1
            )


def _quantize_columns_(state: _Pass, start: int, stop: int) -> Tensor:
    """Quantize one column_block, correcting inside it as it goes. Returns its errors e (N, C,
    O)."""
    work_NIO, upper_NII = state.work_NIO, state.upper_NII
    error_NCO = torch.empty_like(work_NIO[:, start:stop])
    pivot_NI = upper_NII.diagonal(dim1=-2, dim2=-1)
    unit_NO = _open_span_(state, start)
    for j in range(start, stop):
        if j % state.span == 0 and j > start:
            unit_NO = _open_span_(state, j)
        elif j % INPUTS_IN_GROUP == 0 and state.picks_masks:
            _pick_masks_(state, j, j + INPUTS_IN_GROUP)
        level_NO = work_NIO[:, j] / unit_NO
        level_NO = (round_to_e2m1(level_NO) if state.rounds else level_NO) * state.keep_NPO[
            :, j // 2
        ]
        state.level_NIO[:, j] = level_NO
        error_NO = error_NCO[:, j - start]
        torch.div(work_NIO[:, j] - level_NO * unit_NO, pivot_NI[:, j, None], out=error_NO)
        if j + 1 < stop:
            work_NIO[:, j + 1 : stop].addcmul_(
                upper_NII[:, j, j + 1 : stop, None], error_NO[:, None], value=-1
            )
    return error_NCO


def _open_span_(state: _Pass, start: int) -> Tensor:
    """Masks (provisional beyond the first pair_group) and scale of the span at `start`. Returns the
    value of one E2M1 unit, (N, O)."""
    stop = start + state.span
    if state.picks_masks:
        _pick_masks_(state, start, stop)
    if not state.rounds:
        return torch.ones_like(state.work_NIO[:, start])
    keep_NOI = pairs_to_inputs(state.keep_NPO[:, start // 2 : stop // 2].mT)
    scale_NOG = choose_scales(
        state.work_NIO[:, start:stop].mT * keep_NOI, state.global_scale_N, state.span, search=True
    )
    state.scales_NOG.append(scale_NOG)
    return effective_scale(scale_NOG[:, :, 0], state.global_scale_N)


def _pick_masks_(state: _Pass, start: int, stop: int) -> None:
    """Keep the 2 pairs of every 4 whose loss would raise the output error most: sum over the pair
    of w^2 / U_jj^2."""
    importance_NIO = (
        state.work_NIO[:, start:stop].square() * state.sharpness_NI[:, start:stop, None]
    )
    score_NPO = importance_NIO.unflatten(1, (-1, 2)).sum(2)
    state.keep_NPO[:, start // 2 : stop // 2] = keep_top_pairs(score_NPO.mT).mT
