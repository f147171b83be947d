"""Kimi-K2.5's real shape, without its weights: what planning sees at full scale."""

import json
from pathlib import Path

import pytest

from p48ray.checkpoint.families import ModelLayout, check_divisibility, describe_model
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.store import LocalStore
from tests.checkpoint.tiny_variants import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    folder = tmp_path_factory.mktemp("skeleton")
    write_kimi_k25_skeleton(folder)
    return open_checkpoint(LocalStore(folder))


@pytest.fixture(scope="module")
def skeleton_layout(skeleton: CheckpointIndex) -> ModelLayout:
    return describe_model(skeleton)


def test_skeleton_has_the_releases_counts(
    skeleton: CheckpointIndex, skeleton_layout: ModelLayout
) -> None:
    assert len(skeleton.files) == 64
    assert sum(name.endswith(".weight_packed") for name in skeleton.tensors) == 69_120
    assert sum(map(skeleton_layout.is_expert_tensor, skeleton.tensors)) == 3 * 69_120
    assert skeleton_layout.moe_layers == tuple(range(1, 61))
    assert (skeleton_layout.num_layers, skeleton_layout.num_experts, skeleton_layout.top_k) == (
        61,
        384,
        8,
    )
    for span in (16, 32):
        check_divisibility(skeleton_layout, span)


def test_skeleton_is_595_gb_by_its_sizes_and_little_on_disk(skeleton: CheckpointIndex) -> None:
    assert isinstance(skeleton.store, LocalStore)
    files = [Path(skeleton.store.path(info.key)) for info in skeleton.store.list()]
    apparent_bytes = sum(file.stat().st_size for file in files)
    assert 594e9 < apparent_bytes < 597e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 150e6
    total_size = json.loads(skeleton.store.get("model.safetensors.index.json"))["metadata"][
        "total_size"
    ]
    assert total_size == sum(entry.num_bytes for entry in skeleton.tensors.values())


def test_skeleton_names_and_config_keys_are_those_of_the_sample(
    skeleton: CheckpointIndex, tiny: CheckpointIndex
) -> None:
    assert tiny.tensors.keys() <= skeleton.tensors.keys()
    assert all(skeleton.tensors[name].dtype == entry.dtype for name, entry in tiny.tensors.items())
    assert all(
        len(skeleton.tensors[name].shape) == len(entry.shape)
        for name, entry in tiny.tensors.items()
    )
    sample = json.loads((TINY / "config.json").read_text())
    assert skeleton.config.keys() == sample.keys()
    for section in ("text_config", "vision_config"):
        assert skeleton.config[section].keys() == sample[section].keys()
