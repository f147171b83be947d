"""The sample checkpoint, its relatives (see tiny_variants), and copies of it to damage."""

import json
import shutil
import uuid
from collections.abc import Callable

import pytest
from torch import Tensor

from p48ray.checkpoint.families import ModelLayout, describe_model
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.store import LocalStore, MemoryStore
from tests.checkpoint.tiny_variants import TINY, flat_names, load_tiny, plain_experts, write_folder


@pytest.fixture(scope="session")
def tiny_tensors() -> dict[str, Tensor]:
    return load_tiny()


@pytest.fixture(scope="session")
def tiny() -> CheckpointIndex:
    return open_checkpoint(LocalStore(TINY))


@pytest.fixture(scope="session")
def layout(tiny: CheckpointIndex) -> ModelLayout:
    return describe_model(tiny)


@pytest.fixture(scope="session")
def variants(
    tiny_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, CheckpointIndex]:
    """The sample model in all layouts: nested or flat names, INT4 or bf16 experts."""
    root = tmp_path_factory.mktemp("variants")
    config = json.loads((TINY / "config.json").read_text())
    flat_config = config["text_config"]
    bf16_config = config | {
        "text_config": {
            key: value for key, value in flat_config.items() if key != "quantization_config"
        }
    }
    v3_config = {**bf16_config["text_config"], "model_type": "deepseek_v3"}
    write_folder(root / "nested_bf16", bf16_config, plain_experts(tiny_tensors))
    write_folder(root / "flat_int4", flat_config, flat_names(tiny_tensors))
    write_folder(
        root / "flat_bf16", v3_config, flat_names(plain_experts(tiny_tensors)), num_files=3
    )
    shutil.copytree(TINY, root / "nested_int4")
    return {path.name: open_checkpoint(LocalStore(path)) for path in sorted(root.iterdir())}


@pytest.fixture
def copy_of_tiny() -> Callable[[], MemoryStore]:
    """Makes a copy of the sample in memory, to be damaged."""

    def copy() -> MemoryStore:
        store, source = MemoryStore(uuid.uuid4().hex), LocalStore(TINY)
        for info in source.list():
            store.put(info.key, source.get(info.key))
        return store

    return copy
