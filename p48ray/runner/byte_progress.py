"""Progress of work on files of known sizes: a line a file with how many, how many bytes, how fast and how long yet."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from p48ray.report.plan_table import size
from p48ray.report.work import duration

log = logging.getLogger("p48ray.progress")

T = TypeVar("T")


def with_progress(
    stage: str, done: Iterable[tuple[str, T]], sizes: Mapping[str, int], num_before: int = 0, bytes_before: int = 0
) -> Iterator[tuple[str, T]]:
    """`done` as it comes, with a line in the log for each.

    Args: done: (file, result). sizes: bytes of every file still to do. num_before, bytes_before: files and bytes that were done already.
    """
    start = time.monotonic()
    num_total, total = num_before + len(sizes), bytes_before + sum(sizes.values())
    num_done, now = num_before, 0
    for name, result in done:
        num_done, now = num_done + 1, now + sizes[name]
        rate = max(now, 1) / max(time.monotonic() - start, 1e-3)
        left = total - bytes_before - now
        log.info("%-9s %d/%d shards  %s of %s  %d %%  %s/s  %s left", stage, num_done, num_total, size(bytes_before + now), size(total),
                 100 * (bytes_before + now) // max(total, 1), size(round(rate)), duration(left / rate))  # fmt: skip
        yield name, result
