"""Room above an activation's maximum: what groups lose by it, one float at a time, and how much of
it is chosen."""

import pytest
import torch

from p48ray.numerics.activation import input_global_scale, quantize_activations
from p48ray.numerics.headroom import (
    MOST_HEADROOM,
    NUM_BINS,
    SUBNORMAL_SHARE,
    classify,
    count_bins,
    group_amax,
    largest_headroom,
    lost_share,
    loud_experts,
    lower_edges,
)
from tests.reference.formats import e4m3

FLOAT32_MAX = torch.finfo(torch.float32).max


def all_bf16() -> torch.Tensor:
    """Every finite value that is not negative."""
    return torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()


def histogram(amax: torch.Tensor) -> dict[int, int]:
    return {b: n for b, n in enumerate(count_bins(amax).tolist()) if n}


@pytest.mark.parametrize("amax", [1e-3, 6.0, 2688.0, 1e4])
def test_every_amax_of_bf16_is_classified_as_its_scale_rounds(amax: float) -> None:
    scale = input_global_scale(amax)
    values = all_bf16()
    found = classify(values, scale)
    raw = (torch.tensor(scale) * (values / 6)).tolist()  # float32, as the server computes it
    for x, r, saturated, subnormal, zero in zip(values.tolist(), raw, *found, strict=True):
        rounded = e4m3(min(r, 448.0))
        assert zero == (x > 0 and rounded == 0)
        assert subnormal == (0 < rounded < 2**-6)
        assert saturated == (r > 448 * (1 + 1e-6))


def test_bins_hold_what_lies_between_their_edges() -> None:
    values = all_bf16()
    bins = [b for b, n in enumerate(count_bins(values).tolist()) for _ in range(n)]
    edges = lower_edges([*range(NUM_BINS - 4)])  # behind: infinity and what is no number
    assert (edges[1:] > edges[:-1]).all() and edges[0] == 0
    for value, b in zip(values.tolist(), bins, strict=True):
        assert edges[b] <= value and (b + 1 == len(edges) or value < edges[b + 1])
    normal = edges[edges >= 2.0**-126]
    assert (normal[1:] / normal[:-1]).max() <= 1.25


def test_group_amax_is_the_largest_of_every_group() -> None:
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    for group in (16, 32):
        expected = [
            max(abs(v) for v in row[start : start + group])
            for row in x.tolist()
            for start in range(0, 96, group)
        ]
        assert group_amax(x, group).tolist() == expected


@pytest.mark.parametrize("headroom", [2.0, 4.0, 16.0])
def test_room_by_a_power_of_two_changes_no_group_whose_scale_stays_normal(headroom: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = 2.0 ** -torch.randint(0, 18, (256, 1), generator=generator).float()
    x = sizes * torch.randn(256, 16, generator=generator)
    amax = x.abs().max().item()
    close, wide = input_global_scale(amax), input_global_scale(headroom * amax)
    lost = classify(group_amax(x, 16), wide)
    is_normal = ~(lost.subnormal | lost.zero)
    assert 20 < is_normal.sum() < 236
    before, after = quantize_activations(x, close), quantize_activations(x, wide)
    assert torch.equal(before[is_normal], after[is_normal])
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1, 16), (1024, 16), (2048 / 1.25, 16), (2048, 8), (4096, 4), (8192, 2), (16_384, 1)],
)
def test_room_is_what_28672_over_the_ratio_of_largest_to_usual_groups_allows(
    ratio: float, expected: float
) -> None:
    amax = 4.0
    groups = torch.tensor([amax] + [amax / ratio] * 9_999)  # on edges of bins
    exact = 28672 * 16 / 15 / ratio
    assert largest_headroom(histogram(groups), amax) == expected
    assert expected == 1 or expected <= exact
    assert expected == 16 or 2 * expected > exact


