"""p48ray: questions about a run root or a checkpoint, answered from the bucket alone; no cluster is
needed."""

from pathlib import Path
from typing import Annotated

import typer

from p48ray.checkpoint_commands import Endpoint, checkpoint_commands, console, guarded
from p48ray.errors import ConfigError
from p48ray.report.snapshot import write_snapshot
from p48ray.report.status import print_status, read_status
from p48ray.report.watch import watch
from p48ray.run.changing_hands import read_plan
from p48ray.run.cleanup import delete_all, describe_removable, find_removable
from p48ray.run.doctor import describe, diagnose, run_roots_in
from p48ray.run.scratch import describe_others, known_scratch, other_runs
from p48ray.store.base import Store
from p48ray.store.open import open_store, scheme_of

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False
)
app.add_typer(checkpoint_commands)

RunRoot = Annotated[str, typer.Argument(help="Folder or URI of a run.")]
INTERRUPTED = 130  # as a shell says it of Ctrl-C


def open_run(place: str, endpoint_url: str | None) -> Store:
    """Raises: ConfigError for a place where no run can lie."""
    store, scheme = open_store(place, endpoint_url), scheme_of(place)
    if not scheme.is_writable:
        found = f"found {scheme.noun}, where none can lie"
        raise ConfigError(f"{place}: expected a run root, {found}")
    return store


@app.command()
def status(
    run_root: RunRoot,
    watched: Annotated[
        bool, typer.Option("--watch", help="Go on until the run is complete, or Ctrl-C.")
    ] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """How far a run has come: each stage, each layer, and what failed."""

    def action() -> bool:
        store = open_run(run_root, endpoint_url)
        if not watched:
            print_status(read_status(store), console)
            return True
        try:
            watch(store, console)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        return True

    guarded(action)


@app.command()
def doctor(
    run_root: RunRoot,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Delete what is unsound, so that the next run makes it anew."),
    ] = False,
    sizes_only: Annotated[
        bool, typer.Option("--sizes-only", help="Read records, but no bytes of what they name.")
    ] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Read every record and every digest of a run root and say what is unsound, what to delete, and
    what the next run makes anew. The finished checkpoint's own bytes are `verify`'s. Exit 0 if
    nothing is unsound, or all of it was deleted; 1 otherwise."""

    def action() -> bool:
        found = [
            (part, diagnose(part, reads_bytes=not sizes_only))
            for part in run_roots_in(open_run(run_root, endpoint_url))
        ]
        for part, diagnosis in found:
            for line in describe(diagnosis):
                typer.echo(line)
            if fix:
                delete_all(known_scratch(part).store, diagnosis.keys)
                typer.echo(f"  deleted {len(diagnosis.keys)} objects")
            elif diagnosis.unsound:
                typer.echo("  to delete what is unsound: the same command with --fix")
        return fix or not any(diagnosis.unsound for _, diagnosis in found)

    guarded(action)


@app.command()
def clean(
    run_root: RunRoot,
    units: Annotated[
        bool, typer.Option("--units", help="Unit shards too, once the run is at its end.")
    ] = False,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="The copy of a hf:// source too, likewise.")
    ] = False,
    scratch: Annotated[
        bool,
        typer.Option(
            "--scratch", help="Also what other runs left in this run's scratch, held by no driver."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what may go, and delete nothing.")
    ] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Delete what nothing in a run root will read again: streams of finished layers, in run.scratch
    too, and attempts that lost; with options more."""

    def action() -> bool:
        wanted = {"streams", "attempts", *(["units"] * units), *(["mirror"] * mirror)}
        folders: set[Path] = set()
        for part in run_roots_in(open_run(run_root, endpoint_url)):
            known = known_scratch(part)
            folders |= set(known.folders)
            found = find_removable(read_plan(part), known.store)
            waiting = [f for f in found if f.name in wanted and f.keys and f.waits_for]
            if waiting and not dry_run:
                raise ConfigError(
                    f"--{waiting[0].name}: {part.uri}: expected {waiting[0].waits_for}; nothing was"
                    " deleted"
                )
            for line in describe_removable(part.uri, found, set() if dry_run else wanted):
                typer.echo(line)
            for folder in known.unseen:
                typer.echo(f"  not seen from here: {folder} (run.scratch)")
            if not dry_run:
                delete_all(known.store, [key for f in found if f.name in wanted for key in f.keys])
        others = other_runs(folders)
        for line in describe_others(others, is_deleted=scratch and not dry_run):
            typer.echo(line)
        for other in others:
            if scratch and not dry_run and not other.is_held:
                other.remove()
        return True

    guarded(action)


@app.command()
def report(
    run_root: RunRoot,
    output: Annotated[
        Path, typer.Option(help="File to write, on this machine and outside the run root.")
    ] = Path("report.html"),
    endpoint_url: Endpoint = None,
) -> None:
    """Write the page of a run as it stands now, finished or not. The run root is only read."""

    def action() -> bool:
        status = write_snapshot(open_run(run_root, endpoint_url), output)
        state = "complete" if status.is_complete else "not complete"
        typer.echo(f"wrote {output}: {status.name}, {state}")
        return True

    guarded(action)


if __name__ == "__main__":
    app()
