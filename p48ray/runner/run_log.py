"""The log that a driver leaves in the run root: what it printed, and a JSON line a unit.

An object of its own for each driver, under logs/, written anew at intervals and at the end: a
bucket can not append, and a driver that was killed leaves what it knew some seconds before. Nothing
reads it but people.
"""

import logging
import threading
import time
import uuid
from contextlib import AbstractContextManager
from typing import Self

from p48ray.errors import P48Error
from p48ray.run import run_root
from p48ray.runner.console import LineBuffer
from p48ray.store.base import Store

WRITE_INTERVAL_S = 30.0


class RunLog(AbstractContextManager["RunLog"]):
    """Collects from the first moment; nothing is written before `begin`, so that a mistake found
    until then leaves no run root."""

    def __init__(self, store: Store) -> None:
        """Args: store: the run root."""
        self.store = store
        started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.key = run_root.driver_log(f"{started}-{uuid.uuid4().hex[:8]}")
        self.buffer = LineBuffer()
        self.text = ""
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        logging.getLogger("p48ray").addHandler(self.buffer)
        return self

    def begin(self) -> None:
        """Write from now on."""
        self.thread = threading.Thread(target=self.write_at_intervals, name="log", daemon=True)
        self.thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self.thread is not None:
            if kind is not None:
                logging.getLogger(__name__).info("ended by %s: %s", kind.__name__, error)
            self.ended.set()
            self.thread.join()
        logging.getLogger("p48ray").removeHandler(self.buffer)

    def write_at_intervals(self) -> None:
        while not self.ended.wait(WRITE_INTERVAL_S):
            self.write()
        self.write()

    def write(self) -> None:
        """All lines so far, if there are new ones. A log that can not be written ends no run."""
        if not (lines := self.buffer.take()):
            return
        self.text += "".join(f"{line}\n" for line in lines)
        try:
            self.store.put(self.key, self.text.encode())
        except P48Error as error:
            logging.getLogger(__name__).debug("%s: %s", self.key, error)
