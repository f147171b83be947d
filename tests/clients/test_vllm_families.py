"""Checkpoints of the text-only families in vLLM: what it loads, and that its engine answers as the
dense twin. test_vllm.py looks closer, at Kimi-K2.5."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment

from tests.clients.test_vllm import NEW_TOKENS, SETTINGS, ask, configure, kl, load
from tests.clients.torch_nvfp4 import in_the_emulations_slot

LAYERS = {"kimi_k2": (1, 2), "deepseek_v3": (1, 2), "qwen3_moe": (0, 2)}


@pytest.fixture(scope="module", params=LAYERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, made_families: Callable[[str], Path]) -> Path:
    return made_families(family)


def test_experts_are_nvfp4_and_every_parameter_is_loaded(
    family: str, folder: Path, tmp_path: Path
) -> None:
    """Among the rest: what DeepSeek-V3's and Kimi-K2's sources hold in FP8, as BF16. The layer of
    multi-token prediction is not asked for."""
    config = configure(folder / "run" / "checkpoint")
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path}/init", 0, "gloo")
    loaded = load(config)
    methods = {
        name: type(module.quant_method).__name__
        for name, module in loaded.model.named_modules()
        if hasattr(module, "quant_method")
    }
    experts = {
        name for name, method in methods.items() if method == "CompressedTensorsW4A4Nvfp4MoEMethod"
    }
    assert experts == {
        f"model.layers.{layer}.mlp.experts.routed_experts" for layer in LAYERS[family]
    }
    others = {method for name, method in methods.items() if name not in experts}
    assert others == {
        "UnquantizedLinearMethod",
        "UnquantizedEmbeddingMethod",
        "CompressedTensorsKVCacheMethod",
    }
    assert loaded.poisoned() == []


def test_engine_answers_as_the_dense_twin(folder: Path) -> None:
    """Router, groups of experts, attention and rotary embedding are vLLM's own."""
    twins = load_file(folder / "twin.safetensors")
    with in_the_emulations_slot():
        answer = ask(
            LLM(model=str(folder / "run" / "checkpoint"), **SETTINGS),
            twins["tokens"][:, :-NEW_TOKENS],
        )
    assert torch.equal(answer.tokens_BS, twins["tokens"])
    assert kl(twins["logprobs.original"][:, :-1], answer.logprobs_BSV).max() < 1e-6
    assert kl(twins["logprobs.source"][:, :-1], answer.logprobs_BSV).mean() > 0.1
