"""A checkpoint that others have made paired-4:8 sparse (checkpoint.foreign) in dense storage with a
p48ray.json, file by file, so that stock servers load it, and every command here takes it.

`survey_foreign_conversion` looks at everything but the data; `convert_foreign_shard` writes one
file of the target, wherever it runs, and leaves a record of what it has written; with all records
`finish_foreign_conversion` writes the small files, the index last. The same call goes on where
another was interrupted: a file whose record is there is not made again.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from p48ray.checkpoint.expert_checks import FOREIGN_GROUP, check_divisibility
from p48ray.checkpoint.families import describe_foreign
from p48ray.checkpoint.foreign import Folding
from p48ray.checkpoint.fp8 import Fp8Weight
from p48ray.checkpoint.header import encode_header, unmarked
from p48ray.checkpoint.index import (
    CONFIG_FILE,
    INDEX_FILE,
    CheckpointIndex,
    open_checkpoint,
)
from p48ray.checkpoint.layout import ModelLayout
from p48ray.checkpoint.modelopt import FORM_WORDS, Form
from p48ray.checkpoint.output_config import config_json, index_json, output_config
from p48ray.checkpoint.storage_stream import dense_sha256
from p48ray.checkpoint.tensors import tensor_bytes
from p48ray.config import OutputConfig
from p48ray.errors import ConfigError, ShardCorruptError
from p48ray.finished.convert import NOTE_FILE, ConversionNote, check_target, check_target_is_apart
from p48ray.finished.foreign_units import EXPERTS_PER_UNIT, dense_unit
from p48ray.numerics.solution import PAIRED_48
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest, ForeignOrigin
from p48ray.run.output_layout import (
    OutputShard,
    plan_output,
    shard_rows,
    unit_bytes,
)
from p48ray.run.plan import WorkUnit, plan_units
from p48ray.run.records import Record
from p48ray.stages.read_ahead import chunks, readers
from p48ray.stages.reduce import file_bytes
from p48ray.store.base import Piece, Store

MAX_SHARD_SIZE: int = OutputConfig.model_fields["max_shard_size"].default


class ConvertedShard(Record):
    """What a finished file of the target holds; lies beside it until all are finished."""

    schema_version: Literal[1] = 1
    source_fingerprint: str
    header_sha256: str
    unit_sha256: dict[str, str]
    untouched_sha256: dict[str, str]
    relative_weight_errors: dict[str, float]
    foldings: dict[str, Folding]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignShard:
    """One file to write: a message for whoever does it. `source` has this file's tensors alone.
    size_bytes: of the result."""

    file: str
    size_bytes: int
    source: CheckpointIndex
    layout: ModelLayout
    shard: OutputShard
    target: Store

    @property
    def record(self) -> str:
        """Key of its ConvertedShard."""
        return f"{NOTE_FILE.removesuffix('.json')}.{self.file}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignConversion:
    """All that is to be written. Bytes of experts and of all tensors, before and after."""

    source: CheckpointIndex
    layout: ModelLayout
    target: Store
    shards: tuple[ForeignShard, ...]
    note: ConversionNote
    expert_bytes: tuple[int, int]
    all_bytes: tuple[int, int]
    is_done: bool


def survey_foreign_conversion(checkpoint: Store, target: Store, to: Form) -> ForeignConversion:
    """Everything but the data. Writes nothing.

    Raises: ConfigError for another form than dense storage, and where the target holds anything
        else; SourceError, naming file and key, for a checkpoint that is not whole, or not of the
        layout that checkpoint.foreign describes.
    """
    check_target_is_apart(checkpoint, target)
    if to != "dense":
        raise ConfigError(
            f"{checkpoint.uri}: expected --storage dense for a checkpoint without a"
            f" {MANIFEST_FILE}, found {FORM_WORDS[to]}; what that writes can be converted further;"
            " nothing was written"
        )
    source = open_checkpoint(checkpoint)
    layout = describe_foreign(source)
    check_divisibility(layout, FOREIGN_GROUP)
    units = plan_units(layout, EXPERTS_PER_UNIT)
    shards = plan_output(units, MAX_SHARD_SIZE, source, layout)
    before, expert_bytes = source.num_bytes, source.expert_bytes(layout)
    after = sum(unit_bytes(layout, unit) for unit in units)
    note = ConversionNote(checkpoint_sha256=source.fingerprint, storage=to)
    return ForeignConversion(
        source=source,
        layout=layout,
        target=target,
        shards=tuple(
            ForeignShard(
                file=shard.name,
                size_bytes=file_bytes(shard, layout),
                source=tensors_of(source, layout, shard),
                layout=layout,
                shard=shard,
                target=target,
            )
            for shard in shards
        ),
        note=note,
        expert_bytes=(expert_bytes, after),
        all_bytes=(before, before - expert_bytes + after),
        is_done=check_target(target, lambda: is_made_of(target, source.fingerprint), note),
    )


def is_made_of(target: Store, fingerprint: str) -> bool:
    """Whether a folder's p48ray.json says that it is the conversion of that checkpoint."""
    manifest = CheckpointManifest.load(target, MANIFEST_FILE)
    return manifest.foreign is not None and manifest.source_fingerprint == fingerprint


def tensors_of(source: CheckpointIndex, layout: ModelLayout, shard: OutputShard) -> CheckpointIndex:
    """The index with what one file needs of it, and no more."""
    needed = {
        name: source.tensors[name]
        for segment in shard.segments
        for name in (
            [n for e in segment.experts for n in layout.expert_tensor_names(segment.layer, e)]
            if isinstance(segment, WorkUnit)
            else [segment.name]
        )
    }
    return replace(source, tensors=needed, config={}, sidecars=(), left_behind=())


