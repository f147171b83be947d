"""Masks: exhaustive over orders of four scores, over the six patterns and over zero and nonzero
bytes."""

from itertools import combinations, permutations, product

import pytest
import torch

from p48ray.errors import NumericsError
from p48ray.numerics import paired48


def test_patterns_are_the_six_choices_of_two_in_order() -> None:
    expected = [tuple(k in pairs for k in range(4)) for pairs in combinations(range(4), 2)]
    assert list(paired48.PATTERNS) == expected


def test_pattern_index_is_the_position_in_patterns() -> None:
    keep = torch.tensor(paired48.PATTERNS).flatten()[None]
    assert paired48.pattern_index(keep).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_all_scores_of_four_levels_keep_the_best_two_with_ties_to_the_lower_index() -> None:
    scores = list(product([0.0, 1.0, 2.0, 3.0], repeat=4))
    keep = paired48.keep_top_pairs(torch.tensor(scores).flatten()).view(-1, 4)
    for score, kept in zip(scores, keep.tolist(), strict=True):
        order = sorted(range(4), key=lambda k: (-score[k], k))
        assert kept == [k in order[:2] for k in range(4)]


def test_every_pair_group_is_ranked_on_its_own() -> None:
    scores = torch.tensor(list(permutations([1.0, 10.0, 100.0, 1000.0])))
    together = paired48.keep_top_pairs(scores.reshape(2, 3, -1))
    assert torch.equal(together.reshape(-1, 4), scores > 50)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_exactly_two_are_kept_whatever_the_scores(bad: float) -> None:
    scores = torch.tensor([[bad if b else 1.0 for b in bits] for bits in product([0, 1], repeat=4)])
    assert (paired48.keep_top_pairs(scores).view(-1, 4).sum(-1) == 2).all()


def test_a_pair_is_two_neighbouring_inputs() -> None:
    keep = torch.tensor([[True, False, False, True]])
    assert paired48.pairs_to_inputs(keep).tolist() == [
        [True, True, False, False, False, False, True, True]
    ]


def test_legality_of_all_sixteen_zero_patterns() -> None:
    bits = torch.tensor(list(product([0, 1], repeat=4)), dtype=torch.uint8)
    illegal = paired48.find_illegal((bits * 0x31).view(2, 32))
    assert illegal.flatten().tolist() == (bits.sum(-1) > 2).tolist()


@pytest.mark.parametrize("minus_zero", [0x08, 0x80, 0x88])
def test_minus_zeros_count_as_nonzero_bytes(minus_zero: int) -> None:
    packed = torch.tensor([[0x11, 0x11, minus_zero, 0], [0x11, 0x11, 0, 0]], dtype=torch.uint8)
    assert paired48.find_illegal(packed).tolist() == [[True], [False]]


@pytest.mark.parametrize(
    ("zero_bytes", "pattern"),
    [
        ([0, 0, 0, 0], 0),
        ([0, 0, 0, 9], 2),
        ([0, 9, 0, 0], 0),
        ([0, 0, 9, 0], 1),
        ([9, 0, 0, 0], 0),
        ([0, 0, 9, 9], 5),
        ([0, 9, 9, 0], 3),
    ],
)
def test_histogram_counts_the_lowest_zero_bytes_as_kept(
    zero_bytes: list[int], pattern: int
) -> None:
    histogram = paired48.pattern_histogram(torch.tensor([zero_bytes], dtype=torch.uint8))
    assert histogram.dtype == torch.int64
    assert histogram.tolist() == [int(k == pattern) for k in range(6)]


def test_histogram_takes_minus_zeros_as_kept() -> None:
    packed = torch.tensor([[0, 0, 0x08, 9], [0, 0x80, 0, 0x88]], dtype=torch.uint8)
    assert paired48.pattern_histogram(packed).tolist() == [0, 0, 0, 0, 1, 1]


def test_histogram_counts_every_pair_group() -> None:
    rows = (
        torch.tensor(paired48.PATTERNS)
        .to(torch.uint8)
        .repeat_interleave(torch.tensor([3, 1, 4, 1, 5, 9]), dim=0)
    )
    packed = (rows * 0x5A)[torch.randperm(23, generator=torch.Generator().manual_seed(0))].reshape(
        1, -1
    )
    assert paired48.pattern_histogram(packed).tolist() == [3, 1, 4, 1, 5, 9]


def test_pairs_that_do_not_fill_a_pair_group_are_refused() -> None:
    with pytest.raises(NumericsError, match="found 6 pairs"):
        paired48.keep_top_pairs(torch.zeros(1, 6))
    with pytest.raises(NumericsError, match="found 6 pairs"):
        paired48.find_illegal(torch.zeros(1, 6, dtype=torch.uint8))


# the sparse storage


ALL_LEGAL = [bits for bits in product([0, 1], repeat=4) if sum(bits) <= 2]


