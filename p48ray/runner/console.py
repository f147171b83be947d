"""What a process says, and how a person stops it: logging, configured once by jobs and workers, and
signals."""

import logging
import shlex
import signal
import sys
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Self, TextIO

FROM_WORKERS = "p48ray.worker"
"""Logger of lines that workers sent with their results; their warnings were printed when they
came."""


def configure_logging(stream: TextIO | None = None, is_verbose: bool = False) -> None:
    """Progress and warnings are printed; a line a unit and the like only where it is asked for. A
    run's own log has all of it (runner.run_log).

    Args:
        stream: where to; None for the standard output, which a command that prints JSON there wants
            for itself.
        is_verbose: print everything.
    """
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(PlainFormatter())
    handler.addFilter(lambda record: is_shown(record, is_verbose))
    root = logging.getLogger("p48ray")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.INFO)


def is_shown(record: logging.LogRecord, is_verbose: bool) -> bool:
    if record.name == FROM_WORKERS:
        return False
    return is_verbose or record.levelno >= logging.WARNING or record.name == "p48ray.progress"


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


class LineBuffer(logging.Handler):
    """Lines since they were last taken."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(PlainFormatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging, under this handler's lock."""
        self.lines.append(self.format(record))

    def take(self) -> tuple[str, ...]:
        """All of them, oldest first."""
        self.acquire()
        try:
            taken, self.lines = tuple(self.lines), []
        finally:
            self.release()
        return taken


class Interrupts(AbstractContextManager["Interrupts"]):
    """Within it SIGTERM ends the main thread's work as Ctrl-C does, by KeyboardInterrupt, so that
    what was opened is closed. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.held: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.held[number] = signal.signal(number, self.interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.held.items():
            signal.signal(number, handler)

    def last_words(self) -> str:
        """One line that says what stopped the command, and how to go on."""
        by = "Ctrl-C" if self.received in (None, signal.SIGINT) else self.received.name
        command = shlex.join(["python", *sys.argv])
        return f"stopped by {by}; what is done stays. Resume with: {command}"

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 and the signal's number."""
        return 128 + (self.received or signal.SIGINT)

    def interrupt(self, number: int, _: FrameType | None) -> None:
        """The handler."""
        self.received = signal.Signals(number)
        for each in self.held:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt
