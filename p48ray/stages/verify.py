"""Verify: re-read a finished checkpoint as a stranger and compare it with what was promised.

Per tensor: patterns legal, no minus zero, scales finite and positive, gate and up agreeing on their global scales, plain weight error against the source
as the unit's manifest claims. Untouched tensors byte-equal, FP8 ones equal to the source's as BF16. Over all: exactly the planned set of tensors, in the
shards that the index names.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p48ray.checkpoint.decode import read_expert, read_plain
from p48ray.checkpoint.fp8 import Fp8Weight
from p48ray.checkpoint.header import TensorEntry, parse_header, read_header_bytes
from p48ray.checkpoint.index import CONFIG_FILE, INDEX_FILE, CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.checkpoint.storage_stream import decoded_unit, dense_sha256
from p48ray.checkpoint.tensors import read_tensors, tensor_bytes
from p48ray.errors import ObjectMissingError, ShardCorruptError, SourceError
from p48ray.numerics import e2m1, nvfp4, paired48
from p48ray.numerics.metrics import relative_weight_error
from p48ray.output_layout import SUFFIXES, OutputShard, shard_rows, unit_rows
from p48ray.plan import WorkUnit
from p48ray.store.base import Store

CLAIM_TOLERANCE = 1e-3  # relative; the manifest's error was summed on the solver's device, this one here
COMPARE_CHUNK_BYTES = 16 * 2**20
DAMAGE = (
    SourceError,
    ShardCorruptError,
    ObjectMissingError,
)  # a finding; a store that is away or refuses says nothing about the checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a checkpoint's linears are held to. `weight_errors` by module name, `unit_sha256` by unit id; what is in neither claims nothing."""

    is_sparse: bool
    scale_span: int
    weight_errors: Mapping[str, float]
    unit_sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found in one output shard: problems in words, and digests for the checkpoint's own manifest."""

    problems: list[str]
    header_sha256: str = ""
    untouched_sha256: Mapping[str, str] = field(default_factory=dict)


def verify_shard(checkpoint: Store, source: CheckpointIndex, layout: ModelLayout, shard: OutputShard, promise: Promise) -> Findings:
    """Read one output shard through, beside its source. `checkpoint` is rooted at the checkpoint folder."""
    try:
        raw, size_bytes = read_header_bytes(checkpoint, shard.name)
        entries = parse_header(shard.name, raw, size_bytes)
    except DAMAGE as error:
        return Findings(problems=[str(error)])
    problems = list(compare_rows(shard, shard_rows(shard, layout), entries))
    if problems:
        return Findings(problems=problems)
    digests: dict[str, str] = {}
    for segment in shard.segments:
        if isinstance(segment, WorkUnit):
            stored = read_tensors(checkpoint, [entries[name] for name, _, _ in unit_rows(layout, segment, shard.storage)])
            try:
                tensors = decoded_unit(stored) if shard.storage == "sparse" else stored
            except SourceError as error:
                problems.append(f"{shard.name}: unit {segment.id}: {error}")
                continue
            problems += check_unit(shard.name, segment.id, tensors, promise)
            for expert in segment.experts:
                originals = read_expert(source, layout, segment.layer, expert)
                names = {p: layout.expert_linear_name(segment.layer, expert, p) for p in PROJECTIONS}
                problems += check_expert(names, tensors, originals, promise)
        elif isinstance(segment, Fp8Weight):
            digests[segment.name] = tensor_digest(checkpoint, entries[segment.name])
            expected = tensor_bytes(read_plain(source.store, [segment])[segment.name])
            if digests[segment.name] != hashlib.sha256(expected).hexdigest():
                problems.append(f"{shard.name}: {segment.name}: values differ from the source's FP8 weight as BF16 ({segment.file})")
        else:
            is_same, digests[segment.name] = compare_bytes(checkpoint, entries[segment.name], source.store, segment)
            if not is_same:
                problems.append(f"{shard.name}: {segment.name}: bytes differ from the source's ({segment.file})")
    return Findings(problems=problems, header_sha256=header_digest(raw), untouched_sha256=digests)


