"""jobs/publish.py as tests run it: in this process without Ray, or as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

from huggingface_hub import constants
from typer.testing import CliRunner

from jobs import publish
from p48ray.finished.upload import Uploader, upload_and_record
from p48ray.run.manifest import PublishedShard
from p48ray.store import retry
from tests.conftest import REPO
from tests.jobs.command import Outcome, own_logging
from tests.servers.hub import TOKEN, Hub

REPO_NAME = "owner/tiny"


def upload_here(uploader: Uploader, shards: Mapping[str, int]) -> Iterator[PublishedShard]:
    """One shard after the other, in this process."""
    for shard, size_bytes in shards.items():
        yield upload_and_record(uploader, shard, size_bytes)


def invoke_publish(
    root: Path | None, hub: Hub, *args: str, token: str = TOKEN, repo: str = REPO_NAME
) -> Outcome:
    """The command in this process, from the command line on. root: None where `args` say what is
    published."""
    settings = {
        "ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    with ExitStack() as stack:
        for name, value in {**settings, "HF_TOKEN_PATH": str(hub.folder / "no-login")}.items():
            stack.enter_context(mock.patch.object(constants, name, value))
        stack.enter_context(mock.patch.object(publish, "RayUploads", lambda *_: upload_here))
        for policy in ("HUB", "HUB_COMMIT"):
            short = replace(getattr(retry, policy), attempts=3, base_s=0.001)
            stack.enter_context(mock.patch.object(retry, policy, short))
        stack.enter_context(mock.patch.dict(os.environ, {"HF_TOKEN": token}))
        stack.enter_context(own_logging())
        of_root = ["--run-root", str(root)] if root is not None else []
        result = CliRunner().invoke(publish.app, [*of_root, "--repo", repo, *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def launch_publish(
    root: Path | str | None, hub: Hub, *args: str, env: Mapping[str, str]
) -> subprocess.Popen[str]:
    """The command as a person starts it, with a Ray of its own. root: as invoke_publish takes
    it."""
    own = {
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.Popen(
        [
            sys.executable,
            str(REPO / "jobs" / "publish.py"),
            *(["--run-root", str(root)] if root is not None else []),
            "--repo",
            REPO_NAME,
            *args,
        ],
        cwd=REPO,
        env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        | own
        | dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def checkpoint_files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "checkpoint").iterdir()}


def published(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    """The branch's files but for the one that the Hub itself makes."""
    return {
        name: data
        for name, data in hub.files(REPO_NAME, branch).items()
        if name != ".gitattributes"
    }


def files_with(secret: str, *folders: Path) -> list[Path]:
    """Files under the folders that hold the text."""
    found = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    return [path for path in found if secret.encode() in path.read_bytes()]
