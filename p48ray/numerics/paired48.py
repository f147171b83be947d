"""Paired-4:8 sparsity: of every pair_group (8 consecutive inputs = 4 pairs = 4 bytes of packed
codes) exactly 2 pairs are kept: 6 patterns.

    inputs   0 1 | 2 3 | 4 5 | 6 7
    pair      0     1     2     3

A pair is one byte of `weight_packed`, so legality is a statement about bytes: at most 2 of every 4
bytes differ from 0 (a kept weight may quantize to 0 as well).

Source: PTX ISA, `mma.sp` on E2M1 operands: pair-wise structured sparsity at a granularity of 4:8.

Legend: N experts, O out, P pairs (I/2), I inputs, B bytes (= P), K pair_groups (P/4), S kept bytes
(B/2), M bytes of mask (B/8).
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
    """Keep the 2 pairs of every 4 with the highest scores; ties go to the lower index. Exactly 2
    even of NaN (which rank highest).

    Raises: NumericsError if p is not a multiple of 4.
    """
    score_K4 = _by_pair_group(score)
    order_K4 = score_K4.sort(dim=-1, descending=True, stable=True).indices
    keep_K4 = torch.zeros_like(score_K4, dtype=torch.bool).scatter_(
        -1, order_K4[..., :KEPT_PAIRS], True
    )
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
    """pair_groups with more than 2 nonzero bytes. Bytes are judged as they are: 0x08, 0x80 and 0x88
    (minus zeros) count as nonzero."""
    # four bytes that are 0 or 1
    ones_KP = (_by_pair_group(packed) != 0).contiguous().view(torch.int32)
    # whose sum the product has in its highest byte
    return (ones_KP * 0x01010101 >> 24 > KEPT_PAIRS).squeeze(-1)


def pattern_histogram(packed: UInt8[Tensor, "*n b"]) -> Int64[Tensor, "6"]:
    """How many pair_groups have each of the 6 PATTERNS. `packed` must be legal (`find_illegal`).

    A pair_group with fewer than 2 nonzero bytes counts its lowest zero bytes as kept, as the sparse
    storage does.
    """
    keep = keep_top_pairs((packed != 0).float())
    return torch.bincount(pattern_index(keep).flatten().int(), minlength=len(PATTERNS))


def pack_sparse(
    packed: UInt8[Tensor, "*n b"],
) -> tuple[UInt8[Tensor, "*n s"], UInt8[Tensor, "*n m"]]:
    """Dense bytes -> (kept bytes, mask), the sparse storage. Lossless, minus zeros included: a byte
    is kept for being nonzero.

    Args:
        packed: (..., B) one pair a byte, B a multiple of 8 (16 inputs).
    Returns: (..., B/2) the 2 kept bytes of every 4, in order; (..., B/8) 4 bits a pair_group, bit i
        = byte i kept, low nibble = lower inputs. A pair_group with fewer than 2 nonzero bytes keeps
        its lowest zero bytes.
    Raises: NumericsError if a pair_group has more than 2 nonzero bytes (`find_illegal`), with how
        many do and which is the first.
    """
    if packed.shape[-1] % (2 * PAIRS_IN_GROUP):
        raise NumericsError(
            "paired-4:8: sparse storage: expected a multiple of 8 pairs (16 inputs), found"
            f" {packed.shape[-1]} pairs"
        )
    word_K = _words(packed, torch.int32)
    nonzero_K = torch.zeros_like(word_K)
    for i in range(PAIRS_IN_GROUP):
        nonzero_K |= ((word_K >> 8 * i & 0xFF) != 0).int() << i
    mask_K = _look_up(MASK_OF_NONZERO, nonzero_K)
    if bool((mask_K == 0).any()):
        where = (mask_K == 0).nonzero()
        raise NumericsError(
            f"paired-4:8: expected at most {KEPT_PAIRS} nonzero bytes in every {PAIRS_IN_GROUP},"
            f" found more in {len(where)} pair_groups, the first at {tuple(where[0].tolist())}"
        )
    first_K, second_K = _kept_pairs(mask_K)
    kept_K = (word_K >> 8 * first_K & 0xFF) | (word_K >> 8 * second_K & 0xFF) << 8
    return kept_K.to(torch.int16).view(torch.uint8), _two_nibbles_a_byte(mask_K)


def unpack_sparse(
    kept: UInt8[Tensor, "*n s"], mask: UInt8[Tensor, "*n m"]
) -> UInt8[Tensor, "*n b"]:
    """The sparse storage's bytes back where they were: the inverse of `pack_sparse`.

    Raises: NumericsError if the shapes do not belong together or a nibble of the mask does not have
        exactly 2 bits.
    """
    if kept.shape != (*mask.shape[:-1], mask.shape[-1] * 2 * KEPT_PAIRS):
        raise NumericsError(
            "paired-4:8: expected 4 kept bytes for every byte of the mask, found"
            f" {tuple(kept.shape)} and {tuple(mask.shape)}"
        )
    first_K, second_K = _kept_pairs(_nibbles(mask))
    kept_K = _words(kept, torch.int16).int()
    return ((kept_K & 0xFF) << 8 * first_K | (kept_K >> 8 & 0xFF) << 8 * second_K).view(torch.uint8)


def _stored_mask(nonzero: int) -> int:
    """The mask that stores a pair_group with these nonzero bytes: them, and the lowest others up to
    two. 0 where they are more than two."""
    bits = [i for i in range(PAIRS_IN_GROUP) if nonzero >> i & 1]
    others = [i for i in range(PAIRS_IN_GROUP) if i not in bits]
    return sum(1 << i for i in (bits + others)[:KEPT_PAIRS]) if len(bits) <= KEPT_PAIRS else 0


def _set_bits(mask: int) -> int:
    """The two bits that are set, as lower + 4 * higher: rising, hence never 0. 0 where not exactly
    two are."""
    bits = [i for i in range(PAIRS_IN_GROUP) if mask >> i & 1]
    return bits[0] + 4 * bits[1] if len(bits) == KEPT_PAIRS else 0


MASK_OF_NONZERO = tuple(map(_stored_mask, range(1 << PAIRS_IN_GROUP)))
KEPT_OF_MASK = tuple(map(_set_bits, range(1 << PAIRS_IN_GROUP)))


def _kept_pairs(mask_K: Tensor) -> tuple[Tensor, Tensor]:
    """The two kept pairs of each mask, the lower one first. Raises: NumericsError unless each mask
    has exactly 2 bits."""
    both_K = _look_up(KEPT_OF_MASK, mask_K)
    if bool((both_K == 0).any()):
        first = tuple((both_K == 0).nonzero()[0].tolist())
        raise NumericsError(
            f"paired-4:8: expected exactly {KEPT_PAIRS} of 4 bits in every mask, found"
            f" {int(mask_K[first]):04b} at pair_group {first}"
        )
    return both_K & 3, both_K >> 2


def _look_up(table: tuple[int, ...], index: Tensor) -> Tensor:
    return (
        torch.tensor(table, dtype=torch.int32, device=index.device)
        .index_select(0, index.flatten())
        .view(index.shape)
    )


def _words(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Neighbouring bytes as one integer, the first in its low bits: the order of every machine that
    CUDA or this project's files know."""
    # a copy, because a slice may begin between two words
    return stored.clone(memory_format=torch.contiguous_format).view(dtype)


def _two_nibbles_a_byte(nibbles_K: Tensor) -> Tensor:
    low, high = nibbles_K.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).to(torch.uint8)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten(-2).int()


def _by_pair_group(values: Tensor) -> Tensor:
    if values.shape[-1] % PAIRS_IN_GROUP:
        raise NumericsError(
            f"paired-4:8: expected a multiple of 4 pairs (8 inputs), found {values.shape[-1]} pairs"
        )
    return values.unflatten(-1, (-1, PAIRS_IN_GROUP))
