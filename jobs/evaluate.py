"""Benchmarks of a finished run's checkpoint, beside its base and the one-shot baseline. Run the
same command again to resume.

    python jobs/evaluate.py --config configs/kimi_k25_p48_nvfp4.yaml --run-root s3://bucket/run
    python jobs/evaluate.py --config FILE --run-root ROOT --checkpoint ours \\
        --server http://host:8000

lm-evaluation-harness asks an OpenAI-compatible server: the one at --server, or one that is started
for each checkpoint as a Ray actor. The table goes to report.json, report.html and the card. Exit
code 0 only if all that was asked for is measured; 2 for a mistake in what the user supplied; 1
otherwise.
"""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from p48ray.benchmarks.job import Evaluation, prepare_evaluation, run_evaluation
from p48ray.benchmarks.ray_server import RayServer
from p48ray.config.benchmarks import Role
from p48ray.config.load import load_config
from p48ray.errors import P48Error, UserError
from p48ray.report.benchmark_section import print_benchmarks
from p48ray.runner.console import configure_logging


def print_dry(evaluation: Evaluation, url: str | None) -> None:
    """What would be started and asked."""
    for column in evaluation.chosen:
        print(f"{column.title}: {column.place}, identity {column.identity[:12]}")
        print(
            "  to measure: "
            + (
                ", ".join(f"{t.label} ({t.shots}-shot {t.metric})" for t in column.missing)
                or "nothing, all is there"
            )
        )
        if column.missing:
            print(f"  server: {url or shlex.join(evaluation.server_command(column))}")


def main(
    config: Annotated[
        Path, typer.Option(help="YAML configuration of the run, with a section benchmarks.")
    ],
    run_root: Annotated[str | None, typer.Option(help="Replaces run.root.")] = None,
    checkpoint: Annotated[
        Role | None,
        typer.Option(help="Measure this one only; default: all that the configuration names."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Base URL of a server that runs already; it serves --checkpoint, by default ours."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="dotted.key=value, replaces a key of the file; may be repeated."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what would be measured, by which server, and stop."),
    ] = False,
) -> None:
    """Benchmarks of a finished run's checkpoint beside its base and the one-shot baseline."""
    configure_logging()
    try:
        evaluation = prepare_evaluation(
            load_config(config, tuple(set_ or ()), run_root), checkpoint, server
        )
        if dry_run:
            return print_dry(evaluation, server)
        address = os.environ.get("RAY_ADDRESS")
        table = run_evaluation(
            evaluation,
            server,
            lambda command: RayServer(command, evaluation.benchmarks.server, address),
        )
        print_benchmarks(table, Console(width=None if os.isatty(1) else 160))
    except P48Error as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None


if __name__ == "__main__":
    typer.run(main)
