"""The unit of dispatch: a stage's name and one item of its work, how it ended, and the record that
a failure leaves."""

import logging
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from p48ray import errors
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.errors import CorruptObjectError, P48Error, TransientStoreError
from p48ray.run import run_root
from p48ray.run.manifest import Failure, UnitManifest
from p48ray.store.base import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One item of a stage's work: `item` is small and picklable, ids and positions, never weights.

    `marker`: the key whose presence means that it is done, whoever did it. `layer`, `load`: what
    runners dispatch by.
    """

    stage: str
    id: str
    item: Any
    marker: str | None = None
    layer: int | None = None
    load: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """How a task ended. `error_type` is the name of a class of p48ray.errors, or of any other
    exception.

    `redo`: keys of corrupt objects, to be deleted so that they are made anew. `facts`: what a
    unit's manifest says that metrics count. `lines`: what another process logged meanwhile.
    """

    task: Task
    error_type: str | None = None
    error: str = ""
    redo: tuple[str, ...] = ()
    seconds: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        return self.error_type is None

    @property
    def is_transient(self) -> bool:
        return self.is_kind(TransientStoreError)

    @property
    def is_foreign(self) -> bool:
        """Not an error of ours: a bug, or a process (a GPU context) that is no longer sound."""
        return not self.is_done and not self.is_kind(P48Error)

    def is_kind(self, wanted: type[P48Error]) -> bool:
        """Whether it ended with such an error, or with a kind of it."""
        kind = getattr(errors, self.error_type or "", None)
        return isinstance(kind, type) and issubclass(kind, wanted)

    def as_exception(self) -> P48Error:
        """The error as the stage raised it, or a StageFailedError around a foreign one."""
        kind = getattr(errors, self.error_type or "", None)
        if isinstance(kind, type) and issubclass(kind, P48Error):
            return kind(self.error)
        return errors.StageFailedError(
            f"{self.task.stage} {self.task.id}: {self.error_type}: {self.error}"
        )


def attempt(store: Store, task: Task, work: Callable[[], object]) -> TaskResult:
    """Do the work of one task; a failure is recorded in the bucket and returned, never raised, so
    that the rest of the stage goes on."""
    start = time.monotonic()
    try:
        made = work()
    except Exception as error:  # noqa: BLE001 (the one boundary: whatever a stage raises becomes a record with its traceback)
        record_failure(store, task, error)
        redo = error.keys if isinstance(error, CorruptObjectError) else ()
        return TaskResult(
            task=task,
            error_type=type(error).__name__,
            error=str(error),
            redo=redo,
            seconds=time.monotonic() - start,
        )
    return TaskResult(task=task, seconds=time.monotonic() - start, facts=facts_of(made))


def facts_of(made: object) -> dict[str, float]:
    """Tokens, peak GPU memory, and seconds by phase of a unit; nothing for other tasks."""
    if not isinstance(made, UnitManifest):
        return {}
    tokens = sum(record.tokens for record in made.linears) / len(PROJECTIONS)
    peak = max(made.peak_gpu_bytes.values(), default=0)
    return {"tokens": tokens, "peak_gpu_bytes": peak} | {
        f"{phase}_s": seconds for phase, seconds in made.seconds.items()
    }


def record_failure(store: Store, task: Task, error: Exception) -> None:
    """Leave a failed attempt's traceback in the bucket."""
    attempt = uuid.uuid4().hex[:12]
    failure = Failure(
        stage=task.stage,
        task=task.id,
        attempt=attempt,
        error=f"{type(error).__name__}: {error}",
        traceback="".join(traceback.format_exception(error)),
        input=repr(task.item)[:2000],
        is_transient=isinstance(error, TransientStoreError),
    )
    log.error("%s %s failed: %s", task.stage, task.id, failure.error)
    try:
        store.put(run_root.failure(task.stage, task.id, attempt), failure.to_json())
    except P48Error as second:
        log.error("%s %s: the failure could not be recorded: %s", task.stage, task.id, second)
