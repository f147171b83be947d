"""The publishing job: what the Hub lacks is uploaded by Ray tasks, then the driver commits.

The token travels to the tasks as a field of their argument, whose text leaves it out. Small
arguments go in the task's own message from the driver to the worker: they are in no log, in no
answer of Ray's dashboard or state API, and not in the object store, from which `ray.put` could
spill it to a disk. `runtime_env` would show it in the dashboard, and an actor's constructor would
keep it in Ray's control store. A worker's own HF_TOKEN or login file is not used, so the account
that the driver has checked is the one that writes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from p48ray.finished.branch import Hub
from p48ray.finished.publish import commit_release, lacking, read_records, read_release
from p48ray.finished.upload import Uploader, upload_and_record
from p48ray.report.plan_table import size
from p48ray.run.manifest import MANIFEST_FILE, PublishedShard
from p48ray.runner.progress import Amount, each_file
from p48ray.runner.ray_tasks import RayTasks
from p48ray.store.base import Store

log = logging.getLogger("p48ray.progress")

UploadShards = Callable[[Uploader, Mapping[str, int]], Iterator[PublishedShard]]


@dataclass(frozen=True, slots=True)
class FileState:
    """One file of a release, for a person who asks before anything is sent."""

    name: str
    size_bytes: int
    state: str


def publish(store: Store, hub: Hub, is_private: bool, upload: UploadShards) -> str:
    """Put a run root's checkpoint on the Hub; returns the commit that has it. What is there already
    is neither sent nor committed again.

    Args:
        store: the run root, where uploads are recorded.
        hub: with repository, branch and token.
        is_private: make the repository private if it is new; one that is public is refused.
        upload: uploads the shards that it is given with their sizes in bytes.
    Raises: UserError, StageFailedError; what was uploaded stays, and the same call goes on from
        there.
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
            total, left = sum(release.shards.values()), sum(missing.values())
            log.info(
                "publish   %d shards, %s, to send at most %s",
                len(release.shards),
                size(total),
                size(left),
            )
            sent = ((record.path, record) for record in upload(uploader, missing))
            before = Amount(len(release.shards) - len(missing), total - left)
            records |= each_file("publish", sent, missing, before)
    commit = commit_release(hub, release, records)
    num_files = len(release.shards) + len(release.files)
    log.info(
        "publish   %s (%d files) is at %s/%s, commit %s",
        size(release.num_bytes),
        num_files,
        hub.target.endpoint,
        hub.target.repo,
        commit,
    )
    return commit


def rehearse(store: Store, hub: Hub) -> list[FileState]:
    """What `publish` would find; nothing is sent."""
    release = read_release(store)
    hub.check_access()
    records = read_records(store, hub.target, release)
    _, held = hub.state([*release.shards, *release.files])
    missing = set(lacking(release, records, held))
    states = []
    for name, num_bytes in [
        *release.shards.items(),
        *((n, len(data)) for n, data in release.files.items()),
    ]:
        state = (
            "on the Hub" if name not in missing else "uploaded" if name in records else "to send"
        )
        states.append(FileState(name, num_bytes, state))
    return states


class RayUploads:
    """Uploads as Ray tasks."""

    def __init__(self, tasks: RayTasks) -> None:
        self.tasks = tasks

    def __call__(self, uploader: Uploader, shards: Mapping[str, int]) -> Iterator[PublishedShard]:
        """Yields records as shards are done, the largest started first. All that can be uploaded
        is, before a failure is raised."""
        largest_first = sorted(shards, key=lambda s: -shards[s])
        items = {shard: (uploader, shard, shards[shard]) for shard in largest_first}
        for _, record in self.tasks.run(upload_and_record, items, {"--run-root": uploader.store}):
            yield record
