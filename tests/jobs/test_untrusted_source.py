"""Sources and run roots are other people's files: their code runs only where the user says so, and
nothing in them is unpickled."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY
from tests.jobs.command import ROUNDED, arguments, copy_model, invoke

pytestmark = pytest.mark.slow

TOKENIZER_CODE = '''
"""A byte tokenizer, in the form in which Kimi ships its own: Python that transformers imports from
the checkpoint's folder."""
from pathlib import Path
from transformers import PreTrainedTokenizer

Path({marker!r}).touch()


class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {{}}

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {{self._convert_id_to_token(i): i for i in range(256)}}

    def _tokenize(self, text, **kwargs):
        return [self._convert_id_to_token(i) for i in text.encode()]

    def _convert_token_to_id(self, token):
        return ord(token) - 256

    def _convert_id_to_token(self, index):
        return chr(index + 256)
'''

CONFIG_CODE = """
from pathlib import Path
from transformers import PretrainedConfig

Path({marker!r}).touch()


class OwnConfig(PretrainedConfig):
    model_type = "kimi_k25"
"""


def model_with_code(folder: Path, marker: Path) -> Path:
    """The sample with a tokenizer (and a config class) that is code in its folder; importing either
    leaves a marker."""
    copy_model(folder)
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "tokenization_own.py").write_text(TOKENIZER_CODE.format(marker=str(marker)))
    own: dict[str, Any] = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "configuration_own.py").write_text(CONFIG_CODE.format(marker=f"{marker}-config"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "configuration_own.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.usefixtures("module_cache")
def test_code_from_the_source_does_not_run_unless_trusted(tmp_path: Path) -> None:
    marker, root = tmp_path / "ran", tmp_path / "run"
    folder = model_with_code(tmp_path / "model", marker)
    outcome = invoke(*arguments(root, ROUNDED | {"source.checkpoint": str(folder)}))
    assert outcome.code == 2, outcome
    assert f"error: {folder}: the tokenizer can not be loaded" in outcome.err
    assert "source.trust_remote_code: true" in outcome.err
    assert not root.exists()
    assert not list(tmp_path.glob("ran*"))


@pytest.mark.usefixtures("module_cache")
def test_trusted_tokenizer_of_the_source_runs_and_is_carried_over(tmp_path: Path) -> None:
    marker, root = tmp_path / "ran", tmp_path / "run"
    folder = model_with_code(tmp_path / "model", marker)
    outcome = invoke(
        *arguments(
            root, ROUNDED | {"source.checkpoint": str(folder), "source.trust_remote_code": "true"}
        )
    )
    assert outcome.code == 0, outcome
    assert marker.exists()
    assert (root / "checkpoint" / "tokenization_own.py").read_bytes() == (
        folder / "tokenization_own.py"
    ).read_bytes()


@pytest.mark.usefixtures("module_cache")
def test_built_in_tokenizer_is_used_where_code_is_not_trusted(tmp_path: Path) -> None:
    marker, root = tmp_path / "ran", tmp_path / "run"
    folder = model_with_code(tmp_path / "model", marker)
    for file in TINY.glob("*token*"):
        shutil.copy(file, folder)
    own = json.loads((TINY / "tokenizer_config.json").read_text())
    own["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    outcome = invoke(*arguments(root, ROUNDED | {"source.checkpoint": str(folder)}))
    assert outcome.code == 0, outcome
    assert not list(tmp_path.glob("ran*"))


class OpenedFiles:
    """Paths that this process opens while `is_watching`. An audit hook cannot be taken out again,
    only told to rest."""

    def __init__(self) -> None:
        self.is_watching = False
        self.paths: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.is_watching and event == "open":
            self.paths.append(str(args[0]))


@pytest.fixture
def opened() -> Iterator[OpenedFiles]:
    files = OpenedFiles()
    yield files
    files.is_watching = False


def test_pickles_in_source_and_run_root_are_never_read(opened: OpenedFiles, tmp_path: Path) -> None:
    folder, root = copy_model(tmp_path / "model"), tmp_path / "run"
    pickles = [
        folder / "pytorch_model.bin",
        folder / "training_args.bin",
        folder / "vocab.pkl",
        folder / "tokenizer.pt",
    ]
    pickles += [
        root / "plan.pkl",
        root / "calibration" / "tokens.bin",
        root / "units" / "L001-E000-003" / "shard.pkl",
    ]
    pickles += [root / "checkpoint" / "pytorch_model.bin"]
    for path in pickles:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"a": torch.zeros(2)}, path)
    opened.is_watching = True
    outcome = invoke(*arguments(root, ROUNDED | {"source.checkpoint": str(folder)}))
    opened.is_watching = False
    assert outcome.code == 1 and "pytorch_model.bin: not in p48ray.json" in outcome.err, outcome
    assert any(path.endswith(".safetensors") for path in opened.paths)
    assert not {path for path in opened.paths if path.endswith((".bin", ".pkl", ".pt"))}
    assert not (root / "checkpoint" / "model.safetensors.index.json").exists()
    assert {path.name for path in (root / "checkpoint").iterdir()} & {
        path.name for path in pickles
    } == {"pytorch_model.bin"}
    (root / "checkpoint" / "pytorch_model.bin").unlink()
    assert invoke(*arguments(root, ROUNDED | {"source.checkpoint": str(folder)})).code == 0
    assert (root / "checkpoint" / "model.safetensors.index.json").exists()
