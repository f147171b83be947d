"""What a finished checkpoint announces, before its shards are read: files, headers and p48ray.json,
with the source's headers beside them where there is one. One check a shard comes of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from p48ray.checkpoint.families import describe_any
from p48ray.checkpoint.header import TensorEntry, parse_header, read_header_bytes
from p48ray.checkpoint.index import (
    CONFIG_FILE,
    HEADER_THREADS,
    CheckpointIndex,
    open_checkpoint,
)
from p48ray.checkpoint.layout import EXPERT_NAME, PROJECTIONS, ModelLayout
from p48ray.checkpoint.modelopt import Form, GlobalScales, storage_in
from p48ray.checkpoint.modelopt_config import form_of
from p48ray.checkpoint.sparse_storage import Storage
from p48ray.errors import ConfigError
from p48ray.finished.forms import (
    check_form,
    check_source_is_comparable,
    global_scales_of,
    units_of,
)
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.run.output_layout import OutputShard, plan_output, unit_tensor_names
from p48ray.run.plan import WorkUnit, plan_units
from p48ray.stages.index_proof import (
    WEIGHT_SUFFIX,
    check_index,
    check_index_files,
    check_strangers,
    compare_index,
)
from p48ray.stages.linear_proof import Promise
from p48ray.stages.shard_proof import DAMAGE, header_digest
from p48ray.store.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcedCheck:
    """One planned shard beside its source. `source` and `promise` hold what this shard needs of
    them and no more: a message, not a model."""

    file: str
    size_bytes: int
    checkpoint: Store
    shard: OutputShard
    source: CheckpointIndex
    layout: ModelLayout
    promise: Promise


@dataclass(frozen=True, slots=True, kw_only=True)
class LoneCheck:
    """One file by the digests of the checkpoint's own manifest. units: those that lie in it, with
    their linears in shard order. untouched: SHA-256 by tensor. form: the dense tensors that it
    decodes to are what is checked; global_scales: of the linears, in ModelOpt's layout."""

    file: str
    size_bytes: int
    checkpoint: Store
    entries: Mapping[str, TensorEntry]
    units: tuple[tuple[WorkUnit, tuple[str, ...]], ...]
    untouched: Mapping[str, str]
    promise: Promise
    form: Form
    global_scales: GlobalScales = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignCheck:
    """One file of a checkpoint that others have compressed (finished.foreign): units whose first
    tensor lies in it, and its tensors outside the experts. `source` has their tensors alone."""

    file: str
    size_bytes: int
    source: CheckpointIndex
    layout: ModelLayout
    units: tuple[WorkUnit, ...]
    others: tuple[TensorEntry, ...]


