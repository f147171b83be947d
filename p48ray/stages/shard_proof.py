"""Verify: re-read a finished checkpoint as a stranger and compare it with what was promised.

Per unit: the bytes that its manifest names. Per tensor: patterns legal, no minus zero, scales
finite and positive, gate and up agreeing on their global scales, plain weight error against the
source as the unit's manifest claims. Untouched tensors byte-equal, FP8 ones equal to the source's
as BF16. Over all: exactly the planned set of tensors, in the shards that the index names, read
alike by safetensors where a shard is a file.

Legend: O out, B packed bytes (two inputs each), G scale groups (16 inputs each).
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from p48ray.checkpoint.decode import decode_expert_on, decode_plain
from p48ray.checkpoint.fp8 import Fp8Weight, PlainTensor
from p48ray.checkpoint.header import TensorEntry, parse_header, read_header_bytes
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.checkpoint.sparse_storage import Storage
from p48ray.checkpoint.storage_stream import dense_sha256
from p48ray.checkpoint.tensors import read_together, tensor_view
from p48ray.errors import ObjectMissingError, ShardCorruptError, SourceError
from p48ray.numerics import nvfp4, paired48
from p48ray.numerics.relative_errors import relative_weight_error
from p48ray.run.output_layout import TENSOR_SUFFIXES, OutputShard, shard_rows, unit_rows
from p48ray.run.plan import WorkUnit
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

# relative; the manifest's error was summed on the solver's device, this one here
CLAIM_TOLERANCE = 1e-3
CPU = torch.device("cpu")
# findings; a store that is away or refuses says nothing about the checkpoint
DAMAGE = (SourceError, ShardCorruptError, ObjectMissingError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a checkpoint's linears are held to. `weight_errors` and `input_scales` by module name,
    `unit_sha256` by unit id; what is in none of them claims nothing."""

    is_sparse: bool
    scale_span: int
    weight_errors: Mapping[str, float]
    unit_sha256: Mapping[str, str]
    input_scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found in one output shard: problems in words, digests for the checkpoint's own
    manifest, and the units that are no better in the shard that they were stitched from."""

    problems: list[str]
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
            if difference := plain_difference(segment, found, device):
                problems.append(f"{shard.name}: {segment.name}: {difference} ({segment.file})")
    return Findings(
        problems=problems,
        header_sha256=header_digest(raw),
        untouched_sha256=digests,
        unsound_units=tuple(unsound),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlain:
    """A tensor outside the experts: its SHA-256, whether its bytes are the source's, or for FP8
    what the source stores."""

    digest: str
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
    if isinstance(original, Fp8Weight):
        digest = tensor_digest(checkpoint, entry, threads.reads)
        return ReadPlain(
            digest=digest, stored=read_together(source, [original.weight, original.scale_inv])
        )
    is_same, digest = compare_bytes(checkpoint, entry, source, original, threads.reads)
    return ReadPlain(digest=digest, is_same=is_same)


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


def check_expert_tensors(
    experts: Iterable[tuple[Mapping[str, str], Mapping[str, Tensor] | None]],
    tensors: Mapping[str, Tensor],
    promise: Promise,
) -> list[str]:
    """Every check of a unit's experts, computed where the tensors are and brought to the CPU in one
    transfer.

    Args:
        experts: for each, projection -> module name, and projection -> the source's weight where
            that is to be compared; asked for one at a time.
    """
    named: list[tuple[Mapping[str, str], bool]] = []
    measured: list[Tensor] = []
    for names, originals in experts:
        named.append((names, originals is not None))
        for projection, name in names.items():
            linear = {suffix: tensors[f"{name}.{suffix}"] for suffix in TENSOR_SUFFIXES}
            measured.append(
                measure_linear(
                    linear, originals[projection] if originals is not None else None, promise
                )
            )
    facts = iter(
        [LinearFacts(*values) for values in torch.stack(measured).tolist()] if measured else []
    )
    problems: list[str] = []
    for names, is_compared in named:
        problems += expert_problems(names, {p: next(facts) for p in names}, is_compared, promise)
    return problems


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """What the checks of one linear go by, as numbers of a device in float64, which holds each of
    them exactly. Flags are 0 or 1."""

    weight_global_scale: float
    input_global_scale: float
    are_scales_sound: float
    are_spans_equal: float
    has_minus_zero: float
    num_illegal: float
    weight_error: float


def measure_linear(
    linear: Mapping[str, Tensor], original: Tensor | None, promise: Promise
) -> Tensor:
    """LinearFacts as a tensor (7,) on the linear's device: nothing here waits for that. original:
    the source's weight, or None (error 0)."""
    scale_OG, packed_OB = linear["weight_scale"].float(), linear["weight_packed"]
    yes, none = torch.ones((), device=packed_OB.device), torch.zeros((), device=packed_OB.device)
    facts = [linear[suffix].reshape(()) for suffix in ("weight_global_scale", "input_global_scale")]
    facts.append((torch.isfinite(scale_OG) & (scale_OG > 0)).all())
    facts.append(
        (scale_OG[:, 0::2] == scale_OG[:, 1::2]).all() if promise.scale_span == 32 else yes
    )
    facts.append(((packed_OB & 0x0F) == 0x08).any() | ((packed_OB & 0xF0) == 0x80).any())
    facts.append(paired48.find_illegal(packed_OB).count_nonzero() if promise.is_sparse else none)
    if original is None:
        facts.append(none)
    else:
        values = nvfp4.dequantize_packed(
            packed_OB[None], linear["weight_scale"][None], linear["weight_global_scale"]
        )
        facts.append(relative_weight_error(original.float()[None], values).reshape(()))
    return torch.stack([fact.double() for fact in facts])


