"""A Hub to read from, and huggingface_hub pointed at it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from p48ray.store import retry
from tests.hub.server import ReadHub
from tests.jobs.command import narrow_model
from tests.jobs.conftest import aws_identity, moto_server, seaweedfs  # noqa: F401 (fixtures)

MODEL = "models/owner/tiny"
EDGE_BYTES = 300_000
"""More than a plan reads of a shard: its header and both ends. Less than a shard of the narrow model."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReadHub]:
    """Empty. Waits between attempts are short, and no token is at hand."""
    server = ReadHub()
    settings = {
        "ENDPOINT": server.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_TOKEN_PATH": str(tmp_path / "no-login"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(retry, "HUB", replace(retry.HUB, base_s=0.002))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


def tiny_files() -> dict[str, bytes]:
    """The narrow model as a repository, with what repositories have besides."""
    files = {p.name: p.read_bytes() for p in sorted(narrow_model().iterdir()) if p.suffix != ".jsonl"}
    more = {".gitattributes": b"*.safetensors filter=lfs\n", "original/model.safetensors": b"another form", "figures/logo.png": b"\x89PNG"}
    return files | more | {"pytorch_model.bin": b"another form too"}
