"""What publishing asks of one branch of a repository on the Hugging Face Hub. How it is asked, and
again, is store.hub.api's.

With HF_HUB_DISABLE_XET=1 uploads are plain LFS calls, which the tests go through; without it, where
hf_xet is installed, they go through Xet storage, and that path has never been run from here.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._runtime import is_xet_available

from p48ray import __version__
from p48ray.errors import ConfigError, StageFailedError
from p48ray.run.manifest import PublishedShard
from p48ray.run.records import canonical_json
from p48ray.store.hub import api as hub_api

PATHS_AT_ONCE = 500  # the Hub answers for at most 1,000
OBJECTS_AT_ONCE = 256  # huggingface_hub's own number

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to publish: a branch of a model repository at one Hub."""

    endpoint: str
    repo: str
    revision: str

    @property
    def digest(self) -> str:
        """Names the records of what this branch's repository has."""
        return hashlib.sha256(
            canonical_json([self.endpoint, self.repo, self.revision])
        ).hexdigest()[:16]

    def named(self, what: str) -> str:
        """Something of this repository, for messages."""
        return f"{self.repo}: {what}" if what else self.repo


@dataclass(frozen=True, slots=True)
class BranchState:
    """A branch as it was at one moment. `head`: its last commit, None where there is no such
    branch. `files`: those that were asked for and are there, by path. `paths`: all that are."""

    head: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    paths: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Hub:
    """One branch of one repository, through huggingface_hub's own calls. Picklable; the token is in
    no text that this object makes."""

    target: Target
    token: str = field(repr=False)

    @property
    def api(self) -> HfApi:
        client: HfApi = hub_api.api(self.target.endpoint, self.token)
        return client

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """See hub_api.ask. Args: what: is asked about, after the repository's name in messages; ""
        for the repository itself."""
        return hub_api.ask(self.target.named(what), call)

    def check_access(self) -> str:
        """Whose token it is. Raises: ConfigError for one that the Hub does not know or that may
        only read."""
        user = self.ask("whoami", self.api.whoami)
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ConfigError(
                f"the token of {user['name']} may only read; make one that may write to"
                f" {self.target.repo}"
            )
        return str(user["name"])

    def prepare(self, is_private: bool) -> None:
        """Make the repository and the branch where they are missing. Raises: ConfigError for a
        public one that was to be private."""
        t = self.target
        self.ask(
            "create",
            lambda: self.api.create_repo(t.repo, private=is_private or None, exist_ok=True),
        )
        if is_private and self.ask("", lambda: self.api.repo_info(t.repo)).private is False:
            raise ConfigError(
                f"--private: {t.repo} is there already and is public; make it private on the Hub,"
                " or leave --private out"
            )
        if t.revision != "main":
            self.ask(
                f"create branch {t.revision}",
                lambda: self.api.create_branch(t.repo, branch=t.revision, exist_ok=True),
            )

    def check_card(self, card: str) -> None:
        """What the Hub says of the card's front matter, before hours of upload. Raises: ConfigError
        with what is wrong."""

        def ask() -> None:
            try:
                ModelCard(card).validate()
            except ValueError as error:
                raise ConfigError(f"README.md: {error}") from error

        self.ask("README.md", ask)

    def state(self, paths: Sequence[str]) -> BranchState:
        """The branch, and what it has of the paths."""

        def read_branch() -> BranchState:
            try:
                info = self.api.model_info(self.target.repo, revision=self.target.revision)
                batches = [
                    list(paths[at : at + PATHS_AT_ONCE])
                    for at in range(0, len(paths), PATHS_AT_ONCE)
                ]
                found = [
                    f
                    for b in batches
                    for f in self.api.get_paths_info(
                        self.target.repo, b, revision=self.target.revision
                    )
                ]
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return BranchState()
            return BranchState(
                info.sha,
                {f.path: f for f in found if isinstance(f, RepoFile)},
                frozenset(sibling.rfilename for sibling in info.siblings or ()),
            )

        return self.ask("", read_branch)

    def held_objects(self, records: Sequence[PublishedShard]) -> set[str]:
        """Paths of those records whose objects the Hub has, by the same question that decides about
        an upload.

        Objects in Xet storage are taken on trust: whether the LFS endpoint knows of them before a
        commit is not documented.
        """
        if is_xet_available():
            return {r.path for r in records}
        found: set[str] = set()
        for at in range(0, len(records), OBJECTS_AT_ONCE):
            batch = records[at : at + OBJECTS_AT_ONCE]
            answers, _, _ = self.ask("LFS batch", lambda batch=batch: self.lfs_batch(batch))  # type: ignore[misc]
            held = {answer["oid"] for answer in answers if answer.get("actions") is None}
            found |= {r.path for r in batch if r.sha256 in held}
        return found

    def lfs_batch(
        self, records: Sequence[PublishedShard]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str | None]:
        infos = [
            UploadInfo(size=r.size_bytes, sample=b"", sha256=bytes.fromhex(r.sha256))
            for r in records
        ]
        t = self.target
        return post_lfs_batch_info(
            infos, self.token, "model", t.repo, quote(t.revision, safe=""), t.endpoint
        )

    def upload(self, name: str, path: str, sha256: str) -> None:
        """One large file, unless the Hub has its object. huggingface_hub asks again by itself; a
        file is not sent again here.

        Raises: what hub_api.translated says; StageFailedError where the repository does not keep it
            in LFS.
        """
        disable_progress_bars()

        def send() -> bool:
            operation = CommitOperationAdd(name, path)
            # known from the download, so the file is not read for it again
            operation.upload_info.sha256 = bytes.fromhex(sha256)
            self.api.preupload_lfs_files(
                self.target.repo, [operation], revision=self.target.revision
            )
            return operation._is_uploaded

        if not hub_api.once(self.target.named(name), send):
            raise StageFailedError(
                f"{name}: {self.target.repo} does not take it as a large file; see its"
                " .gitattributes (expected '*.safetensors filter=lfs diff=lfs merge=lfs -text')"
                " and .gitignore"
            )

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        parent: str,
        description: str,
    ) -> None:
        """Asked once. Raises: TransientStoreError where it is not known whether the commit was
        made, or another was made first."""
        disable_progress_bars()

        def make() -> None:
            self.api.create_commit(
                self.target.repo,
                operations,
                commit_message=f"Checkpoint compressed by p48ray {__version__}",
                commit_description=description,
                revision=self.target.revision,
                parent_commit=parent,
            )

        hub_api.once(self.target.named("commit"), make)


def uploaded_shard(record: PublishedShard) -> CommitOperationAdd:
    """The operation of a shard that another process has uploaded, as `preupload_lfs_files` leaves
    one: without content, with its digest, marked.

    huggingface_hub has no public way to commit an object by its digest. It does have the state in
    which its own operations are between preupload_lfs_files and create_commit, and this makes that
    state from the record (a test compares the two field by field). The two underscored marks keep
    create_commit from asking about the file and from uploading the empty content in its place, by
    LFS or by Xet.
    """
    operation = CommitOperationAdd(record.path, b"")
    operation.upload_info = UploadInfo(
        size=record.size_bytes, sample=b"", sha256=bytes.fromhex(record.sha256)
    )
    operation._upload_mode, operation._is_uploaded = "lfs", True
    return operation
