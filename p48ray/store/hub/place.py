"""A text hf://... in its parts: kind, repository, revision, path."""

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from p48ray.errors import ConfigError
from p48ray.store.base import check_path

COMMIT = re.compile(r"[0-9a-f]{40}")


_NAME = r"(?!(?:spaces|kernels|buckets|datasets|models)/)[A-Za-z0-9][A-Za-z0-9._-]*"


_PLACE = re.compile(
    rf"(?i:hf)://(?:(datasets|models)/)?({_NAME}/{_NAME})"
    r"(?:@(refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(.*))?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class HubPlace:
    """What a hf:// uri names: a repository, a revision of it (None: main), and a folder or file in
    it ("" for the whole)."""

    kind: str
    repo: str
    revision: str | None
    path: str

    @property
    def uri(self) -> str:
        kind = "datasets/" if self.kind == "dataset" else ""
        at = (
            f"@{quote(self.revision, safe='/' if self.revision.startswith('refs/') else '')}"
            if self.revision
            else ""
        )
        return f"hf://{kind}{self.repo}{at}{'/' if self.path else ''}{self.path}"

    @property
    def commit(self) -> str | None:
        """The revision, where it is a commit and not a name that may move."""
        return self.revision if self.revision and COMMIT.fullmatch(self.revision) else None

    def at(self, revision: str | None, path: str | None = None) -> "HubPlace":
        """The same place at another revision (and path)."""
        return HubPlace(self.kind, self.repo, revision, self.path if path is None else path)


def parse_place(uri: str) -> HubPlace:
    """hf://[datasets/]owner/name[@revision][/path]. Raises: ConfigError for anything else, and
    for a path that is no key."""
    found = _PLACE.fullmatch(uri)
    if not found:
        raise ConfigError(
            f"{uri}: expected hf://owner/name[@revision] or"
            " hf://datasets/owner/name[@revision][/path]"
        )
    path = (found[4] or "").rstrip("/")
    revision = unquote(found[3]) if found[3] else None
    return HubPlace(
        "dataset" if found[1] == "datasets" else "model",
        found[2],
        revision,
        check_path(uri, path),
    )


def split_texts(uri: str) -> tuple[str, str]:
    """A place of texts: the repository's uri, and the file or folder in it.

    Raises: ConfigError unless it is a data set's.
    """
    place = parse_place(uri)
    if place.kind != "dataset":
        expected = "hf://datasets/owner/name[@revision][/path]"
        raise ConfigError(f"{uri}: expected {expected}, found a model's repository")
    return place.at(place.revision, "").uri, place.path


def repository(uri: str) -> tuple[str, str | None]:
    """owner/name and revision, as huggingface_hub and whoever is built on it take them."""
    place = parse_place(uri)
    return place.repo, place.revision


def at_commit(uri: str, commit: str) -> str:
    """The same place at a commit."""
    return parse_place(uri).at(commit).uri
