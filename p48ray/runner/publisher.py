"""The publishing job: what the Hub lacks is uploaded by Ray tasks, then the driver commits.

The token travels to the tasks as a field of their argument, whose text leaves it out. Small arguments go in the task's own message from the driver to
the worker: they are in no log, in no answer of Ray's dashboard or state API, and not in the object store, from which `ray.put` could spill it to a
disk. `runtime_env` would show it in the dashboard, and an actor's constructor would keep it in Ray's control store. A worker's own HF_TOKEN
or login file is not used, so the account that the driver has checked is the one that writes.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray.exceptions import RayError

from p48ray.errors import ConfigError, P48Error, StageFailedError, TransientStoreError, UserError, WorkerLostError
from p48ray.manifest import PublishedShard
from p48ray.report.plan_table import size
from p48ray.report.work import duration
from p48ray.runner.ray_runner import OBJECT_STORE_BYTES, first_line
from p48ray.stages.hub import Hub
from p48ray.stages.publish import Release, commit_release, lacking, read_records, read_release
from p48ray.stages.reduce import MANIFEST_FILE
from p48ray.stages.upload import Uploader, upload_or_error
from p48ray.store.base import Store

log = logging.getLogger("p48ray.progress")

MAX_ATTEMPTS = 3  # at one shard
LISTED_FAILURES = 10

Upload = Callable[[Uploader, Mapping[str, int]], Iterator[PublishedShard]]


@dataclass(frozen=True, slots=True)
class FileState:
    """One file of a release, for a person who asks before anything is sent."""

    name: str
    size_bytes: int
    state: str


def publish(store: Store, hub: Hub, is_private: bool, upload: Upload) -> str:
    """Put a run root's checkpoint on the Hub; returns the commit that has it. What is there already is neither sent nor committed again.

    Raises: UserError, StageFailedError; what was uploaded stays, and the same call goes on from there.
    """
    release = read_release(store)
    hub.check_access()
    hub.prepare(is_private)
    records = read_records(store, hub.target, release)
    _, held = hub.state([*release.shards, *release.files])
    if lacking(release, records, held):
        hub.check_card(release.files.get("README.md", b"").decode(errors="replace"))
        there = hub.held_objects(list(records.values()))
        records = {name: record for name, record in records.items() if name in there}
        missing = {shard: num for shard, num in release.shards.items() if shard not in records}
        if missing:
            uploader = Uploader(store, hub, MANIFEST_FILE, release.manifest.sha256)
            for record in with_progress(upload(uploader, missing), release, missing):
                records[record.path] = record
    commit = commit_release(hub, release, records)
    log.info("publish   %s (%d files) is at %s/%s, commit %s", size(release.num_bytes), len(release.shards) + len(release.files),
             hub.target.endpoint, hub.target.repo, commit)  # fmt: skip
    return commit


def rehearse(store: Store, hub: Hub) -> list[FileState]:
    """What `publish` would find; nothing is sent."""
    release = read_release(store)
    hub.check_access()
    records = read_records(store, hub.target, release)
    _, held = hub.state([*release.shards, *release.files])
    missing = set(lacking(release, records, held))
    states = []
    for name, num_bytes in [*release.shards.items(), *((n, len(data)) for n, data in release.files.items())]:
        state = "on the Hub" if name not in missing else "uploaded" if name in records else "to send"
        states.append(FileState(name, num_bytes, state))
    return states


def with_progress(done: Iterator[PublishedShard], release: Release, missing: Mapping[str, int]) -> Iterator[PublishedShard]:
    """A line a shard: how many, how many bytes, how fast, how long yet. Bytes that the Hub turns out to have count as the others do."""
    start, total = time.monotonic(), sum(release.shards.values())
    left = sum(missing.values())
    log.info("publish   %d shards, %s, to send at most %s", len(release.shards), size(total), size(left))
    num_done, resumed = len(release.shards) - len(missing), total - left
    for record in done:
        left -= record.size_bytes
        num_done += 1
        rate = (total - left - resumed) / (time.monotonic() - start)
        log.info("publish   %d/%d shards  %s of %s  %d %%  %s/s  %s left", num_done, len(release.shards), size(total - left), size(total),
                 100 * (total - left) // total, size(round(rate)), duration(left / rate))  # fmt: skip
        yield record


class RayUploads:
    """Uploads as Ray tasks, `num_workers` at a time, each with one CPU.

    Args: address: of a running cluster; None starts a Ray on this machine and stops it at the end. settings: environment variables that
          huggingface_hub reads when it is imported, no secrets among them. is_shared: a local run root is the same folder on every node.
    """

    def __init__(self, num_workers: int, address: str | None, settings: Mapping[str, str], is_shared: bool) -> None:
        self.num_workers, self.address, self.settings, self.is_shared = num_workers, address, dict(settings), is_shared

    def __call__(self, uploader: Uploader, shards: Mapping[str, int]) -> Iterator[PublishedShard]:
        """Yields records as shards are done. All that can be uploaded is, before a failure is raised."""
        with nullcontext() if ray.is_initialized() else OwnRay(self.num_workers, self.address) as own:
            self.check_shared(uploader.store)
            yield from self.run(uploader, shards, {} if own and own.address is None else {"runtime_env": {"env_vars": self.settings}})

    def check_shared(self, store: Store) -> None:
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        if len(nodes) > 1 and "://" not in store.uri and not self.is_shared:
            raise ConfigError(
                f"--run-root: {store.uri} is a local path and the cluster has {len(nodes)} nodes; use a bucket, or a shared folder"
            )

    def run(self, uploader: Uploader, shards: Mapping[str, int], options: Mapping[str, Any]) -> Iterator[PublishedShard]:
        task = ray.remote(upload_or_error).options(num_cpus=1, max_retries=0, **options)
        waiting = sorted(shards, key=lambda s: shards[s])  # the largest is taken first, from the end
        attempts: Counter[str] = Counter()
        running: dict[Any, str] = {}
        failed: dict[str, Exception] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.num_workers:
                    shard = waiting.pop()
                    running[task.remote(uploader, shard, shards[shard])] = shard
                done, _ = ray.wait(list(running), num_returns=1)
                shard = running.pop(done[0])
                found = outcome(done[0])
                if isinstance(found, PublishedShard):
                    yield found
                    continue
                if isinstance(found, UserError):
                    raise found
                attempts[shard] += 1
                may_pass = isinstance(found, TransientStoreError | WorkerLostError)
                if may_pass and attempts[shard] < MAX_ATTEMPTS:
                    log.warning("publish %s: attempt %d failed, it will be tried again: %s", shard, attempts[shard], found)
                    waiting.append(shard)
                else:
                    failed[shard] = found
        finally:
            for ref in running:
                ray.cancel(ref, force=True)
        if failed:
            lines = [f"  {shard}: {type(error).__name__}: {first_line(error)}" for shard, error in list(failed.items())[:LISTED_FAILURES]]
            raise StageFailedError(
                f"{len(failed)} of {len(shards)} shards failed; run the same command again to go on\n" + "\n".join(lines)
            )


def outcome(ref: Any) -> PublishedShard | P48Error:
    """A finished task's record, or what went wrong. A process that died, or that raised what is not ours, may be replaced."""
    try:
        found: PublishedShard | P48Error = ray.get(ref)
    except RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return WorkerLostError(lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}")
    return found


class OwnRay(AbstractContextManager["OwnRay"]):
    """A connection to a cluster, or a Ray of this machine, for as long as the uploads take."""

    def __init__(self, num_workers: int, address: str | None) -> None:
        self.num_workers, self.address = num_workers, address

    def __enter__(self) -> Self:
        own = {"address": "local", "num_cpus": self.num_workers, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        try:
            ray.init(**({"address": self.address} if self.address else own), log_to_driver=True, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if self.address is None:
                raise
            raise ConfigError(f"RAY_ADDRESS: expected a running Ray cluster at {self.address!r}: {first_line(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
