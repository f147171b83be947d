"""The part of the Hub's HTTP API that reads a repository: revisions, tree listing in pages, and files by `resolve`, with or without a range.

As at the Hub, large files (here .safetensors, .parquet) are answered with a redirect to another server, whose address is signed and which wants no token:
this one notes a token that reaches it. Faults are put in a queue and come up in order.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

from p48ray.store import retry
from tests.jobs.command import narrow_model
from tests.servers.hub import TOKEN, Server, described

LARGE = (".safetensors", ".parquet", ".tiktoken")
PAGE = 4  # entries of a listing at once


@dataclass
class Repo:
    """Files by commit, and where the branches stand."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    is_private: bool = False
    is_gated: bool = False


@dataclass
class Fault:
    """What happens to the next request whose "METHOD path" matches; `is_whole`: and that asks for no range.

    `cut`: bytes of the body after which the connection ends; `flip`: byte to change.
    """

    pattern: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    flip: int | None = None
    is_whole: bool = False


class ReadHub:
    """The server. `sent`: bytes of file content by path; `requests`: by "METHOD path"; `pace`: seconds before each piece of a large file."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.ranges: list[tuple[str, str | None]] = []
        self.leaked: list[str] = []
        self.faults: deque[Fault] = deque()
        self.pace = 0.0
        self.lock = threading.Lock()
        self.front, self.store = (Server(("127.0.0.1", 0), type("Bound", (kind,), {"hub": self})) for kind in (Front, Objects))
        for server in (self.front, self.store):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.front.server_port}"

    def close(self) -> None:
        for server in (self.front, self.store):
            server.shutdown()
            server.server_close()

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main", **settings: bool) -> str:
        """A commit with these files on a branch. Args: name: models/owner/name or datasets/owner/name. Returns its id."""
        repo = self.repos.setdefault(name, Repo(**settings))
        commit = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.branches[branch] = commit
        return commit

    def take_fault(self, request: str, asked: str | None) -> Fault | None:
        with self.lock:
            self.requests[request] += 1
            found = next((f for f in self.faults if re.fullmatch(f.pattern, request) and not (f.is_whole and asked)), None)
            if found is not None:
                self.faults.remove(found)
            return found


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


def entry(name: str, data: bytes) -> dict[str, Any]:
    """A file as a tree listing tells it."""
    return described(name, {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)} if is_large(name) else {"content": data})


class Answering(BaseHTTPRequestHandler):
    """What both servers share."""

    hub: ReadHub
    server: ThreadingHTTPServer
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        data = json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def missing(self, code: str, status: int = 404) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def give(self, path: str, data: bytes, fault: Fault | None) -> None:
        """A file, or the range that was asked for."""
        asked = self.headers.get("Range")
        with self.hub.lock:
            self.hub.ranges.append((path, asked))
        first, last = 0, len(data) - 1
        if asked and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
            first, last = int(found[1]), min(last, int(found[2] or last))
        if fault and fault.flip is not None:
            data = data[: fault.flip] + bytes([data[fault.flip] ^ 1]) + data[fault.flip + 1 :]
        body = data[first : last + 1]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), 2**16):
            piece = body[start : start + 2**16]
            if fault and fault.cut is not None and start + len(piece) > fault.cut:
                self.wfile.write(piece[: max(0, fault.cut - start)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            if self.hub.pace and is_large(path):
                time.sleep(self.hub.pace)
            self.wfile.write(piece)
            with self.hub.lock:
                self.hub.sent[path] += len(piece)


class Front(Answering):
    """The Hub itself. Of what writes it only has the faults."""

    def do_POST(self) -> None:
        fault = self.hub.take_fault(f"POST {urlsplit(self.path).path}", None)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(fault.status if fault and fault.status else 404, {"error": "a fault"}, **(fault.headers if fault else {}))

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        path = split.path
        fault = self.hub.take_fault(f"GET {path}", self.headers.get("Range"))
        if fault and fault.status:
            self.answer(fault.status, {"error": "a fault"}, **fault.headers)
            return
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path)
        if found:
            kind, name, what, revision, folder = found.groups()
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            kind, name, what, revision, folder = "datasets" if found[1] else "models", found[2], "resolve", found[3], found[4]
        else:
            self.answer(404, {"error": f"no such route: {path}"})
            return
        files = self.files(f"{kind}/{name}", unquote(revision or "main"))
        if files is None:
            return
        commit, held = files
        if what == "tree":
            self.tree(held, unquote(folder or ""), parse_qs(split.query))
        elif what == "resolve":
            self.resolve(unquote(folder), held, fault)
        else:
            self.answer(200, {"id": name, "sha": commit, "siblings": []})

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit's; None, after the answer, where there is none or it may not be read."""
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            self.answer(
                401, {"error": "Invalid credentials in Authorization header"}, X_Error_Message="Invalid credentials in Authorization header"
            )
        elif repo is None or (repo.is_private and not token):
            self.missing("RepoNotFound", 404 if token else 401)
        elif repo.is_gated:
            self.missing("GatedRepo", 403)
        elif (commit := repo.branches.get(revision, revision)) not in repo.commits:
            self.missing("RevisionNotFound")
        else:
            return commit, repo.commits[commit]
        return None

    def tree(self, held: dict[str, bytes], folder: str, query: dict[str, list[str]]) -> None:
        inside = sorted(n for n in held if not folder or n.startswith(f"{folder}/"))
        if not inside:
            self.missing("EntryNotFound")
            return
        folders = sorted({n.rpartition("/")[0] for n in inside} - {"", folder})
        entries = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders] + [entry(n, held[n]) for n in inside]
        at = int(query.get("cursor", ["0"])[0])
        more = {}
        if at + PAGE < len(entries):
            more = {"Link": f'<{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={at + PAGE}>; rel="next"'}
        self.answer(200, entries[at : at + PAGE], **more)

    def resolve(self, path: str, held: dict[str, bytes], fault: Fault | None) -> None:
        if path not in held:
            self.missing("EntryNotFound")
        elif is_large(path):
            digest = hashlib.sha256(held[path]).hexdigest()
            self.answer(302, None, Location=f"http://127.0.0.1:{self.hub.store.server_port}/{digest}/{path}?signature=secret-for-an-hour")
        else:
            self.give(path, held[path], fault)


class Objects(Answering):
    """Where large files lie."""

    def do_GET(self) -> None:
        digest, _, path = urlsplit(self.path).path.lstrip("/").partition("/")
        if token := self.headers.get("Authorization"):
            self.hub.leaked.append(token)
        fault = self.hub.take_fault(f"OBJECT {path}", self.headers.get("Range"))
        if fault and fault.status:
            self.answer(fault.status, None, **fault.headers)
            return
        every = (
            data for repo in self.hub.repos.values() for files in repo.commits.values() for n, data in files.items() if n == unquote(path)
        )
        self.give(unquote(path), next(data for data in every if hashlib.sha256(data).hexdigest() == digest), fault)


MODEL = "models/owner/tiny"
EDGE_BYTES = 300_000
"""More than a plan reads of a shard: its header and both ends. Less than a shard of the narrow model."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReadHub]:
    """Empty. Waits between attempts are short, and no token is at hand."""
    server = ReadHub()
    settings = {
        "ENDPOINT": server.url,
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
    files = {p.name: p.read_bytes() for p in sorted(narrow_model().iterdir()) if p.suffix != ".jsonl"}
    more = {".gitattributes": b"*.safetensors filter=lfs\n", "original/model.safetensors": b"another form", "figures/logo.png": b"\x89PNG"}
    return files | more | {"pytorch_model.bin": b"another form too"}
