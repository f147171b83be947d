"""What is published: a finished checkpoint, looked at before anybody is asked.

It is the one of a run root, whose verdicts it is held to, or any finished folder, such as `p48ray
convert` writes, which is held to its own p48ray.json. Workers see to the bytes of the shards, in
either case, while they upload them. A folder may have a run root beside it that has the same
weights: then uploads are recorded there, and what it has measured of them counts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from p48ray.checkpoint.index import INDEX_FILE
from p48ray.checkpoint.sidecars import OTHER_WEIGHTS
from p48ray.errors import ConfigError, ShardCorruptError
from p48ray.finished.own_figures import (
    EVAL_RESULTS_FILE,
    OwnFigures,
    eval_results,
    read_own_figures,
)
from p48ray.finished.survey import check_files, survey_checkpoint
from p48ray.run import run_root
from p48ray.run.changing_hands import root_is_shared
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.run.manifest import ShardVerdict
from p48ray.stages.index_proof import check_index_files, check_strangers
from p48ray.stages.verify import listed
from p48ray.store.base import Store
from p48ray.store.open import open_store
from p48ray.store.view import SubStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Shards, which stay where they are, and the small files beside them.

    checkpoint: rooted at the folder. records: the run root, where uploads are recorded; None for a
    folder without one. shards: size by name. figures: what the run root says of this checkpoint.
    """

    checkpoint: Store
    records: Store | None
    manifest: CheckpointManifest
    shards: Mapping[str, int]
    files: Mapping[str, bytes]
    figures: OwnFigures = field(default_factory=OwnFigures)

    @property
    def num_bytes(self) -> int:
        return sum(self.shards.values()) + sum(map(len, self.files.values()))

    @property
    def is_on_shared_root(self) -> bool:
        """Its run root declares to be the same folder on every node (run.root_is_shared)."""
        if self.records is None or self.records.head(run_root.PLAN) is None:
            return False
        return root_is_shared(self.records)

    @property
    def names(self) -> list[str]:
        return [*self.shards, *self.files]


def read_release(checkpoint: Store, root: Store | None) -> Release:
    """A finished checkpoint. root: the run root that it lies in; None for a folder by itself.

    Raises: ConfigError, naming what is missing or wrong, unless the checkpoint is complete,
        verified, and as it was when it was verified.
    """
    manifest = read_finished(checkpoint)
    sizes = {info.key: info.size_bytes for info in checkpoint.list()}
    problems = check_index_files(checkpoint) + check_files(checkpoint, manifest)
    shards: list[str] = []
    if not problems:
        shards = sorted(set(json.loads(checkpoint.get(INDEX_FILE))["weight_map"].values()))
        problems = [
            f"{n}: not in the index"
            for n in sizes
            if n.endswith(".safetensors") and n not in shards
        ]
        problems += (
            list(survey_checkpoint(checkpoint, None).problems)
            if root is None
            else check_verdicts(root, {shard: sizes[shard] for shard in shards}, manifest)
        )
    if problems:
        mend = (
            "write it anew (p48ray convert)" if root is None else "run jobs/compress.py to its end"
        )
        raise ConfigError(
            f"{checkpoint.uri}: not complete and verified; {mend}\n{listed(problems)}"
        )
    if strangers := check_strangers(checkpoint, manifest) or check_sendable(manifest.file_sha256):
        raise ConfigError(
            f"{checkpoint.uri}: {len(strangers)} files that are not published; nothing was"
            f" sent\n{listed(strangers)}"
        )
    return Release(
        checkpoint=checkpoint,
        records=root,
        manifest=manifest,
        shards={shard: sizes[shard] for shard in shards},
        files={name: checkpoint.get(name) for name in sizes if name not in shards},
    )


def read_finished(checkpoint: Store) -> CheckpointManifest:
    """p48ray.json of a folder that has its index too, which is written last. Raises: ConfigError"""
    for name in (INDEX_FILE, MANIFEST_FILE):
        if checkpoint.head(name) is None:
            raise ConfigError(
                f"{checkpoint.uri}: expected a finished checkpoint, found no {name}; run"
                " jobs/compress.py (or p48ray convert) to its end"
            )
    try:
        return CheckpointManifest.load(checkpoint, MANIFEST_FILE)
    except ShardCorruptError as error:
        raise ConfigError(str(error)) from error


def check_sendable(files: Mapping[str, str]) -> list[str]:
    """Files that p48ray.json names and nobody is sent: pickles and other forms of weights, whose
    loaders may run them, and dot files, which others' programs read. A checkpoint of today has
    none; the job does not carry them over."""
    return [
        f"{name}: a hidden file, or weights in another form; run jobs/compress.py with a new run"
        " root, which leaves it out"
        for name in files
        if any(part.startswith(".") for part in name.split("/"))
        or (name.lower().endswith(OTHER_WEIGHTS) and name != INDEX_FILE)
    ]


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
        if verdict.shard != shard:
            problems.append(f"{shard}: its verdict is of {verdict.shard}")
        elif verdict.plan_digest != manifest.plan_digest:
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


def open_release(root: str | None, folder: str | None, endpoint_url: str | None) -> Release:
    """What the command line names: a run root's checkpoint, a folder by itself, or a folder with
    the weights of a run root.

    Args:
        root: folder or URI of a run; None for a folder by itself.
        folder: of a finished checkpoint, or its URI; None for the run root's own.
        endpoint_url: of an S3 server that is not AWS.
    Raises: ConfigError for anything else, and as read_release.
    """
    if root is None and folder is None:
        raise ConfigError("expected --run-root or --checkpoint, found neither")
    records = open_store(root, endpoint_url) if root is not None else None
    if folder is not None:
        release = read_release(open_store(folder, endpoint_url), None)
        if records is not None:
            check_same_weights(release, SubStore(records, run_root.CHECKPOINT))
            release = replace(release, records=records)
    else:
        assert records is not None
        release = read_release(SubStore(records, run_root.CHECKPOINT), records)
    return release if records is None else with_figures(release, records)


def check_same_weights(release: Release, own: Store) -> None:
    """Raises: ConfigError unless a run root's own checkpoint is the same in another storage, or in
    the same."""
    expected, found = read_finished(own), release.manifest
    for key in ("plan_digest", "unit_sha256", "untouched_sha256"):
        if getattr(expected, key) != getattr(found, key):
            raise ConfigError(
                f"--checkpoint {release.checkpoint.uri}: expected the weights of {own.uri}, found"
                f" others ({MANIFEST_FILE}: {key}); leave --run-root out to publish it without that"
                " run's figures"
            )


def with_figures(release: Release, root: Store) -> Release:
    """The release with what the run has measured of it, and with the file that tells the Hub."""
    figures = read_own_figures(root, release.checkpoint, release.manifest)
    told = eval_results(figures.table)
    files = {**release.files, **({EVAL_RESULTS_FILE: told} if told else {})}
    return replace(release, figures=figures, files=files)
