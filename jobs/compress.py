"""The main job: compress a checkpoint as a configuration file says. Run the same command again to
resume.

    python jobs/compress.py --config configs/tiny.yaml
    ray job submit --working-dir . -- \\
        python jobs/compress.py --config configs/tiny.yaml --run-root /abs/path

Exit code 0 only if checkpoint/ is complete and verified; 2 for a mistake in what the user supplied;
130 or 143 for Ctrl-C or SIGTERM; 1 otherwise.
"""

import os

# read when Ray is imported: a line per finished unit is not to be folded into one of many
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from p48ray.config import RunConfig
from p48ray.config.load import load_config
from p48ray.errors import ConfigError, P48Error, UserError
from p48ray.report.ending import ending
from p48ray.report.plan_table import print_plan, print_texts
from p48ray.report.report import print_report
from p48ray.runner.console import Interrupts, configure_logging
from p48ray.runner.pipeline import run_job
from p48ray.stages.prepare import check_run_place, prepare


def compress(path: Path, config: RunConfig, dry_run: bool, texts: bool, verbose: bool) -> None:
    if texts and not dry_run:
        raise ConfigError("--texts: expected beside --dry-run; a run reads its texts anyway")
    console = Console(width=None if os.isatty(1) else 160)
    check_run_place(path, config)
    prepared = prepare(config, is_dry=dry_run)
    print_plan(prepared, console)
    if dry_run:
        print_texts(prepared, console, is_asking=texts)
        return
    from p48ray.runner.ray_runner import RayRunner  # Ray, which a plan needs not

    address = os.environ.get("RAY_ADDRESS")
    report = run_job(prepared, lambda plan, root: RayRunner(plan, root, address, verbose))
    print_report(report, console)
    print(ending(prepared.context, prepared.store.uri, report, len(prepared.shards)))


def main(
    config: Annotated[Path, typer.Option(help="YAML configuration, see configs/.")],
    run_root: Annotated[str | None, typer.Option(help="Replaces run.root.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="dotted.key=value, replaces a key of the file; may be repeated."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan, print counts, bytes and estimates, and stop.")
    ] = False,
    texts: Annotated[
        bool, typer.Option("--texts", help="With --dry-run: sample texts in buckets, Hub, too.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print a line a unit too.")] = False,
) -> None:
    """Compress a mixture-of-experts checkpoint to paired-4:8 sparse NVFP4."""
    configure_logging(is_verbose=verbose)
    with Interrupts() as interrupts:
        try:
            compress(
                config, load_config(config, tuple(set_ or ()), run_root), dry_run, texts, verbose
            )
        except P48Error as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
        except KeyboardInterrupt:
            typer.echo(interrupts.last_words(), err=True)
            raise typer.Exit(interrupts.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
