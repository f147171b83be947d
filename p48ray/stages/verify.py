"""Verify, shard by shard: what is left to look at, the verdict that each look leaves, and what all
of them come to."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from p48ray.checkpoint.index import INDEX_FILE
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.errors import CorruptObjectError, VerificationError
from p48ray.run import run_root
from p48ray.run.checked import keys_of_refused, load_each, load_shard_verdict
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.run.cleanup import delete_unit_shards
from p48ray.run.manifest import ShardVerdict, UnitManifest
from p48ray.run.output_layout import OutputShard, shard_rows
from p48ray.run.plan import WorkUnit
from p48ray.run.records import LOADS_AT_ONCE
from p48ray.run.scales import shifted_linears
from p48ray.stages.final_files import finish_checkpoint
from p48ray.stages.index_proof import check_index, check_strangers
from p48ray.stages.linear_proof import Promise
from p48ray.stages.shard_proof import verify_shard
from p48ray.stages.tasks import Task
from p48ray.store.view import SubStore
from p48ray.unit.context import StageContext

log = logging.getLogger(__name__)

LISTED_PROBLEMS = 20


def shards_to_verify(context: StageContext, shards: tuple[OutputShard, ...]) -> list[Task]:
    """A verdict that found problems is not the last word: its shard may have been mended since. It
    goes, as one of another plan does, and its shard is looked at again."""
    held = {info.key for info in context.store.list(run_root.VERIFICATION)}

    def counts(name: str) -> bool:
        key = run_root.shard_verdict(name)
        try:
            is_clean = (
                key in held and not load_shard_verdict(context.plan, context.store, name).problems
            )
        except CorruptObjectError as error:
            log.warning("%s; the shard is verified again", error)
            is_clean = False
        if key in held and not is_clean:
            context.store.delete(key)
        return is_clean

    with ThreadPoolExecutor(LOADS_AT_ONCE) as pool:
        good = list(pool.map(counts, [s.name for s in shards]))
    missing = [s for s, is_good in zip(shards, good, strict=True) if not is_good]
    return [Task(stage="verify", id=s.name, item=s) for s in missing]


def verify_and_record(context: StageContext, shard: OutputShard) -> None:
    """Verify one output shard against source and manifests; the verdict is the done-marker."""
    claims: dict[str, float] = {}
    digests: dict[str, str] = {}
    scales: dict[str, float] = {}
    shifts: dict[str, int] = {}
    for segment in shard.segments:
        if isinstance(segment, WorkUnit):
            manifest = context.finished_unit(segment).manifest
            claims |= {record.name: record.relative_weight_error for record in manifest.linears}
            digests[segment.id] = manifest.sha256
            shifts |= shifted_linears(context.layout, segment.layer, manifest.shifts)
            gate_up, down = manifest.input_global_scales
            for expert in segment.experts:
                for projection in PROJECTIONS:
                    name = context.layout.expert_linear_name(segment.layer, expert, projection)
                    scales[name] = down if projection == "down_proj" else gate_up
    checkpoint = SubStore(context.store, run_root.CHECKPOINT)
    compression = context.plan.config.compression
    promise = Promise(
        is_sparse=compression.sparsity == "paired-4:8",
        scale_span=compression.scale_span,
        weight_errors=claims,
        unit_sha256=digests,
        input_scales=scales,
        shifts=shifts,
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
        notes=found.notes,
        unsound_units=found.unsound_units,
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

    Raises: CorruptObjectError for shards that were stitched or read wrongly, so that they are made
        anew; VerificationError for what only a person can judge: units that are refused as they
        were made, and what else lies in the folder. Both list the problems.
    """
    plan, store = context.plan, context.store
    verdicts = load_each(lambda shard: load_shard_verdict(plan, store, shard.name), shards)
    refused = [v for v in verdicts if v.problems]
    if refused:
        problems = [
            p if p.startswith(v.shard) else f"{v.shard}: {p}" for v in refused for p in v.problems
        ]
        unsound = [unit for v in refused for unit in v.unsound_units]
        if not unsound:
            raise CorruptObjectError(
                refusal(context, problems, "the shards are stitched again"),
                *(key for verdict in refused for key in keys_of_refused(verdict)),
            )
        names = ", ".join(run_root.unit_manifest(unit) for unit in unsound[:LISTED_PROBLEMS])
        advice = (
            f"{len(unsound)} units are refused as they were made, so the device or the code may be"
            f" at fault; to have them made anew, delete {names} and the shards named here (`p48ray"
            " doctor RUN_ROOT --fix` does) and run the same command again"
        )
        raise VerificationError(refusal(context, problems, advice))
    for note in (note for verdict in verdicts for note in verdict.notes):
        log.warning("%s", note)
    finish_checkpoint(context, shards, verdicts, units)
    problems = check_folder(context, shards)
    if problems:  # a folder with an index is a verified one
        store.delete(run_root.checkpoint_file(INDEX_FILE))
        advice = "mend or delete the files named here and run the same command again"
        raise VerificationError(refusal(context, problems, advice))
    if plan.config.run.keep == "checkpoint":
        delete_unit_shards(store)


def refusal(context: StageContext, problems: Sequence[str], advice: str) -> str:
    """Problems of a checkpoint as one message, with what to do about them."""
    where = f"{context.store.uri}/{run_root.CHECKPOINT}"
    return f"{where}: {len(problems)} problems; {advice}\n{listed(problems)}"


def listed(problems: Sequence[str]) -> str:
    """The first few, a line each, and how many more there are."""
    lines = [f"  {p}" for p in problems[:LISTED_PROBLEMS]]
    if len(problems) > LISTED_PROBLEMS:
        lines.append(f"  and {len(problems) - LISTED_PROBLEMS} more")
    return "\n".join(lines)
