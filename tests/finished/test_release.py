"""What is published and what is not: the folder is looked at before anybody is asked."""

import hashlib
from pathlib import Path

import pytest

from p48ray.run.manifest import CheckpointManifest
from p48ray.store import LocalStore
from tests.finished.publish_command import invoke_publish
from tests.servers.hub import Hub


@pytest.mark.parametrize("name", [".env", "training_args.bin", "state.PKL", "a/.b/c.json"])
def test_hidden_files_and_pickles_are_refused_though_the_manifest_names_them(
    root: Path, hub: Hub, name: str
) -> None:
    """As a run root may have them that another version of the job has written."""
    store = LocalStore(root / "checkpoint")
    store.put(name, b"whatever")
    manifest = CheckpointManifest.load(store, "p48ray.json")
    files = manifest.file_sha256 | {name: hashlib.sha256(b"whatever").hexdigest()}
    store.put("p48ray.json", manifest.model_copy(update={"file_sha256": files}).sealed().to_json())
    outcome = invoke_publish(root, hub)
    assert outcome.code == 2 and f"  {name}: a hidden file, or weights" in outcome.err, outcome
    assert not hub.requests
