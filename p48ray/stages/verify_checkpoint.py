"""Verify a checkpoint folder on its own: what `p48ray verify` does. With the source at hand it proves what the job's own verification proves."""

import hashlib
from collections.abc import Iterator, Mapping

from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.header import TensorEntry, parse_header, read_header_bytes
from p48ray.checkpoint.index import open_checkpoint
from p48ray.checkpoint.layout import EXPERT_NAME, PROJECTIONS
from p48ray.checkpoint.tensors import read_tensors
from p48ray.errors import ConfigError, P48Error, ShardCorruptError
from p48ray.manifest import CheckpointManifest
from p48ray.output_layout import SUFFIXES, plan_output
from p48ray.plan import WorkUnit, plan_units, ranges
from p48ray.records import Record
from p48ray.stages.reduce import MANIFEST_FILE
from p48ray.stages.verify import (
    Promise,
    check_expert,
    check_index,
    check_index_files,
    check_unit,
    compare_index,
    header_digest,
    tensor_digest,
    verify_shard,
)
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

    Raises: ConfigError when the folder has no manifest, ShardCorruptError when that is unsound; whatever is wrong with the weights is in the verdict.
    """
    if checkpoint.head(MANIFEST_FILE) is None:
        raise ConfigError(f"{checkpoint.uri}: expected the checkpoint/ folder of a p48ray run, found no {MANIFEST_FILE} in it")
    manifest = CheckpointManifest.load(checkpoint, MANIFEST_FILE)
    promise = Promise(
        is_sparse=manifest.sparsity == "paired-4:8",
        scale_span=manifest.scale_span,
        weight_errors=manifest.relative_weight_errors,
        unit_sha256=manifest.unit_sha256,
    )
    problems = verify_alone(checkpoint, manifest, promise) if source is None else verify_with_source(checkpoint, source, manifest, promise)
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
        return [
            f"{source.uri}: not the source of this checkpoint: expected fingerprint {manifest.source_fingerprint[:12]}, found {index.fingerprint[:12]}"
        ]
    layout = describe_model(index)
    shards = plan_output(plan_units(layout, manifest.experts_per_unit), manifest.max_shard_size, index, layout)
    problems = check_index(checkpoint, shards, layout)
    for shard in shards:
        problems += verify_shard(checkpoint, index, layout, shard, promise).problems
    return problems + check_files(checkpoint, manifest)


def verify_alone(checkpoint: Store, manifest: CheckpointManifest, promise: Promise) -> list[str]:
    """Headers against the index, every tensor and file against the digests of the checkpoint's own manifest, every expert linear for its form."""
    problems = check_index_files(checkpoint)
    is_index_readable = not problems
    entries: dict[str, TensorEntry] = {}
    for file in sorted(info.key for info in checkpoint.list() if info.key.endswith(".safetensors")):
        try:
            raw, size_bytes = read_header_bytes(checkpoint, file)
            entries |= parse_header(file, raw, size_bytes)
            if (found := header_digest(raw)) != manifest.header_sha256.get(file):
                problems.append(f"{file}: header: expected SHA-256 {manifest.header_sha256.get(file)}, found {found}")
        except P48Error as error:
            problems.append(str(error))
    if is_index_readable:
        problems += compare_index(checkpoint, {e.name: e.file for e in entries.values()}, sum(e.num_bytes for e in entries.values()))
    known: set[str] = set()
    for unit, linears in units_of(manifest):
        names = [f"{linear}.{suffix}" for suffix in SUFFIXES for linear in linears]
        known |= set(names)
        wrong = [text for linear in linears for text in check_form(linear, entries)]
        problems += wrong
        if not wrong:
            tensors = read_tensors(checkpoint, [entries[name] for name in names])
            problems += check_unit(entries[names[0]].file, unit.id, tensors, promise)
            for at in range(0, len(linears), len(PROJECTIONS)):
                projections = dict(zip(PROJECTIONS, linears[at : at + len(PROJECTIONS)], strict=True))
                problems += check_expert(projections, tensors, None, promise)
    # experts behind the last layer (multi-token prediction) pass through, and are promised with the untouched tensors
    stray = sorted(n for n in entries if EXPERT_NAME.fullmatch(n) and n not in known and n not in manifest.untouched_sha256)
    problems += [f"{name}: an expert tensor that the manifest does not know" for name in stray]
    return problems + list(check_untouched(checkpoint, manifest, entries, known)) + check_files(checkpoint, manifest)


