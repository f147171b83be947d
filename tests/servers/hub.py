"""The part of the Hub's HTTP API that huggingface_hub 2.4 uses to publish a model, over plain LFS (no Xet).

whoami, repository and branch creation, model info, paths info, preupload, LFS batch with uploads in one part or several, verify, validate-yaml, commit.
It refuses what the Hub refuses: an unknown token, an object whose size or SHA-256 is not what its name says, a commit that names an object it does not
have, a commit on another parent. Objects lie in a folder; everything else is in this process, behind one lock.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_ThisIsTheOnlySecretThatTheServerKnows"
LARGE = 10 * 2**20  # files from here on go to LFS whatever their name; so do .safetensors


@dataclass
class Repo:
    """A repository: commits are (id, message, files), a file is {"oid": SHA-256, "size"} of an object or {"content": bytes}."""

    private: bool
    branches: dict[str, list[tuple[str, str, dict[str, dict[str, Any]]]]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, dict[str, Any]]) -> str:
        commits = self.branches[branch]
        oid = hashlib.sha1(f"{branch} {len(commits)} {message} {id(self)}".encode()).hexdigest()
        commits.append((oid, message, (commits[-1][2] if commits else {}) | files))
        return oid


class Hub:
    """The server. `received`: bytes of object content by SHA-256, all attempts. `requests`: count by "METHOD /path". `on`: called in the middle of things."""

    def __init__(self, folder: Path, part_bytes: int = 1_000_000) -> None:
        """Args: part_bytes: objects larger than this are taken in parts of this size."""
        self.folder, self.part_bytes = folder, part_bytes
        folder.mkdir(parents=True)
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.received: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.on: dict[str, Callable[["Handler"], None]] = {}  # "object", "files", "commit", "committed"
        self.role = "write"
        self.server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def happen(self, event: str, handler: "Handler") -> None:
        if callback := self.on.get(event):
            callback(handler)

    def object(self, oid: str) -> Path:
        return self.folder / oid

    def commits(self, repo: str, branch: str = "main") -> list[str]:
        """Messages, oldest first; the first is that of the repository's creation."""
        return [message for _, message, _ in self.repos[repo].branches[branch]]

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What a download would bring."""
        last = self.repos[repo].branches[branch][-1][2]
        return {
            name: file.get("content", b"") if "oid" not in file else self.object(file["oid"]).read_bytes() for name, file in last.items()
        }


class LostConnectionError(Exception):
    """Raised by a callback: the request ends here, without an answer."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are what the tests are about."""


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def described(name: str, file: dict[str, Any]) -> dict[str, Any]:
    """A file as paths-info tells it."""
    if "oid" not in file:
        return {"type": "file", "path": name, "size": len(file["content"]), "oid": blob_id(file["content"])}
    pointer = f"oid sha256:{file['oid']}\nsize {file['size']}\n".encode()
    lfs = {"oid": file["oid"], "size": file["size"], "pointerSize": len(pointer)}
    return {"type": "file", "path": name, "size": file["size"], "oid": blob_id(pointer), "lfs": lfs}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # an answer in one packet; in two, the second waits 40 ms for the first one's acknowledgement

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        data = json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.answer(404, {"error": code}, X_Error_Code=code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def handle_request(self) -> None:
        path = self.path.partition("?")[0]
        with self.hub.lock:
            self.hub.requests[f"{self.command} {path}"] += 1
        for pattern, needs_token, action in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.body()
                    self.answer(401, {"error": "Invalid credentials in Authorization header"})
                    return
                action(self, *map(unquote, found.groups()))
                return
        self.body()
        self.answer(404, {"error": f"no such route: {self.command} {path}"})

    do_GET = do_POST = do_PUT = handle_request

    def whoami(self) -> None:
        self.answer(200, {"type": "user", "name": "owner", "auth": {"accessToken": {"role": self.hub.role}}})

    def create_repo(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked['organization']}/{asked['name']}"
        with self.hub.lock:
            is_there = name in self.hub.repos
            if not is_there:
                repo = self.hub.repos[name] = Repo(asked.get("visibility") == "private", {"main": []})
                repo.commit(
                    "main", "initial commit", {".gitattributes": {"content": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}}
                )
        self.answer(409 if is_there else 200, {"url": f"{self.hub.url}/{name}"})

    def create_branch(self, name: str, branch: str) -> None:
        self.body()
        with self.hub.lock:
            branches = self.hub.repos[name].branches
            is_there = branch in branches
            branches.setdefault(branch, list(branches["main"]))
        self.answer(409 if is_there else 200)

    def branch(self, name: str, branch: str) -> list[Any] | None:
        """Its commits; None, after the answer, where there is none."""
        repo = self.hub.repos.get(name)
        if repo is None or branch not in repo.branches:
            self.missing("RepoNotFound" if repo is None else "RevisionNotFound")
            return None
        return repo.branches[branch]

    def info(self, name: str, branch: str = "main") -> None:
        if commits := self.branch(name, branch):
            self.answer(200, {"id": name, "sha": commits[-1][0], "private": self.hub.repos[name].private})

    def paths_info(self, name: str, branch: str) -> None:
        asked = [unquote(pair.partition("=")[2].replace("+", " ")) for pair in self.body().decode().split("&") if pair.startswith("paths=")]
        if commits := self.branch(name, branch):
            files = commits[-1][2]
            self.answer(200, [described(p, files[p]) for p in asked if p in files])

    def preupload(self, name: str, branch: str) -> None:
        asked = json.loads(self.body())["files"]
        if (commits := self.branch(name, branch)) is None:
            return
        if not any(file["path"].endswith(".safetensors") for file in asked):
            self.hub.happen("files", self)
        held = commits[-1][2]
        answers = []
        for file in asked:
            is_large = file["path"].endswith(".safetensors") or file["size"] >= LARGE
            there = held.get(file["path"])
            oid = there and (there["oid"] if "oid" in there else blob_id(there["content"]))
            answers.append({"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def lfs_batch(self, name: str) -> None:
        objects = []
        for o in json.loads(self.body())["objects"]:
            if not self.hub.object(o["oid"]).exists():
                base = f"{self.hub.url}/lfs/{o['oid']}/{o['size']}"
                upload: dict[str, Any] = {"href": base}
                if o["size"] > self.hub.part_bytes:
                    count = -(-o["size"] // self.hub.part_bytes)
                    parts = {f"{i:05d}": f"{base}/{i}" for i in range(1, count + 1)}
                    upload = {"href": f"{base}/complete", "header": {"chunk_size": str(self.hub.part_bytes), **parts}}
                o["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            objects.append(o)
        self.answer(200, {"objects": objects, "transfer": "basic"})

    def put_object(self, oid: str, size: str) -> None:
        self.keep(oid, int(size), self.receive(oid))

    def receive(self, oid: str) -> bytes:
        data = self.body()
        with self.hub.lock:
            self.hub.received[oid] += len(data)
        return data

    def keep(self, oid: str, size: int, data: bytes) -> None:
        if len(data) != size or hashlib.sha256(data).hexdigest() != oid:
            self.answer(400, {"error": f"expected {size} bytes of SHA-256 {oid}, received {len(data)}"})
            return
        temp = self.hub.folder / f".{oid}-{threading.get_ident()}"
        temp.write_bytes(data)
        temp.replace(self.hub.object(oid))
        self.hub.happen("object", self)
        self.answer(200)

    def put_part(self, oid: str, size: str, number: str) -> None:
        data = self.receive(oid)
        etag = hashlib.md5(data).hexdigest()
        (self.hub.folder / f".{oid}.{number}.{etag}").write_bytes(data)
        self.answer(200, ETag=etag)

    def complete(self, oid: str, size: str) -> None:
        parts = json.loads(self.body())["parts"]
        files = [self.hub.folder / f".{oid}.{p['partNumber']}.{p['etag']}" for p in parts]
        self.keep(oid, int(size), b"".join(f.read_bytes() for f in files if f.exists()))

    def verify(self, oid: str, size: str) -> None:
        asked = json.loads(self.body())
        held = self.hub.object(oid)
        is_good = held.exists() and asked == {"oid": oid, "size": held.stat().st_size}
        self.answer(200 if is_good else 400)

    def validate_yaml(self) -> None:
        """A card needs front matter, and a task that there is."""
        card = json.loads(self.body())["content"]
        is_good = card.startswith("---\n") and "no-such-task" not in card
        self.answer(200 if is_good else 400, {"errors": [] if is_good else [{"message": "pipeline_tag: no such task"}], "warnings": []})

    def commit(self, name: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        head, files = lines[0]["value"], {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = {"content": base64.b64decode(value["content"])}
                continue
            held = self.hub.object(value["oid"])
            if not held.exists() or held.stat().st_size != value["size"]:
                self.answer(400, {"error": f"{value['path']}: no object {value['oid']} of {value['size']} bytes"})
                return
            files[value["path"]] = {"oid": value["oid"], "size": value["size"]}
        self.hub.happen("commit", self)
        with self.hub.lock:
            repo = self.hub.repos[name]
            is_stale = head.get("parentCommit") not in (None, repo.branches[branch][-1][0])
            oid = "" if is_stale else repo.commit(branch, head["summary"], files)
        if is_stale:
            self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        self.hub.happen("committed", self)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})


NAME, ONE, OBJECT = r"([^/]+/[^/]+)", r"([^/]+)", r"/lfs/([0-9a-f]{64})/(\d+)"
ROUTES: list[tuple[str, bool, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", True, Handler.whoami),
    (r"POST /api/repos/create", True, Handler.create_repo),
    (rf"POST /api/models/{NAME}/branch/{ONE}", True, Handler.create_branch),
    (rf"GET /api/models/{NAME}", True, Handler.info),
    (rf"GET /api/models/{NAME}/revision/{ONE}", True, Handler.info),
    (rf"POST /api/models/{NAME}/paths-info/{ONE}", True, Handler.paths_info),
    (rf"POST /api/models/{NAME}/preupload/{ONE}", True, Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", True, Handler.lfs_batch),
    (rf"PUT {OBJECT}", False, Handler.put_object),  # as at the Hub, where these are presigned
    (rf"PUT {OBJECT}/(\d+)", False, Handler.put_part),
    (rf"POST {OBJECT}/complete", False, Handler.complete),
    (rf"POST {OBJECT}/verify", True, Handler.verify),
    (r"POST /api/validate-yaml", False, Handler.validate_yaml),
    (rf"POST /api/models/{NAME}/commit/{ONE}", True, Handler.commit),
]
