"""Logging of a process, configured once by jobs and workers: progress to people, one JSON line a
unit to logs."""

import logging
import sys
from typing import TextIO


def configure_logging(stream: TextIO | None = None) -> None:
    """Progress and warnings always; everything else only where nobody watches (a file, a job's
    log).

    Args:
        stream: where to; None for the standard output, which a command that prints JSON there wants
            for itself.
    """
    target = stream or sys.stdout
    handler = logging.StreamHandler(target)
    handler.setFormatter(PlainFormatter())
    root = logging.getLogger("p48ray")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.WARNING if target.isatty() else logging.INFO)
    logging.getLogger("p48ray.progress").setLevel(logging.INFO)


class PlainFormatter(logging.Formatter):
    """Time and message; the level where it is a warning or worse."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return (
            text
            if record.levelno < logging.WARNING
            else f"{text[:9]}{record.levelname}: {text[9:]}"
        )