def stored(group: tuple[int, ...] | list[int]) -> tuple[list[int], int]:
    """Kept bytes and mask of four bytes, by hand: nonzero ones, then the lowest zeros until there
    are two."""
    kept = [k for k in range(4) if group[k]]
    for k in range(4):
        if len(kept) < 2 and k not in kept:
            kept.append(k)
    return [group[k] for k in sorted(kept)], sum(1 << k for k in kept)


def test_every_byte_value_in_every_legal_place_is_stored_and_comes_back() -> None:
    """All 256 values beside all 256, in all six patterns: every legal pair_group there is."""
    a, b = (
        v.flatten() for v in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    )
    for first, second in combinations(range(4), 2):
        groups = torch.zeros(65536, 4, dtype=torch.uint8)
        groups[:, first], groups[:, second] = a.to(torch.uint8), b.to(torch.uint8)
        packed = groups.view(128, 2048)
        kept, mask = paired48.pack_sparse(packed)
        assert (kept.shape, mask.shape) == ((128, 1024), (128, 256))
        assert torch.equal(paired48.unpack_sparse(kept, mask), packed)
        both = (a != 0) & (b != 0)
        nibbles = torch.stack([mask & 15, mask >> 4], -1).flatten()
        assert (nibbles[both] == (1 << first | 1 << second)).all()
        assert torch.equal(kept.view(-1, 2)[both].long(), torch.stack([a, b], -1)[both])


@pytest.mark.parametrize("low", ALL_LEGAL)
@pytest.mark.parametrize("high", ALL_LEGAL)
def test_two_pair_groups_share_a_byte_of_mask_the_lower_inputs_in_the_low_nibble(
    low: tuple[int, ...], high: tuple[int, ...]
) -> None:
    groups = [
        [b * (0x21 + k) for k, b in enumerate(low)],
        [b * (0x81 + k) for k, b in enumerate(high)],
    ]
    kept, mask = paired48.pack_sparse(torch.tensor([groups[0] + groups[1]], dtype=torch.uint8))
    (kept_low, mask_low), (kept_high, mask_high) = map(stored, groups)
    assert kept.tolist() == [kept_low + kept_high]
    assert mask.tolist() == [[mask_low | mask_high << 4]]


def test_minus_zeros_survive_the_sparse_storage() -> None:
    packed = torch.tensor([[0, 0x08, 0, 0x80, 0x88, 0, 0, 0]], dtype=torch.uint8)
    assert torch.equal(paired48.unpack_sparse(*paired48.pack_sparse(packed)), packed)


def test_sparse_storage_does_not_change_its_input() -> None:
    packed = torch.tensor([[0, 1, 0, 2, 3, 0, 0, 4]], dtype=torch.uint8)
    before = packed.clone()
    paired48.unpack_sparse(*paired48.pack_sparse(packed))
    assert torch.equal(packed, before)


@pytest.mark.parametrize("bits", [bits for bits in product([0, 1], repeat=4) if sum(bits) > 2])
def test_pair_groups_that_keep_more_than_two_have_no_sparse_storage(bits: tuple[int, ...]) -> None:
    packed = torch.zeros(3, 16, dtype=torch.uint8)
    packed[1, 8:12] = torch.tensor(bits, dtype=torch.uint8)
    with pytest.raises(NumericsError, match=r"found more in 1 pair_groups, the first at \(1, 2\)"):
        paired48.pack_sparse(packed)


@pytest.mark.parametrize("nibble", [n for n in range(16) if bin(n).count("1") != 2])
def test_masks_without_exactly_two_bits_are_refused(nibble: int) -> None:
    mask = torch.tensor([[0x33, nibble << 4 | 0x05]], dtype=torch.uint8)
    with pytest.raises(NumericsError, match=rf"found {nibble:04b} at pair_group \(0, 3\)"):
        paired48.unpack_sparse(torch.zeros(1, 8, dtype=torch.uint8), mask)


def test_sparse_storage_of_cut_groups_and_of_shapes_that_do_not_fit_is_refused() -> None:
    with pytest.raises(NumericsError, match="found 12 pairs"):
        paired48.pack_sparse(torch.zeros(1, 12, dtype=torch.uint8))
    with pytest.raises(NumericsError, match="4 kept bytes for every byte"):
        paired48.unpack_sparse(
            torch.zeros(1, 6, dtype=torch.uint8), torch.full((1, 2), 0x33, dtype=torch.uint8)
        )


def test_illegal_groups_are_those_with_more_than_two_nonzero_bytes_whatever_the_bytes() -> None:
    generator = torch.Generator().manual_seed(7)
    values = torch.tensor([0, 0, 1, 8, 128, 255], dtype=torch.uint8)
    packed = values[torch.randint(6, (2, 50, 64), generator=generator)]
    for view in (packed, packed[:, ::2], packed[..., 4:36], packed[..., :0]):
        expected = (view.unflatten(-1, (-1, 4)) != 0).sum(-1) > 2
        assert torch.equal(paired48.find_illegal(view), expected)
