"""The compressed checkpoint's config: read back by compressed-tensors, aimed at the routed experts
under both naming schemes."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.utils.match import is_match

from p48ray.checkpoint.families import ModelLayout, describe_model
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.output_config import output_config

EXPERT_LINEARS = [
    f"{prefix}layers.{layer}.mlp.experts.{expert}.{projection}"
    for prefix in ("language_model.model.", "model.language_model.", "model.", "language_model.")
    for layer, expert in ((1, 0), (60, 383))
    for projection in ("gate_proj", "up_proj", "down_proj")
]
OTHER_LINEARS = [
    f"{prefix}{name}"
    for prefix in ("language_model.model.", "model.language_model.", "model.")
    for name in (
        "layers.0.mlp.gate_proj",
        "layers.1.mlp.shared_experts.down_proj",
        "layers.1.mlp.gate",
        "layers.1.self_attn.o_proj",
        "layers.1.self_attn.kv_a_proj_with_mqa",
    )
] + [
    "lm_head",
    "language_model.lm_head",
    "vision_tower.encoder.blocks.0.mlp.fc0",
    "model.vision_tower.encoder.blocks.0.wqkv",
    "mm_projector.proj.0",
]


def is_quantized(config: QuantizationConfig, name: str) -> bool:
    return is_match(
        name, torch.nn.Linear(1, 1), config.config_groups["group_0"].targets, config.ignore
    )


def test_config_is_json_that_compressed_tensors_reads_back_as_nvfp4(
    tiny: CheckpointIndex, layout: ModelLayout
) -> None:
    written = json.loads(json.dumps(output_config(tiny, layout)))["quantization_config"]
    config = QuantizationConfig.model_validate(written)
    assert (config.quant_method, config.format, config.quantization_status.value) == (
        "compressed-tensors",
        "nvfp4-pack-quantized",
        "compressed",
    )
    (scheme,) = config.config_groups.values()
    assert scheme.format == "nvfp4-pack-quantized"
    for args, dynamic in ((scheme.weights, False), (scheme.input_activations, "local")):
        assert (args.num_bits, args.type, args.strategy, args.group_size, args.symmetric) == (
            4,
            "float",
            "tensor_group",
            16,
            True,
        )
        assert args.dynamic == dynamic
        assert args.scale_dtype is torch.float8_e4m3fn
    assert scheme.output_activations is None


@pytest.mark.parametrize("name", EXPERT_LINEARS)
def test_routed_experts_are_quantized_under_both_naming_schemes(
    tiny: CheckpointIndex, layout: ModelLayout, name: str
) -> None:
    assert is_quantized(
        QuantizationConfig.model_validate(output_config(tiny, layout)["quantization_config"]),
        name,
    )


@pytest.mark.parametrize("name", OTHER_LINEARS)
def test_nothing_else_is_quantized(tiny: CheckpointIndex, layout: ModelLayout, name: str) -> None:
    assert not is_quantized(
        QuantizationConfig.model_validate(output_config(tiny, layout)["quantization_config"]),
        name,
    )


def test_old_quantization_config_is_gone_and_everything_else_is_kept(
    tiny: CheckpointIndex, layout: ModelLayout
) -> None:
    before = copy.deepcopy(tiny.config)
    written = output_config(tiny, layout)
    assert tiny.config == before
    assert "quantization_config" not in written["text_config"]
    assert "pack-quantized" not in json.dumps(written).replace("nvfp4-pack-quantized", "")
    expected = copy.deepcopy(before)
    del expected["text_config"]["quantization_config"]
    del written["quantization_config"]
    assert written == expected
    written["text_config"]["rope_theta"] = 1
    written["vision_config"]["merge_kernel_size"].append(3)
    assert tiny.config == before


@pytest.mark.parametrize("where", ["top", "text"])
def test_scheme_of_a_quantized_cache_stays(
    tiny: CheckpointIndex, layout: ModelLayout, where: str
) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    text = {k: v for k, v in layout.text_config.items() if k != "quantization_config"}
    old = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    source = {**tiny.config, "text_config": text}
    (source if where == "top" else text)["quantization_config"] = old
    written = output_config(replace(tiny, config=source), replace(layout, text_config=text))[
        "quantization_config"
    ]
    assert written["kv_cache_scheme"] == scheme
    read = QuantizationConfig.model_validate(written)
    assert isinstance(read.kv_cache_scheme, QuantizationArgs)
    assert (read.kv_cache_scheme.num_bits, read.kv_cache_scheme.type) == (8, "float")


def test_flat_config_has_ours_in_place_of_the_old_one(variants: dict[str, CheckpointIndex]) -> None:
    for name in ("flat_int4", "flat_bf16"):
        index = variants[name]
        written = output_config(index, describe_model(index))
        assert written["quantization_config"]["format"] == "nvfp4-pack-quantized"
        assert {key for key in written if key != "quantization_config"} == {
            key for key in index.config if key != "quantization_config"
        }
