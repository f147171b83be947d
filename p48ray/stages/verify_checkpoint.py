"""Verify a checkpoint folder on its own: what `p48ray verify` does. With the source at hand it proves what the job's own verification proves."""

from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.header import TensorEntry, read_header
from p48ray.checkpoint.index import open_checkpoint
from p48ray.checkpoint.layout import EXPERT_NAME, PROJECTIONS
from p48ray.checkpoint.tensors import read_tensors
from p48ray.errors import P48Error, ShardCorruptError
from p48ray.manifest import CheckpointManifest
from p48ray.output_layout import SUFFIXES, plan_output
from p48ray.plan import plan_units
from p48ray.records import Record
from p48ray.stages.reduce import MANIFEST_FILE
from p48ray.stages.verify import Promise, check_expert, check_index, check_index_files, verify_shard
from p48ray.store.base import Store


class CheckpointVerdict(Record):
    """What verification of a folder found. `compared_with_source` tells how much it could prove."""

    checkpoint: str
    compared_with_source: bool
    num_shards: int
    num_linears: int
    problems: tuple[str, ...]


def verify_checkpoint(checkpoint: Store, source: Store | None) -> CheckpointVerdict:
    """Verify a folder, against its source where one is given.

    Raises: ShardCorruptError when the folder has no manifest; whatever is wrong with the weights is in the verdict.
    """
    if checkpoint.head(MANIFEST_FILE) is None:
        raise ShardCorruptError(f"{checkpoint.uri}/{MANIFEST_FILE}: missing; is this the checkpoint/ folder of a p48ray run?")
    manifest = CheckpointManifest.load(checkpoint, MANIFEST_FILE)
    promise = Promise(is_sparse=manifest.sparsity == "paired-4:8", scale_span=manifest.scale_span, weight_errors=manifest.relative_weight_errors)
    problems = verify_alone(checkpoint, promise) if source is None else verify_with_source(checkpoint, source, manifest, promise)
    return CheckpointVerdict(
        checkpoint=checkpoint.uri,
        compared_with_source=source is not None,
        num_shards=sum(info.key.endswith(".safetensors") for info in checkpoint.list()),
        num_linears=len(manifest.relative_weight_errors),
        problems=tuple(problems),
    )


def verify_with_source(checkpoint: Store, source: Store, manifest: CheckpointManifest, promise: Promise) -> list[str]:
    """Every planned byte: the plan follows from the source's headers and two settings in the manifest."""
    index = open_checkpoint(source)
    if index.fingerprint != manifest.source_fingerprint:
        return [f"{source.uri}: not the source of this checkpoint: expected fingerprint {manifest.source_fingerprint[:12]}, found {index.fingerprint[:12]}"]
    layout = describe_model(index)
    shards = plan_output(plan_units(layout, manifest.experts_per_unit), manifest.max_shard_size, index, layout)
    problems = check_index(checkpoint, shards, layout)
    for shard in shards:
        problems += verify_shard(checkpoint, index, layout, shard, promise)
    return problems


def verify_alone(checkpoint: Store, promise: Promise) -> list[str]:
    """Headers, index and every expert linear that the manifest names."""
    problems = check_index_files(checkpoint)
    entries: dict[str, TensorEntry] = {}
    for file in sorted(info.key for info in checkpoint.list() if info.key.endswith(".safetensors")):
        try:
            entries |= read_header(checkpoint, file)
        except P48Error as error:
            problems.append(str(error))
    experts = sorted({name.rpartition(".")[0] for name in promise.weight_errors})
    for expert in experts:
        names = {p: f"{expert}.{p}" for p in PROJECTIONS}
        wanted = [f"{name}.{suffix}" for name in names.values() for suffix in SUFFIXES]
        missing = [name for name in wanted if name not in entries]
        problems += [f"{name}: missing" for name in missing]
        if not missing:
            problems += check_expert(names, read_tensors(checkpoint, [entries[name] for name in wanted]), None, promise)
    known = {f"{name}.{suffix}" for name in promise.weight_errors for suffix in SUFFIXES}
    stray = sorted(n for n in entries if EXPERT_NAME.fullmatch(n) and n not in known)
    return problems + [f"{name}: an expert tensor that the manifest does not know" for name in stray]