ShardCheck = SourcedCheck | LoneCheck | ForeignCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a checkpoint is to be held to, and what is wrong with it before its data is read."""

    checkpoint: str
    compared_with_source: bool
    num_shards: int
    num_linears: int
    checks: tuple[ShardCheck, ...]
    problems: tuple[str, ...]
    file_problems: tuple[str, ...]


def survey_checkpoint(checkpoint: Store, source: Store | None) -> Survey:
    """Everything but the data.

    Raises: ConfigError when the folder has no manifest, ShardCorruptError when that is unsound,
        SourceError for an unsound source; whatever is wrong with the weights is in the survey.
    """
    manifest = read_manifest(checkpoint)
    form = announced_form(checkpoint)
    if source is not None:
        check_source_is_comparable(form)
    sizes = {
        info.key: info.size_bytes for info in checkpoint.list() if info.key.endswith(WEIGHT_SUFFIX)
    }
    problems, checks = (
        survey_alone(checkpoint, manifest, sizes, form)
        if source is None
        else survey_beside(checkpoint, source, manifest, sizes, storage_in(form))
    )
    return Survey(
        checkpoint=checkpoint.uri,
        compared_with_source=source is not None,
        num_shards=len(sizes),
        num_linears=len(manifest.relative_weight_errors),
        checks=tuple(checks),
        problems=tuple(problems),
        file_problems=(
            (*check_files(checkpoint, manifest), *check_strangers(checkpoint, manifest))
            if checks or source is None
            else ()
        ),  # another source's: nothing else is said
    )


def read_manifest(checkpoint: Store) -> CheckpointManifest:
    """p48ray.json. Raises: ConfigError where there is none, ShardCorruptError where it is
    unsound."""
    if checkpoint.head(MANIFEST_FILE) is None:
        raise ConfigError(
            f"{checkpoint.uri}: expected the checkpoint/ folder of a p48ray run, found no"
            f" {MANIFEST_FILE} in it; nor does {CONFIG_FILE} announce paired-4:8 experts in NVFP4"
            " with groups of 32, as others write them"
        )
    return CheckpointManifest.load(checkpoint, MANIFEST_FILE)


def announced_form(checkpoint: Store) -> Form:
    """By config.json; dense where that can not be read, which check_index_files reports. Raises:
    SourceError for an unknown sparse layout."""
    if check_index_files(checkpoint):
        return "dense"
    return form_of(json.loads(checkpoint.get(CONFIG_FILE)))


def promise_of(
    manifest: CheckpointManifest, linears: Mapping[str, float], units: Mapping[str, str]
) -> Promise:
    """What the manifest promises, for some linears and units."""
    return Promise(
        is_sparse=manifest.sparsity == "paired-4:8",
        scale_span=manifest.scale_span,
        weight_errors=linears,
        unit_sha256=units,
        shifts={name: manifest.shifts[name] for name in linears if name in manifest.shifts},
    )


def survey_beside(
    checkpoint: Store,
    source: Store,
    manifest: CheckpointManifest,
    sizes: Mapping[str, int],
    storage: Storage,
) -> tuple[list[str], list[SourcedCheck]]:
    """Every planned byte: the plan follows from the source's headers, two settings in the manifest
    and the storage.

    Args:
        checkpoint, source: stores, each rooted at its folder.
        manifest: of the checkpoint.
        sizes: bytes of every shard that is there, by file.
        storage: of the checkpoint.
    Returns: problems, and one check for each planned shard; none where the source is another.
    """
    index = open_checkpoint(source)
    if index.fingerprint != manifest.source_fingerprint:
        expected, found = manifest.source_fingerprint[:12], index.fingerprint[:12]
        return [
            f"{source.uri}: not the source of this checkpoint: expected fingerprint {expected},"
            f" found {found}"
        ], []
    layout = describe_any(index)
    shards = plan_output(
        plan_units(layout, manifest.experts_per_unit),
        manifest.max_shard_size,
        index,
        layout,
        storage,
    )
    checks = [
        sourced_check(checkpoint, index, layout, shard, manifest, sizes.get(shard.name, 0))
        for shard in shards
    ]
    return check_index(checkpoint, shards, layout), checks


def sourced_check(
    checkpoint: Store,
    index: CheckpointIndex,
    layout: ModelLayout,
    shard: OutputShard,
    manifest: CheckpointManifest,
    size_bytes: int,
) -> SourcedCheck:
    """The check of one planned shard.

    Args:
        checkpoint, manifest: as survey_beside takes them.
        index, layout: of the whole source.
        shard: as planned.
        size_bytes: of its file, 0 where there is none.
    """
    units = [s for s in shard.segments if isinstance(s, WorkUnit)]
    experts = [(u.layer, e) for u in units for e in u.experts]
    needed = [name for expert in experts for name in layout.expert_tensor_names(*expert)]
    claims = manifest.relative_weight_errors
    linears = [layout.expert_linear_name(*expert, p) for expert in experts for p in PROJECTIONS]
    return SourcedCheck(
        file=shard.name,
        size_bytes=size_bytes,
        checkpoint=checkpoint,
        shard=shard,
        source=replace(index, tensors={name: index.tensors[name] for name in needed}),
        layout=layout,
        promise=promise_of(
            manifest,
            {name: claims[name] for name in linears if name in claims},
            {u.id: manifest.unit_sha256[u.id] for u in units if u.id in manifest.unit_sha256},
        ),
    )


def survey_alone(
    checkpoint: Store, manifest: CheckpointManifest, sizes: Mapping[str, int], form: Form
) -> tuple[list[str], list[LoneCheck]]:
    """Headers against the index, and every tensor of the manifest in some file's header, in a form
    that fits.

    Args:
        checkpoint, manifest, sizes: as survey_beside takes them.
        form: of the checkpoint.
    Returns: problems, and one check for each file that is there.
    """
    problems = check_index_files(checkpoint)
    is_index_readable = not problems
    entries, unsound = read_headers(checkpoint, manifest, sorted(sizes))
    problems += unsound
    if is_index_readable:
        problems += compare_index(
            checkpoint,
            {e.name: e.file for e in entries.values()},
            sum(e.num_bytes for e in entries.values()),
        )
    units: dict[str, list[tuple[WorkUnit, tuple[str, ...]]]] = {file: [] for file in sizes}
    known: set[str] = set()
    scales = global_scales_of(manifest)
    for unit, linears in units_of(manifest):
        names = unit_tensor_names(linears, form)
        known |= set(names)
        wrong = [text for linear in linears for text in check_form(linear, entries, form)]
        problems += wrong
        files = sorted({entries[name].file for name in names}) if not wrong else []
        if len(files) == 1:
            units[files[0]].append((unit, tuple(linears)))
        elif files:
            problems.append(
                f"unit {unit.id}: expected its tensors in one file, found them in"
                f" {', '.join(files)}"
            )
    # experts behind the last layer (multi-token prediction) pass through, and are promised with the
    # untouched tensors
    stray = sorted(
        n
        for n in entries
        if EXPERT_NAME.fullmatch(n) and n not in known and n not in manifest.untouched_sha256
    )
    problems += [f"{name}: an expert tensor that the manifest does not know" for name in stray]
    problems += unexpected_tensors(manifest, entries, known)
    return problems, [
        lone_check(checkpoint, manifest, file, sizes[file], entries, units[file], form, scales)
        for file in sorted(sizes)
    ]


def read_headers(
    checkpoint: Store, manifest: CheckpointManifest, files: list[str]
) -> tuple[dict[str, TensorEntry], list[str]]:
    """Tensors of every file with a sound header, and what is wrong with the others'."""

    def read(file: str) -> tuple[dict[str, TensorEntry], list[str]]:
        try:
            raw, size_bytes = read_header_bytes(checkpoint, file)
            found = parse_header(file, raw, size_bytes)
        except DAMAGE as error:
            return {}, [str(error)]
        expected, digest = manifest.header_sha256.get(file), header_digest(raw)
        return found, (
            []
            if digest == expected
            else [f"{file}: header: expected SHA-256 {expected}, found {digest}"]
        )

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        read_files = list(pool.map(read, files))
    entries = {name: entry for found, _ in read_files for name, entry in found.items()}
    return entries, [problem for _, problems in read_files for problem in problems]


