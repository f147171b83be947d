"""p48ray: questions about a run root or a checkpoint, answered from the bucket alone; no cluster is
needed."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from p48ray.checkpoint.modelopt import FORM_WORDS, Form
from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.checkpoint.sparse_storage import Storage
from p48ray.errors import ConfigError, P48Error, UserError
from p48ray.report.inspect import inspect_linear, print_inspection
from p48ray.report.snapshot import write_snapshot
from p48ray.report.status import print_status, read_status
from p48ray.report.watch import watch
from p48ray.run.changing_hands import read_plan
from p48ray.run.cleanup import delete_all, describe_removable, find_removable
from p48ray.run.doctor import describe, diagnose, run_roots_in
from p48ray.runner.console import configure_logging
from p48ray.store.base import Store
from p48ray.store.open import ENDPOINT_VARIABLES, open_store, scheme_of

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False
)
console = Console()

Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url", envvar=ENDPOINT_VARIABLES, help="Of an S3 server that is not AWS."
    ),
]
SourceEndpoint = Annotated[
    str | None,
    typer.Option("--source-endpoint-url", help="Of the source's; default: that of --endpoint-url."),
]


Format = Literal["compressed-tensors", "modelopt"]
RunRoot = Annotated[str, typer.Argument(help="Folder or URI of a run.")]
INTERRUPTED = 130  # as a shell says it of Ctrl-C


def open_run(place: str, endpoint_url: str | None) -> Store:
    """Raises: ConfigError for a place where no run can lie."""
    store, scheme = open_store(place, endpoint_url), scheme_of(place)
    if not scheme.is_writable:
        found = f"found {scheme.noun}, where none can lie"
        raise ConfigError(f"{place}: expected a run root, {found}")
    return store


def guarded(action: Callable[[], bool]) -> None:
    """Run; exit 0 if it returns True, 1 if False or for an internal error, 2 for a user's
    mistake."""
    configure_logging(sys.stderr)
    try:
        is_good = action()
    except P48Error as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    raise typer.Exit(0 if is_good else 1)


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
                delete_all(part, diagnosis.keys)
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what may go, and delete nothing.")
    ] = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Delete what nothing in a run root will read again: streams of finished layers and attempts
    that lost; with options more."""

    def action() -> bool:
        wanted = {"streams", "attempts", *(["units"] * units), *(["mirror"] * mirror)}
        for part in run_roots_in(open_run(run_root, endpoint_url)):
            found = find_removable(read_plan(part), part)
            waiting = [f for f in found if f.name in wanted and f.keys and f.waits_for]
            if waiting and not dry_run:
                raise ConfigError(
                    f"--{waiting[0].name}: {part.uri}: expected {waiting[0].waits_for}; nothing was"
                    " deleted"
                )
            for line in describe_removable(part.uri, found, set() if dry_run else wanted):
                typer.echo(line)
            if not dry_run:
                delete_all(part, [key for f in found if f.name in wanted for key in f.keys])
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


