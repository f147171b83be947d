"""The page of a run that is still going on, or of one that was given up, from what its run root
holds now.

It goes to a file outside the run root: there the job alone writes report/, once and at its end.
"""

import os
from pathlib import Path

from p48ray.errors import ConfigError
from p48ray.report.html import report_html
from p48ray.report.report import build_report
from p48ray.report.status import RunStatus, read_status
from p48ray.run import run_root
from p48ray.run.changing_hands import read_plan
from p48ray.run.manifest import UnitManifest
from p48ray.run.output_layout import plan_output
from p48ray.stages.mirror import mirror_state
from p48ray.stages.workplace import open_context
from p48ray.store.base import Store
from p48ray.store.view import local_path


def write_snapshot(store: Store, output: Path) -> RunStatus:
    """Write the page to `output`, whole or not at all. Of a complete run it is the job's own page.

    Returns: how far the run was.
    Raises: ConfigError for a place that cannot be written to or lies in the run root, for a run
        root without a plan, and while the source is still being copied; SourceError when the source
        is not the one that was planned.
    """
    check_output(store, output)
    status = read_status(store)
    if status.is_complete and store.head(run_root.REPORT_PAGE) is not None:
        page = store.get(run_root.REPORT_PAGE)
    else:
        page = snapshot(store, status).encode()
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        beside.write_bytes(page)
        beside.replace(output)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"--output {output}: could not be written: {error.strerror}") from error
    return status


def check_output(store: Store, output: Path) -> None:
    """Raises: ConfigError, see write_snapshot."""
    if output.is_dir() or not output.parent.is_dir():
        what = "a folder" if output.is_dir() else f"no folder {output.parent}"
        raise ConfigError(
            f"--output {output}: expected a file in a folder that is there, found {what}"
        )
    plan = local_path(store, run_root.PLAN)
    if plan is not None and Path(plan).resolve().parent in output.resolve().parents:
        raise ConfigError(
            f"--output {output}: expected a file outside the run root, where a page stands for a"
            f" finished run, found one in {store.uri}; name another place"
        )


def snapshot(store: Store, status: RunStatus) -> str:
    """The page, with what is there by now and a line on top that says so."""
    plan = read_plan(store)
    if not mirror_state(plan, store).is_complete:
        raise ConfigError(
            f"{store.uri}: expected the source to be there, found it still being copied; there is"
            " nothing to draw before that: `p48ray status` says how far it is"
        )
    context = open_context(plan, store)
    held = {info.key for info in store.list(run_root.UNITS)}
    keys = [key for u in plan.units if (key := run_root.unit_manifest(u.id)) in held]
    units = UnitManifest.load_all(store, keys)
    output = plan.config.output
    shards = plan_output(
        plan.units, output.max_shard_size, context.source, context.layout, output.storage
    )
    report = build_report(context, units, shards, None, {})
    return report_html(context, report, units, status=status)
