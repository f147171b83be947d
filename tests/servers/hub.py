"""The part of the Hub's HTTP API that reads and publishes models and data sets, as one server.

What one client publishes another can read. Published by huggingface_hub 2.4 over plain LFS (no
Xet): whoami, repositories and branches, preupload, LFS batch with uploads in one part or several,
verify, validate-yaml, commit. Read: revisions, listings in pages, and files by `resolve`.

    hub           Hub, what tests hold and set; the fixture
    hub_front     the answers about repositories
    hub_requests  one request from arrival to answer, and the host where objects lie
    hub_repos     repositories, commits, files

As at the Hub, large files are answered with a redirect to another host, and are uploaded there.
Its addresses are signed and want no token. It has a port of its own because huggingface_hub keeps
its token, and follows redirects for a file's metadata, as long as it stays on the same origin.
"""

import hashlib
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from p48ray.store import retry
from tests.jobs.command import narrow_model
from tests.servers.hub_front import Front
from tests.servers.hub_repos import File, Repo, is_large
from tests.servers.hub_requests import TOKEN, Handler, LostConnectionError, Server, Storage

__all__ = [
    "EDGE_BYTES",
    "MODEL",
    "TOKEN",
    "Fault",
    "Handler",
    "Hub",
    "LostConnectionError",
    "hub",
    "tiny_files",
]

MODEL = "owner/tiny"
EDGE_BYTES = 300_000
"""More than a plan reads of a shard: its header and both ends. Less than the narrow model's."""


@dataclass
class Fault:
    """What happens to the next request whose "METHOD path" matches ("OBJECT path": a download from
    the other host); `is_whole`: and that asks for no range.

    `status`: the answer, with `headers`. `cut`: bytes of the body after which the connection ends;
    `flip`: byte to change.
    """

    pattern: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    flip: int | None = None
    is_whole: bool = False


class Hub:
    """The server. It is told to go wrong in two ways, and neither can do what the other does.

    `faults` are data, each for one request, in order: a wrong answer instead of the right one.
    `on` are calls in the middle of a request that goes well ("object": one is kept; "files": small
    files are asked about; "commit": it is about to be made; "committed": it is made, and nobody
    knows): what the test does there, a kill or another commit, happens between the two halves.

    What it saw: `requests`, counted by "METHOD path"; `received`, bytes of objects by SHA-256, all
    attempts; `sent`, bytes of files by path; `ranges`, in order; `leaked`, tokens that reached the
    storage host. `pace`: seconds before each piece of a large file. `role`: the token's.

    Repositories are named as in the Hub's own addresses: owner/name, datasets/owner/name.
    """

    def __init__(self, folder: Path, part_bytes: int = 1_000_000) -> None:
        """Args: folder: for objects. part_bytes: larger ones are uploaded in parts of this size."""
        self.folder, self.part_bytes = folder, part_bytes
        folder.mkdir(parents=True)
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.requests: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.ranges: list[tuple[str, str | None]] = []
        self.leaked: list[str] = []
        self.faults: deque[Fault] = deque()
        self.on: dict[str, Callable[[Handler], None]] = {}
        self.pace = 0.0
        self.role = "write"
        self.front, self.storage = (self.started(kind) for kind in (Front, Storage))
        self.url = f"http://127.0.0.1:{self.front.server_port}"
        self.storage_url = f"http://127.0.0.1:{self.storage.server_port}"

    def started(self, kind: type[Handler]) -> Server:
        server = Server(("127.0.0.1", 0), type("Bound", (kind,), {"hub": self}))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self) -> None:
        for server in (self.front, self.storage):
            server.shutdown()
            server.server_close()

    def happen(self, event: str, handler: Handler) -> None:
        if callback := self.on.get(event):
            callback(handler)

    def take_fault(self, request: str, asked: str | None) -> Fault | None:
        """Count a request, and take the first fault meant for it. Args: asked: its range."""
        with self.lock:
            self.requests[request] += 1
            for fault in self.faults:
                if re.fullmatch(fault.pattern, request) and not (fault.is_whole and asked):
                    self.faults.remove(fault)
                    return fault
            return None

    def object(self, oid: str) -> Path:
        return self.folder / oid

    def commit(
        self,
        name: str,
        files: dict[str, bytes],
        branch: str = "main",
        message: str = "by hand",
        **settings: bool,
    ) -> str:
        """A commit that holds these files and no others, by no client. Returns its id.

        Args:
            settings: is_private, is_gated, of a repository that is not there yet.
        """
        with self.lock:
            repo = self.repos.setdefault(name, Repo(**settings))
            held = {path: self.kept(path, data) for path, data in files.items()}
            return repo.commit(branch, message, held).id

    def kept(self, path: str, data: bytes) -> File:
        if not is_large(path, len(data)):
            return File(len(data), content=data)
        oid = hashlib.sha256(data).hexdigest()
        if not self.object(oid).exists():
            self.object(oid).write_bytes(data)
        return File(len(data), oid)

    def commits(self, name: str, branch: str = "main") -> list[str]:
        """Messages, oldest first; the first is that of the repository's creation."""
        return [commit.message for commit in self.repos[name].branches[branch]]

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a download would bring."""
        return {
            path: self.object(file.sha256).read_bytes() if file.sha256 else file.content
            for path, file in self.repos[name].branches[branch][-1].files.items()
        }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Empty. Waits between attempts are short, and no token is at hand.

    Shards of the small model go up in one part or in two: the limit lies between their sizes.
    """
    server = Hub(tmp_path / "hub", part_bytes=300_000)
    resolve = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": resolve,  # made of ENDPOINT when the module was imported
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_TOKEN_PATH": str(tmp_path / "no-login"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(retry, "HUB", replace(retry.HUB, base_s=0.002))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


def tiny_files() -> dict[str, bytes]:
    """The narrow model as a repository, with what repositories have besides."""
    paths = sorted(narrow_model().iterdir())
    files = {path.name: path.read_bytes() for path in paths if path.suffix != ".jsonl"}
    more = {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "original/model.safetensors": b"another form",
        "figures/logo.png": b"\x89PNG",
        "pytorch_model.bin": b"another form too",
    }
    return files | more
