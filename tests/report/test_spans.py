"""Who worked when: never two pieces of work in one pair of hands."""

import pytest

from p48ray.report.spans import (
    Span,
    WorkPiece,
    busy,
    merged_spans,
    most_at_once,
    shared_seconds,
    spans_by_worker,
)


def pieces(*found: tuple[str, float, float]) -> list[WorkPiece]:
    """(worker, seconds, finished_at) each."""
    return [
        WorkPiece("capture", n, seconds, at, worker)
        for n, (worker, seconds, at) in enumerate(found)
    ]


def times(spans: list[Span]) -> list[tuple[int, float, float]]:
    return [(s.layer, s.start, s.end) for s in spans]


def test_parts_that_a_worker_wrote_together_come_one_after_the_other() -> None:
    """Six parts of 5 s each, durable at 30 s: one worker, not six."""
    found = spans_by_worker(pieces(*[("a", 5.0, 30.0)] * 6), 2)
    assert [(s.start, s.end) for s in found] == [(5.0 * n, 5.0 * n + 5.0) for n in range(6)]
    assert most_at_once(found) == 1


def test_a_piece_that_was_over_before_the_next_was_begun_stays_where_it_is() -> None:
    found = spans_by_worker(pieces(("a", 5.0, 10.0), ("a", 5.0, 30.0), ("b", 8.0, 12.0)), 2)
    assert times(found) == [(2, 4.0, 12.0), (0, 5.0, 10.0), (1, 25.0, 30.0)]


def test_a_unit_written_while_the_next_is_computed_is_drawn_before_it() -> None:
    found = spans_by_worker(pieces(("a", 10.0, 22.0), ("a", 10.0, 30.0)), 1)
    assert times(found) == [(0, 10.0, 20.0), (1, 20.0, 30.0)]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_pieces_of_nobody_known_are_shared_by_the_workers_there_were(num_workers: int) -> None:
    """Manifests of before name no worker."""
    found = spans_by_worker(pieces(*[("", 5.0, 30.0)] * 6), num_workers)
    assert most_at_once(found) == num_workers
    assert min(s.start for s in found) == 30.0 - 30.0 / num_workers
    assert all(s.end - s.start == 5.0 for s in found)


def test_more_workers_than_a_resumed_run_asks_for_are_all_drawn() -> None:
    found = spans_by_worker(pieces(("a", 5.0, 10.0), ("b", 5.0, 10.0), ("c", 5.0, 10.0)), 1)
    assert most_at_once(found) == 3


def test_one_that_ends_as_another_begins_is_over() -> None:
    assert most_at_once([Span("x", 1, 0.0, 1.0), Span("x", 1, 1.0, 2.0)]) == 1
    assert most_at_once([Span("x", 1, 0.0, 1.5), Span("x", 1, 1.0, 2.0)]) == 2
    assert most_at_once([]) == most_at_once([Span("x", 1, 1.0, 1.0)]) == 0


def test_time_that_streams_and_units_share_counts_each_moment_once() -> None:
    streams = [Span("gradients", 2, 0.0, 4.0), Span("gradients", 1, 3.0, 6.0)]
    units = [
        Span("compress", 2, 5.0, 7.0),
        Span("compress", 2, 5.5, 9.0),
        Span("compress", 1, -1.0, 1.0),
    ]
    assert shared_seconds(streams, units) == pytest.approx(2.0)
    assert shared_seconds(streams, []) == 0


def test_stretches_are_merged_and_counted() -> None:
    spans = [
        Span("compress", 1, 10.0, 12.0),
        Span("compress", 1, 0.0, 4.0),
        Span("compress", 1, 1.0, 3.0),
        Span("compress", 1, 4.5, 5.0),
    ]
    assert merged_spans(spans, 0.1) == [(0.0, 4.0, 2), (4.5, 5.0, 1), (10.0, 12.0, 1)]
    assert merged_spans(spans, 0.5) == [(0.0, 5.0, 3), (10.0, 12.0, 1)]
    assert busy(spans, 0.0, 12.0, 12) == pytest.approx([1, 2, 2, 1, 0.5, 0, 0, 0, 0, 0, 1, 1])
    assert sum(busy(spans, 0.0, 12.0, 5)) * 12 / 5 == pytest.approx(
        sum(s.end - s.start for s in spans)
    )
