"""Convert a finished checkpoint between dense and sparse storage, or to ModelOpt's layout and back,
shard by shard; the bytes of experts are re-ordered, and no weight is computed anew.

`survey_conversion` looks at everything but the data and makes one task a file; `convert_shard`
streams one file, wherever it runs, and holds every unit against the digest in p48ray.json;
`finish_conversion` writes the small files, the index last. A shard appears whole or not at all, and
a note in the target says of which checkpoint it is the conversion: so the same call goes on where
another was interrupted.

p48ray.json keeps the SHA-256 of every unit's dense form in all forms: it is what was verified, and
what other bytes must decode to. finished.form_change has what differs between them.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Literal

from p48ray.checkpoint.header import TensorEntry, encode_header, torch_dtype
from p48ray.checkpoint.index import CONFIG_FILE, CONFIG_KEY, INDEX_FILE
from p48ray.checkpoint.modelopt import FORM_WORDS, Form
from p48ray.checkpoint.modelopt_config import HF_QUANT_FILE, form_of
from p48ray.checkpoint.output_config import index_json
from p48ray.checkpoint.sparse_storage import TensorRow
from p48ray.checkpoint.storage_stream import StoredUnit, recoded_unit
from p48ray.errors import ConfigError, ShardCorruptError, SourceError
from p48ray.finished.form_change import (
    check_forms_fit,
    check_restored,
    check_scalars,
    index_in,
    raise_for_problems,
    rows_in,
    small_files,
)
from p48ray.finished.forms import check_forms, global_scales_of, units_of
from p48ray.finished.survey import check_files, read_headers, read_manifest
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest, ModelOptForm
from p48ray.run.cleanup import ABANDONED_S
from p48ray.run.output_layout import unit_tensor_names
from p48ray.run.records import Record
from p48ray.stages.index_proof import check_index_files
from p48ray.store.base import ByteRange, Piece, Store
from p48ray.store.open import is_within

NOTE_FILE = "p48ray-convert.json"


class ConversionNote(Record):
    """Lies in a folder for as long as a conversion fills it."""

    schema_version: Literal[1] = 1
    checkpoint_sha256: str
    storage: Form


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConversion:
    """One file to convert: a message for whoever does it. parts: in file order; a bare entry is
    copied."""

    file: str
    size_bytes: int
    result_bytes: int
    checkpoint: Store
    target: Store
    to: Form
    header: bytes
    parts: tuple[StoredUnit | TensorEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """All that is to be written. files: the small ones, by name, the index apart. Bytes of experts
    and of all tensors, before and after."""

    checkpoint: Store
    target: Store
    to: Form
    shards: tuple[ShardConversion, ...]
    files: Mapping[str, bytes]
    index: bytes
    note: ConversionNote
    expert_bytes: tuple[int, int]
    all_bytes: tuple[int, int]
    is_done: bool


def survey_conversion(checkpoint: Store, target: Store, to: Form) -> Conversion:
    """Everything but the data. Writes nothing.

    Raises: ConfigError where there is no finished checkpoint, where it has the form already, or
        where the target holds anything else; SourceError, naming file and tensor, for what that
        form can not hold, and for a checkpoint that is not what its manifest says.
    """
    check_target_is_apart(checkpoint, target)
    manifest = read_manifest(checkpoint)
    raise_for_problems(
        checkpoint, check_index_files(checkpoint) or check_files(checkpoint, manifest)
    )
    config, index = (json.loads(checkpoint.get(name)) for name in (CONFIG_FILE, INDEX_FILE))
    have = form_of(config)
    check_forms_fit(checkpoint, manifest, have, to)
    entries, problems = read_headers(
        checkpoint, manifest, sorted(set(index["weight_map"].values()))
    )
    linears = manifest.relative_weight_errors
    raise_for_problems(checkpoint, check_forms(linears, entries, have) + problems)
    scales = check_scalars(checkpoint, manifest, entries, have, to)
    shards = tuple(shard_conversions(checkpoint, target, manifest, entries, have, to))
    before, after = (
        sizes_of(rows, linears)
        for rows in (all_rows(entries), rows_in(to, all_rows(entries), linears, have))
    )
    files = {name: checkpoint.get(name) for name in manifest.file_sha256}
    files |= small_files(checkpoint, manifest, config, have, to)
    if have == "modelopt":
        del files[HF_QUANT_FILE]
    files[INDEX_FILE] = index_json(index_in(to, index, linears, have, after[0]))
    check_restored(
        checkpoint,
        INDEX_FILE,
        index_json(index_in(have, json.loads(files[INDEX_FILE]), linears, to, before[0])),
    )
    changed = manifest.model_copy(
        update={
            "header_sha256": {s.file: hashlib.sha256(s.header).hexdigest() for s in shards},
            "file_sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            "modelopt": ModelOptForm(
                quantization_config=json.dumps(config[CONFIG_KEY], ensure_ascii=False),
                global_scales=scales,
            )
            if to == "modelopt"
            else None,
        }
    ).sealed()
    note = ConversionNote(checkpoint_sha256=manifest.sha256, storage=to)
    return Conversion(
        checkpoint=checkpoint,
        target=target,
        to=to,
        shards=shards,
        index=files.pop(INDEX_FILE),
        files=files | {MANIFEST_FILE: changed.to_json()},
        note=note,
        expert_bytes=(before[1], after[1]),
        all_bytes=(before[0], after[0]),
        is_done=check_target(target, lambda: target.get(MANIFEST_FILE) == changed.to_json(), note),
    )


def check_target_is_apart(checkpoint: Store, target: Store) -> None:
    """Raises: ConfigError for a target inside the checkpoint."""
    if is_within(target, checkpoint):
        raise ConfigError(
            f"{target.uri}: expected a folder apart from the checkpoint {checkpoint.uri}, found one"
            " in it; nothing was written"
        )


def check_target(target: Store, is_it: Callable[[], bool], note: ConversionNote) -> bool:
    """Whether the conversion is there already.

    Args:
        target: rooted at the folder.
        is_it: whether the p48ray.json that is there is the conversion's.
        note: that the conversion would leave there while it goes on.
    Raises: ConfigError where the target holds anything but this conversion, finished or not.
    """
    held = {info.key for info in target.list()}
    if NOTE_FILE in held:
        found = ConversionNote.load(target, NOTE_FILE)
        if found == note:
            return False
        raise ConfigError(
            f"{target.uri}: expected a new or empty folder, found an unfinished conversion to"
            f" {FORM_WORDS[found.storage]} of another checkpoint"
            f" ({found.checkpoint_sha256[:12]}, not {note.checkpoint_sha256[:12]})"
        )
    if held and not (held >= {MANIFEST_FILE, INDEX_FILE} and is_it()):
        raise ConfigError(
            f"{target.uri}: expected a new or empty folder, found {min(held)} in it; nothing was"
            " written"
        )
    return bool(held)


def shard_conversions(
    checkpoint: Store,
    target: Store,
    manifest: CheckpointManifest,
    entries: Mapping[str, TensorEntry],
    have: Form,
    to: Form,
) -> Iterator[ShardConversion]:
    """One a file, with header and size of what it becomes.

    Args:
        checkpoint, target: stores, each rooted at its folder.
        manifest: of the checkpoint.
        entries: every tensor of the checkpoint by name: file by file, and in header order.
        have, to: the form that it has, and the one that is wanted.
    Raises: SourceError for a file that is not laid out as p48ray lays it out.
    """
    linears, scales = manifest.relative_weight_errors, global_scales_of(manifest)
    unit_names = {unit.id: unit_tensor_names(names, have) for unit, names in units_of(manifest)}
    unit_of = {name: unit for unit, names in unit_names.items() for name in names}
    for file, of_file in groupby(entries.values(), key=lambda e: e.file):
        in_order = list(of_file)
        rows = [(e.name, e.dtype, e.shape) for e in in_order]
        if hashlib.sha256(encode_header(rows)).hexdigest() != manifest.header_sha256[file]:
            raise SourceError(
                f"{checkpoint.uri}/{file}: header: expected it as p48ray writes it, found another"
                " form, which could not be restored"
            )
        parts: list[StoredUnit | TensorEntry] = []
        for unit, group in groupby(in_order, key=lambda e: unit_of.get(e.name)):
            found = tuple(group)
            if unit is None:
                parts += found
                continue
            if tuple(e.name for e in found) != tuple(unit_names[unit]):
                raise SourceError(
                    f"{checkpoint.uri}/{file}: unit {unit}: expected its tensors one after another"
                    " in a unit's order, found another"
                )
            sha256 = manifest.unit_sha256.get(unit, "none")
            parts.append(
                StoredUnit(
                    id=unit,
                    sha256=sha256,
                    named_in=MANIFEST_FILE,
                    store=checkpoint,
                    entries=found,
                    form=have,
                    global_scales={n: scales[n] for n in scales.keys() & linears_of(found)},
                )
            )
        new_rows = rows_in(to, rows, linears, have)
        header = encode_header(new_rows)
        yield ShardConversion(
            file=file,
            size_bytes=len(encode_header(rows)) + sum(e.num_bytes for e in in_order),
            result_bytes=len(header) + sum(map(size_of, new_rows)),
            checkpoint=checkpoint,
            target=target,
            to=to,
            header=header,
            parts=tuple(parts),
        )


def convert_shard(shard: ShardConversion) -> int:
    """Write one file of the target, unless it is there; returns its size. One unit at a time is
    held in memory.

    Raises: SourceError, naming the tensor, for what its form can not hold; ShardCorruptError for
        bytes that are not those that were verified.
    """
    held = shard.target.head(shard.file)
    if held is None or held.size_bytes != shard.result_bytes:
        written = shard.target.compose(shard.file, converted_pieces(shard))
        if written != shard.result_bytes:
            shard.target.delete(shard.file)
            raise ShardCorruptError(
                f"{shard.target.uri}/{shard.file}: expected {shard.result_bytes} bytes, composed"
                f" {written}"
            )
    return shard.result_bytes


def converted_pieces(shard: ShardConversion) -> Iterator[Piece]:
    """Header, units and copied tensors in file order."""
    yield shard.header
    for part in shard.parts:
        if isinstance(part, TensorEntry):
            yield ByteRange(shard.checkpoint, part.file, part.start, part.num_bytes)
        else:
            yield from recoded_unit(part, shard.to)


def begin_conversion(target: Store, note: ConversionNote) -> None:
    """Claim the target, and clear away what killed writers left there."""
    target.put(NOTE_FILE, note.to_json())
    target.sweep(ABANDONED_S)


def finish_conversion(conversion: Conversion, card: bytes | None) -> None:
    """The files beside the shards; the index last, and then the note goes. card: README.md, where
    there is one."""
    small = {**conversion.files, **({"README.md": card} if card is not None else {})}
    for name, data in {**small, INDEX_FILE: conversion.index}.items():
        conversion.target.put(name, data)
    conversion.target.delete(NOTE_FILE)


def linears_of(entries: tuple[TensorEntry, ...]) -> set[str]:
    return {e.name.rpartition(".")[0] for e in entries}


def all_rows(entries: Mapping[str, TensorEntry]) -> list[TensorRow]:
    return [(e.name, e.dtype, e.shape) for e in entries.values()]


def sizes_of(rows: list[TensorRow], linears: Collection[str]) -> tuple[int, int]:
    """Bytes of all tensors, and of those linears' alone."""
    return sum(map(size_of, rows)), sum(
        size_of(row) for row in rows if row[0].rpartition(".")[0] in linears
    )


def size_of(row: TensorRow) -> int:
    return prod(row[2]) * torch_dtype(row[1]).itemsize
