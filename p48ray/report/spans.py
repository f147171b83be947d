"""Who worked when: stretches of time from the records of finished work.

A record has the seconds that its piece of work took and the moment at which it was durable. The
parts that a worker carries through a layer together become durable together, and a unit is written
while the next one is computed; so pieces that are simply drawn back from their records lie on top
of each other, as if more workers had been there. `spans_by_worker` puts those of a worker one after
the other instead.
"""

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple


class WorkPiece(NamedTuple):
    """A finished piece of work: its seconds, when it was durable (Unix seconds), and the process
    that did it, empty where the record does not say."""

    stage: str
    layer: int
    seconds: float
    finished_at: float
    worker: str


class Span(NamedTuple):
    """One piece of finished work, Unix seconds."""

    stage: str
    layer: int
    start: float
    end: float


def spans_by_worker(pieces: Iterable[WorkPiece], num_workers: int) -> list[Span]:
    """Every piece when its worker was at it: no later than it was durable, and before what the same
    worker did next. The first to begin comes first.

    Args: num_workers: how many share the pieces that name no worker.
    """
    begun: dict[str | int, float] = dict.fromkeys(range(num_workers), math.inf)
    found = []
    for piece in sorted(pieces, key=lambda p: -p.finished_at):
        lane = piece.worker or max(range(num_workers), key=begun.__getitem__)
        end = min(piece.finished_at, begun.get(lane, math.inf))
        begun[lane] = end - piece.seconds
        found.append(Span(piece.stage, piece.layer, begun[lane], end))
    return sorted(found, key=lambda s: s.start)


def most_at_once(spans: Iterable[Span]) -> int:
    """How many were under way at the busiest moment; one that ends as another begins is over."""
    ends = sorted(
        (at, step) for s in spans if s.end > s.start for at, step in ((s.start, 1), (s.end, -1))
    )
    return max(accumulate(step for _, step in ends), default=0)


def merged_spans(spans: Iterable[Span], slack_s: float) -> list[tuple[float, float, int]]:
    """(start, end, how many) of stretches in which something was worked on, with gaps up to
    `slack_s` closed."""
    found: list[tuple[float, float, int]] = []
    for span in sorted(spans, key=lambda s: s.start):
        if found and span.start <= found[-1][1] + slack_s:
            start, end, count = found[-1]
            found[-1] = (start, max(end, span.end), count + 1)
        else:
            found.append((span.start, span.end, 1))
    return found


def shared_seconds(some: Iterable[Span], others: Iterable[Span]) -> float:
    """For how long both kinds of work were under way at once."""
    stretches = [merged_spans(spans, 0.0) for spans in (some, others)]
    return sum(
        max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in stretches[0] for b in stretches[1]
    )


def busy(spans: Iterable[Span], start: float, end: float, steps: int) -> list[float]:
    """Mean number of workers at work in each of `steps` equal stretches of time.

    Args:
        spans: of one stage or of several.
        start, end: of the whole time, Unix seconds; end is later.
        steps: how many stretches.
    """
    width = (end - start) / steps
    found = [0.0] * steps
    for span in spans:
        first = max(0, min(steps - 1, int((span.start - start) / width)))
        last = max(0, min(steps - 1, int((span.end - start) / width)))
        for i in range(first, last + 1):
            inside = min(span.end, start + (i + 1) * width) - max(span.start, start + i * width)
            found[i] += max(0.0, inside) / width
    return found
