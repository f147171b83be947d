"""Verify: re-read a finished checkpoint as a stranger and compare it with what was promised.

Per unit: the bytes that its manifest names. Per tensor: patterns legal, no minus zero, scales
finite and positive, gate and up agreeing on their global scales, plain weight error against the
source as the unit's manifest claims. Untouched tensors byte-equal, FP8 ones equal to the source's
as BF16. Over all: exactly the planned set of tensors, in the shards that the index names, read
alike by safetensors where a shard is a file.

What is checked of one linear is in linear_proof.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p48ray.checkpoint.decode import decode_expert_on, decode_plain
from p48ray.checkpoint.finite_values import FiniteCheck, NotFinite
from p48ray.checkpoint.fp8 import Fp8Weight, PlainTensor
from p48ray.checkpoint.header import TensorEntry, parse_header, read_header_bytes
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.checkpoint.sparse_storage import Storage
from p48ray.checkpoint.storage_stream import dense_sha256
from p48ray.checkpoint.tensors import read_together, tensor_view
from p48ray.errors import ObjectMissingError, ShardCorruptError, SourceError
from p48ray.run.output_layout import OutputShard, shard_rows, unit_rows
from p48ray.run.plan import WorkUnit
from p48ray.stages.linear_proof import Promise, check_expert_tensors
from p48ray.stages.read_ahead import (
    Readers,
    ReadUnit,
    compare_bytes,
    read_originals,
    read_unit,
    readers,
    tensor_digest,
)
from p48ray.store.base import Store
from p48ray.store.view import local_path

CPU = torch.device("cpu")
# findings; a store that is away or refuses says nothing about the checkpoint
DAMAGE = (SourceError, ShardCorruptError, ObjectMissingError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found in one output shard: problems in words, digests for the checkpoint's own
    manifest, and the units that are no better in the shard that they were stitched from. notes: of
    values that are not finite, and are so in the source."""

    problems: list[str]
    notes: tuple[str, ...] = ()
    header_sha256: str = ""
    untouched_sha256: Mapping[str, str] = field(default_factory=dict)
    unsound_units: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnitProblems:
    """Of one unit, in words. damage: its bytes are not those that were stored. content: what they
    hold is not what was promised."""

    damage: list[str]
    content: list[str]

    @property
    def all(self) -> list[str]:
        return [*self.damage, *self.content]

    @property
    def is_unsound(self) -> bool:
        """To stitch it again would not help."""
        return bool(self.content) and not self.damage


