"""What the tests' Hub answers about repositories: to whoever reads them, and to whoever publishes.

It refuses what the Hub refuses: an unknown token, an object whose size or SHA-256 is not what its
name says, a commit that names an object it does not have, a commit on another parent.
"""

import base64
import json
from typing import Any
from urllib.parse import parse_qs, quote

from tests.servers.hub_repos import Commit, File, Repo, is_large
from tests.servers.hub_requests import Handler, keep

PAGE = 4
"""Entries of a listing at once."""
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Front(Handler):
    """The Hub itself."""

    def commit_at(self, name: str, revision: str) -> Commit | None:
        """None, after the answer, where there is none or it may not be read."""
        repo = self.hub.repos.get(name)
        has_token = "Authorization" in self.headers
        if repo is None or (repo.is_private and not has_token):
            self.missing("RepoNotFound", 404 if has_token else 401)
        elif repo.is_gated:
            self.missing("GatedRepo", 403)
        elif (commit := repo.find(revision)) is None:
            self.missing("RevisionNotFound")
        else:
            return commit
        return None

    # Reading.

    def info(self, name: str, revision: str = "main") -> None:
        if commit := self.commit_at(name, revision):
            siblings = [{"rfilename": path} for path in commit.files]
            found = {"id": name.removeprefix("datasets/"), "sha": commit.id, "siblings": siblings}
            self.answer(200, found | {"private": self.hub.repos[name].is_private})

    def paths_info(self, name: str, revision: str) -> None:
        asked = parse_qs(self.body().decode()).get("paths", [])
        if commit := self.commit_at(name, revision):
            self.answer(200, [commit.files[p].listed(p) for p in asked if p in commit.files])

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        """Every file under a folder, and the folders between, in pages."""
        if (commit := self.commit_at(name, revision)) is None:
            return
        inside = sorted(p for p in commit.files if not folder or p.startswith(f"{folder}/"))
        if not inside:
            self.missing("EntryNotFound")
            return
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            for path in sorted({p.rpartition("/")[0] for p in inside} - {"", folder})
        ]
        entries += [commit.files[path].listed(path) for path in inside]
        path, _, query = self.path.partition("?")
        at = int(parse_qs(query).get("cursor", ["0"])[0])
        more = {}
        if at + PAGE < len(entries):
            following = f"{self.hub.url}{path}?recursive=true&cursor={at + PAGE}"
            more = {"Link": f'<{following}>; rel="next"'}
        self.answer(200, entries[at : at + PAGE], **more)

    def resolve(self, name: str, revision: str, path: str) -> None:
        """The file, or where its object lies. The headers are what hf_hub_download takes it by."""
        if (commit := self.commit_at(name, revision)) is None:
            return
        file = commit.files.get(path)
        if file is None:
            self.missing("EntryNotFound", X_Repo_Commit=commit.id)
            return
        etag = f'"{file.etag}"'
        if file.sha256 is None:
            self.give(path, file.content, X_Repo_Commit=commit.id, ETag=etag)
            return
        address = f"{self.hub.storage_url}/{file.sha256}/{quote(path)}"
        self.answer(
            302,
            Location=f"{address}?signature=secret-for-an-hour",
            X_Repo_Commit=commit.id,
            X_Linked_ETag=etag,
            X_Linked_Size=str(file.size),
        )

    # Publishing.

    def whoami(self) -> None:
        auth = {"accessToken": {"role": self.hub.role}}
        self.answer(200, {"type": "user", "name": "owner", "auth": auth})

    def create_repo(self) -> None:
        """A model's: nobody here publishes a data set."""
        asked = json.loads(self.body())
        name = f"{asked['organization']}/{asked['name']}"
        with self.hub.lock:
            is_there = name in self.hub.repos
            if not is_there:
                repo = self.hub.repos[name] = Repo(asked.get("visibility") == "private")
                file = File(len(GIT_ATTRIBUTES), content=GIT_ATTRIBUTES)
                repo.commit("main", "initial commit", {".gitattributes": file})
        self.answer(409 if is_there else 200, {"url": f"{self.hub.url}/{name}"})

    def create_branch(self, name: str, branch: str) -> None:
        self.body()
        with self.hub.lock:
            branches = self.hub.repos[name].branches
            is_there = branch in branches
            branches.setdefault(branch, list(branches["main"]))
        self.answer(409 if is_there else 200)

    def validate_yaml(self) -> None:
        """A card needs front matter, and a task that there is."""
        card = json.loads(self.body())["content"]
        is_good = card.startswith("---\n") and "no-such-task" not in card
        errors = [] if is_good else [{"message": "pipeline_tag: no such task"}]
        self.answer(200 if is_good else 400, {"errors": errors, "warnings": []})

    def preupload(self, name: str, branch: str) -> None:
        asked = json.loads(self.body())["files"]
        if (commit := self.commit_at(name, branch)) is None:
            return
        if not any(file["path"].endswith(".safetensors") for file in asked):
            self.hub.happen("files", self)
        answers = []
        for path, size in ((file["path"], file["size"]) for file in asked):
            held = commit.files.get(path)
            mode = "lfs" if is_large(path, size) else "regular"
            oid = held.etag if held else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def lfs_batch(self, name: str) -> None:
        objects = json.loads(self.body())["objects"]
        for o in objects:
            if not self.hub.object(o["oid"]).exists():
                path = f"/lfs/{o['oid']}/{o['size']}"
                upload: dict[str, Any] = {"href": f"{self.hub.storage_url}{path}"}
                if o["size"] > self.hub.part_bytes:
                    count = -(-o["size"] // self.hub.part_bytes)
                    parts = {f"{i:05d}": f"{upload['href']}/{i}" for i in range(1, count + 1)}
                    header = {"chunk_size": str(self.hub.part_bytes), **parts}
                    upload = {"href": f"{self.hub.url}{path}/complete", "header": header}
                verify = {"href": f"{self.hub.url}{path}/verify"}
                o["actions"] = {"upload": upload, "verify": verify}
        self.answer(200, {"objects": objects, "transfer": "basic"})

    def complete(self, oid: str, size: str) -> None:
        parts = json.loads(self.body())["parts"]
        files = [self.hub.folder / f".{oid}.{p['partNumber']}.{p['etag']}" for p in parts]
        keep(self, oid, int(size), b"".join(f.read_bytes() for f in files if f.exists()))

    def verify(self, oid: str, size: str) -> None:
        asked = json.loads(self.body())
        held = self.hub.object(oid)
        is_good = held.exists() and asked == {"oid": oid, "size": held.stat().st_size}
        self.answer(200 if is_good else 400)

    def commit(self, name: str, branch: str) -> None:
        """Adds files to a branch, and deletes others, which have to be there."""
        lines = [json.loads(line) for line in self.body().splitlines()]
        head, files, gone = lines[0]["value"], {}, set()
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                gone.add(value["path"])
                continue
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(len(content), content=content)
                continue
            held = self.hub.object(value["oid"])
            if not held.exists() or held.stat().st_size != value["size"]:
                said = f"{value['path']}: no object {value['oid']} of {value['size']} bytes"
                self.answer(400, {"error": said})
                return
            files[value["path"]] = File(value["size"], value["oid"])
        self.hub.happen("commit", self)
        with self.hub.lock:
            repo = self.hub.repos[name]
            last = repo.branches[branch][-1]
            is_stale = head.get("parentCommit") not in (None, last.id)
            strange = sorted(gone - last.files.keys())
            if not is_stale and not strange:
                kept = {path: f for path, f in last.files.items() if path not in gone}
                oid = repo.commit(branch, head["summary"], {**kept, **files}).id
        if is_stale:
            said = "A commit has happened since. Please refresh and try again."
            self.answer(412, {"error": said})
            return
        if strange:
            self.answer(404, {"error": f"{strange[0]}: A file with this name doesn't exist"})
            return
        self.hub.happen("committed", self)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self.answer(200, {"commitUrl": url, "commitOid": oid})


NAME, ONE = r"((?:datasets/)?[^/]+/[^/]+)", r"([^/]+)"
API, OBJECT = rf"/api/(?:models/|(?=datasets/)){NAME}", r"/lfs/([0-9a-f]{64})/(\d+)"
Front.routes = [
    (rf"GET {API}", False, Front.info),
    (rf"GET {API}/revision/{ONE}", False, Front.info),
    (rf"GET {API}/tree/{ONE}", False, Front.tree),
    (rf"GET {API}/tree/{ONE}/(.+)", False, Front.tree),
    (rf"POST {API}/paths-info/{ONE}", False, Front.paths_info),
    (rf"GET /{NAME}/resolve/{ONE}/(.+)", False, Front.resolve),
    (r"GET /api/whoami-v2", True, Front.whoami),
    (r"POST /api/repos/create", True, Front.create_repo),
    (r"POST /api/validate-yaml", False, Front.validate_yaml),
    (rf"POST {API}/branch/{ONE}", True, Front.create_branch),
    (rf"POST {API}/preupload/{ONE}", True, Front.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", True, Front.lfs_batch),
    (rf"POST {OBJECT}/complete", False, Front.complete),  # its address is signed, as at the Hub
    (rf"POST {OBJECT}/verify", True, Front.verify),
    (rf"POST {API}/commit/{ONE}", True, Front.commit),
]
