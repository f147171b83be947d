"""What is unsound in a run root, found by reading every record and every digest, and what the next
run makes anew once that is gone.

Nothing here needs the source. The bytes of the finished checkpoint itself are `p48ray verify`'s to
read. A run may be under way: what it is about to finish counts as unfinished, not as unsound.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

from p48ray.checkpoint.index import INDEX_FILE
from p48ray.errors import CorruptObjectError, ShardCorruptError
from p48ray.run import run_root
from p48ray.run.benchmark_results import BenchmarkResult
from p48ray.run.changing_hands import read_plan
from p48ray.run.checked import (
    PART_RECORDS,
    keys_of_refused,
    load_checked,
    load_evaluation_part,
    load_part_manifest,
    load_scan,
    load_shard_verdict,
    load_tokens_manifest,
    load_unit_manifest,
)
from p48ray.run.greedy_records import load_continuations, load_greedy_part
from p48ray.run.manifest import MirrorManifest
from p48ray.run.needs import NEEDED_PREFIXES, Needs
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.run.records import LOADS_AT_ONCE, Record
from p48ray.run.run_root import BlobKind
from p48ray.run.scales import check_units, load_layer_scales
from p48ray.run.scratch import KnownScratch, known_scratch
from p48ray.store.base import Store
from p48ray.store.view import SubStore, name_of, sha256_of

Check = Callable[[], object]
"""Raises CorruptObjectError for what is unsound."""

PART = re.compile(r"(?P<kind>[a-z-]+)/layer-(?P<layer>\d{3})/part-(?P<part>\d{4})\.json")
EVALUATED = re.compile(r"evaluation/(?P<digest>[0-9a-f]+)/part-(?P<part>\d{4})\.json")
FOLLOWED = re.compile(r"greedy/(?P<digest>[0-9a-f]+)/part-(?P<part>\d{4})\.json")
CONTINUED = re.compile(r"greedy/continuations/(?P<digest>[0-9a-f]+)\.json")
PACKED_TEXTS = re.compile(r"evaluation/(?P<digest>[0-9a-f]+)/tokens\.json")
SCALES = re.compile(r"activations/layer-(?P<layer>\d{3})/scales\.json")
VERDICT = re.compile(r"verification/(?P<shard>[^/]+)\.json")
RESULT = re.compile(r"benchmarks/[^/]+/result\.json")


class UnsoundObject(Record):
    """Something that is not what it should be, and what to delete so that a run makes it anew."""

    problem: str
    delete: tuple[str, ...]


class Diagnosis(Record):
    """What was found in a run root."""

    schema_version: Literal[1] = 1
    run_root: str
    num_checked: int
    unsound: tuple[UnsoundObject, ...]
    unknown: tuple[str, ...]  # keys that belong to nothing a run makes
    made_anew: tuple[str, ...]  # by the next run, once what is unsound is deleted
    unseen: tuple[str, ...] = ()  # scratch folders that are not there on this machine

    @property
    def keys(self) -> list[str]:
        """All that is to be deleted."""
        return sorted({key for found in self.unsound for key in found.delete})


def run_roots_in(store: Store) -> Iterator[Store]:
    """The run root, and that of its one-shot reference where there is one."""
    yield store
    baseline = SubStore(store, run_root.BASELINE)
    if baseline.head(run_root.PLAN) is not None:
        yield baseline


def diagnose(store: Store, reads_bytes: bool = True) -> Diagnosis:
    """Read every record of a run root, and hold every object against the digest that its record
    names.

    Args:
        store: the run root.
        reads_bytes: else only sizes are compared.
    Raises: ConfigError or PlanMismatchError where there is no plan that can be read.
    """
    plan, scratch = read_plan(store), known_scratch(store)
    sizes = {info.key: info.size_bytes for info in scratch.store.list()}
    checks = list(Examination(plan, scratch, sizes, reads_bytes).checks())
    with ThreadPoolExecutor(LOADS_AT_ONCE) as pool:
        unsound = [found for found in pool.map(unsoundness, checks) if found is not None]
    gone = {key for found in unsound for key in found.delete}
    held = sizes.keys() - gone
    if scratch.unseen:  # what has a manifest may be there
        manifests = (key for key in held if PART.fullmatch(key))
        held |= {run_root.data_of(key) for key in manifests}
    return Diagnosis(
        run_root=store.uri,
        num_checked=len(checks),
        unsound=tuple(unsound),
        unknown=tuple(sorted(key for key in sizes if not is_known(key))),
        made_anew=made_anew(plan, held, gone),
        unseen=scratch.unseen,
    )


def unsoundness(check: Check) -> UnsoundObject | None:
    try:
        check()
    except CorruptObjectError as error:
        return UnsoundObject(problem=str(error), delete=error.keys)
    return None


class Examination:
    """Every check of a run root, given one listing of it."""

    def __init__(
        self, plan: RunPlan, scratch: KnownScratch, sizes: dict[str, int], reads_bytes: bool
    ) -> None:
        """Nothing is read yet.

        Args:
            plan: that lies in the run root.
            scratch: the run root, with what this machine sees of its scratch.
            sizes: of its objects, by key.
            reads_bytes: objects are hashed, where the store does not say their digest.
        """
        self.plan, self.scratch, self.sizes, self.reads_bytes = plan, scratch, sizes, reads_bytes
        self.store = scratch.store
        self.is_finished = run_root.checkpoint_file(INDEX_FILE) in sizes

    def checks(self) -> Iterator[Check]:
        """One for each record, with the object that it speaks of."""
        plan, store = self.plan, self.store
        for key in self.sizes:
            if (found := PART.fullmatch(key)) and found["kind"] in PART_RECORDS:
                yield partial(
                    self.check_blob, found["kind"], int(found["layer"]), int(found["part"])
                )
            elif found := SCALES.fullmatch(key):
                yield partial(load_layer_scales, plan, store, int(found["layer"]))
            elif found := EVALUATED.fullmatch(key):
                yield partial(
                    load_evaluation_part, plan, store, found["digest"], int(found["part"])
                )
            elif found := FOLLOWED.fullmatch(key):
                yield partial(load_greedy_part, plan, store, found["digest"], int(found["part"]))
            elif found := CONTINUED.fullmatch(key):
                yield partial(load_continuations, store, found["digest"])
            elif found := PACKED_TEXTS.fullmatch(key):
                owner = found["digest"]
                yield partial(self.check_tokens, run_root.evaluation_tokens(owner), owner)
            elif RESULT.fullmatch(key):
                yield partial(load_checked, BenchmarkResult, store, key)
            elif found := VERDICT.fullmatch(key):
                yield partial(self.check_shard, f"{found['shard']}.safetensors")
        if run_root.manifest_of(run_root.TOKENS) in self.sizes:
            yield partial(self.check_tokens, run_root.TOKENS, plan.units_digest)
        for unit in plan.units:
            if run_root.unit_manifest(unit.id) in self.sizes:
                yield partial(self.check_unit, unit)
        for name in plan.source.scanned:
            if run_root.scan_manifest(name) in self.sizes:
                yield partial(load_scan, plan, store, name)
        for file in plan.source.mirror:
            if run_root.mirror_manifest(file.path) in self.sizes:
                yield partial(self.check_mirrored, file.path)

    def check_blob(self, kind: BlobKind, layer: int, part: int) -> None:
        """A blob that `run.keep` deleted is no fault where its manifest stays for the record, and
        one that was lost with a scratch folder is made again. Where not all scratch is seen, the
        manifest may speak of a blob that lies there."""
        manifest_key, key = (
            run_root.blob_manifest(kind, layer, part),
            run_root.blob(kind, layer, part),
        )
        if part >= len(self.plan.parts):
            raise CorruptObjectError(
                f"{self.store.uri}/{manifest_key}: the plan has {len(self.plan.parts)} parts",
                manifest_key,
                key,
            )
        manifest = load_part_manifest(self.plan, self.store, kind, layer, part)
        may_be_gone = kind in ("activations", "gradients") or self.scratch.is_used
        if not self.scratch.unseen and (key in self.sizes or not may_be_gone):
            self.check_bytes(key, manifest.size_bytes, manifest.sha256, manifest_key)

    def check_tokens(self, key: str, owner: str) -> None:
        manifest = load_tokens_manifest(self.store, key, owner)
        self.check_bytes(key, manifest.size_bytes, manifest.sha256, run_root.manifest_of(key))

    def check_unit(self, unit: WorkUnit) -> None:
        """A unit's manifest, its scales, and its shard, which goes once the checkpoint is finished
        (run.keep)."""
        manifest = load_unit_manifest(self.plan, self.store, unit)
        scales_key = run_root.layer_scales(unit.layer)
        if scales_key in self.sizes:
            try:
                scales = load_layer_scales(self.plan, self.store, unit.layer)
            except CorruptObjectError:
                pass  # a finding of its own; whether the unit fits is seen once it is mended
            else:
                check_units([manifest], {unit.layer: scales})
        key = run_root.unit_shard(unit.id, manifest.attempt)
        if key in self.sizes or not self.is_finished:
            self.check_bytes(
                key, manifest.size_bytes, manifest.sha256, run_root.unit_manifest(unit.id)
            )

    def check_shard(self, name: str) -> None:
        """A verdict, and the size of the output shard that it is about."""
        verdict = load_shard_verdict(self.plan, self.store, name)
        key = run_root.checkpoint_file(name)
        if verdict.problems:
            raise CorruptObjectError(
                f"{self.store.uri}/{key}: refused by verification: {verdict.problems[0]}",
                *keys_of_refused(verdict),
            )
        found = self.sizes.get(key)
        if found != verdict.size_bytes:
            raise CorruptObjectError(
                f"{self.store.uri}/{key}: expected {verdict.size_bytes} bytes as its verdict says,"
                f" found {found or 'nothing'}",
                run_root.shard_verdict(name),
                key,
            )

    def check_mirrored(self, path: str) -> None:
        key, manifest_key = run_root.source_file(path), run_root.mirror_manifest(path)
        manifest = load_checked(MirrorManifest, self.store, manifest_key, [key], path=path)
        self.check_bytes(key, manifest.size_bytes, manifest.sha256, manifest_key)

    def check_bytes(self, key: str, size_bytes: int, sha256: str, named_in: str) -> None:
        """Hold an object against its record.

        Args:
            key: of the object.
            size_bytes, sha256: as the record says.
            named_in: key of the record.
        """
        info = self.store.head(key)
        found = "nothing" if info is None else f"{info.size_bytes} bytes"
        if info is not None and info.size_bytes == size_bytes:
            if not self.reads_bytes:
                return
            try:
                digest = info.sha256 or sha256_of(self.store, key, size_bytes)
            except ShardCorruptError as error:
                digest = str(error)
            if digest == sha256:
                return
            found += f" with SHA-256 {digest[:12]}"
        raise CorruptObjectError(
            f"{name_of(self.store, key)}: expected {size_bytes} bytes with SHA-256 {sha256[:12]} as"
            f" {named_in} says, found {found}",
            named_in,
            key,
        )


def is_known(key: str) -> bool:
    """Whether a run, or a command after it, makes objects of such a name."""
    return key in run_root.SINGLE_OBJECTS or key.startswith(run_root.PREFIXES)


def made_anew(plan: RunPlan, keys: set[str], gone: set[str]) -> tuple[str, ...]:
    """In words, what the next run has to make of streams, units and shards.

    Args:
        plan: of the run root.
        keys: that stay.
        gone: keys that were unsound.
    """
    needs = Needs(plan, frozenset(key for key in keys if key.startswith(NEEDED_PREFIXES)))
    lines = []
    if needs.missing_units:
        layers = ", ".join(map(str, needs.open_layers))
        lines.append(f"{len(needs.missing_units)} of {len(plan.units)} units, of layers {layers}")
    if not plan.propagates:
        up = [len(needs.forward_layers(part.part)) for part in plan.parts]
        back = [sum(len({*v.up, *v.back}) for v in needs.visits(part.part)) for part in plan.parts]
        for way, passes in (("forward", up), ("backward", back)):
            if any(passes):
                lines.append(
                    f"{sum(map(bool, passes))} of {len(plan.parts)} parts pass {way} through"
                    f" {max(passes)} layers at most"
                )
    lines += describe_gone(gone)
    return tuple(lines)


def describe_gone(gone: set[str]) -> Iterator[str]:
    """What is neither a stream's nor a unit's."""
    for prefix, noun in (
        (run_root.CHECKPOINT, "output shards"),
        (run_root.VERIFICATION, "verdicts on output shards"),
        (run_root.EVALUATION, "objects of the evaluation"),
        (run_root.GREEDY, "objects of the greedy agreement"),
        (run_root.BENCHMARKS, "benchmark results (jobs/evaluate.py)"),
        (run_root.SOURCE, "files of the source's mirror"),
        (run_root.SCAN, "records of what is not finite in the source"),
    ):
        if count := sum(key.startswith(prefix) for key in gone):
            yield f"{count} {noun}"
    if run_root.TOKENS in gone:
        yield "the packed calibration texts"


def describe(diagnosis: Diagnosis) -> Sequence[str]:
    """The diagnosis in lines, for a terminal."""
    return [
        f"{diagnosis.run_root}: {diagnosis.num_checked} records read,"
        f" {len(diagnosis.unsound)} unsound",
        *(
            line
            for found in diagnosis.unsound
            for line in (f"  unsound: {found.problem}", f"    delete: {', '.join(found.delete)}")
        ),
        *(f"  unknown: {key}: nothing that a run makes" for key in diagnosis.unknown),
        *(
            f"  not seen from here: {folder} (run.scratch): blobs that lie there were not read"
            for folder in diagnosis.unseen
        ),
        *(f"  the next run makes: {line}" for line in diagnosis.made_anew),
    ]
