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
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import ray

from p48ray.errors import ConfigError, StageFailedError
from p48ray.runner.capacity import amount
from p48ray.store.open import scheme_of

log = logging.getLogger("p48ray.progress")

STARTING = "starting on this machine, which takes some seconds"
OBJECT_STORE_BYTES = 256 * 2**20
"""Of a Ray that is started here: tasks and results are kilobytes."""
MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Of the path of a Unix socket."""
SOCKET_IN_FOLDER = "/ray/session_2006-01-02_15-04-05_000000_4194304/sockets/plasma_store"
"""The longest that Ray 2.60 puts into its folder: a time and a process id are in it."""
SHORT_FOLDER = "/tmp"
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
TOKEN_NOTICE = "Token authentication is enabled"
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
        num_gpus: of a Ray of this machine; None: those that Ray finds.
    """

    def __init__(
        self,
        address: str | None,
        num_cpus: int,
        shows_logs: bool = True,
        num_gpus: int | None = None,
    ) -> None:
        self.address = address or None  # an empty RAY_ADDRESS is none
        self.num_cpus, self.num_gpus, self.shows_logs = num_cpus, num_gpus, shows_logs
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
            "num_gpus": self.num_gpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        if self.address is None:
            where |= session_folder(os.environ)
        else:
            where = {"address": self.address}
        log.info("ray       %s", f"joining {self.address}" if self.address else STARTING)
        if not sys.stdout.isatty():  # Ray colours the lines of workers in a file too
            os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        handler = signal.getsignal(signal.SIGTERM)
        start = time.monotonic()
        try:
            check_reachable(self.address)
            with nullcontext() if self.address else without_token_notice():
                ray.init(**where, log_to_driver=self.shows_logs, logging_level=logging.WARNING)
        except Exception as error:
            if self.address is None:
                raise StageFailedError(
                    f"Ray can not be started on this machine: {first_line(error)}"
                ) from error
            if not isinstance(error, OSError | ValueError | RuntimeError):
                raise
            raise ConfigError(
                "RAY_ADDRESS: expected host:port of a running Ray cluster, found "
                f"{self.address!r}: {first_line(error)}; "
                "start one with `ray start --head`, or unset RAY_ADDRESS to use this machine alone"
            ) from error
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
        log.info("ray       up after %.0f s", time.monotonic() - start)


def starts_own(address: str | None) -> bool:
    """Whether a Cluster of this address is a Ray of this machine that does not run yet."""
    return not address and not ray.is_initialized()


def session_folder(environment: Mapping[str, str]) -> dict[str, str]:
    """For ray.init: a short folder, where the one that Ray would take leaves no room for the paths
    of its sockets. Ray takes RAY_TMPDIR, then TMPDIR, then /tmp.

    Raises: ConfigError where there is no other folder.
    """
    name = next((n for n in ("RAY_TMPDIR", "TMPDIR") if n in environment), None)
    if name is None:
        return {}
    found, most = environment[name], MAX_SOCKET_BYTES - len(SOCKET_IN_FOLDER)
    num_bytes = len(os.fsencode(found))
    if os.path.isabs(found) and num_bytes <= most:
        return {}
    expected = f"expected an absolute path of at most {most} bytes, for Ray's Unix sockets"
    if not os.access(SHORT_FOLDER, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}: {expected}, found {num_bytes} bytes: {found!r}, and {SHORT_FOLDER} may not be"
            " written; set RAY_TMPDIR to a shorter folder"
        )
    log.warning(
        "ray       %s: %s, found %d bytes; its session lies under %s",
        name,
        expected,
        num_bytes,
        SHORT_FOLDER,
    )
    return {"_temp_dir": f"{SHORT_FOLDER}/ray"}


@contextmanager
def without_token_notice() -> Iterator[None]:
    """A Ray of this machine that lasts as long as the job is nobody else's to reach; that it checks
    a token is no news. That it does not check one would be."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(TOKEN_NOTICE)

    logger = logging.getLogger(TOKEN_LOGGER)
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def what_there_is() -> str:
    """A cluster's resources in words, and what of them is free."""
    return (
        f"the cluster has {amount(ray.cluster_resources())}, of which"
        f" {amount(ray.available_resources())} are free"
    )


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
