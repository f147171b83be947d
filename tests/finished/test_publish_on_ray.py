"""jobs/publish.py as a process with a Ray of its own, and what is left of it when it is killed."""

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.finished.publish_command import (
    REPO_NAME,
    checkpoint_files,
    files_with,
    invoke_publish,
    launch_publish,
    published,
)
from tests.servers.hub import TOKEN, Handler, Hub, LostConnectionError

pytestmark = pytest.mark.ray

TIMEOUT_S = 120
SURVIVORS_TIMEOUT_S = 90
"""Ray's agents notice by a few slow looks in a row that their node is gone: 20 s were too few on a
busy machine."""
TASK = "ray::upload_and_record"


@dataclass
class Publishing:
    """The command on one run root, again and again. `said`: all that it has printed."""

    root: Path
    hub: Hub
    env: dict[str, str]
    process: subprocess.Popen[str] | None = None
    said: list[str] = field(default_factory=list)

    def run(self) -> int:
        """To its end, or to where something kills it. Nothing of it may be left afterwards."""
        self.process = launch_publish(self.root, self.hub, "--workers", "2", env=self.env)
        self.said += self.process.communicate(timeout=TIMEOUT_S)
        deadline = time.monotonic() + SURVIVORS_TIMEOUT_S
        while self.survivors():
            assert time.monotonic() < deadline, self.survivors()
            time.sleep(0.1)
        return self.process.returncode

    def survivors(self) -> list[str]:
        """Processes of this run's Ray, by the folder that they all name."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if (
                    process.environ().get("RAY_TMPDIR") == self.env["RAY_TMPDIR"]
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(f"{process.pid} {process.cmdline()[:2]}")
        return found

    def kill(self, handler: Handler) -> None:
        """kill -9 of the driver; the request in which it happens gets no answer."""
        assert self.process
        os.kill(self.process.pid, signal.SIGKILL)
        self.hub.on.clear()
        raise LostConnectionError

    def kill_worker(self, handler: Handler) -> None:
        """kill -9 of every worker that is uploading."""
        assert self.process
        self.hub.on.pop("object")
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.cmdline()[:1] == [TASK]:
                    child.kill()


@pytest.fixture
def publishing(root: Path, hub: Hub) -> Iterator[Publishing]:
    # short, because Ray keeps sockets there
    temp = Path(tempfile.mkdtemp(prefix="p48pub-", dir="/tmp"))
    (temp / "staging").mkdir()
    yield Publishing(
        root,
        hub,
        {"RAY_TMPDIR": str(temp), "TMPDIR": str(temp / "staging"), "HF_HOME": str(temp / "hf")},
    )
    shutil.rmtree(temp, ignore_errors=True)


def test_folder_without_a_run_root_is_published_by_workers(publishing: Publishing) -> None:
    folder, hub = publishing.root / "checkpoint", publishing.hub
    process = launch_publish(None, hub, "--checkpoint", str(folder), env=publishing.env)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, (out, err)
    assert published(hub) == checkpoint_files(publishing.root)
    assert not (publishing.root / "publish").exists()


def test_killed_again_and_again_it_ends_with_one_commit_and_nothing_sent_twice(
    publishing: Publishing,
) -> None:
    root, hub = publishing.root, publishing.hub
    temp = Path(publishing.env["RAY_TMPDIR"])
    sizes = {
        hashlib.sha256(p.read_bytes()).hexdigest(): p.stat().st_size
        for p in (root / "checkpoint").glob("*.safetensors")
    }

    hub.on["object"] = publishing.kill  # the Hub has the first shard, nobody knows of it
    assert publishing.run() == -signal.SIGKILL
    assert 1 <= sum(hub.object(oid).exists() for oid in sizes) <= 2  # two workers

    hub.on |= {
        "object": publishing.kill_worker,
        "files": publishing.kill,
    }  # a worker dies, another takes its shard; then all is sent, nothing committed
    assert publishing.run() == -signal.SIGKILL
    assert all(hub.object(oid).exists() for oid in sizes)
    assert len(list((root / "publish").rglob("*.json"))) == 6 and len(hub.commits(REPO_NAME)) == 1
    received = dict(hub.received)
    assert (
        sum(received[oid] > size for oid, size in sizes.items()) <= 3
    )  # only what was on its way: one other at the first kill, two at the second
    assert "attempt 1 failed, it will be tried again" in "".join(publishing.said)

    hub.on["commit"] = publishing.kill  # the commit has arrived and is not made
    assert publishing.run() == -signal.SIGKILL
    assert len(hub.commits(REPO_NAME)) == 1

    hub.on["committed"] = publishing.kill  # the commit is made, and nobody hears of it
    assert publishing.run() == -signal.SIGKILL
    assert len(hub.commits(REPO_NAME)) == 2

    last = invoke_publish(root, hub)  # all is there, so no Ray is needed
    assert last.code == 0, last
    assert len(hub.commits(REPO_NAME)) == 2
    assert published(hub) == checkpoint_files(root)
    assert hub.received == received  # nothing was sent after the second kill
    assert list((temp / "staging").iterdir()) == []
    assert TOKEN not in "".join(publishing.said) + last.out + last.err
    # Ray's logs among them
    assert files_with(TOKEN, temp, root) == [] and list(temp.glob("ray/session_*/logs/*"))
