"""What the tests' Hub holds: repositories, their branches and commits, and a commit's files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LARGE_SUFFIXES = (".safetensors", ".parquet", ".tiktoken")
LARGE_BYTES = 10 * 2**20
"""Files from here on are large whatever their name."""


def is_large(path: str, size: int) -> bool:
    """Whether git LFS keeps it. The Hub goes by .gitattributes; here the usual names are enough."""
    return path.endswith(LARGE_SUFFIXES) or size >= LARGE_BYTES


def blob_id(data: bytes) -> str:
    """What git calls these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True, slots=True)
class File:
    """A large file is an object with a SHA-256; a small one has none, and holds its `content`."""

    size: int
    sha256: str | None = None
    content: bytes = b""

    @property
    def etag(self) -> str:
        return self.sha256 or blob_id(self.content)

    def listed(self, path: str) -> dict[str, Any]:
        """As a tree listing and paths-info tell it."""
        common = {"type": "file", "path": path, "size": self.size}
        if self.sha256 is None:
            return common | {"oid": blob_id(self.content)}
        version = "https://git-lfs.github.com/spec/v1"
        pointer = f"version {version}\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer)}
        return common | {"oid": blob_id(pointer), "lfs": lfs}


@dataclass(frozen=True, slots=True)
class Commit:
    """`files`: every file at that point, by path, not only what the commit changed."""

    id: str
    message: str
    files: Mapping[str, File]


@dataclass
class Repo:
    """`branches`: the commits of each, oldest first."""

    is_private: bool = False
    is_gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: Mapping[str, File]) -> Commit:
        """A commit that holds these files and no others. Its id follows from all that it says."""
        commits = self.branches.setdefault(branch, [])
        parent = commits[-1].id if commits else ""
        said = [parent, branch, message, {path: file.etag for path, file in files.items()}]
        commit = Commit(hashlib.sha1(json.dumps(said).encode()).hexdigest(), message, dict(files))
        commits.append(commit)
        return commit

    def find(self, revision: str) -> Commit | None:
        """The last commit of a branch, or the one with that id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        every = (commit for commits in self.branches.values() for commit in commits)
        return next((commit for commit in every if commit.id == revision), None)