def header_digest(raw: bytes) -> str:
    """SHA-256 of a safetensors header as it lies in the file: eight bytes of length, then the JSON."""
    return hashlib.sha256(len(raw).to_bytes(8, "little") + raw).hexdigest()


def check_unit(file: str, unit_id: str, tensors: Mapping[str, Tensor], promise: Promise) -> list[str]:
    """The bytes are those that the unit stored. The weight error alone can not tell: one wrong code in a million moves it by less than rounding.

    Args: tensors: dense, in the order of unit_rows, so that they serialize to the unit's own shard.
    """
    found, claim = dense_sha256(tensors), promise.unit_sha256.get(unit_id)
    return (
        []
        if found == claim
        else [f"{file}: unit {unit_id}: expected the bytes with SHA-256 {claim} that its manifest names, found {found}"]
    )


def compare_rows(shard: OutputShard, rows: list[tuple[str, str, tuple[int, ...]]], found: Mapping[str, TensorEntry]) -> Iterator[str]:
    planned = {name: (dtype, shape) for name, dtype, shape in rows}
    for name in sorted(planned.keys() - found.keys()):
        yield f"{shard.name}: {name}: missing"
    for name in sorted(found.keys() - planned.keys()):
        yield f"{shard.name}: {name}: not planned"
    for name in planned.keys() & found.keys():
        if planned[name] != (found[name].dtype, tuple(found[name].shape)):
            yield f"{shard.name}: {name}: expected {planned[name]}, found {(found[name].dtype, tuple(found[name].shape))}"


def check_expert(
    names: Mapping[str, str], tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor] | None, promise: Promise
) -> list[str]:
    """Every check of one expert. names: projection -> module name. originals: the source's weights, where they are to be compared."""
    problems: list[str] = []
    linears = {p: {suffix: tensors[f"{name}.{suffix}"] for suffix in SUFFIXES} for p, name in names.items()}
    for projection, linear in linears.items():
        found = [f"{names[projection]}.{text}" for text in check_linear(linear, promise)]
        if not found and originals is not None:
            found = check_claim(names[projection], linear, originals[projection], promise)
        problems += found
    for suffix in ("weight_global_scale", "input_global_scale"):
        gate, up = linears["gate_proj"][suffix], linears["up_proj"][suffix]
        if not torch.equal(gate, up):
            problems.append(f"{names['up_proj']}.{suffix}: expected gate's {gate.item()}, found {up.item()}")
    return problems


def check_claim(name: str, linear: Mapping[str, Tensor], original: Tensor, promise: Promise) -> list[str]:
    """The plain weight error is what the manifest says."""
    values = nvfp4.dequantize(e2m1.unpack(linear["weight_packed"])[None], linear["weight_scale"][None], linear["weight_global_scale"])
    error = relative_weight_error(original.float()[None], values).item()
    claim = promise.weight_errors.get(name)
    if claim is None:
        return [f"{name}: relative weight error {error:.6g}, and no manifest that claims one"]
    if not math.isclose(error, claim, rel_tol=CLAIM_TOLERANCE, abs_tol=1e-9):
        return [f"{name}: relative weight error {error:.6g}, but the manifest claims {claim:.6g}"]
    return []


def check_linear(linear: Mapping[str, Tensor], promise: Promise) -> Iterator[str]:
    """Problems of one linear's four tensors."""
    for suffix in ("weight_global_scale", "input_global_scale"):
        value = linear[suffix].item()
        if not (math.isfinite(value) and value > 0):
            yield f"{suffix}: expected finite and above 0, found {value}"
    scale_OG = linear["weight_scale"].float()
    if not bool((torch.isfinite(scale_OG) & (scale_OG > 0)).all()):
        yield "weight_scale: expected finite and above 0 everywhere"
    if promise.scale_span == 32 and not torch.equal(scale_OG[:, 0::2], scale_OG[:, 1::2]):
        yield "weight_scale: expected the two scales of every 32 inputs to be equal (scale_span 32)"
    packed_OB = linear["weight_packed"]
    if bool(((packed_OB & 0x0F) == 0x08).any() | ((packed_OB & 0xF0) == 0x80).any()):
        yield "weight_packed: holds code 8 (minus zero)"
    if promise.is_sparse and (illegal := int(paired48.find_illegal(packed_OB).sum())):
        yield f"weight_packed: {illegal} groups of 8 inputs keep more than 2 of 4 pairs"


