"""jobs/publish.py of a folder in ModelOpt's layout, whose units' digests are those of their dense
form."""

import json
from pathlib import Path

import pytest

from p48ray.finished.converter import convert_folder
from p48ray.store import LocalStore
from tests.finished.publish_command import invoke_publish, published
from tests.servers.hub import Hub
from tests.stages.damage import Folder

pytestmark = pytest.mark.server

LINEAR = "language_model.model.layers.1.mlp.experts.1.up_proj"


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    target = tmp_path / "modelopt"
    convert_folder(LocalStore(root / "checkpoint"), LocalStore(target), "modelopt", None)
    return target


def test_hub_has_the_folder_byte_for_byte(root: Path, folder: Path, hub: Hub) -> None:
    """Beside the run root that has the same weights, too."""
    outcome = invoke_publish(root, hub, "--checkpoint", str(folder))
    assert outcome.code == 0, outcome
    assert published(hub) == Folder.read(folder).files
    assert "hf_quant_config.json" in published(hub)


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_scale_2", "input_scale"])
def test_a_unit_changed_after_verification_is_refused(folder: Path, hub: Hub, suffix: str) -> None:
    """One bit, the size as it was."""
    held = Folder.read(folder)
    file = held.file_of(f"{LINEAR}.{suffix}")
    (folder / file).write_bytes(held.flipped(f"{LINEAR}.{suffix}", 0, 1).files[file])
    outcome = invoke_publish(None, hub, "--checkpoint", str(folder))
    words = f"{file}: changed since it was verified: unit L001-E000-003: expected SHA-256"
    assert outcome.code == 2 and words in outcome.err, outcome
    assert published(hub) == {}
    assert json.loads(held.files["p48ray.json"])["modelopt"]["global_scales"][LINEAR]
