"""Python's garbage collector, kept out of the way.

It looks for cycles among all objects again and again while many are made. The headers of a large
checkpoint are 200,000 records without cycles: to search them took longer than to check them.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Without automatic garbage collection inside."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
