"""Mirror: copy what a run needs of a hf:// source into its run root, once, so that no worker
streams from the Hub again and again.

    hf://owner/name@<commit>/model-00001-of-00064.safetensors  ->
    source/model-00001-of-00064.safetensors, then mirror/<the same name>.json

A task copies one file: one request (taken up again where it breaks), bounded memory, an atomic
write that is given up unless the bytes have the digest that the Hub lists. Copied are the files
that the checkpoint's index speaks of: config, index, the weight files that the index names, and the
small files that go with them (checkpoint.sidecars: tokenizer, code, templates, licence), README.md
for the card. Not copied: other folders, other forms of the weights, pictures, .gitattributes.
The copy is kept whatever `run.keep` says: resuming, making a lost shard anew and `p48ray verify
--source` read it.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from p48ray.checkpoint.index import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    CheckpointIndex,
    open_checkpoint,
)
from p48ray.errors import ObjectMissingError, ShardCorruptError, SourceError
from p48ray.run import run_root
from p48ray.run.cleanup import delete_all
from p48ray.run.manifest import MirrorManifest
from p48ray.run.output_layout import OutputShard
from p48ray.run.plan import MirroredFile, RunPlan
from p48ray.run.records import LOADS_AT_ONCE
from p48ray.stages.tasks import Task
from p48ray.store.base import Store
from p48ray.store.hub.store import FileDigest, HubFile, HubStore
from p48ray.store.open import mirror_source, open_store
from p48ray.store.view import SubStore
from p48ray.unit.context import StageContext


@dataclass(frozen=True, slots=True)
class MirrorItem:
    """One file to copy, and from where. The store brings the token to the worker that copies; it is
    in no text of this item."""

    source: HubStore
    file: MirroredFile


def files_to_mirror(index: CheckpointIndex, store: HubStore) -> tuple[MirroredFile, ...]:
    """What the rule above names, as the Hub lists it, weights last."""
    small = [
        name
        for name in (CONFIG_FILE, INDEX_FILE, CARD_FILE, *index.sidecars)
        if store.head(name) is not None
    ]
    return tuple(mirrored_file(store, name) for name in (*small, *index.files))


def mirrored_file(store: HubStore, name: str) -> MirroredFile:
    file = store.file(name)
    if file is None:
        raise SourceError(f"{store.uri}: {name} was listed and is gone")
    return MirroredFile(
        path=file.path, size_bytes=file.size_bytes, sha256=file.sha256, git_sha1=file.git_sha1
    )


def mirror_file(store: Store, item: MirrorItem) -> MirrorManifest:
    """Copy one file into the run root and say so beside it. Running it twice is harmless: both
    write the same bytes.

    Raises: TransientStoreError if what came is not what the Hub lists; nothing is at the file's
        place then that was not there before.
    """
    start, file = time.monotonic(), item.file
    digest = FileDigest(HubFile(file.path, file.size_bytes, file.sha256, file.git_sha1))
    key = run_root.source_file(file.path)
    num_bytes = store.compose(key, item.source.download(digest))
    if num_bytes != file.size_bytes:
        raise ShardCorruptError(
            f"{store.uri}/{key}: expected {file.size_bytes} bytes, wrote {num_bytes}"
        )
    manifest = MirrorManifest(
        source=item.source.uri,
        path=file.path,
        size_bytes=num_bytes,
        sha256=digest.sha256.hexdigest(),
        seconds=round(time.monotonic() - start, 3),
        finished_at=time.time(),
    )
    store.put(run_root.mirror_manifest(file.path), manifest.to_json())
    return manifest


@dataclass(frozen=True, slots=True)
class MirrorState:
    """What a mirror lacks, and the keys of manifests that count for nothing: their files are gone,
    cut, or of another commit."""

    missing: tuple[MirroredFile, ...]
    void: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        return not self.missing


def mirror_state(plan: RunPlan, store: Store) -> MirrorState:
    """The plan's mirror against what the run root holds. Of a source that is not mirrored, nothing
    is missing."""
    if not plan.source.mirror:
        return MirrorState((), ())
    # manifests first: a manifest that another driver writes meanwhile is not to be seen without its
    # file
    sizes = {
        info.key: info.size_bytes
        for prefix in (run_root.MIRROR, run_root.SOURCE)
        for info in store.list(prefix)
    }

    def is_there(file: MirroredFile) -> bool:
        return (
            run_root.mirror_manifest(file.path) in sizes
            and sizes.get(run_root.source_file(file.path)) == file.size_bytes
        )

    def counts(file: MirroredFile) -> bool:
        try:
            manifest = MirrorManifest.load(store, run_root.mirror_manifest(file.path))
        except (ShardCorruptError, ObjectMissingError):
            return False
        return (
            manifest.sha256 == file.sha256
            if file.sha256
            else manifest.source == plan.config.source.checkpoint
        )

    held = [file for file in plan.source.mirror if is_there(file)]
    with ThreadPoolExecutor(LOADS_AT_ONCE) as pool:
        good = {
            file.path for file, is_good in zip(held, pool.map(counts, held), strict=True) if is_good
        }
    missing = tuple(f for f in plan.source.mirror if f.path not in good)
    return MirrorState(
        missing, tuple(key for f in missing if (key := run_root.mirror_manifest(f.path)) in sizes)
    )


def files_to_copy(context: StageContext, shards: tuple[OutputShard, ...]) -> list[Task]:
    """The largest first, so that the last to end is a small one. Manifests that count for nothing
    go."""
    source = mirror_source(context.plan.config.source.checkpoint)
    assert source is not None, "a plan with files to mirror is of a source that is mirrored"
    found = mirror_state(context.plan, context.store)
    delete_all(context.store, found.void)
    return [
        Task(
            stage="mirror",
            id=file.path,
            item=MirrorItem(source, file),
            marker=run_root.mirror_manifest(file.path),
            load=float(file.size_bytes),
        )
        for file in found.missing
    ]


def mirrored(index: CheckpointIndex, store: Store) -> CheckpointIndex:
    """The same checkpoint, to be read from the run root."""
    return replace(index, store=SubStore(store, run_root.SOURCE))


def open_source(plan: RunPlan, store: Store) -> CheckpointIndex:
    """The source as every worker reads it: a hf:// source from its mirror, any other from where it
    lies.

    Raises: SourceError when it is not the one that was planned.
    """
    place = plan.config.source
    source = open_checkpoint(
        SubStore(store, run_root.SOURCE)
        if plan.source.mirror
        else open_store(place.checkpoint, place.endpoint_url)
    )
    if source.fingerprint != plan.source.fingerprint:
        raise SourceError(
            f"{source.store.uri}: changed since it was planned: expected fingerprint"
            f" {plan.source.fingerprint[:12]}, found {source.fingerprint[:12]}"
        )
    return source
