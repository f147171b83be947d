"""Verification of a checkpoint folder by one process or by many: the same verdict, sooner."""

import logging
from collections.abc import Iterator

from p48ray.finished.foreign_units import is_foreign_folder
from p48ray.finished.foreign_verify import survey_foreign
from p48ray.finished.survey import survey_checkpoint
from p48ray.finished.verify_checkpoint import (
    CheckpointVerdict,
    FileFindings,
    check_shard,
    combine_findings,
)
from p48ray.report.plan_table import size
from p48ray.runner.progress import Amount, each_file
from p48ray.runner.ray_tasks import RayTasks
from p48ray.store.base import Store

log = logging.getLogger("p48ray.progress")


def verify_folder(
    checkpoint: Store, source: Store | None, tasks: RayTasks | None = None
) -> CheckpointVerdict:
    """Verify a checkpoint, shard by shard, with progress in bytes.

    Args:
        tasks: where shards are read; None for this process.
    Raises: UserError, ShardCorruptError or StageFailedError when there can be no verdict; what is
        wrong with the checkpoint is in the verdict.
    """
    survey = (
        survey_foreign(checkpoint, source)
        if is_foreign_folder(checkpoint)
        else survey_checkpoint(checkpoint, source)
    )
    checks = {check.file: check for check in survey.checks}
    sizes = {file: check.size_bytes for file, check in checks.items()}
    log.info(
        "verify    %d shards, %s%s",
        len(sizes),
        size(sum(sizes.values())),
        ", beside their source" if source else "",
    )
    done: Iterator[tuple[str, FileFindings]]
    if tasks is None:
        done = ((file, check_shard(check)) for file, check in checks.items())
    else:
        stores = {"CHECKPOINT": checkpoint} | ({"--source": source} if source else {})
        done = tasks.run(check_shard, {file: (check,) for file, check in checks.items()}, stores)
    return combine_findings(survey, dict(each_file("verify", done, sizes, Amount(0, 0))))
