"""Layouts: read off names and config, the same for all relatives of the sample, and refused for
every way of not holding together."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from p48ray.checkpoint.families import FAMILIES, ModelLayout, check_divisibility, describe_model
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.errors import SourceError

EXPERT = "language_model.model.layers.2.mlp.experts.7."
FLAT_EXPERT = "model.layers.2.mlp.experts.7."


def with_config(
    index: CheckpointIndex, edit: Callable[[dict[str, Any]], object]
) -> CheckpointIndex:
    config = copy.deepcopy(index.config)
    edit(config)
    return replace(index, config=config)


def with_text(index: CheckpointIndex, **values: object) -> CheckpointIndex:
    return with_config(index, lambda config: config["text_config"].update(values))


def without(index: CheckpointIndex, *names: str) -> CheckpointIndex:
    assert all(name in index.tensors for name in names)
    return replace(
        index, tensors={name: entry for name, entry in index.tensors.items() if name not in names}
    )


def plus(index: CheckpointIndex, *entries: TensorEntry) -> CheckpointIndex:
    return replace(index, tensors={**index.tensors, **{entry.name: entry for entry in entries}})


def changed(index: CheckpointIndex, name: str, **values: Any) -> CheckpointIndex:
    return plus(index, replace(index.tensors[name], **values))


def renamed(index: CheckpointIndex, old: str, new: str) -> CheckpointIndex:
    return plus(without(index, old), replace(index.tensors[old], name=new))


def copied_layer(index: CheckpointIndex, old: int, new: int) -> CheckpointIndex:
    """The layer `old` once more under the number `new`."""
    entries = [entry for name, entry in index.tensors.items() if f"layers.{old}." in name]
    return plus(
        index,
        *(
            replace(entry, name=entry.name.replace(f"layers.{old}.", f"layers.{new}."))
            for entry in entries
        ),
    )


def test_layout_of_the_sample(layout: ModelLayout) -> None:
    assert (layout.family, layout.text_config_path) == ("kimi_k25", ("text_config",))
    assert layout.text_config["kv_lora_rank"] == 64
    assert layout.layer_prefix == "language_model.model.layers."
    assert layout.layer_prefix == "language_model.model.layers."
    assert layout.embed_name == "language_model.model.embed_tokens.weight"
    assert layout.norm_name == "language_model.model.norm.weight"
    assert layout.head_name == "language_model.lm_head.weight"
    assert (layout.num_layers, layout.moe_layers, layout.passthrough_expert_layers) == (
        5,
        (1, 2, 3, 4),
        (),
    )
    assert (layout.num_experts, layout.top_k, layout.hidden_size, layout.moe_intermediate_size) == (
        16,
        4,
        256,
        128,
    )
    assert (layout.expert_storage, layout.int4_group_size) == ("int4", 32)


def test_relatives_differ_in_names_and_storage_only(
    variants: dict[str, CheckpointIndex], layout: ModelLayout
) -> None:
    for name, index in variants.items():
        found = describe_model(index)
        assert found.layer_prefix == (
            "model.layers." if "flat" in name else "language_model.model.layers."
        )
        assert found.head_name == (
            "lm_head.weight" if "flat" in name else "language_model.lm_head.weight"
        )
        assert found.text_config_path == (() if "flat" in name else ("text_config",))
        assert (found.expert_storage, found.int4_group_size) == (
            ("int4", 32) if "int4" in name else ("bf16", None)
        )
        assert {found.embed_name, found.norm_name, found.head_name} <= index.tensors.keys()
        sizes = (
            "num_layers",
            "moe_layers",
            "num_experts",
            "top_k",
            "hidden_size",
            "moe_intermediate_size",
        )
        assert [getattr(found, size) for size in sizes] == [getattr(layout, size) for size in sizes]


def test_expert_names_are_exactly_the_tensors_of_the_experts(
    variants: dict[str, CheckpointIndex],
) -> None:
    for index in variants.values():
        layout = describe_model(index)
        names = [
            name
            for layer in layout.moe_layers
            for expert in range(16)
            for name in layout.expert_tensor_names(layer, expert)
        ]
        assert len(names) == len(set(names)) == 4 * 16 * 3 * len(layout.expert_suffixes)
        assert set(names) == {name for name in index.tensors if layout.is_expert_tensor(name)}
        assert set(names) == {name for name in index.tensors if ".experts." in name}


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.1.mlp.shared_experts.gate_proj.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
        "language_model.model.layers.1.mlp.gate.weight",
        "language_model.model.layers.5.mlp.experts.0.gate_proj.weight_packed",
        "model.layers.1.mlp.experts.0.gate_proj.weight_packed",
        "language_model.model.layers.1.mlp.experts.0.gate_proj",
        "x.language_model.model.layers.1.mlp.experts.0.gate_proj.weight_packed",
    ],
)
def test_other_tensors_are_not_expert_tensors(layout: ModelLayout, name: str) -> None:
    assert not layout.is_expert_tensor(name)


def test_linear_shapes_are_those_of_the_files(variants: dict[str, CheckpointIndex]) -> None:
    index = variants["flat_bf16"]
    layout = describe_model(index)
    for projection in PROJECTIONS:
        assert index.tensors[
            f"{layout.expert_linear_name(1, 0, projection)}.weight"
        ].shape == layout.linear_shape(projection)


def test_moe_layers_follow_first_dense(tiny: CheckpointIndex) -> None:
    fewer = replace(
        tiny,
        tensors={
            name: entry for name, entry in tiny.tensors.items() if "layers.1.mlp.e" not in name
        },
    )
    assert describe_model(with_text(fewer, first_k_dense_replace=2)).moe_layers == (2, 3, 4)
    no_key = with_config(tiny, lambda config: config["text_config"].pop("moe_layer_freq"))
    assert describe_model(no_key).moe_layers == (1, 2, 3, 4)


def test_tied_embedding_stands_in_for_an_absent_head_only(tiny: CheckpointIndex) -> None:
    headless = without(tiny, "language_model.lm_head.weight")
    assert (
        describe_model(with_text(headless, tie_word_embeddings=True)).head_name
        == "language_model.model.embed_tokens.weight"
    )
    assert (
        describe_model(with_text(tiny, tie_word_embeddings=True)).head_name
        == "language_model.lm_head.weight"
    )
    with pytest.raises(SourceError, match=r"language_model\.lm_head\.weight: expected"):
        describe_model(headless)


def test_experts_behind_the_last_layer_pass_through_if_plain(
    variants: dict[str, CheckpointIndex],
) -> None:
    layout = describe_model(copied_layer(variants["nested_bf16"], 4, 5))
    assert (layout.num_layers, layout.moe_layers, layout.passthrough_expert_layers) == (
        5,
        (1, 2, 3, 4),
        (5,),
    )
    assert not layout.is_expert_tensor(
        "language_model.model.layers.5.mlp.experts.0.gate_proj.weight"
    )
    with pytest.raises(
        SourceError,
        match=(
            r"model-\S+: tensor \S+layers\.5\.mlp\.experts\S+weight_packed: expected plain.*below 5"
        ),
    ):
        describe_model(copied_layer(variants["nested_int4"], 4, 5))


@pytest.mark.parametrize("model_type", ["llama", None, 5, "kimi_linear"])
def test_unknown_family_is_refused_listing_the_known_ones(
    tiny: CheckpointIndex, model_type: object
) -> None:
    known = "deepseek_v3, kimi_k2, kimi_k25, qwen3_moe"
    with pytest.raises(
        SourceError,
        match=(
            rf"^config\.json: model_type: expected one of {known}, found {model_type!r}; a family"
            r" is one file"
        ),
    ):
        describe_model(with_config(tiny, lambda config: config.update(model_type=model_type)))
    assert ", ".join(FAMILIES) == known


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "gelu"), ("scoring_func", "softmax"), ("topk_method", "group_limited_greedy")],
)
def test_settings_that_nothing_here_would_heed_are_refused(
    tiny: CheckpointIndex, key: str, value: str
) -> None:
    with pytest.raises(
        SourceError,
        match=(
            rf"config\.json: text_config\.{key}: expected '\w+' for model_type kimi_k25, found"
            rf" '{value}'"
        ),
    ):
        describe_model(with_text(tiny, **{key: value}))
    describe_model(with_config(tiny, lambda config: config["text_config"].pop(key)))


def test_bad_config_values_are_named_by_their_dotted_path(tiny: CheckpointIndex) -> None:
    for key in (
        "num_hidden_layers",
        "n_routed_experts",
        "num_experts_per_tok",
        "hidden_size",
        "moe_intermediate_size",
        "first_k_dense_replace",
    ):
        for value in (None, "5", -1, True, 2.0):
            with pytest.raises(
                SourceError,
                match=(
                    rf"config\.json: text_config\.{key}: expected an integer >= [01], found"
                    rf" {value!r}"
                ),
            ):
                describe_model(with_text(tiny, **{key: value}))
    for value in (2, [1], True):
        with pytest.raises(
            SourceError,
            match=(
                r"text_config\.moe_layer_freq: expected 1 for model_type kimi_k25, found"
                rf" {re.escape(repr(value))}"
            ),
        ):
            describe_model(with_text(tiny, moe_layer_freq=value))
    with pytest.raises(
        SourceError, match=r"text_config\.first_k_dense_replace: expected a layer with experts"
    ):
        describe_model(with_text(tiny, first_k_dense_replace=5))
    with pytest.raises(
        SourceError,
        match=(
            r"config\.json: text_config\.model_type: expected one of kimi_k2, deepseek_v3, found"
            r" 'qwen'"
        ),
    ):
        describe_model(with_text(tiny, model_type="qwen"))
    with pytest.raises(
        SourceError, match=r"config\.json: text_config: expected an object, found None"
    ):
        describe_model(with_config(tiny, lambda config: config.pop("text_config")))


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_missing_int4_tensor_is_named(tiny: CheckpointIndex, projection: str, suffix: str) -> None:
    name = f"{EXPERT}{projection}.{suffix}"
    with pytest.raises(
        SourceError,
        match=(
            rf"model-0000\d\S*: tensor {name}: expected weight_packed, weight_scale,"
            r" weight_shape.*found"
        ),
    ):
        describe_model(without(tiny, name))


def test_missing_linear_and_missing_layer_are_named(variants: dict[str, CheckpointIndex]) -> None:
    index = variants["flat_bf16"]
    with pytest.raises(
        SourceError,
        match=rf"tensor {FLAT_EXPERT}up_proj\.weight: expected weight for this linear, found none",
    ):
        describe_model(without(index, f"{FLAT_EXPERT}up_proj.weight"))
    gone = [name for name in index.tensors if "layers.3.mlp.experts" in name]
    with pytest.raises(
        SourceError, match=r"tensor model\.layers\.3\.mlp\.experts\.0\.gate_proj\.weight: expected"
    ):
        describe_model(without(index, *gone))


def test_experts_that_the_config_does_not_announce_are_named(tiny: CheckpointIndex) -> None:
    with pytest.raises(
        SourceError,
        match=(
            r"model-\S+: tensor \S+experts\.15\S+: expected 15 experts in 4 layers \(1 to"
            r" 4\).*found expert 15 in layer 1"
        ),
    ):
        describe_model(with_text(tiny, n_routed_experts=15))
    with pytest.raises(
        SourceError,
        match=(
            r"expected 16 experts in 3 layers \(2 to 4\) by config\.json, found expert \d+ in"
            r" layer 1"
        ),
    ):
        describe_model(with_text(tiny, first_k_dense_replace=2))
    with pytest.raises(
        SourceError, match=r"experts\.16\.gate_proj\.weight_packed: expected .* found none"
    ):
        describe_model(with_text(tiny, n_routed_experts=17))


@pytest.mark.parametrize(
    ("suffix", "values", "expected"),
    [
        (
            "weight_packed",
            {"shape": (128, 33)},
            r"I32 \[128, 32\] by config\.json, found I32 \[128, 33\]",
        ),
        ("weight_packed", {"dtype": "U8"}, r"I32 \[128, 32\] by config\.json, found U8"),
        (
            "weight_scale",
            {"shape": (128, 16)},
            r"BF16 or F16 or F32 \[128, 8\].*found BF16 \[128, 16\]",
        ),
        ("weight_scale", {"dtype": "I32"}, r"BF16 or F16 or F32.*found I32"),
        ("weight_shape", {"shape": (3,)}, r"I32 or I64 \[2\].*found I32 \[3\]"),
        ("weight_shape", {"dtype": "F32"}, r"I32 or I64 \[2\].*found F32"),
    ],
)
def test_wrong_shape_or_dtype_of_an_int4_tensor_is_named(
    tiny: CheckpointIndex, suffix: str, values: dict[str, Any], expected: str
) -> None:
    name = f"{EXPERT}gate_proj.{suffix}"
    with pytest.raises(SourceError, match=rf"^model-\S+: tensor {name}: expected {expected}"):
        describe_model(changed(tiny, name, **values))


def test_shapes_are_checked_per_projection(variants: dict[str, CheckpointIndex]) -> None:
    index = variants["flat_bf16"]
    for projection, shape in (
        ("gate_proj", (128, 256)),
        ("up_proj", (128, 256)),
        ("down_proj", (256, 128)),
    ):
        name = f"{FLAT_EXPERT}{projection}.weight"
        with pytest.raises(
            SourceError,
            match=(
                rf"tensor {name}: expected .* \[{shape[0]}, {shape[1]}\].*found BF16 \[{shape[1]},"
                rf" {shape[0]}\]"
            ),
        ):
            describe_model(changed(index, name, shape=shape[::-1]))
    with pytest.raises(SourceError, match=r"found BF16 \[128, 256\]"):
        describe_model(with_config(index, lambda config: config.update(hidden_size=512)))


def test_allowed_dtypes_are_accepted(
    tiny: CheckpointIndex, variants: dict[str, CheckpointIndex]
) -> None:
    describe_model(changed(tiny, f"{EXPERT}gate_proj.weight_shape", dtype="I64"))
    describe_model(changed(tiny, f"{EXPERT}gate_proj.weight_scale", dtype="F32"))
    describe_model(changed(variants["flat_bf16"], f"{FLAT_EXPERT}gate_proj.weight", dtype="F32"))


def test_extra_tensor_of_a_linear_is_named(tiny: CheckpointIndex) -> None:
    extra = replace(
        tiny.tensors[f"{EXPERT}up_proj.weight_scale"], name=f"{EXPERT}up_proj.weight_zero_point"
    )
    with pytest.raises(
        SourceError, match=rf"model-\S+: tensor {EXPERT}up_proj\.weight_zero_point: expected only"
    ):
        describe_model(plus(tiny, extra))


def test_unknown_storage_and_mixed_storage_are_named(variants: dict[str, CheckpointIndex]) -> None:
    index = variants["flat_bf16"]
    first = "model.layers.1.mlp.experts.0.down_proj."
    with pytest.raises(
        SourceError,
        match=(
            rf"tensor {first}qweight: expected weight_packed or weight for this linear, found"
            r" qweight"
        ),
    ):
        describe_model(renamed(index, f"{first}weight", f"{first}qweight"))
    with pytest.raises(
        SourceError,
        match=(
            rf"tensor {FLAT_EXPERT}gate_proj\.weight: expected weight for this linear, found"
            r" weight_packed"
        ),
    ):
        describe_model(
            renamed(
                index, f"{FLAT_EXPERT}gate_proj.weight", f"{FLAT_EXPERT}gate_proj.weight_packed"
            )
        )


@pytest.mark.parametrize(
    "name", [f"{FLAT_EXPERT}gate_proj.weight", "model.layers.0.self_attn.o_proj.weight"]
)
def test_fp8_weights_that_the_config_does_not_announce_are_refused_naming_the_tensor(
    variants: dict[str, CheckpointIndex], name: str
) -> None:
    with pytest.raises(
        SourceError,
        match=(
            rf"config\.json: quantization_config: expected quant_method 'fp8' for {name}"
            r" \(model-\S+, F8_E4M3\), found None"
        ),
    ):
        describe_model(changed(variants["flat_bf16"], name, dtype="F8_E4M3"))


def test_packed_linears_outside_the_experts_are_refused(tiny: CheckpointIndex) -> None:
    name = "language_model.model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(
        SourceError,
        match=rf"tensor {name}_packed: expected plain weights outside the routed experts",
    ):
        describe_model(renamed(tiny, name, f"{name}_packed"))


def test_models_without_experts_or_with_two_sets_are_refused(tiny: CheckpointIndex) -> None:
    dense = replace(
        tiny,
        tensors={name: entry for name, entry in tiny.tensors.items() if ".experts." not in name},
    )
    with pytest.raises(SourceError, match=r"\(prefix\)layers\.N\.mlp\.experts\.E, found none"):
        describe_model(dense)
    twin = replace(
        tiny.tensors[f"{EXPERT}up_proj.weight_packed"],
        name="draft.layers.0.mlp.experts.0.up_proj.weight_packed",
    )
    with pytest.raises(
        SourceError, match=r"under one .* found language_model\S+ \(model-\S+\), draft\.layers"
    ):
        describe_model(plus(tiny, twin))
    behind = {
        name: entry
        for name, entry in tiny.tensors.items()
        if ".experts." not in name or "layers.4." in name
    }
    with pytest.raises(SourceError, match=r"below num_hidden_layers 4, found only \[4\]"):
        describe_model(with_text(replace(tiny, tensors=behind), num_hidden_layers=4))


@pytest.mark.parametrize(
    "name", ["language_model.model.embed_tokens.weight", "language_model.model.norm.weight"]
)
def test_missing_ends_of_the_model_are_named(tiny: CheckpointIndex, name: str) -> None:
    with pytest.raises(SourceError, match=rf"tensor {name}: expected in the checkpoint"):
        describe_model(without(tiny, name))


def quantization(index: CheckpointIndex) -> dict[str, Any]:
    return copy.deepcopy(index.config["text_config"]["quantization_config"])


def test_quantization_config_is_found_at_the_top_level_too(tiny: CheckpointIndex) -> None:
    moved = with_config(
        tiny,
        lambda config: config.update(
            quantization_config=config["text_config"].pop("quantization_config")
        ),
    )
    assert describe_model(moved).int4_group_size == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_bits", 8),
        ("type", "float"),
        ("symmetric", False),
        ("strategy", "channel"),
        ("dynamic", True),
        ("group_size", -1),
    ],
)
def test_other_int_formats_are_refused_naming_the_key(
    tiny: CheckpointIndex, key: str, value: object
) -> None:
    config = quantization(tiny)
    config["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(
        SourceError,
        match=(
            rf"config\.json: quantization_config\.config_groups\.group_0\.weights\.{key}: expected"
            rf" .*found {value!r}"
        ),
    ):
        describe_model(with_text(tiny, quantization_config=config))


def test_other_group_size_than_the_scales_have_is_refused(tiny: CheckpointIndex) -> None:
    config = quantization(tiny)
    config["config_groups"]["group_0"]["weights"]["group_size"] = 64
    with pytest.raises(
        SourceError,
        match=r"weight_scale: expected .* \[128, 4\] by config\.json, found BF16 \[128, 8\]",
    ):
        describe_model(with_text(tiny, quantization_config=config))
    config["config_groups"]["group_0"]["weights"]["group_size"] = 48
    with pytest.raises(
        SourceError,
        match=r"gate_proj: expected in_features divisible by 48 \(weights a scale\), found 256",
    ):
        describe_model(with_text(tiny, quantization_config=config))


def test_absent_or_foreign_quantization_config_is_refused(tiny: CheckpointIndex) -> None:
    group = quantization(tiny)["config_groups"]["group_0"]
    for found, message in (
        (None, "expected quantization_config for experts stored as weight_packed, found None"),
        (
            quantization(tiny) | {"quant_method": "gptq"},
            "expected compressed-tensors' pack-quantized, found 'gptq'",
        ),
        (quantization(tiny) | {"format": "int-quantized"}, "format 'int-quantized'"),
        (
            quantization(tiny) | {"config_groups": {"a": group, "b": group}},
            r"expected one group, found \['a', 'b'\]",
        ),
        (quantization(tiny) | {"config_groups": None}, "expected one group, found None"),
        (
            quantization(tiny) | {"config_groups": {"a": {"weights": None}}},
            r"config_groups\.a\.weights: expected an object, found None",
        ),
    ):
        with pytest.raises(SourceError, match=message):
            describe_model(with_text(tiny, quantization_config=found))


def test_divisibility_names_the_first_linear_expected_and_found(layout: ModelLayout) -> None:
    for span in (16, 32):
        check_divisibility(layout, span)
    first = r"language_model\.model\.layers\.1\.mlp\.experts\.0\."
    check_divisibility(replace(layout, hidden_size=272), 16)
    with pytest.raises(
        SourceError, match=rf"^{first}gate_proj: expected in_features divisible by 32 .*found 272"
    ):
        check_divisibility(replace(layout, hidden_size=272), 32)
    with pytest.raises(
        SourceError, match=rf"^{first}gate_proj: expected in_features divisible by 16 .*found 264"
    ):
        check_divisibility(replace(layout, hidden_size=264), 16)
    with pytest.raises(
        SourceError, match=rf"^{first}gate_proj: expected out_features divisible by 8, found 132"
    ):
        check_divisibility(replace(layout, moe_intermediate_size=132), 16)
    with pytest.raises(
        SourceError, match=rf"^{first}down_proj: expected in_features divisible by 16 .*found 136"
    ):
        check_divisibility(replace(layout, moe_intermediate_size=136), 16)
