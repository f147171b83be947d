"""A run's status again and again, until the run is complete."""

import time
from collections.abc import Callable

from rich.console import Console

from p48ray.errors import ObjectMissingError, TransientStoreError
from p48ray.report.status import RunStatus, print_status, read_status
from p48ray.report.work import Manifest
from p48ray.store.base import Store

WATCH_S = 5.0
"""Between two looks at the run root, at least."""
WATCH_SHARE = 10
"""Times a look's own duration until the next one: to list a large bucket takes a while."""


def watch(store: Store, console: Console, wait: Callable[[float], object] = time.sleep) -> None:
    """Show a run until it is complete: on a terminal in place of what stood there, elsewhere
    whenever something has changed. Manifests are read once.

    Args: store: the run root. wait: is given the seconds until the next look.
    Raises: ConfigError when there is no plan.
    """
    known: dict[str, Manifest] = {}
    shown: RunStatus | None = None
    while True:
        begun = time.monotonic()
        try:
            status = read_status(store, known)
        except (TransientStoreError, ObjectMissingError) as error:  # deleted since it was listed
            console.print(f"not read, tried again soon: {error}", soft_wrap=True, markup=False)
        else:
            if console.is_terminal:
                console.clear()
            if console.is_terminal or status != shown:
                print_status(status, console, has_layers=False)
            shown = status
            if status.is_complete:
                return
        wait(max(WATCH_S, WATCH_SHARE * (time.monotonic() - begun)))
