"""Where a worker's time goes, for benchmarks: one JSON line for each span of work, in the folder
that P48RAY_TRACE names.

Without that variable a span costs an attribute lookup. A process writes a file of its own,
`<pid>.jsonl`, so that no lock is shared:

    {"kind": "hash", "stage": "capture", "start": 1764440000.123, "seconds": 0.41,
     "bytes": 1879048192, "thread": 140..., "what": "residuals/layer-002/..."}

`start` is Unix time. Spans of one kind do not nest inside each other; spans of different threads
lie beside each other.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

TRACE_VARIABLE = "P48RAY_TRACE"

Kind = Literal[
    "task",  # a whole task of a stage
    "copy",  # between a GPU and the host
    "encode",  # into the form that is stored, or back
    "hash",  # SHA-256
    "write",  # to the store, fsync included
    "read",  # from the store
    "gather",  # rows of a unit's tokens
    "pin",  # pages of host memory for the GPU, and their release
    "wait",  # of a computation for a write or a read that is behind
]

_lock = threading.Lock()
_stage = ""


@contextmanager
def span(kind: Kind, num_bytes: int = 0, what: str = "") -> Iterator[None]:
    """Time the body. num_bytes: what it moved or hashed; what: a key or a task, for a person."""
    folder = os.environ.get(TRACE_VARIABLE)
    if not folder:
        yield
        return
    start, begun = time.time(), time.perf_counter()
    try:
        yield
    finally:
        seconds = round(time.perf_counter() - begun, 6)
        line = {
            "kind": kind,
            "stage": _stage,
            "start": round(start, 4),
            "seconds": seconds,
            "bytes": num_bytes,
            "thread": threading.get_ident(),
        }
        with _lock, (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line | {"what": what}) + "\n")


@contextmanager
def task(stage: str, what: str) -> Iterator[None]:
    """A task of a stage: spans of its process belong to that stage until the next task begins (a
    process works for one stage at a time)."""
    global _stage
    _stage = stage
    with span("task", what=what):
        yield
