"""Paired-4:8 sparsity: of every pair_group (8 consecutive inputs = 4 pairs = 4 bytes of packed codes) exactly 2 pairs are kept: 6 patterns.

    inputs   0 1 | 2 3 | 4 5 | 6 7        a pair is one byte of `weight_packed`, so legality is a statement about bytes:
    pair      0     1     2     3         at most 2 of every 4 bytes differ from 0 (a kept weight may quantize to 0 as well)

Source: PTX ISA, `mma.sp` on E2M1 operands: pair-wise structured sparsity at a granularity of 4:8.

Legend: N experts, O out, P pairs (I/2), I inputs, B bytes (= P), K pair_groups (P/4).
"""

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from p48ray.errors import NumericsError

PAIRS_IN_GROUP = 4
KEPT_PAIRS = 2
INPUTS_IN_GROUP = 8
# Which of the 4 pairs a pattern keeps, in the order that pattern indices count: 01 02 03 12 13 23.
PATTERNS = (
    (True, True, False, False),
    (True, False, True, False),
    (True, False, False, True),
    (False, True, True, False),
    (False, True, False, True),
    (False, False, True, True),
)


def keep_top_pairs(score: Float[Tensor, "*n p"]) -> Bool[Tensor, "*n p"]:
    """Keep the 2 pairs of every 4 with the highest scores; ties go to the lower index. Exactly 2 even of NaN (which rank highest).

    Raises: NumericsError if p is not a multiple of 4.
    """
    score_K4 = _by_pair_group(score)
    order_K4 = score_K4.sort(dim=-1, descending=True, stable=True).indices
    keep_K4 = torch.zeros_like(score_K4, dtype=torch.bool).scatter_(-1, order_K4[..., :KEPT_PAIRS], True)
    return keep_K4.flatten(-2)


def pairs_to_inputs(keep: Bool[Tensor, "*n p"]) -> Bool[Tensor, "*n i"]:
    """Both inputs of a kept pair are kept."""
    return keep.repeat_interleave(2, dim=-1)


def pattern_index(keep: Bool[Tensor, "*n p"]) -> UInt8[Tensor, "*n k"]:
    """Index into PATTERNS per pair_group. `keep` must hold exactly 2 pairs in every 4."""
    first_K, second_K, third_K, _ = _by_pair_group(keep).unbind(-1)
    starts_with_0 = torch.where(second_K, 0, torch.where(third_K, 1, 2))
    starts_later = torch.where(second_K, torch.where(third_K, 3, 4), 5)
    return torch.where(first_K, starts_with_0, starts_later).to(torch.uint8)


def find_illegal(packed: UInt8[Tensor, "*n b"]) -> Bool[Tensor, "*n k"]:
    """pair_groups with more than 2 nonzero bytes. Bytes are judged as they are: 0x08, 0x80 and 0x88 (minus zeros) count as nonzero."""
    return (_by_pair_group(packed) != 0).sum(-1) > KEPT_PAIRS


def pattern_histogram(packed: UInt8[Tensor, "*n b"]) -> Int64[Tensor, "6"]:
    """How many pair_groups have each of the 6 PATTERNS. `packed` must be legal (`find_illegal`).

    A pair_group with fewer than 2 nonzero bytes counts its lowest zero bytes as kept, as the sparse storage does.
    """
    keep = keep_top_pairs((packed != 0).float())
    return torch.bincount(pattern_index(keep).flatten().int(), minlength=len(PATTERNS))


def _by_pair_group(values: Tensor) -> Tensor:
    if values.shape[-1] % PAIRS_IN_GROUP:
        raise NumericsError(f"paired-4:8: expected a multiple of 4 pairs (8 inputs), found {values.shape[-1]} pairs")
    return values.unflatten(-1, (-1, PAIRS_IN_GROUP))
