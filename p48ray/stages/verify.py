"""Verify, shard by shard: what is left to look at, the verdict that each look leaves, and what all
of them come to."""

from collections.abc import Sequence

from p48ray.checkpoint.index import INDEX_FILE
from p48ray.errors import VerificationError
from p48ray.run import run_root
from p48ray.run.cleanup import delete_unit_shards
from p48ray.run.manifest import MANIFEST_FILE, CheckpointManifest, ShardVerdict, UnitManifest
from p48ray.run.output_layout import OutputShard, shard_rows
from p48ray.run.plan import WorkUnit
from p48ray.stages.final_files import finish_checkpoint
from p48ray.stages.index_proof import check_index, check_strangers
from p48ray.stages.shard_proof import Promise, verify_shard
from p48ray.stages.tasks import Task
from p48ray.store.view import SubStore
from p48ray.unit.context import StageContext

LISTED_PROBLEMS = 20


def shards_to_verify(context: StageContext, shards: tuple[OutputShard, ...]) -> list[Task]:
    """A verdict that found problems is not the last word: its shard may have been mended since. It
    goes, and its shard is looked at again."""
    held = {info.key for info in context.store.list(run_root.VERIFICATION)}
    for key in sorted(held):
        if ShardVerdict.load(context.store, key).problems:
            context.store.delete(key)
            held.remove(key)
    missing = [s for s in shards if run_root.shard_verdict(s.name) not in held]
    return [Task(stage="verify", id=s.name, item=s) for s in missing]


def verify_and_record(context: StageContext, shard: OutputShard) -> None:
    """Verify one output shard against source and manifests; the verdict is the done-marker."""
    claims: dict[str, float] = {}
    digests: dict[str, str] = {}
    for segment in shard.segments:
        if isinstance(segment, WorkUnit):
            manifest = UnitManifest.load(context.store, run_root.unit_manifest(segment.id))
            claims |= {record.name: record.relative_weight_error for record in manifest.linears}
            digests[segment.id] = manifest.sha256
    checkpoint = SubStore(context.store, run_root.CHECKPOINT)
    compression = context.plan.config.compression
    promise = Promise(
        is_sparse=compression.sparsity == "paired-4:8",
        scale_span=compression.scale_span,
        weight_errors=claims,
        unit_sha256=digests,
    )
    found = verify_shard(checkpoint, context.source, context.layout, shard, promise, context.device)
    held = checkpoint.head(shard.name)
    verdict = ShardVerdict(
        plan_digest=context.plan.digest,
        shard=shard.name,
        size_bytes=held.size_bytes if held else 0,
        num_tensors=len(shard_rows(shard, context.layout)),
        num_linears=len(claims),
        problems=tuple(found.problems),
        header_sha256=found.header_sha256,
        untouched_sha256=dict(found.untouched_sha256),
    )
    context.store.put(run_root.shard_verdict(shard.name), verdict.to_json())


def check_folder(context: StageContext, shards: tuple[OutputShard, ...]) -> list[str]:
    """What lies beside the shards: the index, and nothing that no manifest names."""
    checkpoint = SubStore(context.store, run_root.CHECKPOINT)
    manifest = CheckpointManifest.load(checkpoint, MANIFEST_FILE)
    problems = check_index(checkpoint, shards, context.layout)
    return problems + check_strangers(checkpoint, manifest)


def finish_verification(
    context: StageContext, shards: tuple[OutputShard, ...], units: Sequence[UnitManifest]
) -> None:
    """Write what is known only now (index, config, p48ray.json) and hold the index against the
    shards.

    Raises: VerificationError with all problems.
    """
    store = context.store
    verdicts = ShardVerdict.load_all(store, [run_root.shard_verdict(s.name) for s in shards])
    problems = [
        p if p.startswith(v.shard) else f"{v.shard}: {p}" for v in verdicts for p in v.problems
    ]
    if not problems:
        finish_checkpoint(context, shards, verdicts, units)
        problems += check_folder(context, shards)
        if problems:  # a folder with an index is a verified one
            store.delete(run_root.checkpoint_file(INDEX_FILE))
    if problems:
        listed = "\n".join(f"  {p}" for p in problems[:LISTED_PROBLEMS])
        unlisted = len(problems) - LISTED_PROBLEMS
        rest = f"\n  and {unlisted} more" if unlisted > 0 else ""
        raise VerificationError(
            f"{store.uri}/{run_root.CHECKPOINT}: {len(problems)} problems; delete the files named"
            f" here and run the same command again to have them made anew\n{listed}{rest}"
        )
    if context.plan.config.run.keep == "checkpoint":
        delete_unit_shards(store)
