"""What of an expert loader needs no GPU: which pages are pinned, and where tensors lie in a slot."""

from itertools import pairwise

import pytest
import torch

from p48ray.model.expert_loader import ALIGNMENT, PAGE_BYTES, lay_out, page_ranges

P = PAGE_BYTES


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(P, P)], [(P, 2 * P)]),
        ([(P + 1, 1)], [(P, 2 * P)]),
        ([(2 * P - 1, 2)], [(P, 3 * P)]),
        ([(10 * P, 5), (P, 5)], [(P, 11 * P)]),
        ([(P, 2**24), (P + 5, 1)], [(P, P + 2**24)]),
        ([(P, P), (2**30, P)], [(P, 2 * P), (2**30, 2**30 + P)]),
        ([], []),
    ],
)
def test_page_ranges_cover_the_tensors_in_whole_pages(spans: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert page_ranges(spans) == expected


def test_page_ranges_never_share_a_page() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 2**33, (500,), generator=generator).tolist()
    sizes = torch.randint(1, 2**20, (500,), generator=generator).tolist()
    ranges = page_ranges(zip(starts, sizes, strict=True))
    assert all(a[1] < b[0] for a, b in pairwise(ranges))
    for start, size in zip(starts, sizes, strict=True):
        assert any(first <= start and start + size <= end for first, end in ranges)


def test_places_are_aligned_and_do_not_overlap() -> None:
    tensors = {name: torch.empty(size, dtype=torch.uint8) for name, size in {"a": 1, "b": 256, "c": 257, "d": 0, "e": 5}.items()}
    places, size = lay_out(tensors)
    assert list(places.values()) == [0, 256, 512, 1024, 1024] and size == 1280
    assert all(place % ALIGNMENT == 0 for place in places.values())
