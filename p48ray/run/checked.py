"""Records of a run root, each held against what was asked for: that it says of itself what its key
says, and belongs to the plan.

Objects can be moved, cut, or left over from other settings, and a run must not take one for
another. What is not what was asked for raises CorruptObjectError with the keys to delete, and the
run makes it anew.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from p48ray.errors import CorruptObjectError, ObjectMissingError, ShardCorruptError
from p48ray.run import run_root
from p48ray.run.manifest import (
    ActivationPart,
    BoundaryPart,
    EvaluationPart,
    GradientPart,
    PartManifest,
    ScanManifest,
    ShardVerdict,
    TokensManifest,
    UnitManifest,
)
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.run.records import LOADS_AT_ONCE, R
from p48ray.run.run_root import BlobKind
from p48ray.store.base import Store

T = TypeVar("T")

PART_RECORDS: dict[BlobKind, type[PartManifest]] = {
    "activations": ActivationPart,
    "gradients": GradientPart,
    "residuals": BoundaryPart,
    "compressed-residuals": BoundaryPart,
    "residual-gradients": BoundaryPart,
}


def load_checked(
    record: type[R], store: Store, key: str, also: Sequence[str] = (), **expected: object
) -> R:
    """A record whose fields are what its key promises.

    Args:
        record: its class.
        store: the run root.
        key: of the record.
        also: further keys to delete with it, so that it is made again.
        expected: the value of each field that says what the record is.
    Raises: CorruptObjectError for one that is gone, unreadable, or of something else.
    """
    try:
        found = record.load(store, key)
    except (ObjectMissingError, ShardCorruptError) as error:
        raise CorruptObjectError(
            f"{store.uri}/{key}: gone or unreadable: {error}", key, *also
        ) from error
    for name, value in expected.items():
        check_found(store, key, name, value, getattr(found, name), *also)
    return found


def check_found(
    store: Store, key: str, what: str, expected: object, found: object, *also: str
) -> None:
    """Of a record that has been read: something that is as it should be.

    Args:
        store: the run root.
        key: of the record.
        what: is looked at, for the message.
        expected, found: equal, else the record is corrupt.
        also: further keys to delete with it.
    Raises: CorruptObjectError.
    """
    if expected != found:
        raise CorruptObjectError(
            f"{store.uri}/{key}: {what}: expected {short(expected)}, found {short(found)}",
            key,
            *also,
        )


def short(value: object) -> str:
    """A value in a message; of a digest its first digits."""
    text = repr(value)
    return text if len(text) < 64 else f"{text[:13]}...'"


def load_each(load: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Many records, side by side as Record.load_all has them, in order.

    Raises: one CorruptObjectError for all that are unsound, so that one round makes them anew.
    """

    def load_or_error(item: T) -> R | CorruptObjectError:
        try:
            return load(item)
        except CorruptObjectError as error:
            return error

    with ThreadPoolExecutor(LOADS_AT_ONCE) as pool:
        found = list(pool.map(load_or_error, items))
    raise_together([error for error in found if isinstance(error, CorruptObjectError)])
    return [record for record in found if not isinstance(record, CorruptObjectError)]


def raise_together(errors: Sequence[CorruptObjectError]) -> None:
    """Raises: one error that names what all of them name, if there are any."""
    if errors:
        more = f" (and {len(errors) - 1} more objects)" if len(errors) > 1 else ""
        keys = dict.fromkeys(key for error in errors for key in error.keys)
        raise CorruptObjectError(f"{errors[0]}{more}", *keys)


def load_part_manifest(
    plan: RunPlan, store: Store, kind: BlobKind, layer: int, part: int
) -> PartManifest:
    """The manifest of a blob.

    Args:
        plan, store: of the run.
        kind, layer, part: what the blob has to be.
    """
    tokens = plan.parts[part].num_sequences * plan.config.calibration.sequence_length
    return load_checked(
        PART_RECORDS[kind],
        store,
        run_root.blob_manifest(kind, layer, part),
        [run_root.blob(kind, layer, part)],
        kind=kind,
        layer=layer,
        part=part,
        num_tokens=tokens,
        units_digest=plan.units_digest,
    )


def blob_facts(plan: RunPlan, kind: BlobKind, layer: int, part: int) -> dict[str, str]:
    """What a blob says in itself that it is.

    Args:
        plan: that it belongs to.
        kind, layer, part: as in its key.
    """
    return {"kind": kind, "layer": str(layer), "part": str(part), "units": plan.units_digest}


def load_unit_manifest(plan: RunPlan, store: Store, unit: WorkUnit) -> UnitManifest:
    """What became of a unit. Shards that no manifest names any more are attempts that lost
    (run.cleanup)."""
    key = run_root.unit_manifest(unit.id)
    return load_checked(UnitManifest, store, key, unit=unit.id, units_digest=plan.units_digest)


def load_unit_manifests(plan: RunPlan, store: Store) -> list[UnitManifest]:
    """Of all units of the plan, in its order."""
    return load_each(lambda unit: load_unit_manifest(plan, store, unit), plan.units)


def load_scan(plan: RunPlan, store: Store, file: str) -> ScanManifest:
    """What was found in one weight file of the plan's source."""
    return load_checked(
        ScanManifest,
        store,
        run_root.scan_manifest(file),
        file=file,
        source_fingerprint=plan.source.fingerprint,
    )


def load_tokens_manifest(store: Store, key: str, owner: str) -> TokensManifest:
    """Of packed token ids.

    Args:
        store: the run root.
        key: of the blob.
        owner: whose they have to be: the plan's units' digest, or the evaluation's.
    """
    return load_checked(TokensManifest, store, run_root.manifest_of(key), [key], owner=owner)


def load_shard_verdict(plan: RunPlan, store: Store, shard: str) -> ShardVerdict:
    """What verification found in one output shard of this plan."""
    return load_checked(
        ShardVerdict,
        store,
        run_root.shard_verdict(shard),
        shard=shard,
        plan_digest=plan.digest,
    )


def keys_of_refused(verdict: ShardVerdict) -> list[str]:
    """What to delete so that a refused shard is made and verified again: of its units only those
    that are refused as they were made."""
    return [
        run_root.shard_verdict(verdict.shard),
        run_root.checkpoint_file(verdict.shard),
        *map(run_root.unit_manifest, verdict.unsound_units),
    ]


def load_evaluation_part(plan: RunPlan, store: Store, digest: str, part: int) -> EvaluationPart:
    """Sums over some held-out sequences.

    Args:
        plan, store: of the run.
        digest: of the evaluation.
        part: its number.
    Raises: CorruptObjectError, also where its tokens are not those of whole sequences: figures by
        position would not add up to those of all.
    """
    key = run_root.evaluation_part(digest, part)
    found = load_checked(
        EvaluationPart, store, key, evaluation=digest, part=part, plan_digest=plan.digest
    )
    starts = (0, *found.stretch_ends[:-1])
    widths = [end - start for start, end in zip(starts, found.stretch_ends, strict=True)]
    tokens = Counter[int]()
    for cell in found.cells:
        tokens[cell.stretch] += cell.num_tokens
    sequences = tokens[0] // max(1, *widths[:1]) if widths else 0
    check_found(
        store,
        key,
        "tokens by stretch",
        {n: sequences * width for n, width in enumerate(widths)} if sequences else "some",
        dict(sorted(tokens.items())),
    )
    return found