def expert_problems(
    names: Mapping[str, str], facts: Mapping[str, LinearFacts], is_compared: bool, promise: Promise
) -> Iterator[str]:
    """What is wrong with one expert, in words.

    Args:
        names, facts: module name and facts of each projection.
        is_compared: with the source, so that the weight error says something.
        promise: with the weight errors that are claimed.
    """
    for projection, name in names.items():
        found = [f"{name}.{text}" for text in linear_problems(facts[projection])]
        scale, claim = facts[projection].input_global_scale, promise.input_scales.get(name)
        if claim not in (None, scale):
            found.append(f"{name}.input_global_scale: expected its layer's {claim}, found {scale}")
        yield from found
        if not found and is_compared:
            yield from claim_problems(name, facts[projection].weight_error, promise)
    for suffix in ("weight_global_scale", "input_global_scale"):
        gate, up = (getattr(facts[projection], suffix) for projection in ("gate_proj", "up_proj"))
        if gate != up:
            yield f"{names['up_proj']}.{suffix}: expected gate's {gate}, found {up}"


def claim_problems(name: str, error: float, promise: Promise) -> Iterator[str]:
    """The plain weight error is what the manifest says."""
    claim = promise.weight_errors.get(name)
    if claim is None:
        yield f"{name}: relative weight error {error:.6g}, and no manifest that claims one"
    elif not math.isclose(error, claim, rel_tol=CLAIM_TOLERANCE, abs_tol=1e-9):
        yield f"{name}: relative weight error {error:.6g}, but the manifest claims {claim:.6g}"


def linear_problems(facts: LinearFacts) -> Iterator[str]:
    """Problems of one linear's four tensors."""
    for suffix in ("weight_global_scale", "input_global_scale"):
        value = getattr(facts, suffix)
        if not (math.isfinite(value) and value > 0):
            yield f"{suffix}: expected finite and above 0, found {value}"
    if not facts.are_scales_sound:
        yield "weight_scale: expected finite and above 0 everywhere"
    if not facts.are_spans_equal:
        yield "weight_scale: expected the two scales of every 32 inputs to be equal (scale_span 32)"
    if facts.has_minus_zero:
        yield "weight_packed: holds code 8 (minus zero)"
    if facts.num_illegal:
        yield (
            f"weight_packed: {int(facts.num_illegal)} groups of 8 inputs keep more than 2 of 4"
            " pairs"
        )
