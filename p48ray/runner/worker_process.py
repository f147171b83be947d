"""What an actor of the Ray runner does: a Workplace, its metrics, and its log lines for the
driver."""

import logging
from dataclasses import replace

import ray

from p48ray.errors import P48Error
from p48ray.run.plan import RunPlan
from p48ray.run.scratch import check_probe
from p48ray.runner.console import LineBuffer, configure_logging
from p48ray.runner.metrics import WorkerMetrics
from p48ray.stages.tasks import Task, TaskResult
from p48ray.stages.workplace import Workplace

log = logging.getLogger(__name__)


class WorkerProcess:
    """The actor's body: opens run root and source once, then executes tasks."""

    def __init__(self, plan_json: bytes, store_uri: str) -> None:
        self.lines = LineBuffer()
        self.plan_json, self.store_uri = plan_json, store_uri

    def start(self, is_verbose: bool = False, probe: str | None = None) -> str | P48Error:
        """Open what there is. Returns this worker's node, or what is wrong instead of raising it,
        which would reach the driver as a dead actor.

        Args:
            is_verbose: print all that is logged; the driver's log gets it in any case.
            probe: what the driver wrote to run.scratch.
        """
        configure_logging(is_verbose=is_verbose)
        logging.getLogger("p48ray").addHandler(self.lines)
        node = str(ray.get_runtime_context().get_node_id())
        try:
            plan = RunPlan.from_json(self.plan_json, "the driver's plan")
            address = ray.util.get_node_ip_address()
            check_probe(plan, self.store_uri, probe, f"{node[:12]} ({address})")
            self.workplace = Workplace(plan, self.store_uri, node)
        except P48Error as error:
            return error
        self.metrics = WorkerMetrics(lambda: self.workplace.traffic)
        return node

    def close(self) -> None:
        """Let go of the node's cache; the last worker of the node removes it."""
        self.workplace.close()

    def execute(self, task: Task) -> TaskResult:
        result = self.workplace.execute(task)
        try:
            self.metrics.count(result)
        except Exception as error:  # noqa: BLE001 (a unit is not to be lost because nobody could be told of it)
            log.warning("metrics: %s", error)
        return replace(result, lines=self.lines.take())
