"""Files in folders that go with the weights, all the way: from a repository on the Hub through the
mirror into a checkpoint that verifies, converts and is published; and what stays behind."""

import json
from pathlib import Path

import pytest

from p48ray.finished.converter import convert_folder
from p48ray.finished.verifier import verify_folder
from p48ray.run.manifest import CheckpointManifest
from p48ray.store import LocalStore
from tests.finished.publish_command import invoke_publish
from tests.jobs.command import ROUNDED, arguments, invoke
from tests.servers.hub import MODEL, Hub, tiny_files

pytestmark = [pytest.mark.server, pytest.mark.slow]

RESULT = "owner/tiny-p48"
CARRIED = {
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}\n",
    "code/modeling.py": b"raise RuntimeError('code of a source must not run')\n",
    "code/parts.py": b"",
    "tokenizer.model.v3": b"of Mistral's",
    "USE_POLICY.md": b"Be kind.\n",
    "vocab.bpe": b"#version: 0.2\n",
}
LEFT = {
    "plan.json": b'{"run": "/home/someone"}',
    "trainer_state.json": b"{}",
    "hf_quant_config.json": b"{}",
    "inference/generate.py": b"",
}


def source_files() -> dict[str, bytes]:
    files = tiny_files() | CARRIED | LEFT
    config = json.loads(files["config.json"])
    config["auto_map"] = {"AutoModelForCausalLM": "code/modeling.Model"}
    return files | {"config.json": json.dumps(config).encode()}


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_files_in_folders_are_mirrored_carried_verified_converted_and_published(
    hub: Hub, tmp_path: Path
) -> None:
    hub.commit(MODEL, source_files())
    root = tmp_path / "run"
    settings = ROUNDED | {"source.checkpoint": f"hf://{MODEL}"}
    outcome = invoke(*arguments(root, settings))
    assert outcome.code == 0, outcome
    assert "left behind" in outcome.out and "trainer_state.json" in outcome.out
    checkpoint = root / "checkpoint"
    found = files_under(checkpoint)
    assert {name: found.get(name) for name in CARRIED} == CARRIED
    assert not LEFT.keys() & (found.keys() | files_under(root / "source").keys())
    manifest = CheckpointManifest.load(LocalStore(checkpoint), "p48ray.json")
    assert manifest.file_sha256.keys() >= CARRIED.keys()
    for source in (None, LocalStore(root / "source")):
        verdict = verify_folder(LocalStore(checkpoint), source)
        assert (verdict.problems, verdict.notes) == ((), ())
    convert_folder(LocalStore(checkpoint), LocalStore(tmp_path / "sparse"), "sparse", None)
    converted = files_under(tmp_path / "sparse")
    assert {name: converted.get(name) for name in CARRIED} == CARRIED
    outcome = invoke_publish(root, hub, repo=RESULT)
    assert outcome.code == 0, outcome
    published = hub.files(RESULT)
    assert {name: published.get(name) for name in found} == found
