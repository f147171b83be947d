"""GPU-hours that a run may take (run.max_gpu_hours): those of finished work that is there already,
and those of the workers that a driver holds, busy or not, since they are paid for."""

from collections.abc import Callable
from dataclasses import dataclass, field

from p48ray.errors import BudgetSpentError
from p48ray.report.work import gpu_hours, read_work
from p48ray.run.plan import RunPlan
from p48ray.store.base import Store

SECONDS_PER_HOUR = 3600.0


@dataclass(slots=True)
class Budget:
    """What may be spent, and what is.

    Args:
        limit: GPU-hours; None: no end.
        before: GPU-hours of finished work, of drivers before this one.
        gpus_per_worker: that each worker holds.
        clock: monotonic seconds.
    """

    limit: float | None
    before: float
    gpus_per_worker: float
    clock: Callable[[], float]
    worker_seconds: float = 0.0
    counted_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.counted_at = self.clock()

    def count(self, num_workers: int) -> None:
        """Add the time since the last count, in which so many workers were held."""
        now = self.clock()
        self.worker_seconds += num_workers * (now - self.counted_at)
        self.counted_at = now

    @property
    def held(self) -> float:
        """GPU-hours of this driver's workers."""
        return self.worker_seconds / SECONDS_PER_HOUR * self.gpus_per_worker

    @property
    def is_spent(self) -> bool:
        return self.limit is not None and self.before + self.held >= self.limit

    def error(self) -> BudgetSpentError:
        """What ends the run."""
        return BudgetSpentError(
            f"run.max_gpu_hours = {self.limit:g} is spent: {self.before + self.held:.2f} GPU-hours,"
            f" {self.before:.2f} of finished work of before and {self.held:.2f} of this job's"
            " workers; what is finished stays: raise the limit and run the same command again to"
            " go on"
        )


def budget_of(plan: RunPlan, store: Store, clock: Callable[[], float]) -> Budget:
    """A run's budget, with what its run root says was spent so far.

    Args:
        plan: of the run.
        store: its run root, of which nothing is read where there is no limit.
        clock: monotonic seconds.
    """
    run, before = plan.config.run, 0.0
    if run.max_gpu_hours is not None:
        keys = {info.key for info in store.list()}
        before = gpu_hours(plan, read_work(plan, store, keys))
    return Budget(run.max_gpu_hours, before, run.gpus_per_worker, clock)