def is_converted(shard: ForeignShard, held: Mapping[str, int]) -> bool:
    """Whether a file and its record are there. held: bytes of what the target holds, by key."""
    return shard.record in held and held.get(shard.file) == shard.size_bytes


def convert_foreign_shard(shard: ForeignShard) -> int:
    """Write one file of the target and then its record; returns the file's size. One unit at a time
    is held in memory.

    Raises: SourceError, naming file and tensor, for experts that are not what they should be; the
        file is then not there.
    """
    found = ShardContents({}, {}, {}, {})
    written = shard.target.compose(shard.file, foreign_pieces(shard, found))
    if written != shard.size_bytes:
        shard.target.delete(shard.file)
        raise ShardCorruptError(
            f"{shard.target.uri}/{shard.file}: expected {shard.size_bytes} bytes, composed"
            f" {written}"
        )
    record = ConvertedShard(
        source_fingerprint=shard.source.fingerprint,
        header_sha256=hashlib.sha256(shard_header(shard)).hexdigest(),
        unit_sha256=found.units,
        untouched_sha256=found.untouched,
        relative_weight_errors=found.errors,
        foldings=found.foldings,
    )
    shard.target.put(shard.record, record.to_json())
    return shard.size_bytes


@dataclass(frozen=True, slots=True)
class ShardContents:
    """Filled while a file is written: SHA-256 of units and of other tensors, weight errors and
    foldings by linear."""

    units: dict[str, str]
    untouched: dict[str, str]
    errors: dict[str, float]
    foldings: dict[str, Folding]


def shard_header(shard: ForeignShard) -> bytes:
    return encode_header(shard_rows(shard.shard, shard.layout))


def foreign_pieces(shard: ForeignShard, found: ShardContents) -> Iterator[Piece]:
    """Header, units and copied tensors in file order. found: filled on the way."""
    yield shard_header(shard)
    with readers(shard.size_bytes) as threads:
        for segment in shard.shard.segments:
            if isinstance(segment, WorkUnit):
                unit = dense_unit(shard.source, shard.layout, segment)
                found.units[segment.id] = dense_sha256(unit.tensors)
                found.errors.update(unit.errors)
                found.foldings.update(unit.foldings)
                for tensor in unit.tensors.values():
                    yield tensor_bytes(tensor)
                continue
            assert not isinstance(segment, Fp8Weight)  # describe_foreign refuses them
            digest = hashlib.sha256()
            for data in chunks(shard.source.store, segment, threads.reads):
                digest.update(data)
                yield data
            found.untouched[segment.name] = digest.hexdigest()


def finish_foreign_conversion(
    conversion: ForeignConversion, records: list[ConvertedShard], card: bytes
) -> None:
    """The files beside the shards; the index last, and then notes and records go.

    Args:
        conversion: whose shards are all there.
        records: of all shards, in order.
        card: README.md.
    """
    source, layout, target = conversion.source, conversion.layout, conversion.target
    files = {name: unmarked(name, source.store.get(name)) for name in source.sidecars}
    files[CONFIG_FILE] = config_json(output_config(source, layout))
    weight_map = {
        name: s.file for s in conversion.shards for name, _, _ in shard_rows(s.shard, layout)
    }
    index = index_json(
        {
            "metadata": {"total_size": conversion.all_bytes[1]},
            "weight_map": dict(sorted(weight_map.items())),
        }
    )
    manifest = foreign_manifest(conversion, records, {**files, INDEX_FILE: index})
    small = {**files, MANIFEST_FILE: manifest.to_json(), "README.md": card, INDEX_FILE: index}
    for name, data in small.items():
        target.put(name, data)
    for shard in conversion.shards:
        target.delete(shard.record)
    target.delete(NOTE_FILE)


def foreign_manifest(
    conversion: ForeignConversion, records: list[ConvertedShard], files: Mapping[str, bytes]
) -> CheckpointManifest:
    """p48ray.json, sealed.

    Args:
        conversion, records: as finish_foreign_conversion takes them.
        files: beside the shards, by name; the index among them.
    """
    units = {unit: digest for r in records for unit, digest in r.unit_sha256.items()}
    return CheckpointManifest(
        plan_digest="",
        source_fingerprint=conversion.source.fingerprint,
        sparsity=PAIRED_48,
        scale_span=FOREIGN_GROUP,
        activation_group=FOREIGN_GROUP,
        experts_per_unit=EXPERTS_PER_UNIT,
        max_shard_size=MAX_SHARD_SIZE,
        relative_weight_errors=errors_of(records),
        unit_sha256=units,
        untouched_sha256={
            name: digest for r in records for name, digest in r.untouched_sha256.items()
        },
        header_sha256={
            s.file: r.header_sha256 for s, r in zip(conversion.shards, records, strict=True)
        },
        file_sha256={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        foreign=ForeignOrigin(
            storage=conversion.layout.expert_storage, foldings=foldings_of(records)
        ),
    ).sealed()


def errors_of(records: list[ConvertedShard]) -> dict[str, float]:
    """|W - Q|^2 / |W|^2 of all linears, by module name."""
    return {name: error for r in records for name, error in r.relative_weight_errors.items()}


def foldings_of(records: list[ConvertedShard]) -> dict[str, Folding]:
    """Of all linears, by module name."""
    return {name: folding for r in records for name, folding in r.foldings.items()}