def verify_shard(
    checkpoint: Store,
    source: CheckpointIndex,
    layout: ModelLayout,
    shard: OutputShard,
    promise: Promise,
    device: torch.device = CPU,
) -> Findings:
    """Read one output shard through, beside its source.

    Args:
        checkpoint: rooted at the checkpoint folder.
        source: with at least the tensors of this shard's experts.
        layout: of the source.
        shard: as the plan has it.
        promise: for the linears and units in it.
        device: where units and their originals are decoded and compared; what travels there is what
            is stored. Hashes are made on the CPU.
    Cost: memory for three units and the packed originals of their experts. Threads that read and
        hash, beside the one that computes.
    """
    try:
        raw, size_bytes = read_header_bytes(checkpoint, shard.name)
        entries = parse_header(shard.name, raw, size_bytes)
    except DAMAGE as error:
        return Findings(problems=[str(error)])
    problems = list(compare_rows(shard, shard_rows(shard, layout), entries))
    problems += compare_with_safetensors(checkpoint, shard.name, entries)
    if problems:
        return Findings(problems=problems)
    digests: dict[str, str] = {}
    unsound: list[str] = []
    notes: list[str] = []
    with readers(size_bytes) as threads:

        def look(segment: WorkUnit | PlainTensor) -> ReadUnit | ReadPlain:
            if isinstance(segment, WorkUnit):
                stored = [entries[name] for name, _, _ in unit_rows(layout, segment, shard.storage)]
                return read_unit(
                    checkpoint,
                    stored,
                    shard.storage,
                    partial(read_originals, source, layout, segment),
                )
            return read_plain_tensor(
                checkpoint, entries[segment.name], source.store, segment, threads
            )

        for segment, found in threads.in_order(look, shard.segments):
            if isinstance(segment, WorkUnit):
                assert isinstance(found, ReadUnit)
                experts = (
                    (
                        {p: layout.expert_linear_name(segment.layer, e, p) for p in PROJECTIONS},
                        decode_expert_on(device, source, layout, segment.layer, e, found.originals),
                    )
                    for e in segment.experts
                )
                unit = check_unit(
                    shard.name, segment.id, found, experts, promise, shard.storage, threads, device
                )
                problems += unit.all
                unsound += [segment.id] if unit.is_unsound else []
                continue
            assert isinstance(found, ReadPlain)
            digests[segment.name] = found.digest
            where, bad = f"{shard.name}: {segment.name}", found.not_finite
            if difference := plain_difference(segment, found, device):
                holds = f"; holds {bad}" if bad else ""
                problems.append(f"{where}: {difference} ({segment.file}){holds}")
            elif bad:
                notes.append(f"{where}: holds {bad}, as in the source ({segment.file})")
    return Findings(
        problems=problems,
        notes=tuple(notes),
        header_sha256=header_digest(raw),
        untouched_sha256=digests,
        unsound_units=tuple(unsound),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlain:
    """A tensor outside the experts: its SHA-256, values that are not finite, whether its bytes are
    the source's, or for FP8 what the source stores."""

    digest: str
    not_finite: NotFinite
    is_same: bool = False
    stored: Mapping[str, Tensor] = field(default_factory=dict)


def read_plain_tensor(
    checkpoint: Store, entry: TensorEntry, source: Store, original: PlainTensor, threads: Readers
) -> ReadPlain:
    """Read a tensor outside the experts and hold it against the source's.

    Args:
        checkpoint, entry: where it lies.
        source, original: the same of the source.
        threads: those of its `reads` read.
    """
    values = FiniteCheck(entry.dtype, entry.shape)
    if isinstance(original, Fp8Weight):
        digest = tensor_digest(checkpoint, entry, threads.reads, values)
        return ReadPlain(
            digest=digest,
            not_finite=values.found,
            stored=read_together(source, [original.weight, original.scale_inv]),
        )
    is_same, digest = compare_bytes(checkpoint, entry, source, original, threads.reads, values)
    return ReadPlain(digest=digest, not_finite=values.found, is_same=is_same)


def plain_difference(segment: PlainTensor, found: ReadPlain, device: torch.device) -> str | None:
    """How a tensor outside the experts differs from the source's; None where it does not."""
    if not isinstance(segment, Fp8Weight):
        return None if found.is_same else "bytes differ from the source's"
    there = {name: tensor.to(device) for name, tensor in found.stored.items()}
    expected = tensor_view(decode_plain(there, [segment])[segment.name])
    if found.digest == hashlib.sha256(expected).hexdigest():
        return None
    return "values differ from the source's FP8 weight as BF16"


def header_digest(raw: bytes) -> str:
    """SHA-256 of a safetensors header as it lies in the file: eight bytes of length, then the
    JSON."""
    return hashlib.sha256(len(raw).to_bytes(8, "little") + raw).hexdigest()


def check_unit(
    file: str,
    unit_id: str,
    found: ReadUnit,
    experts: Iterable[tuple[Mapping[str, str], Mapping[str, Tensor] | None]],
    promise: Promise,
    storage: Storage,
    threads: Readers,
    device: torch.device = CPU,
) -> UnitProblems:
    """Every check of one unit. First, the bytes are those that the unit stored: the weight error
    alone can not tell, because one wrong code in a million moves it by less than rounding.

    Args:
        file, unit_id: for messages; the promise knows the unit by its id.
        found: as read, in the order of unit_rows, so that dense tensors serialize to the unit's own
            shard.
        experts, promise: as check_expert_tensors takes them.
        storage: of `found`.
        threads: of the shard; one hashes the dense form of a sparse unit.
        device: where it is decoded and checked; the originals lie there too.
    """
    try:
        tensors = found.dense(storage, device)
    except SourceError as error:
        return UnitProblems([f"{file}: unit {unit_id}: {error}"], [])
    digest: Future[str] | None = (
        threads.segments.submit(dense_sha256, tensors) if found.digest is None else None
    )
    problems = check_expert_tensors(experts, tensors, promise)
    sha256, claim = digest.result() if digest else found.digest, promise.unit_sha256.get(unit_id)
    if sha256 == claim:
        return UnitProblems([], problems)
    damage = (
        f"{file}: unit {unit_id}: expected the bytes with SHA-256 {claim} that its manifest names,"
        f" found {sha256}"
    )
    return UnitProblems([damage], problems)


def compare_rows(
    shard: OutputShard,
    rows: list[tuple[str, str, tuple[int, ...]]],
    found: Mapping[str, TensorEntry],
) -> Iterator[str]:
    planned = {name: (dtype, shape) for name, dtype, shape in rows}
    for name in sorted(planned.keys() - found.keys()):
        yield f"{shard.name}: {name}: missing"
    for name in sorted(found.keys() - planned.keys()):
        yield f"{shard.name}: {name}: not planned"
    for name in sorted(planned.keys() & found.keys()):
        if planned[name] != (found[name].dtype, tuple(found[name].shape)):
            yield (
                f"{shard.name}: {name}: expected {planned[name]}, found"
                f" {(found[name].dtype, tuple(found[name].shape))}"
            )


def compare_with_safetensors(
    checkpoint: Store, file: str, entries: Mapping[str, TensorEntry]
) -> Iterator[str]:
    """What the library that servers load with says of the header, where the shard is a file of this
    machine.

    Args:
        entries: tensors as this package reads them.
    """
    path = local_path(checkpoint, file)
    if path is None:
        return
    try:
        with safe_open(path, framework="pt") as opened:
            names = set(opened.keys())
            for name in sorted(names ^ entries.keys()):
                reader = "safetensors" if name in names else "p48ray"
                yield f"{file}: {name}: only {reader} finds this tensor"
            for name in sorted(names & entries.keys()):
                found = opened.get_slice(name)
                theirs = (found.get_dtype(), tuple(found.get_shape()))
                ours = (entries[name].dtype, tuple(entries[name].shape))
                if theirs != ours:
                    yield f"{file}: {name}: expected {ours}, safetensors reads {theirs}"
    except (SafetensorError, OSError) as error:
        yield f"{file}: safetensors does not read it: {error}"
