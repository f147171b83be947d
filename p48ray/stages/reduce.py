"""Reduce: stitch unit shards and untouched source tensors into a Hugging Face folder. The index
comes last, once every shard is verified.

A shard is a header plus byte ranges, composed by the store in one atomic object, so a shard that
exists is whole and is not made again. With sparse storage a unit's range is read, held against its
digest and recoded on the way, one unit at a time; unit shards themselves stay dense.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from p48ray.checkpoint.decode import read_plain
from p48ray.checkpoint.fp8 import Fp8Weight
from p48ray.checkpoint.header import encode_header
from p48ray.checkpoint.index import INDEX_FILE
from p48ray.checkpoint.layout import ModelLayout
from p48ray.checkpoint.sparse_storage import Storage
from p48ray.checkpoint.storage_stream import StoredUnit, recoded_unit
from p48ray.checkpoint.tensors import tensor_bytes
from p48ray.errors import CorruptObjectError, ObjectMissingError, ShardCorruptError, SourceError
from p48ray.run import run_root
from p48ray.run.cleanup import delete_all
from p48ray.run.output_layout import OutputShard, shard_rows, unit_entries
from p48ray.run.plan import WorkUnit
from p48ray.stages.tasks import Task
from p48ray.store.base import ByteRange, ObjectInfo, Piece, Store
from p48ray.store.open import scheme_of
from p48ray.store.view import sha256_of
from p48ray.unit.context import StageContext

HASH_THREADS = 4
"""Units whose bytes are hashed at a time, or whose heads are asked of a bucket."""


@dataclass(frozen=True, slots=True)
class StitchedShard:
    """A finished output shard."""

    name: str
    size_bytes: int


def stitch_shard(context: StageContext, shard: OutputShard) -> StitchedShard:
    """Compose one output shard from manifest-named attempts and the source.

    Raises: ShardCorruptError when a unit's manifest belongs to another plan; CorruptObjectError
        when shards are not what their manifests claim.
    """
    done = StitchedShard(shard.name, file_bytes(shard, context.layout))
    if not is_whole(context, done):
        try:
            compose_shard(context, shard, done)
        except (CorruptObjectError, ObjectMissingError):
            # else another driver was faster, and its units' shards are deleted by now
            if not is_whole(context, done):
                raise
    return done


def is_whole(context: StageContext, shard: StitchedShard) -> bool:
    held = context.store.head(run_root.checkpoint_file(shard.name))
    return held is not None and held.size_bytes == shard.size_bytes


def compose_shard(context: StageContext, shard: OutputShard, done: StitchedShard) -> None:
    key = run_root.checkpoint_file(shard.name)
    units, corrupt = find_units(
        context, [segment for segment in shard.segments if isinstance(segment, WorkUnit)]
    )
    if corrupt:
        more = f" (and {len(corrupt) - 1} more units)" if len(corrupt) > 1 else ""
        raise CorruptObjectError(
            f"{corrupt[0]}{more}", *(name for error in corrupt for name in error.keys)
        )
    written = context.store.compose(key, shard_pieces(context, shard, units))
    if written != done.size_bytes:
        context.store.delete(key)
        raise ShardCorruptError(
            f"{context.store.uri}/{key}: expected {done.size_bytes} bytes, composed {written}"
        )


def shard_pieces(
    context: StageContext, shard: OutputShard, units: Mapping[str, StoredUnit]
) -> Iterator[Piece]:
    """Header, units and source tensors in file order. What is not copied as it is (units in sparse
    storage, FP8 weights) is made as it is asked for: one at a time is held in memory."""
    yield encode_header(shard_rows(shard, context.layout))
    source = context.source.store
    for segment in shard.segments:
        if isinstance(segment, WorkUnit):
            yield from unit_pieces(units[segment.id], shard.storage)
        elif isinstance(segment, Fp8Weight):
            yield tensor_bytes(read_plain(source, [segment])[segment.name])
        else:
            yield ByteRange(source, segment.file, segment.start, segment.num_bytes)


def file_bytes(shard: OutputShard, layout: ModelLayout) -> int:
    """Size of an output shard's file, header included."""
    return len(encode_header(shard_rows(shard, layout))) + shard.num_bytes


