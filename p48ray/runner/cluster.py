"""The connection to Ray: to the cluster at an address, or to a Ray of this machine that ends with
it."""

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any, Self

import ray

from p48ray.errors import ConfigError, StageFailedError
from p48ray.store.open import scheme_of

log = logging.getLogger("p48ray.progress")

STARTING = "starting on this machine, which takes some seconds"
OBJECT_STORE_BYTES = 256 * 2**20
"""Of a Ray that is started here: tasks and results are kilobytes."""
REACH_TIMEOUT_S = 20.0
START_TIMEOUT_S = 60.0
"""How long to wait for a first worker before saying that the cluster has no room."""


class Cluster(AbstractContextManager["Cluster"]):
    """Connected for as long as the context lasts. A connection that is there already is the
    caller's: it is used, and left.

    Args:
        address: host:port of a running cluster; None starts a Ray of this machine.
        num_cpus: of a Ray of this machine.
        shows_logs: what workers print comes out here.
    """

    def __init__(self, address: str | None, num_cpus: int, shows_logs: bool = True) -> None:
        self.address = address or None  # an empty RAY_ADDRESS is none
        self.num_cpus, self.shows_logs = num_cpus, shows_logs
        self.has_joined = False

    @property
    def is_own(self) -> bool:
        """Whether it is a Ray of this machine that was started here."""
        return self.has_joined and self.address is None

    def __enter__(self) -> Self:
        """Raises: ConfigError for an address where there is no cluster."""
        if not ray.is_initialized():
            self.join()
            self.has_joined = True
        return self

    def check_alive(self) -> None:
        """Raises: StageFailedError when the Ray that was started here has lost its raylet, without
        which nothing ever runs again. A cluster may get new nodes."""
        if self.is_own and not any(node["Alive"] for node in ray.nodes()):
            raise StageFailedError(
                "the Ray that this job started on this machine has ended (its raylet died: killed,"
                " or out of memory); run the same command again to resume"
            )

    def __exit__(self, *_: object) -> None:
        if self.has_joined:
            ray.shutdown()

    def join(self) -> None:
        where: dict[str, Any] = {
            "address": "local",
            "num_cpus": self.num_cpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        if self.address is not None:
            where = {"address": self.address}
        log.info("ray       %s", f"joining {self.address}" if self.address else STARTING)
        if not sys.stdout.isatty():  # Ray colours the lines of workers in a file too
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        handler = signal.getsignal(signal.SIGTERM)
        start = time.monotonic()
        try:
            check_reachable(self.address)
            ray.init(**where, log_to_driver=self.shows_logs, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError) as error:
            if self.address is None:
                raise
            raise ConfigError(
                "RAY_ADDRESS: expected host:port of a running Ray cluster, found "
                f"{self.address!r}: {first_line(error)}; "
                "start one with `ray start --head`, or unset RAY_ADDRESS to use this machine alone"
            ) from error
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
        log.info("ray       up after %.0f s", time.monotonic() - start)


def check_reachable(address: str | None) -> None:
    """Ray itself would try for a quarter of an hour before it says that nobody is there.

    Raises: OSError where nobody listens at host:port.
    """
    found = re.fullmatch(r"([^:/]+):(\d{1,5})", address or "")
    if found:
        place = (found[1], int(found[2]))
        socket.create_connection(place, timeout=REACH_TIMEOUT_S).close()


def check_shared(key: str, place: str, is_shared: bool, remedy: str) -> None:
    """A local path means another folder on every node, unless the user says that it does not.

    Args:
        key: of the configuration or the command.
        place: its value, a path or a URI.
        is_shared: the user says that the path is the same folder on every node.
        remedy: besides a bucket.
    Raises: ConfigError on a cluster of several nodes.
    """
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    if len(nodes) > 1 and scheme_of(place).is_local and not is_shared:
        raise ConfigError(
            f"{key}: {place} is a local path and the cluster has {len(nodes)} nodes; use a bucket,"
            f" or {remedy}"
        )


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
