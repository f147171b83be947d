"""What of pinned pages needs no GPU: which pages they are, and how a copy is cut at their ends. On
a GPU: test_experts_cuda.py."""

from itertools import pairwise

import pytest
import torch

from p48ray.model.pinned_pages import PAGE_BYTES, page_ranges, pieces

P = PAGE_BYTES


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(P, P)], [(P, 2 * P)]),
        ([(P + 1, 1)], []),
        ([(P - 1, P + 1)], [(P, 2 * P)]),
        ([(P + 1, 2 * P)], [(2 * P, 3 * P)]),
        ([(2 * P - 1, 2)], []),
        ([(10 * P, 5), (P, 5)], [(P, 10 * P)]),
        ([(P, 2**24), (P + 5, 1)], [(P, P + 2**24)]),
        ([(P, P), (2**30, P)], [(P, 2 * P), (2**30, 2**30 + P)]),
        ([], []),
    ],
)
def test_page_ranges_are_the_whole_pages_inside(
    spans: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert page_ranges(spans) == expected


def random_spans(count: int, largest: int) -> list[tuple[int, int]]:
    """(address, bytes), apart from each other, as tensors of one file are."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, largest, (count,), generator=generator).tolist()
    gaps = torch.randint(0, 3 * 2**20, (count,), generator=generator).tolist()
    spans, end = [], 12345
    for size, gap in zip(sizes, gaps, strict=True):
        spans.append((end + gap, size))
        end += gap + size
    return spans


def test_nobody_elses_tensor_ever_lies_half_in_a_range() -> None:
    """The fault of before: of tensors side by side in a file, every second one is pinned, and the
    others begin and end where they like."""
    spans = random_spans(400, 2**20)
    ranges = page_ranges(spans[::2])
    assert ranges and all(a[1] < b[0] for a, b in pairwise(ranges))
    for start, size in spans[1::2]:
        for first, last in ranges:
            touches = start < last and start + size > first
            assert not touches or (first <= start and start + size <= last)


@pytest.mark.parametrize(
    ("span", "ranges", "expected"),
    [
        ((P, P), [], [(0, P)]),
        ((P, P), [(P, 2 * P)], [(0, P)]),
        ((P - 3, P + 8), [(P, 2 * P)], [(0, 3), (3, P + 3), (P + 3, P + 8)]),
        ((P - 3, 10), [(P, 4 * P)], [(0, 3), (3, 10)]),
        ((4 * P - 3, 10), [(P, 4 * P)], [(0, 3), (3, 10)]),
        (
            (P, 6 * P),
            [(0, 2 * P), (3 * P, 4 * P), (9 * P, 10 * P)],
            [(0, P), (P, 2 * P), (2 * P, 3 * P), (3 * P, 6 * P)],
        ),
        ((P, 0), [(0, 2 * P)], []),
    ],
)
def test_a_copy_is_cut_where_a_range_begins_or_ends(
    span: tuple[int, int], ranges: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert pieces(*span, ranges) == expected


def test_no_piece_straddles_and_all_pieces_are_the_tensor() -> None:
    spans = random_spans(300, 5 * P)
    ranges = page_ranges(random_spans(300, 9 * P)[::3])
    for start, size in spans:
        cut = pieces(start, size, ranges)
        assert [a for a, _ in cut] == [0, *(b for _, b in cut[:-1])] and cut[-1][1] == size
        for a, b in cut:
            inside = [first <= start + a and start + b <= last for first, last in ranges]
            outside = [start + b <= first or start + a >= last for first, last in ranges]
            assert all(i or o for i, o in zip(inside, outside, strict=True))
