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

from p48ray.finished.branch import Hub
from p48ray.finished.publish import (
    check_left_over,
    commit_release,
    lacking,
    left_over,
    read_records,
)
from p48ray.finished.release import Release
from p48ray.finished.upload import Uploader, upload_and_record
from p48ray.report.plan_table import size
from p48ray.run.checkpoint_manifest import MANIFEST_FILE
from p48ray.run.manifest import PublishedShard
from p48ray.runner.progress import Amount, each_file
from p48ray.runner.ray_tasks import RayTasks

log = logging.getLogger("p48ray.progress")

UploadShards = Callable[[Uploader, Mapping[str, int]], Iterator[PublishedShard]]


def publish(
    release: Release, hub: Hub, is_private: bool, is_replacing: bool, upload: UploadShards
) -> str:
    """Put a finished checkpoint on the Hub; returns the commit that has it. What is there already
    is neither sent nor committed again.

    Args:
        release: what is published, with the run root where uploads are recorded, if any.
        hub: with repository, branch and token.
        is_private: make the repository private if it is new; one that is public is refused.
        is_replacing: delete weights that are there and not in the release; else they are refused.
        upload: uploads the shards that it is given with their sizes in bytes.
    Raises: UserError, StageFailedError; what was uploaded stays, and the same call goes on from
        there.
    """
    hub.check_access()
    hub.prepare(is_private)
    records = read_records(hub.target, release)
    branch = hub.state(release.names)
    check_left_over(hub, left_over(release, branch.paths), is_replacing)
    if lacking(release, records, branch.files):
        hub.check_card(release.files.get("README.md", b"").decode(errors="replace"))
        there = hub.held_objects(list(records.values()))
        records = {name: record for name, record in records.items() if name in there}
        missing = {shard: num for shard, num in release.shards.items() if shard not in records}
        if missing:
            uploader = Uploader(
                release.checkpoint, release.records, hub, MANIFEST_FILE, release.manifest.sha256
            )
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
    commit = commit_release(hub, release, records, is_replacing)
    log.info(
        "publish   %s (%d files) is at %s/%s, commit %s",
        size(release.num_bytes),
        len(release.names),
        hub.target.endpoint,
        hub.target.repo,
        commit,
    )
    return commit


class RayUploads:
    """Uploads as Ray tasks."""

    def __init__(self, tasks: RayTasks) -> None:
        self.tasks = tasks

    def __call__(self, uploader: Uploader, shards: Mapping[str, int]) -> Iterator[PublishedShard]:
        """Yields records as shards are done, the largest started first. All that can be uploaded
        is, before a failure is raised."""
        largest_first = sorted(shards, key=lambda s: -shards[s])
        items = {shard: (uploader, shard, shards[shard]) for shard in largest_first}
        stores = {"--run-root": uploader.records, "--checkpoint": uploader.checkpoint}
        opened = {option: store for option, store in stores.items() if store is not None}
        for _, record in self.tasks.run(upload_and_record, items, opened):
            yield record
