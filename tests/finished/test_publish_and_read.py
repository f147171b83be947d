"""What jobs/publish.py puts on the Hub is what others find there.

They are this project, to which it is a source, and huggingface_hub's own downloads.
"""

from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download

from p48ray.store import HubStore, open_store
from tests.finished.publish_command import REPO_NAME, checkpoint_files, invoke_publish
from tests.servers.hub import TOKEN, Hub

pytestmark = pytest.mark.server

SHARD, SMALL = "model-00001-of-00006.safetensors", "config.json"
ATTRIBUTES = ".gitattributes"  # the Hub's own


@pytest.fixture(params=[(), ("--private",)], ids=["public", "private"])
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Only a private repository is read with a token."""
    options: tuple[str, ...] = request.param
    if options:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    return options


@pytest.fixture
def commit(root: Path, hub: Hub, options: tuple[str, ...]) -> str:
    """The id of what was published."""
    outcome = invoke_publish(root, hub, *options)
    assert outcome.code == 0, outcome
    return HubStore(f"hf://{REPO_NAME}").commit


def test_a_published_checkpoint_is_a_source_to_the_byte(root: Path, hub: Hub, commit: str) -> None:
    store = open_store(f"hf://{REPO_NAME}@{commit}")
    expected = checkpoint_files(root)
    assert {info.key for info in store.list()} == {ATTRIBUTES, *expected}
    assert {name: store.get(name) for name in expected} == expected  # each against its digest
    head = store.head(SHARD)
    assert head is not None and head.size_bytes == len(expected[SHARD])
    assert store.get_range(SHARD, 8, 100) == expected[SHARD][8:108]
    assert not hub.leaked


def test_huggingface_hub_downloads_it(root: Path, hub: Hub, commit: str, tmp_path: Path) -> None:
    expected = checkpoint_files(root)
    for name in (SHARD, SMALL):
        path = Path(hf_hub_download(REPO_NAME, name, cache_dir=tmp_path / "one"))
        assert path.read_bytes() == expected[name] and path.parent.name == commit
    folder = Path(snapshot_download(REPO_NAME, revision=commit, cache_dir=tmp_path / "whole"))
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.pop(ATTRIBUTES) and found == expected
    assert not hub.leaked