def check_untouched(
    checkpoint: Store, manifest: CheckpointManifest, entries: Mapping[str, TensorEntry], compressed: set[str]
) -> Iterator[str]:
    """Tensors that came over from the source: all there, no other, and the bytes that were verified when the checkpoint was made."""
    promised = manifest.untouched_sha256
    for name in sorted(promised.keys() - entries.keys()):
        yield f"{name}: missing"
    for name in sorted(entries.keys() - promised.keys() - compressed):
        if not EXPERT_NAME.fullmatch(name):
            yield f"{entries[name].file}: {name}: a tensor that the manifest does not know"
    for name in sorted(promised.keys() & entries.keys()):
        if (found := tensor_digest(checkpoint, entries[name])) != promised[name]:
            yield f"{entries[name].file}: {name}: bytes differ from those that were verified: expected SHA-256 {promised[name]}, found {found}"


def check_files(checkpoint: Store, manifest: CheckpointManifest) -> list[str]:
    """The files beside the weights, and the manifest itself."""
    problems = []
    if manifest.sha256 != manifest.own_sha256():
        problems.append(f"{MANIFEST_FILE}: does not have the SHA-256 that it states: changed since it was written")
    for name, digest in sorted(manifest.file_sha256.items()):
        if checkpoint.head(name) is None:
            problems.append(f"{name}: missing")
        elif (found := hashlib.sha256(checkpoint.get(name)).hexdigest()) != digest:
            problems.append(f"{name}: expected SHA-256 {digest}, found {found}")
    return problems


def units_of(manifest: CheckpointManifest) -> Iterator[tuple[WorkUnit, list[str]]]:
    """Every unit with its linears in shard order, from the names and the unit size in the manifest."""
    layers: dict[tuple[int, str], set[int]] = {}
    for name in manifest.relative_weight_errors:
        found = EXPERT_NAME.fullmatch(f"{name}.weight")
        if found is None:
            raise ShardCorruptError(f"{MANIFEST_FILE}: relative_weight_errors: expected names of expert linears, found {name!r}")
        layers.setdefault((int(found[2]), found[1]), set()).add(int(found[3]))
    for (layer, prefix), experts in sorted(layers.items()):
        for first, count in ranges(max(experts) + 1, manifest.experts_per_unit):
            unit = WorkUnit(layer=layer, first_expert=first, num_experts=count)
            yield unit, [f"{prefix}layers.{layer}.mlp.experts.{e}.{p}" for e in unit.experts for p in PROJECTIONS]


def check_form(linear: str, entries: Mapping[str, TensorEntry]) -> list[str]:
    """A linear's four tensors are there, in dtypes and shapes that fit each other."""
    if missing := [f"{linear}.{suffix}: missing" for suffix in SUFFIXES if f"{linear}.{suffix}" not in entries]:
        return missing
    found = {suffix: (entries[f"{linear}.{suffix}"].dtype, entries[f"{linear}.{suffix}"].shape) for suffix in SUFFIXES}
    out, num_bytes = (*found["weight_packed"][1], 0, 0)[:2]
    expected = {"weight_packed": ("U8", (out, num_bytes)), "weight_scale": ("F8_E4M3", (out, num_bytes // 8))}
    wanted = {suffix: expected.get(suffix, ("F32", (1,))) for suffix in SUFFIXES}
    return [
        f"{linear}.{suffix}: expected {wanted[suffix]}, found {found[suffix]}" for suffix in SUFFIXES if found[suffix] != wanted[suffix]
    ]