def compare_bytes(left: Store, a: TensorEntry, right: Store, b: TensorEntry) -> tuple[bool, str]:
    """Whether two tensors' bytes are the same, and the left one's SHA-256; read in chunks."""
    digest, is_same = hashlib.sha256(), a.num_bytes == b.num_bytes
    for at, data in chunks(left, a):
        digest.update(data)
        is_same = is_same and data == right.get_range(b.file, b.start + at, len(data))
    return is_same, digest.hexdigest()


def tensor_digest(store: Store, entry: TensorEntry) -> str:
    """SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    for _, data in chunks(store, entry):
        digest.update(data)
    return digest.hexdigest()


def chunks(store: Store, entry: TensorEntry) -> Iterator[tuple[int, bytes]]:
    """A tensor's bytes in pieces, each with its offset."""
    for at in range(0, entry.num_bytes, COMPARE_CHUNK_BYTES):
        yield at, store.get_range(entry.file, entry.start + at, min(COMPARE_CHUNK_BYTES, entry.num_bytes - at))


def check_index(checkpoint: Store, shards: tuple[OutputShard, ...], layout: ModelLayout) -> list[str]:
    """The index names exactly the planned tensors in their shards; no other safetensors file lies beside them; no old quantization config is left."""
    problems = check_index_files(checkpoint)
    if problems:
        return problems
    planned = {name: shard.name for shard in shards for name, _, _ in shard_rows(shard, layout)}
    problems += compare_index(checkpoint, planned, sum(shard.num_bytes for shard in shards))
    files = {info.key for info in checkpoint.list() if info.key.endswith(".safetensors")}
    return problems + [f"{name}: not planned" for name in sorted(files - {s.name for s in shards})]


def compare_index(checkpoint: Store, expected: Mapping[str, str], total: int) -> list[str]:
    """The index (which check_index_files has found readable) against tensor -> file and the sum of all tensors' bytes."""
    index = json.loads(checkpoint.get(INDEX_FILE))
    found, metadata = index["weight_map"], index.get("metadata")
    differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    problems = [f"{INDEX_FILE}: {n}: expected {expected.get(n)}, found {found.get(n)}" for n in differing[:5]]
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    return problems if stated == total else [*problems, f"{INDEX_FILE}: metadata.total_size: expected {total}, found {stated}"]


def check_index_files(checkpoint: Store) -> list[str]:
    """config.json and the index are there, are JSON, and name files that are there."""
    parsed = {}
    for name in (CONFIG_FILE, INDEX_FILE):
        if checkpoint.head(name) is None:
            return [f"{name}: missing"]
        try:
            parsed[name] = json.loads(checkpoint.get(name))
        except ValueError as error:
            return [f"{name}: not JSON: {error}"]
    weight_map = parsed[INDEX_FILE].get("weight_map") if isinstance(parsed[INDEX_FILE], dict) else None
    if not isinstance(weight_map, dict) or not isinstance(parsed[CONFIG_FILE], dict):
        return [f"{INDEX_FILE}: expected an object with a weight_map"]
    files = {str(v) for v in weight_map.values()}
    missing = sorted(f for f in files if not re.fullmatch(r"\w[\w.-]*\.safetensors", f) or checkpoint.head(f) is None)
    return [f"{INDEX_FILE}: names {f!r}, which is not there" for f in missing] + check_config(parsed[CONFIG_FILE])


def check_config(config: dict) -> list[str]:
    """The output's quantization config is the NVFP4 one, at the top level and nowhere else."""
    quantization = config.get("quantization_config")
    found = quantization.get("format") if isinstance(quantization, dict) else None
    problems = []
    if found != "nvfp4-pack-quantized":
        problems.append(f"config.json: quantization_config.format: expected 'nvfp4-pack-quantized', found {found!r}")
    for key, value in config.items():
        if isinstance(value, dict) and "quantization_config" in value:
            problems.append(f"config.json: {key}.quantization_config: left over from the source")
    return problems