def test_room_is_as_large_as_an_exact_count_allows_or_one_step_smaller() -> None:
    generator = torch.Generator().manual_seed(2)
    for spread in (1, 3, 5, 7):
        groups = torch.exp(spread * torch.randn(20_000, generator=generator)).bfloat16().float()
        amax = groups.max().item()

        def share(headroom: float, groups: torch.Tensor = groups, amax: float = amax) -> float:
            lost = classify(groups, input_global_scale(headroom * amax))
            return (lost.subnormal | lost.zero).float().mean().item()

        steps = [16.0, 8.0, 4.0, 2.0, 1.0]
        exact = next((h for h in steps if share(h) <= SUBNORMAL_SHARE), 1.0)
        assert largest_headroom(histogram(groups), amax) in (exact, max(1.0, exact / 2))


def test_one_in_a_thousand_groups_may_be_lost_and_all_zero_ones_do_not_count() -> None:
    zeros = torch.zeros(50_000)
    groups = torch.cat([torch.full((999,), 1.0), torch.tensor([2.0**-20]), zeros])
    assert largest_headroom(histogram(groups), 1.0) == MOST_HEADROOM
    groups = torch.cat([groups, torch.tensor([2.0**-20])])
    assert largest_headroom(histogram(groups), 1.0) == 1


def test_layer_without_values_and_one_near_the_end_of_float32() -> None:
    assert largest_headroom({}, 0.0) == MOST_HEADROOM
    near = torch.full((10,), FLOAT32_MAX / 3).bfloat16().float()
    assert largest_headroom(histogram(near), FLOAT32_MAX / 3) == 2


def layer_of(loudness: list[float], tokens: list[int], seed: int = 3) -> list[torch.Tensor]:
    """Group maxima of each expert: a usual spread, times its loudness."""
    generator = torch.Generator().manual_seed(seed)
    return [
        size * torch.exp(torch.randn(100 * n, generator=generator)).bfloat16().float()
        for size, n in zip(loudness, tokens, strict=True)
    ]


def test_one_loud_expert_of_many_is_brought_down_until_the_others_are_heard() -> None:
    groups = layer_of([1.0] * 20 + [2.0**13], [50] * 20 + [3])
    amaxes = [g.max().item() for g in groups]
    counts = histogram(torch.cat(groups))
    assert lost_share(counts, input_global_scale(max(amaxes))) > 0.5
    shifts = loud_experts(amaxes, counts)
    assert list(shifts) == [20] and 1 <= shifts[20] <= 8
    moved = [g / 2 ** shifts.get(e, 0) for e, g in enumerate(groups)]
    amax = max(g.max().item() for g in moved)

    def lost(k: int) -> float:
        others = torch.cat(groups[:20])
        found = classify(others, input_global_scale(max(amaxes) / 2**k))
        return (found.subnormal | found.zero).float().mean().item()

    found = classify(torch.cat(moved), input_global_scale(amax))
    assert (found.subnormal | found.zero).float().mean() <= SUBNORMAL_SHARE
    assert lost(shifts[20]) <= SUBNORMAL_SHARE < lost(shifts[20] - 2), "no further than needed"


@pytest.mark.parametrize(
    ("loudness", "why"),
    [
        ([1.0] * 21, "nobody is loud"),
        ([1.0] * 20 + [2.0**3], "nobody is lost"),
        ([1.0] * 18 + [2.0**13] * 3, "the loud are not few"),
        ([1.0] * 20 + [2.0**25], "the most that is done does not help"),
    ],
)
def test_layer_is_left_alone_where_that_helps_nobody(loudness: list[float], why: str) -> None:
    groups = layer_of(loudness, [20] * 21)
    amaxes = [g.max().item() for g in groups]
    assert loud_experts(amaxes, histogram(torch.cat(groups))) == {}, why


def test_layer_without_tokens_has_no_loud_expert() -> None:
    assert loud_experts([0.0, 0.0], {}) == {} and loud_experts([], {}) == {}
