"""What is wrong outside the experts is named before a run: by tensor, or by key of config.json."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p48ray.checkpoint.families import FAMILIES, describe_model
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import ModelLayout
from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.errors import P48Error, SourceError
from p48ray.model.architecture import architecture, empty_layer, model_config
from p48ray.model.source_check import NoExperts, carried_through, check_source
from p48ray.store import LocalStore
from tests.checkpoint.tiny_variants import write_folder
from tests.reference import tiny_families

Tensors = dict[str, Tensor]
Change = Callable[[dict[str, Any], Tensors], Any]


def opened(folder: Path) -> tuple[CheckpointIndex, ModelLayout]:
    index = open_checkpoint(LocalStore(folder))
    return index, describe_model(index)


def changed(family: str, folder: Path, change: Change) -> Path:
    """A small release, `change` made to its text config and tensors."""
    config, tensors = getattr(tiny_families, family)()
    change(config.get("text_config", config), tensors)
    write_folder(folder, config, tensors)
    return folder


def with_values(**values: object) -> Change:
    return lambda config, _: config.update(values)


def without(*keys: str) -> Change:
    """Config keys and tensors that are not there."""

    def change(config: dict[str, Any], tensors: Tensors) -> None:
        for key in keys:
            (config if key in config else tensors).pop(key)

    return change


def with_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Change:
    return lambda _, tensors: tensors.update({name: torch.ones(shape, dtype=dtype)})


@pytest.mark.parametrize("family", tiny_families.NAMES)
def test_every_familys_release_passes_and_its_config_stays_as_it_is(
    family: str, tmp_path: Path
) -> None:
    index, layout = opened(changed(family, tmp_path / "source", lambda *_: None))
    before = copy.deepcopy((index.config, layout.text_config))
    check_source(index, layout)
    assert (index.config, layout.text_config) == before, "transformers writes into what it is given"


def test_kimis_true_shapes_pass(tmp_path: Path) -> None:
    write_kimi_k25_skeleton(tmp_path / "kimi")
    index, layout = opened(tmp_path / "kimi")
    check_source(index, layout)
    parts = {part: len(tensors) for part, tensors in carried_through(index, layout).items()}
    assert parts == {"mm_projector": 6, "vision_tower": 27 * 12 + 5}


LAYER, NESTED = "model.layers.2.", "language_model.model.layers.2."
BAD_TENSORS: dict[str, tuple[str, Change, str]] = {
    "attention": (
        "kimi_k25",
        without(f"{NESTED}self_attn.o_proj.weight"),
        rf"{NESTED}self_attn.o_proj.weight: expected BF16 or F16 or F32 \[128, 128\] .* found none",
    ),
    "shared expert": (
        "kimi_k25",
        without(f"{NESTED}mlp.shared_experts.up_proj.weight"),
        rf"{NESTED}mlp.shared_experts.up_proj.weight: expected .* \[64, 128\] .* found none",
    ),
    "no shared expert": (
        "kimi_k25",
        with_values(n_shared_experts=0),
        r"layers.1.mlp.shared_experts.gate_proj.weight: expected .* \[0, 128\] by config.json,"
        r" found BF16 \[64, 128\]",
    ),
    "latent heads": (
        "deepseek_v3",
        with_values(num_attention_heads=8),
        r"layers.0.self_attn.q_b_proj.weight: expected .* \[384, 48\] .*, found BF16 \[192, 48\]",
    ),
    "grouped heads": (
        "qwen3_moe",
        with_values(num_attention_heads=8),
        r"layers.0.self_attn.q_proj.weight: expected .* \[256, 96\] .*, found BF16 \[128, 96\]",
    ),
    "absent head size": (
        "qwen3_moe",
        without("head_dim"),
        r"layers.0.self_attn.q_proj.weight: expected .* \[96, 96\] .*, found BF16 \[128, 96\]",
    ),
    "embedding": (
        "kimi_k2",
        with_tensor("model.embed_tokens.weight", (2000, 128)),
        r"model.embed_tokens.weight: expected .* \[2048, 128\] .*, found BF16 \[2000, 128\]",
    ),
    "norm": (
        "qwen3_moe",
        with_tensor("model.norm.weight", (95,)),
        r"model.norm.weight: expected .* \[96\] .*, found BF16 \[95\]",
    ),
    "head": (
        "qwen3_moe",
        with_tensor("lm_head.weight", (2047, 96)),
        r"lm_head.weight: expected .* \[2048, 96\] .*, found BF16 \[2047, 96\]",
    ),
    "one too many": (
        "qwen3_moe",
        with_tensor(f"{LAYER}self_attn.sinks", (4,)),
        rf"{LAYER}self_attn.sinks: expected no such tensor in layer 2 .*, found BF16 \[4\]",
    ),
    "bias": (
        "qwen3_moe",
        with_values(attention_bias=True),
        r"layers.0.self_attn.q_proj.bias: expected .* \[128\] by config.json .*, found none",
    ),
    "integers": (
        "qwen3_moe",
        with_tensor(f"{LAYER}self_attn.o_proj.weight", (96, 128), torch.int8),
        rf"{LAYER}self_attn.o_proj.weight: expected BF16 or F16 or F32 .*, found I8 \[96, 128\]",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_that_config_and_headers_disagree_on_is_named_with_its_file(
    case: str, tmp_path: Path
) -> None:
    family, change, words = BAD_TENSORS[case]
    index, layout = opened(changed(family, tmp_path / "source", change))
    with pytest.raises(SourceError, match=rf"^model-.*\.safetensors: tensor .*{words}"):
        check_source(index, layout)


BAD_KEYS: dict[str, tuple[str, Change, str]] = {
    "groups": ("deepseek_v3", with_values(n_group=3), "n_group: expected groups of one size"),
    "groups of one": ("deepseek_v3", with_values(n_group=8), "n_group: .* two or more, .*found 8"),
    "too many groups": (
        "deepseek_v3",
        with_values(topk_group=5),
        r"topk_group: expected at most the 4 groups \(n_group\), found 5",
    ),
    "more than there are": (
        "qwen3_moe",
        with_values(num_experts_per_tok=9),
        r"num_experts_per_tok: expected at most the 8 experts of a layer .*, found 9",
    ),
    "more than groups hold": (
        "deepseek_v3",
        with_values(num_experts_per_tok=5),
        r"num_experts_per_tok: expected at most the 4 experts of 2 groups .*, found 5",
    ),
    "rope": (
        "kimi_k25",
        with_values(rope_scaling={"type": "su"}),
        r"text_config\.rope_scaling\.type: found 'su': .*'su' is none of .*longrope.*yarn",
    ),
    "rope without its factor": (
        "kimi_k2",
        with_values(rope_scaling={"type": "yarn", "beta_fast": 32}),
        r"rope_scaling.*found .*: expected .*DeepseekV3Config can be made .*factor",
    ),
    "null": (
        "qwen3_moe",
        with_values(head_dim=None),
        r"head_dim: found None: expected .* Qwen3MoeDecoderLayer can be built \(TypeError: .*\)",
    ),
    "text for a number": (
        "kimi_k25",
        with_values(rms_norm_eps="1e-6"),
        r"text_config\.rms_norm_eps: found '1e-6': expected .* DeepseekV3Config can be made",
    ),
    "no vocabulary": ("kimi_k25", without("vocab_size"), r"text_config\.vocab_size: .*found None"),
    "heads of keys": (
        "qwen3_moe",
        lambda config, tensors: (
            config.update(num_key_value_heads=3),
            tensors.update(
                {
                    f"model.layers.{layer}.self_attn.{name}_proj.weight": torch.ones(96, 96)
                    for layer in range(3)
                    for name in "kv"
                }
            ),
        ),
        r"num_key_value_heads: found 3: expected .* Qwen3MoeDecoderLayer can be run \(Runtime",
    ),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_key_with_which_the_model_can_not_run_is_named(case: str, tmp_path: Path) -> None:
    family, change, words = BAD_KEYS[case]
    folder = changed(family, tmp_path / "source", change)
    with pytest.raises(SourceError, match=rf"(?s)^config\.json: .*{words}"):
        check_source(*opened(folder))


def test_only_the_keys_to_blame_are_named(tmp_path: Path) -> None:
    folder = changed("kimi_k25", tmp_path / "source", with_values(v_head_dim=None))
    with pytest.raises(SourceError) as raised:
        check_source(*opened(folder))
    assert re.findall(r"text_config\.\w+", str(raised.value)) == ["text_config.v_head_dim"]


def test_vision_part_that_transformers_refuses_is_blamed_on_its_own_key(tmp_path: Path) -> None:
    config, tensors = tiny_families.kimi_k25()
    config["vision_config"]["hidden_size"] = "wide"
    write_folder(tmp_path / "source", config, tensors)
    with pytest.raises(
        SourceError, match=r"config\.json: vision_config\.hidden_size: found 'wide'"
    ):
        check_source(*opened(tmp_path / "source"))


CACHE_SCALES = (
    "self_attn.k_scale",
    "self_attn.v_scale",
    "self_attn.attn.q_scale",
    "self_attn.k_zero_point",
    "self_attn.k_proj.output_scale",
    "self_attn.qkv_proj.v_scale",
)


@pytest.mark.parametrize("name", CACHE_SCALES)
def test_scales_of_a_cache_pass_through(name: str, tmp_path: Path) -> None:
    scale = with_tensor(f"{LAYER}{name}", (), torch.float32)
    index, layout = opened(changed("qwen3_moe", tmp_path / "source", scale))
    check_source(index, layout)
    (tensor,) = carried_through(index, layout)["key and value cache scales"]
    assert tensor.name == f"{LAYER}{name}"


def test_weights_are_no_scales_of_a_cache() -> None:
    family = FAMILIES["qwen3_moe"]
    assert not any(
        family.is_cache_scale(f"{LAYER}self_attn.{name}")
        for name in ("k_proj.weight", "k_proj.weight_scale", "k_norm.weight", "k_scale.weight")
    )


def test_names_of_transformers_5_are_read_with_the_head_at_the_top(tmp_path: Path) -> None:
    config, tensors = tiny_families.kimi_k25()
    renamed = {
        name.replace("language_model.lm_head", "lm_head")
        .replace("language_model.model.", "model.language_model.")
        .replace("vision_tower.", "model.vision_tower."): tensor
        for name, tensor in tensors.items()
    }
    write_folder(tmp_path / "source", config, renamed)
    index, layout = opened(tmp_path / "source")
    check_source(index, layout)
    assert layout.head_name == "lm_head.weight"
    assert layout.layer_prefix == "model.language_model.layers."
    assert set(carried_through(index, layout)) == {"vision_tower", "mm_projector"}


def test_class_that_places_experts_elsewhere_than_the_family_is_found_out(tmp_path: Path) -> None:
    _, layout = opened(changed("qwen3_moe", tmp_path / "source", lambda *_: None))
    arch = architecture(FAMILIES["qwen3_moe"])
    config = model_config(arch, layout.text_config)
    with pytest.raises(P48Error, match="layer 1: expected a layer with experts"):
        empty_layer(arch, config, 1, NoExperts())
    with pytest.raises(P48Error, match="layer 2: expected a dense layer"):
        empty_layer(arch, config, 2, None)