@app.command()
def verify(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a compressed checkpoint.")],
    source: Annotated[
        str | None,
        typer.Option(
            help=(
                "The checkpoint it was made from: untouched tensors and weight errors are compared"
                " too."
            )
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=(
                "Processes that read shards. Default: as many as the cluster at RAY_ADDRESS has"
                " CPUs; without one, this process."
            ),
        ),
    ] = None,
    shared: Annotated[
        bool,
        typer.Option(
            "--shared", help="Local paths are the same folder on every node of the cluster."
        ),
    ] = False,
    endpoint_url: Endpoint = None,
    source_endpoint_url: SourceEndpoint = None,
) -> None:
    """Re-read a checkpoint as a stranger and print what is wrong with it, as JSON; progress goes to
    the standard error. Exit 0 if nothing is, 1 otherwise."""

    def action() -> bool:
        from p48ray.finished.verifier import verify_folder

        # here, because Ray takes a second to import and no other command needs it
        from p48ray.runner.ray_tasks import RayTasks

        address = os.environ.get("RAY_ADDRESS")
        tasks = RayTasks(
            what="verify", num_workers=workers, address=address, is_shared=shared, shows_logs=False
        )
        verdict = verify_folder(
            open_store(checkpoint, endpoint_url),
            open_store(source, source_endpoint_url or endpoint_url) if source else None,
            tasks if address or (workers or 1) > 1 else None,
        )
        typer.echo(json.dumps(verdict.model_dump(), indent=1))
        return not verdict.problems

    guarded(action)


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a compressed checkpoint.")],
    out: Annotated[
        str, typer.Argument(help="New folder, or one where the same conversion was interrupted.")
    ],
    storage: Annotated[
        Storage | None,
        typer.Option(
            help="What to write: sparse for the kernels of paired-4:8, dense for stock loaders."
        ),
    ] = None,
    layout: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help=(
                "What to write in dense storage: modelopt for readers of NVIDIA's layout,"
                " compressed-tensors to go back from it."
            ),
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=(
                "Processes that convert shards. Default: as many as the cluster at RAY_ADDRESS has"
                " CPUs; without one, this process."
            ),
        ),
    ] = None,
    shared: Annotated[
        bool,
        typer.Option(
            "--shared", help="Local paths are the same folder on every node of the cluster."
        ),
    ] = False,
    endpoint_url: Endpoint = None,
    out_endpoint_url: Annotated[
        str | None,
        typer.Option(
            "--out-endpoint-url", help="Of OUT's S3 server; default: that of --endpoint-url."
        ),
    ] = None,
) -> None:
    """Write a checkpoint anew: in sparse or dense storage (--storage), or in NVIDIA ModelOpt's
    layout and back (--format), without loss either way. Progress goes to the standard error."""

    def action() -> bool:
        # here, because Ray takes a second to import
        from p48ray.finished.converter import convert_folder
        from p48ray.runner.ray_tasks import RayTasks

        if (storage is None) == (layout is None):
            found = "both" if storage else "neither"
            raise ConfigError(f"expected --storage or --format, found {found}")
        to: Form = storage or ("modelopt" if layout == "modelopt" else "dense")
        if not scheme_of(out).is_writable:
            raise ConfigError(f"OUT: expected a place that can be written to, found {out}")
        address = os.environ.get("RAY_ADDRESS")
        tasks = RayTasks(
            what="convert", num_workers=workers, address=address, is_shared=shared, shows_logs=False
        )
        done = convert_folder(
            open_store(checkpoint, endpoint_url),
            open_store(out, out_endpoint_url or endpoint_url),
            to,
            tasks if address or (workers or 1) > 1 else None,
        )
        typer.echo(
            f"{'found' if done.is_done else 'wrote'} {out}: {FORM_WORDS[to]}, {len(done.shards)}"
            " shards"
        )
        for what, (before, after) in (
            ("experts", done.expert_bytes),
            ("all tensors", done.all_bytes),
        ):
            typer.echo(f"{what:<12} {before:,} -> {after:,} bytes ({after / before:.3f}x)")
        return True

    guarded(action)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a compressed checkpoint.")],
    linear: Annotated[
        str | None, typer.Option(help="Module name of one expert linear; default: the first.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="The checkpoint it was made from, for the weight error.")
    ] = None,
    endpoint_url: Endpoint = None,
    source_endpoint_url: SourceEndpoint = None,
) -> None:
    """One linear: patterns kept, scales, codes, weight error."""

    def action() -> bool:
        origin = open_store(source, source_endpoint_url or endpoint_url) if source else None
        print_inspection(
            inspect_linear(open_store(checkpoint, endpoint_url), linear, origin), console
        )
        return True

    guarded(action)


@app.command()
def skeleton(
    folder: Annotated[
        Path, typer.Argument(help="New folder; its sparse files take a few MB of disk.")
    ],
) -> None:
    """Write a checkpoint of Kimi-K2.5's shape with headers and no data, to try plans on:
    jobs/compress.py --dry-run --set source.checkpoint=FOLDER."""

    def action() -> bool:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder}: expected a new or empty folder, found something there; nothing was"
                " written"
            )
        write_kimi_k25_skeleton(folder)
        typer.echo(f"wrote {folder}")
        return True

    guarded(action)


if __name__ == "__main__":
    app()