def unit_pieces(unit: StoredUnit, storage: Storage) -> Iterator[Piece]:
    """A unit as it lies in an output shard.

    Raises: CorruptObjectError, with sparse storage, for a unit that is not the one that its
        manifest names, so that it is made anew.
    """
    if storage == "dense":
        yield ByteRange(
            unit.store, unit.file, unit.entries[0].start, sum(e.num_bytes for e in unit.entries)
        )
        return
    try:
        yield from recoded_unit(unit, storage)
    except (ShardCorruptError, SourceError) as error:
        where = f"{unit.store.uri}/{unit.file}"
        raise CorruptObjectError(
            f"{where}: not the unit that {unit.named_in} names: {error}", unit.named_in, unit.file
        ) from error


def find_units(
    context: StageContext, units: Sequence[WorkUnit]
) -> tuple[dict[str, StoredUnit], list[CorruptObjectError]]:
    """Units by id, and an error for each that is not what its manifest says: all of them are named,
    so that one round makes them all anew.

    Raises: as find_unit does but for CorruptObjectError. Cost: HASH_THREADS units are read at a
        time, a chunk of each in memory.
    """

    def find_or_error(unit: WorkUnit) -> StoredUnit | CorruptObjectError:
        try:
            return find_unit(context, unit)
        except CorruptObjectError as error:
            return error

    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="reduce") as pool:
        looked = list(pool.map(find_or_error, units))
    return {found.id: found for found in looked if isinstance(found, StoredUnit)}, [
        e for e in looked if isinstance(e, CorruptObjectError)
    ]


def find_unit(context: StageContext, unit: WorkUnit) -> StoredUnit:
    """A unit's tensors in the shard of the attempt that counts, after a check of its manifest, size
    and digest."""
    done = context.finished_unit(unit)
    manifest, manifest_key, key = done.manifest, done.manifest_key, done.shard_key
    held = context.store.head(key)
    found = "nothing" if held is None else f"{held.size_bytes} bytes"
    if held is not None and held.size_bytes == manifest.size_bytes:
        digest = stored_sha256(context.store, held)
        if digest in (None, manifest.sha256):
            entries = unit_entries(context.layout, unit, key, manifest.data_offset)
            return StoredUnit(
                id=unit.id,
                sha256=manifest.sha256,
                named_in=manifest_key,
                store=context.store,
                entries=entries,
            )
        found += f" with SHA-256 {digest[:12]}"
    raise CorruptObjectError(
        f"{context.store.uri}/{key}: expected {manifest.size_bytes} bytes with SHA-256"
        f" {manifest.sha256[:12]} as {manifest_key} says, found {found}",
        manifest_key,
        key,
    )


def stored_sha256(store: Store, held: ObjectInfo) -> str | None:
    """The digest that the store keeps, so that a bucket's bytes need not be read; on a disk that of
    the bytes. None where only `verify` will tell."""
    if held.sha256 is not None or scheme_of(store.uri).keeps_sha256:
        return held.sha256
    return sha256_of(store, held.key, held.size_bytes)


def shards_to_stitch(context: StageContext, shards: tuple[OutputShard, ...]) -> list[Task]:
    """Those that are not there in full. There is no index over such, and no verdict on one that
    will be another: both go."""
    held = {info.key: info.size_bytes for info in context.store.list(run_root.CHECKPOINT)}
    missing = [
        s
        for s in shards
        if held.get(run_root.checkpoint_file(s.name)) != file_bytes(s, context.layout)
    ]
    if missing:
        context.store.delete(run_root.checkpoint_file(INDEX_FILE))
        delete_all(context.store, [run_root.shard_verdict(s.name) for s in missing])
    return [Task(stage="reduce", id=s.name, item=s) for s in missing]
