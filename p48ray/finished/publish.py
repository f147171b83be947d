"""Publish: put a finished, verified checkpoint on the Hugging Face Hub. Shards go up one by one,
wherever a task runs; one commit at the end.

Every step may be repeated. A shard that the Hub has leaves a record in the run root, and the Hub
gives no upload action for an object it holds, so no byte is sent twice. The commit is made against
the state of the branch that was compared, and what it did is read back: a reply that is lost on the
way is not a second commit.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile

from p48ray.checkpoint.sidecars import OTHER_WEIGHTS
from p48ray.errors import ConfigError, GaveUpError, StageFailedError, TransientStoreError
from p48ray.finished.branch import Hub, Target, uploaded_shard
from p48ray.finished.own_figures import EVAL_RESULTS_FILE
from p48ray.finished.release import Release, listed
from p48ray.run import run_root
from p48ray.run.manifest import PublishedShard
from p48ray.store import retry


def read_records(target: Target, release: Release) -> dict[str, PublishedShard]:
    """What was uploaded of this very checkpoint, by name; nothing where no run root keeps it."""
    if release.records is None:
        return {}
    keys = {info.key for info in release.records.list(f"{run_root.PUBLISH}{target.digest}/")}
    wanted = [
        key
        for shard in release.shards
        if (key := run_root.published_shard(target.digest, shard)) in keys
    ]
    return {
        r.path: r
        for r in PublishedShard.load_all(release.records, wanted)
        if r.checkpoint_sha256 == release.manifest.sha256
    }


def lacking(
    release: Release, records: Mapping[str, PublishedShard], held: Mapping[str, RepoFile]
) -> list[str]:
    """Files that the branch does not have, or has other bytes of."""
    missing = [
        s
        for s in release.shards
        if s not in held or s not in records or not is_same_object(held[s], records[s].sha256)
    ]
    return missing + [
        name
        for name, data in release.files.items()
        if name not in held or not is_same_file(held[name], data)
    ]


def is_same_object(found: RepoFile, sha256: str) -> bool:
    return found.lfs is not None and found.lfs.sha256 == sha256


def is_same_file(found: RepoFile, data: bytes) -> bool:
    """By the digest that the Hub tells: SHA-256 of a large file, git's own of any other."""
    if found.lfs is not None:
        return is_same_object(found, hashlib.sha256(data).hexdigest())
    return found.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def left_over(release: Release, paths: Collection[str]) -> list[str]:
    """Files of a branch that hold or describe weights and are none of the release's. A loader that
    takes every file of a kind, or prefers another kind, would take them."""
    kept = set(release.names)
    return sorted(p for p in paths if p not in kept and p.lower().endswith(OTHER_WEIGHTS))


def outdated(release: Release, paths: Collection[str]) -> list[str]:
    """What publishing has told the Hub of another checkpoint, and does not tell of this one."""
    return [p for p in paths if p == EVAL_RESULTS_FILE and p not in release.files]


def check_left_over(hub: Hub, old: Sequence[str], is_replacing: bool) -> None:
    """Raises: ConfigError, naming them, where old weights would stay beside the new ones."""
    if old and not is_replacing:
        t = hub.target
        raise ConfigError(
            f"{t.repo}, branch {t.revision}: {len(old)} files of weights that this checkpoint does"
            " not have; publish with --replace to delete them in the same commit, or to another"
            f" --revision\n{listed(old)}"
        )


def commit_release(
    hub: Hub, release: Release, records: Mapping[str, PublishedShard], is_replacing: bool
) -> str:
    """Make the branch's last commit have every file of the release and no other weights; returns
    that commit. There is nothing to do where it is so.

    Args:
        hub: with repository and branch.
        release: what the branch is to have.
        records: of its shards, which the Hub has by now.
        is_replacing: weights of what was there before are deleted; else they are a mistake.
    Raises: StageFailedError when the Hub does not take it; ConfigError for weights that came there
        meanwhile.
    """
    paths = release.names
    description = release.manifest.origin

    unanswered: list[GaveUpError] = []

    def read_commit() -> tuple[str, list[str], list[str]]:
        """The branch's last commit, what it lacks, and what it has too much."""
        try:
            branch = hub.state(paths)
        except GaveUpError as error:
            unanswered.append(error)
            raise
        if branch.head is None:
            raise StageFailedError(f"{hub.target.repo}: no branch {hub.target.revision!r} any more")
        old = left_over(release, branch.paths)
        check_left_over(hub, old, is_replacing)
        old += outdated(release, branch.paths)
        return branch.head, lacking(release, records, branch.files), old

    def attempt() -> str:
        """Looks first, because the one before may have been made after all."""
        head, missing, old = read_commit()
        if missing or old:
            shards = [uploaded_shard(records[name]) for name in missing if name in records]
            files = [
                CommitOperationAdd(name, release.files[name])
                for name in missing
                if name in release.files
            ]
            gone = [CommitOperationDelete(name, is_folder=False) for name in old]
            hub.commit([*shards, *files, *gone], head, description)
            head, missing, old = read_commit()
        if missing or old:
            raise TransientStoreError(
                f"{hub.target.repo}: a commit was made, and the branch lacks {len(missing)} files"
                f" and has {len(old)} old ones"
            )
        return head

    try:
        return retry.call(retry.HUB_COMMIT, attempt)
    except GaveUpError as error:
        if unanswered:  # a question, which was asked often enough, and no commit
            raise
        head, missing, old = read_commit()
        if not missing and not old:
            return head
        tries = retry.HUB_COMMIT.attempts
        raise StageFailedError(
            f"{hub.target.repo}: the commit was not made in {tries} tries; run the same command"
            f" again ({error})"
        ) from error
