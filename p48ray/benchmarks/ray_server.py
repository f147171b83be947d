"""A server as a Ray actor: it lies where the GPUs are, which need not be where the job's driver is,
and lives as long as the driver wants it to."""

import contextlib
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from p48ray.benchmarks.server_process import END_TIMEOUT_S, SHOWN_LINES, ServerProcess, ServerState
from p48ray.config.benchmarks import ServerSettings
from p48ray.errors import ConfigError, StageFailedError
from p48ray.report.work import duration
from p48ray.runner.cluster import Cluster, first_line, what_there_is

log = logging.getLogger("p48ray.progress")

HEALTH_POLL_S = 2.0
START_REPORT_EVERY_S = 30.0


class RayServer(AbstractContextManager[str]):
    """Enter: starts the server, waits until it is healthy, and gives its URL. Exit: ends it with
    all its processes.

    Args:
        command: the server's, with the checkpoint and its flags.
        address: of a running cluster; None for a Ray of this machine.
    """

    def __init__(
        self, command: Sequence[str], settings: ServerSettings, address: str | None
    ) -> None:
        self.command, self.settings = list(command), settings
        self.cluster = Cluster(address, num_cpus=1)
        self.opened = ExitStack()

    def __enter__(self) -> str:
        """Raises: ConfigError for a command that can not be started or GPUs that are not there;
        StageFailedError when the server ends or is not up in time."""
        with self.opened as opened:
            opened.enter_context(self.cluster)
            self.check_gpus()
            host = "127.0.0.1" if self.cluster.address is None else None
            actor = (
                ray.remote(NodeServer)
                .options(num_cpus=1, num_gpus=self.settings.gpus)
                .remote(self.command, host)
            )
            opened.callback(end, actor)
            url = self.wait(actor)
            self.opened = opened.pop_all()
        return url

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.opened.close()

    def check_gpus(self) -> None:
        found = ray.cluster_resources().get("GPU", 0)
        if self.cluster.address is None and found < self.settings.gpus:
            raise ConfigError(
                f"benchmarks.server.gpus: expected {self.settings.gpus} GPUs on this machine, Ray"
                f" finds {found:g}; set RAY_ADDRESS to a cluster that has them, or serve the"
                " checkpoint elsewhere and pass --server URL"
            )

    def waiting_for(self) -> str:
        return (
            "waiting for a node with room: the server asks for 1 CPU and"
            f" {self.settings.gpus} GPU (benchmarks.server.gpus), {what_there_is()}"
        )

    def wait(self, actor: Any) -> str:
        """The URL, once the server is healthy. The time that it may take counts from when its node
        was found, which may have to be bought first."""
        asked = said = started = time.monotonic()
        log.info("server    %s", " ".join(self.command))
        url: str | None = None
        while True:
            state = ServerState(False, None, "")
            try:
                if url is None:
                    url = ray.get(actor.where.remote(), timeout=HEALTH_POLL_S)
                    started = time.monotonic()
                state = ray.get(actor.state.remote(), timeout=self.settings.start_timeout_s)
            except GetTimeoutError:
                pass
            except RayTaskError as error:
                raise (
                    error.cause
                    if isinstance(error.cause, ConfigError)
                    else StageFailedError(f"server: {first_line(error)}")
                ) from error
            except RayError as error:
                raise startup_failure(error) from error
            last = state.last_lines.splitlines()[-SHOWN_LINES:]
            if state.is_healthy and url:
                log.info(
                    "server    healthy after %s at %s", duration(time.monotonic() - asked), url
                )
                return url
            if state.code is not None:
                raise StageFailedError(
                    f"server: {' '.join(self.command)}: ended with code {state.code} before it"
                    " answered; its last lines:\n" + "\n".join(last)
                )
            if url and time.monotonic() - started > self.settings.start_timeout_s:
                raise StageFailedError(
                    f"server: {' '.join(self.command)}: not healthy within"
                    f" benchmarks.server.start_timeout_s = {self.settings.start_timeout_s:g}; its"
                    " last lines:\n" + "\n".join(last)
                )
            if time.monotonic() - said > START_REPORT_EVERY_S:
                said = time.monotonic()
                log.info(
                    "server    starting for %s: %s",
                    duration(said - asked),
                    (last or [""])[-1][:120] if url else self.waiting_for(),
                )
            time.sleep(HEALTH_POLL_S)


class NodeServer(ServerProcess):
    """The actor: on a cluster it listens on its node's address, so that the driver reaches it;
    whoever reaches the node does too."""

    def __init__(self, command: Sequence[str], host: str | None) -> None:
        super().__init__(command, host or ray.util.get_node_ip_address())


def startup_failure(error: RayError) -> Exception:
    """What went wrong in the actor's constructor, or with its node."""
    cause = getattr(error, "cause", None)
    text = str(error)
    if isinstance(cause, ConfigError):
        return cause
    if "ConfigError: " in text:
        return ConfigError(text.rpartition("ConfigError: ")[2].splitlines()[0])
    return StageFailedError(f"server: {first_line(error)}")


def end(actor: Any) -> None:
    """A node that is gone has taken its server with it."""
    with contextlib.suppress(RayError):
        ray.get(actor.end.remote(), timeout=3 * END_TIMEOUT_S)
    ray.kill(actor)
