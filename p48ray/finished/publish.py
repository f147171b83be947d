"""Publish: put a finished, verified checkpoint on the Hugging Face Hub. Shards go up one by one,
wherever a task runs; one commit at the end.

Every step may be repeated. A shard that the Hub has leaves a record in the run root, and the Hub
gives no upload action for an object it holds, so no byte is sent twice. The commit is made against
the state of the branch that was compared, and what it did is read back: a reply that is lost on the
way is not a second commit.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd
from huggingface_hub.hf_api import RepoFile

from p48ray.checkpoint.index import INDEX_FILE
from p48ray.errors import (
    ConfigError,
    GaveUpError,
    ShardCorruptError,
    StageFailedError,
    TransientStoreError,
)
from p48ray.finished.branch import Hub, Target, uploaded_shard
from p48ray.finished.survey import check_files
from p48ray.run import run_root
from p48ray.run.manifest import MANIFEST_FILE, CheckpointManifest, PublishedShard, ShardVerdict
from p48ray.stages.index_proof import check_index_files, check_strangers
from p48ray.stages.verify import LISTED_PROBLEMS
from p48ray.store import retry
from p48ray.store.base import Store
from p48ray.store.view import SubStore


@dataclass(frozen=True, slots=True)
class Release:
    """What is published: shards, which stay where they are, and the small files beside them."""

    manifest: CheckpointManifest
    shards: Mapping[str, int]  # size by name
    files: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        return sum(self.shards.values()) + sum(map(len, self.files.values()))


def read_release(store: Store) -> Release:
    """The finished checkpoint of a run root.

    Raises: ConfigError, naming what is missing or wrong, unless the checkpoint is complete,
        verified, and as it was when it was verified.
    """
    checkpoint = SubStore(store, run_root.CHECKPOINT)
    for name in (INDEX_FILE, MANIFEST_FILE):
        if checkpoint.head(name) is None:
            raise ConfigError(
                f"{checkpoint.uri}: expected a finished checkpoint, found no {name}; run"
                " jobs/compress.py to its end"
            )
    try:
        manifest = CheckpointManifest.load(checkpoint, MANIFEST_FILE)
    except ShardCorruptError as error:
        raise ConfigError(str(error)) from error
    problems = check_index_files(checkpoint) + check_files(checkpoint, manifest)
    if not problems:
        sizes = {info.key: info.size_bytes for info in checkpoint.list()}
        shards = sorted(set(json.loads(checkpoint.get(INDEX_FILE))["weight_map"].values()))
        problems = [
            f"{n}: not in the index"
            for n in sizes
            if n.endswith(".safetensors") and n not in shards
        ]
        problems += check_verdicts(store, {shard: sizes[shard] for shard in shards}, manifest)
    if problems:
        rest = (
            f"\n  and {len(problems) - LISTED_PROBLEMS} more"
            if len(problems) > LISTED_PROBLEMS
            else ""
        )
        listed = "\n".join(f"  {p}" for p in problems[:LISTED_PROBLEMS])
        raise ConfigError(
            f"{checkpoint.uri}: not complete and verified; run jobs/compress.py to its"
            f" end\n{listed}{rest}"
        )
    if strangers := check_strangers(checkpoint, manifest):
        listed = "\n".join(f"  {p}" for p in strangers[:LISTED_PROBLEMS])
        raise ConfigError(
            f"{checkpoint.uri}: {len(strangers)} files that the job did not make; nothing was"
            f" sent\n{listed}"
        )
    files = {name: checkpoint.get(name) for name in sizes if name not in shards}
    return Release(manifest, {shard: sizes[shard] for shard in shards}, files)


def check_verdicts(
    store: Store, sizes: Mapping[str, int], manifest: CheckpointManifest
) -> list[str]:
    """Verification has passed every shard, and each still has the size that it had then."""
    keys = {info.key for info in store.list(run_root.VERIFICATION)}
    verified = [shard for shard in sizes if run_root.shard_verdict(shard) in keys]
    problems = [
        f"{shard}: no verdict at {run_root.shard_verdict(shard)}"
        for shard in sizes
        if shard not in verified
    ]
    for shard, verdict in zip(
        verified, ShardVerdict.load_all(store, map(run_root.shard_verdict, verified)), strict=True
    ):
        if verdict.plan_digest != manifest.plan_digest:
            problems.append(
                f"{shard}: its verdict is of plan {verdict.plan_digest[:12]}, not of"
                f" {manifest.plan_digest[:12]}"
            )
        elif verdict.size_bytes != sizes[shard]:
            problems.append(
                f"{shard}: {verdict.size_bytes} bytes when it was verified, {sizes[shard]} now"
            )
        problems += [f"{shard}: verification found: {text}" for text in verdict.problems]
    return problems


def read_records(store: Store, target: Target, release: Release) -> dict[str, PublishedShard]:
    """What was uploaded of this very checkpoint, by name."""
    keys = {info.key for info in store.list(f"{run_root.PUBLISH}{target.digest}/")}
    wanted = [
        key
        for shard in release.shards
        if (key := run_root.published_shard(target.digest, shard)) in keys
    ]
    return {
        r.path: r
        for r in PublishedShard.load_all(store, wanted)
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


def commit_release(hub: Hub, release: Release, records: Mapping[str, PublishedShard]) -> str:
    """Make the branch's last commit have every file of the release; returns that commit. There is
    nothing to do where it has them.

    Raises: StageFailedError when the Hub does not take it.
    """
    paths = [*release.shards, *release.files]
    description = f"plan {release.manifest.plan_digest}"

    unanswered: list[GaveUpError] = []

    def read_commit() -> tuple[str, list[str]]:
        """The branch's last commit, and what it lacks."""
        try:
            head, held = hub.state(paths)
        except GaveUpError as error:
            unanswered.append(error)
            raise
        if head is None:
            raise StageFailedError(f"{hub.target.repo}: no branch {hub.target.revision!r} any more")
        return head, lacking(release, records, held)

    def attempt() -> str:
        """Looks first, because the one before may have been made after all."""
        head, missing = read_commit()
        if missing:
            shards = [uploaded_shard(records[name]) for name in missing if name in records]
            files = [
                CommitOperationAdd(name, release.files[name])
                for name in missing
                if name in release.files
            ]
            hub.commit([*shards, *files], head, description)
            head, missing = read_commit()
        if missing:
            raise TransientStoreError(
                f"{hub.target.repo}: a commit was made, and the branch lacks {len(missing)} files"
            )
        return head

    try:
        return retry.call(retry.HUB_COMMIT, attempt)
    except GaveUpError as error:
        if unanswered:  # a question, which was asked often enough, and no commit
            raise
        head, missing = read_commit()
        if not missing:
            return head
        tries = retry.HUB_COMMIT.attempts
        raise StageFailedError(
            f"{hub.target.repo}: the commit was not made in {tries} tries; run the same command"
            f" again ({error})"
        ) from error
