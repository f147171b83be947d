"""p48ray: questions about a run root or a checkpoint, answered from the bucket alone; no cluster is needed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.errors import ConfigError, P48Error, UserError
from p48ray.report.inspect import inspect_linear, print_inspection
from p48ray.report.status import print_status, read_status
from p48ray.runner.console import configure_logging
from p48ray.stages.verify_checkpoint import verify_checkpoint
from p48ray.store.hub import is_hub
from p48ray.store.open import open_store

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
console = Console()


def guarded(action: Callable[[], bool]) -> None:
    """Run; exit 0 if it returns True, 1 if False or for an internal error, 2 for a user's mistake."""
    configure_logging()
    try:
        is_good = action()
    except P48Error as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    raise typer.Exit(0 if is_good else 1)


@app.command()
def status(run_root: Annotated[str, typer.Argument(help="Folder or URI of a run.")]) -> None:
    """How far a run has come: each stage, each layer, and what failed."""

    def action() -> bool:
        if is_hub(run_root):
            raise ConfigError(f"{run_root}: expected a run root, found a repository on the Hub, where none can lie")
        print_status(read_status(open_store(run_root)), console)
        return True

    guarded(action)


@app.command()
def verify(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a compressed checkpoint.")],
    source: Annotated[
        str | None, typer.Option(help="The checkpoint it was made from: untouched tensors and weight errors are compared too.")
    ] = None,
) -> None:
    """Re-read a checkpoint as a stranger and print what is wrong with it, as JSON. Exit 0 if nothing is, 1 otherwise."""

    def action() -> bool:
        verdict = verify_checkpoint(open_store(checkpoint), open_store(source) if source else None)
        typer.echo(json.dumps(verdict.model_dump(), indent=1))
        return not verdict.problems

    guarded(action)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a compressed checkpoint.")],
    linear: Annotated[str | None, typer.Option(help="Module name of one expert linear; default: the first.")] = None,
    source: Annotated[str | None, typer.Option(help="The checkpoint it was made from, for the weight error.")] = None,
) -> None:
    """One linear: patterns kept, scales, codes, weight error."""

    def action() -> bool:
        print_inspection(inspect_linear(open_store(checkpoint), linear, open_store(source) if source else None), console)
        return True

    guarded(action)


@app.command()
def skeleton(folder: Annotated[Path, typer.Argument(help="New folder; its sparse files take a few MB of disk.")]) -> None:
    """Write a checkpoint of Kimi-K2.5's shape with headers and no data, to try plans on: jobs/compress.py --dry-run --set source.checkpoint=FOLDER."""

    def action() -> bool:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: expected a new or empty folder, found something there; nothing was written")
        write_kimi_k25_skeleton(folder)
        typer.echo(f"wrote {folder}")
        return True

    guarded(action)


if __name__ == "__main__":
    app()
