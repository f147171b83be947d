"""The last lines of a finished job: what there is now, where it lies, and what to do with it."""

import shlex

from p48ray.report.plan_table import size
from p48ray.report.report import Report
from p48ray.report.serving_card import fitting_flags
from p48ray.report.work import duration
from p48ray.run import run_root
from p48ray.store.open import scheme_of
from p48ray.unit.context import StageContext

COPY = "COPY_OF_THE_CHECKPOINT"


def ending(context: StageContext, root: str, report: Report, num_shards: int) -> str:
    """Lines for a terminal or a log, without colours.

    Args:
        context: of the run.
        root: uri of the run root.
        report: of the run.
        num_shards: of the checkpoint, all of which were verified.
    """
    plan = context.plan
    lines = [f"done in {duration(report.stage_seconds['total'])}"]
    if not plan.is_pilot:
        lines += [
            f"verified    {num_shards} shards, {size(report.checkpoint_bytes)} (source"
            f" {size(report.source_bytes)}), experts {size(report.expert_bytes)}",
            f"checkpoint  {report.checkpoint}",
            f"card        {root}/{run_root.checkpoint_file('README.md')}",
        ]
    lines += [f"report      {root}/{run_root.REPORT_PAGE}"]
    if not plan.is_pilot:
        lines += ["next:", *(f"  {command}" for command in next_commands(context, root, report))]
    return "\n".join(lines)


def next_commands(context: StageContext, root: str, report: Report) -> list[str]:
    """Serve, verify, publish, as a shell takes them."""
    plan = context.plan
    checkpoint = report.checkpoint.rstrip("/")
    # a server wants a folder: what lies in a bucket is copied first
    served = checkpoint if scheme_of(checkpoint).served else COPY
    url = plan.config.run.endpoint_url
    endpoint = ["--endpoint-url", url] if url else []
    source_url = plan.config.source.endpoint_url
    source = ["--source", report.source]
    if source_url and source_url != url:
        source += ["--source-endpoint-url", source_url]
    return [
        " ".join([shlex.join(["vllm", "serve", served]), *fitting_flags(context)]),
        shlex.join(["p48ray", "verify", checkpoint, *source, *endpoint]),
        "HF_TOKEN=... "
        + shlex.join(["python", "jobs/publish.py", "--run-root", root, "--repo", "OWNER/NAME"])
        + "".join(f" {word}" for word in endpoint),
    ]
