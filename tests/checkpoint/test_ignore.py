"""Every linear outside the compressed experts is named by a pattern, under whatever name a server
has for it; no expert is."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from p48ray.checkpoint.families import describe_model, describe_names
from p48ray.checkpoint.ignore import check_patterns, ignored, is_linear
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.checkpoint.skeleton import write_kimi_k25_skeleton
from p48ray.errors import P48Error
from p48ray.store import LocalStore
from tests.checkpoint.tiny_variants import write_folder
from tests.reference import tiny_families

SOURCES = (*tiny_families.NAMES, "kimi's true shapes")

FUSED = {
    "self_attn.q_a_proj": "self_attn.fused_qkv_a_proj_with_mqa",  # SGLang
    "self_attn.kv_a_proj_with_mqa": "self_attn.fused_qkv_a_proj",  # vLLM
    "self_attn.q_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "shared_experts.up_proj": "shared_experts.gate_up_proj",
}


@pytest.fixture(scope="module", params=SOURCES)
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CheckpointIndex:
    folder = tmp_path_factory.mktemp("source") / "model"
    if request.param == SOURCES[-1]:
        write_kimi_k25_skeleton(folder)
    else:
        write_folder(folder, *getattr(tiny_families, request.param)())
    return open_checkpoint(LocalStore(folder))


def other_names(name: str) -> set[str]:
    """A linear as other programs call it: without the outer prefix, as transformers 5 nests it, and
    fused."""
    bare = name.removeprefix("language_model.")
    names = {name, bare, f"language_model.{bare}", bare.replace("model.", "model.language_model.")}
    for piece, fused in FUSED.items():
        names |= {n.replace(piece, fused) for n in names if n.endswith(piece)}
    return names


def plain_linears(index: CheckpointIndex, layout: ModelLayout) -> set[str]:
    return {
        entry.name.removesuffix(".weight")
        for entry in index.tensors.values()
        if is_linear(entry.name, entry.shape)
        and not layout.is_expert_tensor(entry.name)
        and entry.name != layout.embed_name
    }


# From the start of a name: compressed-tensors, vLLM, SGLang. The whole: TensorRT-LLM.
@pytest.mark.parametrize("match", [re.match, re.fullmatch], ids=["start", "whole"])
def test_all_linears_but_the_experts_are_ignored(
    source: CheckpointIndex, match: Callable[[str, str], object]
) -> None:
    layout = describe_model(source)
    patterns = [pattern.removeprefix("re:") for pattern in ignored(source, layout)]

    def is_ignored(name: str) -> bool:
        return any(match(pattern, name) for pattern in patterns)

    plain = plain_linears(source, layout)
    assert len(plain) > 10
    assert {n for name in plain for n in other_names(name) if not is_ignored(n)} == set()
    experts = {
        layout.expert_linear_name(layer, expert, projection)
        for layer in layout.moe_layers
        for expert in (0, layout.num_experts - 1)
        for projection in PROJECTIONS
    }
    mixtures = {f"{layout.layer_prefix}{layer}.mlp.experts" for layer in layout.moe_layers}
    names = {n for name in experts | mixtures for n in other_names(name)}
    assert {name for name in names if is_ignored(name)} == set()


def test_patterns_are_few_whatever_the_size(source: CheckpointIndex) -> None:
    assert len(ignored(source, describe_model(source))) <= 7


def test_layer_of_multi_token_prediction_is_ignored_under_each_servers_prefix(
    tmp_path: Path,
) -> None:
    write_folder(tmp_path / "model", *tiny_families.deepseek_v3())
    index = open_checkpoint(LocalStore(tmp_path / "model"))
    patterns = [p.removeprefix("re:") for p in ignored(index, describe_model(index))]
    for name in (
        "model.layers.3.mlp.experts.0.gate_proj",
        "model.layers.3.mtp_block.mlp.experts.7.down_proj",
        "model.layers.3.mtp_block.self_attn.o_proj",
        "model.layers.3.eh_proj",
        "model.layers.3.shared_head.head",
        "model.decoder.mlp.experts.0.gate_proj",
        "model.decoder.self_attn.fused_qkv_a_proj_with_mqa",
        "model.eh_proj",
        "model.shared_head.head",
    ):
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
    for name in ("model.layers.1.mlp.experts.3.up_proj", "model.layers.33.mlp.experts.3.up_proj"):
        assert not any(re.match(pattern, name) for pattern in patterns), name


def test_head_is_ignored_where_the_checkpoint_ties_it(tmp_path: Path) -> None:
    config, tensors = tiny_families.qwen3_moe()
    del tensors["lm_head.weight"]
    write_folder(tmp_path / "model", config | {"tie_word_embeddings": True}, tensors)
    index = open_checkpoint(LocalStore(tmp_path / "model"))
    assert r"re:(.*\.)?lm_head$" in ignored(index, describe_model(index))


@pytest.mark.parametrize("pattern", [r"re:.*\.mlp\..*", r"re:.*gate_proj$", r"re:.*\.experts$"])
def test_pattern_that_would_leave_an_expert_plain_is_refused(
    source: CheckpointIndex, pattern: str
) -> None:
    layout = describe_model(source)
    with pytest.raises(P48Error, match=r"would leave .*mlp.experts.* unquantized"):
        check_patterns([pattern], layout)


def test_finished_checkpoint_says_the_same_as_its_source(source: CheckpointIndex) -> None:
    """Its experts have other tensors, and no layout of a source."""
    layout = describe_model(source)
    finished = {
        entry.name: entry
        for entry in source.tensors.values()
        if not layout.is_expert_tensor(entry.name)
    }
    for layer in layout.moe_layers:
        for expert in range(layout.num_experts):
            for projection in PROJECTIONS:
                name = layout.expert_linear_name(layer, expert, projection) + ".weight_packed"
                finished[name] = replace(next(iter(source.tensors.values())), name=name)
    index = replace(source, tensors=finished)
    assert ignored(index, describe_names(index)) == ignored(source, layout)
