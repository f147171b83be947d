"""Counts of groups, from bins and from values."""

import pytest
import torch

from p48ray.numerics.activation import input_global_scale
from p48ray.numerics.headroom import count_bins, lower_edges
from p48ray.run.scale_counts import (
    GroupHistogram,
    ScaleCounts,
    count_binned,
    count_groups,
    merged_bins,
)


def histogram(amax: torch.Tensor) -> GroupHistogram:
    return GroupHistogram.model_validate(count_bins(amax).tolist())


def test_histogram_keeps_what_lies_between_its_first_and_last_group_and_comes_back() -> None:
    amax = torch.tensor([0.0, 0.0, 1.0, 1.1, 4.0])
    found = histogram(amax)
    assert found.first == 0 and sum(found.counts) == 5
    apart = histogram(amax[2:])
    assert apart.counts == (2, 0, 0, 0, 0, 0, 0, 0, 1)
    assert lower_edges([apart.first]).item() == 1.0
    assert GroupHistogram.from_json(apart.to_json(), "x") == apart
    assert histogram(torch.zeros(0)).by_bin() == {}
    assert merged_bins([found, apart]) == {0: 2, apart.first: 4, apart.first + 8: 2}


def test_groups_on_edges_count_the_same_by_bins_and_by_values() -> None:
    edges = lower_edges([*range(1, 1020)])
    scale = input_global_scale(5.0)
    binned = count_binned(histogram(edges).by_bin(), scale)
    assert binned == count_groups(edges, scale)
    assert binned.groups == len(edges)
    assert min(binned.saturated, binned.subnormal, binned.zero) > 10


def test_zero_groups_are_not_counted_and_sums_are_by_field() -> None:
    counts = count_groups(torch.tensor([0.0, 0.0, 6.0, 7.0, 6 * 2.0**-8, 6 * 2.0**-12]), 448.0)
    assert counts == ScaleCounts(groups=4, saturated=1, subnormal=0, zero=0)
    counts = count_groups(torch.tensor([0.0, 3.0, 6 * 2.0**-8, 6 * 2.0**-12]), 1.0)
    assert counts == ScaleCounts(groups=3, saturated=0, subnormal=1, zero=1)
    assert counts + counts == ScaleCounts(groups=6, saturated=0, subnormal=2, zero=2)


@pytest.mark.parametrize("count", [0, 3])
def test_bins_without_values_count_nothing(count: int) -> None:
    assert count_binned({0: count}, 1.0) == ScaleCounts()
