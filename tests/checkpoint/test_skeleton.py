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


def test_skeleton_names_and_text_keys_are_those_of_the_sample(
    skeleton: CheckpointIndex, tiny: CheckpointIndex
) -> None:
    assert tiny.tensors.keys() <= skeleton.tensors.keys()
    assert all(skeleton.tensors[name].dtype == entry.dtype for name, entry in tiny.tensors.items())
    assert all(
        len(skeleton.tensors[name].shape) == len(entry.shape)
        for name, entry in tiny.tensors.items()
    )
    sample = json.loads((TINY / "config.json").read_text())
    assert skeleton.config["text_config"].keys() == sample["text_config"].keys()


# As the release's configuration_kimi_k25.py takes them. transformers 5, whose keys the sample has,
# calls most of them otherwise, and has the projector's at the top.
VISION = {
    "init_pos_emb_height": 64,
    "init_pos_emb_time": 4,
    "init_pos_emb_width": 64,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "mm_hidden_size": 1152,
    "mm_projector_type": "patchmerger",
    "patch_size": 14,
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-05,
    "text_hidden_size": 7168,
    "video_attn_type": "spatial_temporal",
    "vt_hidden_size": 1152,
    "vt_intermediate_size": 4304,
    "vt_num_attention_heads": 16,
    "vt_num_hidden_layers": 27,
}


def test_skeletons_vision_config_has_the_releases_keys(skeleton: CheckpointIndex) -> None:
    assert skeleton.config["vision_config"] == VISION
    assert not [key for key in skeleton.config if key.startswith("projection_")]
