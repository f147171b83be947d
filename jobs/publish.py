"""Publish a finished checkpoint on the Hugging Face Hub: a run's, or a folder that `p48ray convert`
wrote. Run the same command again to resume.

    HF_TOKEN=... python jobs/publish.py --run-root runs/tiny --repo owner/name --private

Exit code 0 only if the commit is on the Hub; 2 for a mistake in what the user supplied; 1
otherwise, an unmet --require among it. The token comes from HF_TOKEN or from the login file (`hf
auth login`). HF_ENDPOINT is honoured; HF_HUB_DISABLE_XET=1 takes plain LFS calls (the Xet path is
untested).
"""

import os
from typing import Annotated

import typer
from huggingface_hub import constants, get_token
from huggingface_hub.utils import validate_repo_id
from rich.console import Console

from p48ray.errors import ConfigError, P48Error, UserError
from p48ray.finished.branch import Hub, Target
from p48ray.finished.publisher import RayUploads, publish
from p48ray.finished.rehearsal import print_states, rehearse
from p48ray.finished.release import open_release
from p48ray.finished.requirements import check_requirements, parse_requirement
from p48ray.runner.console import configure_logging
from p48ray.runner.ray_tasks import RayTasks
from p48ray.store.open import ENDPOINT_VARIABLES

# pretty ones print locals, and the token is in some
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# of huggingface_hub, read when workers import it
SHARED_SETTINGS = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE")


def connect(repo: str, revision: str) -> Hub:
    """Raises: ConfigError for a bad name or without a token."""
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ConfigError(f"--repo: expected owner/name, found {repo!r}: {error}") from error
    if repo.count("/") != 1:
        raise ConfigError(f"--repo: expected owner/name, found {repo!r}")
    if not (token := get_token()):
        raise ConfigError("no token for the Hub: set HF_TOKEN, or log in with `hf auth login`")
    return Hub(Target(constants.ENDPOINT, repo, revision), token)


RUN_ROOT = typer.Option(help="Folder or URI of a finished run.")
FOLDER = typer.Option(help="Finished folder that is published in place of the run root's own.")
IS_PRIVATE = typer.Option("--private", help="Make the repository private.")
REQUIRED = typer.Option(help="What a figure has to be, as kl<=0.12; may be repeated.")
REPLACES = typer.Option("--replace", help="Delete weights of what was there before.")
IS_DRY = typer.Option("--dry-run", help="Print files, bytes and what is there already, and stop.")
WORKERS = typer.Option(min=1, help="Shards sent at once, each staged in its worker's TMPDIR.")
IS_SHARED = typer.Option("--shared", help="Local paths are the same folder on every node.")
ENDPOINT = typer.Option(envvar=ENDPOINT_VARIABLES, help="Of an S3 server that is not AWS.")


@app.command()
def main(
    repo: Annotated[str, typer.Option(help="owner/name; made if it is not there.")],
    run_root: Annotated[str | None, RUN_ROOT] = None,
    checkpoint: Annotated[str | None, FOLDER] = None,
    private: Annotated[bool, IS_PRIVATE] = False,
    revision: Annotated[str, typer.Option(help="Branch; made if it is not there.")] = "main",
    require: Annotated[list[str] | None, REQUIRED] = None,
    replace: Annotated[bool, REPLACES] = False,
    dry_run: Annotated[bool, IS_DRY] = False,
    workers: Annotated[int, WORKERS] = 4,
    shared: Annotated[bool, IS_SHARED] = False,
    endpoint_url: Annotated[str | None, ENDPOINT] = None,
) -> None:
    """Publish a finished checkpoint on the Hugging Face Hub."""
    configure_logging()
    try:
        requirements = [parse_requirement(text) for text in require or ()]
        hub = connect(repo, revision)
        release = open_release(run_root, checkpoint, endpoint_url)
        check_requirements(requirements, release.figures)
        if dry_run:
            console = Console(width=None if os.isatty(1) else 160)
            return print_states(rehearse(release, hub, replace), hub, console)
        settings = {name: os.environ[name] for name in SHARED_SETTINGS if name in os.environ}
        tasks = RayTasks(
            what="publish",
            num_workers=workers,
            address=os.environ.get("RAY_ADDRESS"),
            settings=settings,
            is_shared=shared or release.is_on_shared_root,
        )
        publish(release, hub, private, replace, RayUploads(tasks))
    except P48Error as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None


if __name__ == "__main__":
    app()
