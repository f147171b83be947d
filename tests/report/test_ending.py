"""The last lines of a job, where the run lies elsewhere than on this machine or is a pilot."""

import shlex
from dataclasses import replace

from p48ray.report.ending import COPY, ending, next_commands
from p48ray.report.report import Report
from p48ray.run import run_root
from tests.stages.small_run import SmallRun

ROOT = "s3://bucket/run"


def moved(finished: SmallRun) -> Report:
    """The finished run's report, as though it lay in a bucket."""
    report = Report.load(finished.prepared.store, run_root.REPORT)
    return report.model_copy(
        update={
            "checkpoint": f"{ROOT}/checkpoint/",
            "source": "s3://models/source",
            "stage_seconds": report.stage_seconds | {"total": 3720.0},
        }
    )


def test_run_in_a_bucket_is_verified_and_published_there_and_copied_to_be_served(
    finished: SmallRun,
) -> None:
    plan = finished.prepared.plan
    run = plan.config.run.model_copy(update={"endpoint_url": "http://host:9000"})
    source = plan.config.source.model_copy(update={"endpoint_url": "http://other:9000"})
    config = plan.config.model_copy(update={"run": run, "source": source})
    serve, verify, publish = (
        shlex.split(command)
        for command in next_commands(
            replace(finished.context, plan=plan.model_copy(update={"config": config})),
            ROOT,
            moved(finished),
        )
    )
    assert serve[:3] == ["vllm", "serve", COPY]
    assert verify == [
        *("p48ray", "verify", f"{ROOT}/checkpoint", "--source", "s3://models/source"),
        *("--source-endpoint-url", "http://other:9000", "--endpoint-url", "http://host:9000"),
    ]
    assert publish[-6:] == [
        *("--run-root", ROOT, "--repo", "OWNER/NAME", "--endpoint-url", "http://host:9000")
    ]


def test_pilot_has_a_report_and_nothing_to_serve(finished: SmallRun) -> None:
    plan = finished.prepared.plan
    run = plan.config.run.model_copy(update={"layers": plan.layers[:1]})
    pilot = plan.model_copy(update={"config": plan.config.model_copy(update={"run": run})})
    assert pilot.is_pilot
    assert ending(replace(finished.context, plan=pilot), ROOT, moved(finished), 0).splitlines() == [
        "done in 1 h 02 min",
        f"report      {ROOT}/report/report.html",
    ]


def test_finished_run_says_what_was_verified(finished: SmallRun) -> None:
    lines = ending(finished.context, ROOT, moved(finished), 6).splitlines()
    assert lines[1].startswith("verified    6 shards, ")
    assert lines[2:4] == [
        f"checkpoint  {ROOT}/checkpoint/",
        f"card        {ROOT}/checkpoint/README.md",
    ]
