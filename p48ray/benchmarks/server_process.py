"""An OpenAI-compatible server as a process of this machine, and the few questions that are put to
any such server.

The server gets a process group of its own, which is ended as a whole, also where this process dies
without doing so (process_group): a server of a large model is many processes, and one that stays
keeps its GPUs.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from p48ray.errors import ConfigError

LOG_TAIL_BYTES = 4000
ASK_TIMEOUT_S = 10.0
END_TIMEOUT_S = 30.0
SHOWN_LINES = 20
"""Of what a process printed last, in an error."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """`code`: exit code, None while it lives. `last_lines`: the end of what it has printed."""

    is_healthy: bool
    code: int | None
    last_lines: str


class ServerProcess:
    """A server from its start to its end.

    Args:
        command: without --host and --port, which are added.
        host: the address to listen on; the port is a free one.
    Raises: ConfigError when the command can not be started.
    """

    def __init__(self, command: Sequence[str], host: str = "127.0.0.1") -> None:
        self.url = f"http://{host}:{free_port(host)}"
        self.log = tempfile.NamedTemporaryFile(prefix="p48ray-server-", suffix=".log")  # noqa: SIM115 (lives as long as the server)
        full = [*command, "--host", host, "--port", self.url.rpartition(":")[2]]
        if shutil.which(command[0]) is None:
            raise ConfigError(
                f"benchmarks.server.command: {command[0]!r} can not be started: no such program on"
                f" {socket.gethostname()}"
            )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "p48ray.benchmarks.process_group", *full],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def where(self) -> str:
        return self.url

    def state(self) -> ServerState:
        code = self.process.poll()
        is_healthy = code is None and answers(f"{self.url}/health")
        return ServerState(is_healthy, code, self.last_lines())

    def last_lines(self) -> str:
        return tail(self.log.name)

    def end(self) -> None:
        """Ask the whole group to end; what has not done so in time is killed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal_group(self.process.pid, number)
            deadline = time.monotonic() + END_TIMEOUT_S
            while time.monotonic() < deadline and (
                self.process.poll() is None or signal_group(self.process.pid, 0)
            ):
                time.sleep(0.1)
            if self.process.poll() is not None and not signal_group(self.process.pid, 0):
                return


def tail(path: str) -> str:
    """The end of a log; a progress bar's states are lines of their own."""
    with open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - LOG_TAIL_BYTES))
        return log.read().decode("utf-8", "replace").replace("\r", "\n").strip()


def signal_group(pid: int, number: int) -> bool:
    """Whether there was still anyone in the group."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    return True


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=ASK_TIMEOUT_S) as reply:
            return bool(reply.status == 200)
    except OSError:  # urllib's errors among them
        return False


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as a server names it. `id`: for requests. `root`: the place that it was loaded from,
    where the server says so."""

    id: str
    root: str | None
    max_length: int | None
    owner: str


def served_models(url: str) -> list[ServedModel]:
    """What the server at a base URL serves. Raises: ConfigError where no OpenAI-compatible server
    answers."""
    try:
        data = ask_server(f"{url}/v1/models")["data"]
        return [
            ServedModel(
                m["id"],
                m.get("root"),
                m.get("max_model_len"),
                m.get("owned_by") or "unknown server",
            )
            for m in data
        ]
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{url}/v1/models: expected the list of models of an OpenAI-compatible server, found"
            f" {error!r}"
        ) from error


def model_named(served: Sequence[ServedModel], wanted: Collection[str]) -> ServedModel | None:
    """The first of a server's models that has one of the names, or was loaded from one of them."""
    return next((m for m in served if m.id in wanted or m.root in wanted), None)


def server_version(url: str, model: ServedModel) -> str:
    """Name and version, as far as the server tells."""
    try:
        return f"{model.owner} {ask_server(f'{url}/version')['version']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{model.owner}, which gives no version"


def ask_server(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=ASK_TIMEOUT_S) as reply:
        return json.load(reply)
