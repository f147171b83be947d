"""Scan: before the first unit, read every float outside the compressed experts once, and refuse a
source with values that are not finite there.

Such a value makes figures of the whole model NaN, or reaches the output unseen where no text meets
it: a row of the embedding, the vision tower, a layer of multi-token prediction. Experts are not
read here: whoever decodes one looks at it. A task reads one weight file, by range, a few pieces of
at most 16 MiB in memory. It never fails for what it finds: once all files are read, one error names
every tensor.

-inf in a router's bias is how an expert is kept from being chosen: said, not refused.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from p48ray.checkpoint.families import FAMILIES
from p48ray.checkpoint.finite_values import FiniteCheck, NotFinite
from p48ray.checkpoint.fp8 import stored_floats
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.tensors import merge_ranges
from p48ray.errors import CorruptObjectError, SourceError
from p48ray.run import run_root
from p48ray.run.checked import load_each, load_scan
from p48ray.run.cleanup import delete_all
from p48ray.run.manifest import NotFiniteTensor, ScanManifest, UnitManifest
from p48ray.run.output_layout import OutputShard
from p48ray.run.records import LOADS_AT_ONCE, load_readable
from p48ray.stages.read_ahead import COMPARE_CHUNK_BYTES, Readers, chunks, readers
from p48ray.stages.tasks import Task
from p48ray.stages.verify import listed
from p48ray.store.base import Store
from p48ray.unit.context import StageContext

log = logging.getLogger("p48ray.progress")


def files_to_scan(context: StageContext, shards: tuple[OutputShard, ...]) -> list[Task]:
    """A file in which something was found is read again, because it may have been mended since:
    bytes in the middle of a file are in no fingerprint. Manifests that count for nothing go."""
    plan, store = context.plan, context.store
    held = {info.key for info in store.list(run_root.SCAN)}

    def counts(file: str) -> bool:
        try:
            return run_root.scan_manifest(file) in held and not load_scan(plan, store, file).refused
        except CorruptObjectError as error:
            log.warning("%s; the file is read again", error)
            return False

    with ThreadPoolExecutor(LOADS_AT_ONCE) as pool:
        good = list(pool.map(counts, plan.source.scanned))
    missing = [f for f, is_good in zip(plan.source.scanned, good, strict=True) if not is_good]
    delete_all(store, [key for f in missing if (key := run_root.scan_manifest(f)) in held])
    return [
        Task(stage="scan", id=file, item=file, marker=run_root.scan_manifest(file))
        for file in missing
    ]


def scan_file(context: StageContext, file: str) -> None:
    """Read the floats of one weight file that are outside the compressed experts, and leave what
    was found. Running it twice is harmless."""
    start = time.monotonic()
    entries = [e for e in stored_floats(context.source, context.layout) if e.file == file]
    biases = FAMILIES[context.layout.family].router_biases
    refused: list[NotFiniteTensor] = []
    noted: list[NotFiniteTensor] = []
    for entry, found in find_not_finite(context.source.store, entries):
        is_closed = found.num_minus_inf and not found.num_nan and not found.num_inf
        is_noted = is_closed and entry.name.endswith(biases)
        (noted if is_noted else refused).append(
            NotFiniteTensor(name=entry.name, dtype=entry.dtype, shape=entry.shape, **asdict(found))
        )
    manifest = ScanManifest(
        source_fingerprint=context.plan.source.fingerprint,
        file=file,
        num_tensors=len(entries),
        num_bytes=sum(entry.num_bytes for entry in entries),
        refused=tuple(refused),
        router_biases=tuple(noted),
        seconds=round(time.monotonic() - start, 3),
        finished_at=time.time(),
    )
    context.store.put(run_root.scan_manifest(file), manifest.to_json())


def find_not_finite(
    store: Store, entries: Sequence[TensorEntry]
) -> Iterator[tuple[TensorEntry, NotFinite]]:
    """Those of some tensors of one file that hold values which are not finite, with what they hold.

    Raises: what the store raises for bytes that are not there. Cost: memory for a few chunks.
    """
    with readers(sum(entry.num_bytes for entry in entries)) as threads:
        runs = merge_ranges(entries, COMPARE_CHUNK_BYTES)
        for run, found in threads.in_order(lambda run: look_at(store, run, threads), runs):
            yield from ((e, bad) for e, bad in zip(run, found, strict=True) if bad)


def look_at(store: Store, run: Sequence[TensorEntry], threads: Readers) -> list[NotFinite]:
    """What each of some neighbours in a file holds: one tensor in chunks, or small ones that are
    read together."""
    checks = [FiniteCheck(entry.dtype, entry.shape) for entry in run]
    if len(run) == 1:
        for piece in chunks(store, run[0], threads.reads):
            checks[0].add(piece)
        return [checks[0].found]
    start = run[0].start
    size = max(entry.start + entry.num_bytes for entry in run) - start
    data = memoryview(store.get_range(run[0].file, start, size))
    for entry, check in zip(run, checks, strict=True):
        check.add(data[entry.start - start :][: entry.num_bytes])
    return [check.found for check in checks]


def finish_scan(
    context: StageContext, shards: tuple[OutputShard, ...], units: Sequence[UnitManifest]
) -> None:
    """Say what was found.

    Raises: SourceError, naming every tensor that is refused, its file, the first place and the
        counts.
    """
    plan, store = context.plan, context.store
    scans = load_each(lambda file: load_scan(plan, store, file), plan.source.scanned)
    for line in router_notes(scans):
        log.warning("scan      %s", line)
    refused = [tensor_words(scan.file, tensor) for scan in scans for tensor in scan.refused]
    if refused:
        raise SourceError(
            f"{context.source.store.uri}: values that are not finite in {len(refused)} tensors"
            " outside the compressed experts, which would stand in the output as they are: mend"
            " the source (download the files named here again, or take another revision of the"
            f" model) and run the same command again\n{listed(refused)}"
        )


def scans_so_far(context: StageContext) -> list[ScanManifest]:
    """Of files that were read and can be told of."""
    keys = [run_root.scan_manifest(file) for file in context.plan.source.scanned]
    held = {info.key for info in context.store.list(run_root.SCAN)}
    return list(load_readable(ScanManifest, context.store, [k for k in keys if k in held]).values())


def router_notes(scans: Sequence[ScanManifest]) -> list[str]:
    """A line for each router with experts that it never chooses."""
    return [
        f"{tensor_words(scan.file, tensor)}: experts that the router never chooses, which stay so"
        for scan in scans
        for tensor in scan.router_biases
    ]


def tensor_words(file: str, tensor: NotFiniteTensor) -> str:
    """Where it is, and what in it is not finite."""
    found = NotFinite(**tensor.model_dump(include={"first", "num_nan", "num_inf", "num_minus_inf"}))
    return f"{file}: tensor {tensor.name} ({tensor.dtype} {list(tensor.shape)}): {found}"
