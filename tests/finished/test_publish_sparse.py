"""jobs/publish.py of a run with output.storage: sparse, whose units' digests are those of their
dense form."""

import hashlib
import json
from pathlib import Path

import pytest

from p48ray.finished import upload
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.store import LocalStore
from tests.finished.publish_command import checkpoint_files, invoke_publish, published
from tests.servers.hub import Hub

pytestmark = pytest.mark.server

INDEX = "model.safetensors.index.json"
LINEAR = "language_model.model.layers.1.mlp.experts.1.up_proj"


def test_hub_has_the_sparse_checkpoint_byte_for_byte(sparse_root: Path, hub: Hub) -> None:
    outcome = invoke_publish(sparse_root, hub)
    assert outcome.code == 0, outcome
    files = published(hub)
    assert files == checkpoint_files(sparse_root)
    assert f"{LINEAR}.weight_sparse_mask" in json.loads(files[INDEX])["weight_map"]
    assert b"## Sparse storage" in files["README.md"]


@pytest.mark.parametrize(
    "suffix", ["weight_sparse_packed", "weight_sparse_mask", "weight_scale", "weight_global_scale"]
)
def test_a_unit_changed_after_verification_is_refused(
    sparse_root: Path, hub: Hub, suffix: str
) -> None:
    """One bit, the size as it was."""
    file = json.loads((sparse_root / "checkpoint" / INDEX).read_bytes())["weight_map"][
        f"{LINEAR}.{suffix}"
    ]
    path = sparse_root / "checkpoint" / file
    data = bytearray(path.read_bytes())
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    data[
        header_bytes + json.loads(data[8:header_bytes])[f"{LINEAR}.{suffix}"]["data_offsets"][0]
    ] ^= 1
    path.write_bytes(data)
    outcome = invoke_publish(sparse_root, hub)
    assert (
        outcome.code == 2
        and f"{file}: changed since it was verified: unit L001-E000-003: expected SHA-256"
        in outcome.err
    ), outcome
    assert published(hub) == {}


def test_ranges_that_cut_units_anywhere_give_the_same_answer(
    sparse_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = LocalStore(sparse_root / "checkpoint")
    manifest = CheckpointManifest.load(checkpoint, "p48ray.json")
    monkeypatch.setattr(upload, "RANGE_BYTES", 99_991)
    kept: list[upload.CheckedRange] = []
    segments_of = upload.segments_of
    monkeypatch.setattr(
        upload, "segments_of", lambda *args: kept.extend(found := segments_of(*args)) or found
    )
    for path in sorted((sparse_root / "checkpoint").glob("*.safetensors")):
        with (tmp_path / "staged").open("wb") as file:
            sha256 = upload.stage_shard(checkpoint, path.name, path.stat().st_size, manifest, file)
        assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (tmp_path / "staged").read_bytes() == path.read_bytes()
    units = [s for s in kept if isinstance(s, upload.DecodedRange)]
    assert len(units) == 16 and not any(s.data for s in units), (
        "a unit that was checked is not held any longer"
    )
