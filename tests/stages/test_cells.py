"""Figures of held-out tokens, by source and position, against plain loops in float64."""

import math
from itertools import pairwise

import pytest
import torch

from p48ray.errors import NumericsError
from p48ray.run.plan import SequencePart
from p48ray.stages.cells import CellSums, cells_of, compare_logits, stretch_ends, stretch_words

PART = SequencePart(part=3, first_sequence=24, num_sequences=4)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (2, (1, 2)),
        (7, (3, 7)),
        (8, (1, 4, 8)),
        (64, (8, 32, 64)),
        (512, (64, 256, 512)),
        (513, (512, 513)),
        (2048, (512, 2048)),
        (2049, (512, 2048, 2049)),
        (8192, (512, 2048, 8192)),
        (100_000, (512, 2048, 8192, 32768, 100_000)),
    ],
)
def test_stretches_of_a_long_sequence_end_where_all_others_do(
    length: int, expected: tuple[int, ...]
) -> None:
    assert stretch_ends(length) == expected


def test_every_sequence_has_two_stretches_or_more_that_cover_it_once() -> None:
    for length in range(2, 1100):
        ends = stretch_ends(length)
        assert len(ends) >= 2 and ends[0] >= 1 and ends[-1] == length
        assert all(a < b for a, b in pairwise(ends))


@pytest.mark.parametrize("length", [2, 64, 513, 3000])
def test_token_is_in_the_cell_of_its_source_and_of_its_position(length: int) -> None:
    ends, documents = stretch_ends(length), [2, 0, 2, 1]
    found = cells_of(documents, length)
    assert found.shape == (4, length)
    for row, document in enumerate(documents):
        for at in {0, length - 1, *(e - 1 for e in ends), *(e for e in ends[:-1])}:
            seen = at + 1  # tokens that the model has seen when it predicts the next one
            stretch = next(n for n, end in enumerate(ends) if seen <= end)
            assert found[row, at] == document * len(ends) + stretch, (row, at)


def test_positions_are_said_from_one_on() -> None:
    assert [stretch_words(1, 512), stretch_words(513, 2048)] == ["1 to 512", "513 to 2,048"]


def slow_figures(logits_TV: list[torch.Tensor], labels: list[int]) -> list[list[float]]:
    """By token: loss and whether right of the source, then loss, whether right and KL of each other
    model; logarithms and sums of Python's."""

    def log_p(row: list[float]) -> list[float]:
        top = max(row)
        norm = top + math.log(math.fsum(math.exp(x - top) for x in row))
        return [x - norm for x in row]

    found = []
    for t, label in enumerate(labels):
        p, *others = (log_p(logits[t].tolist()) for logits in logits_TV)
        figures = [-p[label], float(p.index(max(p)) == label)]
        for q in others:
            figures += [-q[label], float(q.index(max(q)) == label)]
            figures.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        found.append(figures)
    return found


@pytest.mark.parametrize("num_views", [1, 2])
def test_sums_by_cell_are_those_of_plain_loops(num_views: int) -> None:
    """In three calls, whose borders are not those of cells."""
    generator = torch.Generator().manual_seed(num_views)
    documents, length, vocabulary = [1, 0, 1, 3], 16, 11
    logits = [
        3 * torch.randn(4 * length, vocabulary, generator=generator) for _ in range(1 + num_views)
    ]
    labels_T = torch.randint(vocabulary, (4 * length,), generator=generator)
    cells_T = cells_of(documents, length).flatten()
    sums = CellSums()
    for start, end in ((0, 21), (21, 50), (50, 64)):
        some = slice(start, end)
        figures_RT = compare_logits(*(x[some] for x in logits), labels_T=labels_T[some])
        assert figures_RT.dtype == torch.float64
        sums.add(figures_RT, cells_T[some])
    records = sums.records(PART, length)

    ends, by_cell = stretch_ends(length), dict[tuple[int, int], list[list[float]]]()
    for t, figures in enumerate(slow_figures(logits, labels_T.tolist())):
        stretch = next(n for n, end in enumerate(ends) if t % length < end)
        by_cell.setdefault((documents[t // length], stretch), []).append(figures)
    assert [(r.document, r.stretch) for r in records] == sorted(by_cell)
    for record in records:
        own = by_cell[record.document, record.stretch]
        expected = [math.fsum(column) for column in zip(*own, strict=True)]
        other = record.in_groups_of_32
        found = [record.source_loss, record.source_correct, record.compressed_loss]
        found += [record.compressed_correct, record.kl]
        found += [other.loss, other.correct, other.kl] if other is not None else []
        assert record.num_tokens == len(own)
        assert found == pytest.approx(expected, rel=1e-5)
        assert (other is not None) == (num_views == 2)


def test_cells_of_a_part_add_up_to_the_sums_over_all_of_its_tokens() -> None:
    """To the last digits: figures are added in float64 whatever they were computed in."""
    generator = torch.Generator().manual_seed(5)
    logits = [torch.randn(4 * 64, 50, generator=generator) for _ in range(2)]
    labels_T = torch.randint(50, (4 * 64,), generator=generator)
    figures_RT = compare_logits(*logits, labels_T=labels_T)
    sums = CellSums()
    sums.add(figures_RT, cells_of([0, 1, 1, 0], 64).flatten())
    records = sums.records(PART, 64)
    assert len(records) == 6 and sum(r.num_tokens for r in records) == 256
    names = ("source_loss", "source_correct", "compressed_loss", "compressed_correct", "kl")
    for name, whole in zip(names, figures_RT.sum(1).tolist(), strict=True):
        found = math.fsum(getattr(r, name) for r in records)
        assert found == pytest.approx(whole, rel=1e-12)


def test_sum_that_is_not_finite_names_its_source() -> None:
    sums = CellSums()
    figures_RT = torch.zeros(5, 3, dtype=torch.float64)
    figures_RT[4, 2] = math.inf
    sums.add(figures_RT, torch.tensor([0, 1, 4]))
    words = (
        r"part 3 \(held-out sequences 24 to 27\): KL: expected a finite sum, found inf; .*"
        r"evaluation\.documents\[2\]"
    )
    with pytest.raises(NumericsError, match=words):
        sums.records(PART, 2)
