"""Commands of p48ray on a checkpoint's folder, and what all commands share; cli has those on a run
root."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from p48ray.benchmarks.smoke import run_smoke
from p48ray.benchmarks.smoke_table import print_smoke
from p48ray.checkpoint.modelopt import FORM_WORDS, Form
from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.checkpoint.sparse_storage import Storage
from p48ray.errors import ConfigError, P48Error, UserError
from p48ray.report.inspect import inspect_linear, print_inspection
from p48ray.runner.console import configure_logging
from p48ray.store.open import ENDPOINT_VARIABLES, open_store, scheme_of

checkpoint_commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()

Endpoint = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url", envvar=ENDPOINT_VARIABLES, help="Of an S3 server that is not AWS."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=(
            "Processes at work on shards. Default: as many as the cluster at RAY_ADDRESS has CPUs;"
            " without one, this process."
        ),
    ),
]
Shared = Annotated[
    bool,
    typer.Option("--shared", help="Local paths are the same folder on every node of the cluster."),
]
SourceEndpoint = Annotated[
    str | None,
    typer.Option("--source-endpoint-url", help="Of the source's; default: that of --endpoint-url."),
]


Format = Literal["compressed-tensors", "modelopt"]


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


@checkpoint_commands.command()
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
    workers: Workers = None,
    shared: Shared = False,
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


@checkpoint_commands.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a compressed checkpoint.")],
    out: Annotated[
        str, typer.Argument(help="New folder, or one where the same conversion was interrupted.")
    ],
    storage: Annotated[
        Storage | None,
        typer.Option(
            help=(
                "What to write: dense for stock loaders, sparse for the paired48 patch of vLLM on"
                " the GPUs that it names."
            )
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
    workers: Workers = None,
    shared: Shared = False,
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
            f"{'found' if done.was_there else 'wrote'} {out}: {FORM_WORDS[to]}, {done.num_shards}"
            " shards"
        )
        for what, (before, after) in (
            ("experts", done.expert_bytes),
            ("all tensors", done.all_bytes),
        ):
            typer.echo(f"{what:<12} {before:,} -> {after:,} bytes ({after / before:.3f}x)")
        if done.folding:
            typer.echo(f"gate and up share a global scale: {done.folding}")
        return True

    guarded(action)


@checkpoint_commands.command()
def update_config(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a finished checkpoint.")],
    endpoint_url: Endpoint = None,
) -> None:
    """Name all linears outside the experts in config.json (quantization_config.ignore) of a
    checkpoint of p48ray 0.1, which named none: SGLang and TensorRT-LLM need it. Only config.json
    and its digest in p48ray.json are written."""

    def action() -> bool:
        from p48ray.finished.config_update import fill_ignore

        found = fill_ignore(open_store(checkpoint, endpoint_url))
        if found.is_new:
            typer.echo(
                f"wrote {checkpoint}/config.json and its digest in p48ray.json: quantization_config"
                f".ignore has {len(found.patterns)} patterns"
            )
        else:
            typer.echo(f"found {checkpoint}/config.json up to date; nothing was written")
        return True

    guarded(action)


@checkpoint_commands.command()
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


@checkpoint_commands.command()
def smoke(
    checkpoint: Annotated[
        str, typer.Argument(help="As the server was given it: folder or owner/name.")
    ],
    server: Annotated[str, typer.Option(help="URL of an OpenAI-compatible server.")],
    reference: Annotated[
        str | None, typer.Option(help="URL of a server that it should answer like.")
    ] = None,
    served_name: Annotated[
        str | None, typer.Option("--served-name", help="The server's id for the checkpoint.")
    ] = None,
) -> None:
    """Send twenty prompts to a server, and to a reference: answers side by side, how far the
    log-probabilities agree, and what looks broken. Exit 1 if anything does."""

    def action() -> bool:
        found = run_smoke(checkpoint, server, reference, served_name)
        print_smoke(found, console)
        return not found.num_flawed

    guarded(action)


@checkpoint_commands.command()
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