def lone_check(
    checkpoint: Store,
    manifest: CheckpointManifest,
    file: str,
    size_bytes: int,
    entries: Mapping[str, TensorEntry],
    units: list[tuple[WorkUnit, tuple[str, ...]]],
    form: Form,
    scales: GlobalScales,
) -> LoneCheck:
    """The check of one file.

    Args:
        checkpoint, manifest: as survey_beside takes them.
        file, size_bytes: its name and size.
        entries: tensors of all files by name.
        units: those that lie in the file, with their linears in shard order.
        form: of the checkpoint.
        scales: of all linears, in ModelOpt's layout.
    """
    of_units = [name for _, linears in units for name in unit_tensor_names(linears, form)]
    untouched = {
        n: digest
        for n, digest in manifest.untouched_sha256.items()
        if n in entries and entries[n].file == file
    }
    return LoneCheck(
        file=file,
        size_bytes=size_bytes,
        checkpoint=checkpoint,
        entries={name: entries[name] for name in (*of_units, *untouched)},
        units=tuple(units),
        untouched=untouched,
        promise=promise_of(
            manifest,
            {},
            {u.id: manifest.unit_sha256[u.id] for u, _ in units if u.id in manifest.unit_sha256},
        ),
        form=form,
        global_scales={linear: scales[linear] for _, linears in units for linear in linears}
        if scales
        else {},
    )


def unexpected_tensors(
    manifest: CheckpointManifest, entries: Mapping[str, TensorEntry], compressed: set[str]
) -> Iterator[str]:
    """Tensors that came over from the source: all there, and no other."""
    promised = manifest.untouched_sha256
    for name in sorted(promised.keys() - entries.keys()):
        yield f"{name}: missing"
    for name in sorted(entries.keys() - promised.keys() - compressed):
        if not EXPERT_NAME.fullmatch(name):
            yield f"{entries[name].file}: {name}: a tensor that the manifest does not know"


def check_files(checkpoint: Store, manifest: CheckpointManifest) -> list[str]:
    """The files beside the weights, and the manifest itself."""
    problems = []
    if manifest.sha256 != manifest.own_sha256():
        problems.append(
            f"{MANIFEST_FILE}: does not have the SHA-256 that it states: changed since it was"
            " written"
        )
    for name, digest in sorted(manifest.file_sha256.items()):
        if checkpoint.head(name) is None:
            problems.append(f"{name}: missing")
        elif (found := hashlib.sha256(checkpoint.get(name)).hexdigest()) != digest:
            problems.append(f"{name}: expected SHA-256 {digest}, found {found}")
    return problems
