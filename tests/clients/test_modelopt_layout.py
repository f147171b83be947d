"""A checkpoint in ModelOpt's layout in the servers' own code for it: what they read of either
configuration file, what they leave plain, what vLLM loads, and what its engine answers.

Of SGLang the reading of the configuration and the matching of names are run, as they stand in its
file; the module itself needs a GPU's libraries.
"""

import ast
import json
import subprocess
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import regex
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm import LLM
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

from tests.clients.conftest import main_python
from tests.clients.test_vllm import (
    EXPERTS,
    EXPERTS_NAME,
    LAYERS,
    NEW_TOKENS,
    SETTINGS,
    Loaded,
    ask,
    configure,
    kl,
    load,
    read_all,
)
from tests.clients.torch_nvfp4 import in_the_emulations_slot
from tests.conftest import REPO
from tests.reference import tiny_families

SOURCES = (*tiny_families.NAMES, "kimi's true shapes")
LEAVES = {
    "weight": "weight_packed",
    "weight_scale": "weight_scale",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}
SGLANG_FUNCTIONS = {
    "_compile_exclusion_pattern",
    "is_layer_excluded",
    "from_config",
    "common_group_size",
}


@pytest.fixture(scope="module")
def checkpoint(modelopt_checkpoint: Path) -> Path:
    return modelopt_checkpoint


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("names") / "names.json"
    command = [main_python(), "-m", "tests.clients.names", str(file)]
    subprocess.run(command, cwd=REPO, check=True)
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.fixture(autouse=True, scope="module")
def takes_float32() -> Iterator[None]:
    """vLLM's list for ModelOpt's layout has the dtypes of its kernels, none of which is run."""
    with mock.patch.object(
        ModelOptNvFp4Config, "get_supported_act_dtypes", lambda self: [torch.float32]
    ):
        yield


@cache
def sglang_class() -> type:
    """ModelOptFp4Config with those of SGLang's functions that need nothing else of it."""
    package = find_spec("sglang")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "srt/layers/quantization/modelopt_quant.py"
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(file.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = getattr(node, "name", "")
        if isinstance(node, ast.ClassDef) and owner not in (
            "ModelOptQuantConfig",
            "ModelOptFp4Config",
        ):
            continue
        found |= {
            m.name: m
            for m in members
            if isinstance(m, ast.FunctionDef) and m.name in SGLANG_FUNCTIONS
        }
    assert found.keys() == SGLANG_FUNCTIONS
    compile_pattern = found.pop("_compile_exclusion_pattern")

    def init(
        self: Any, serialized: bool, cache: str, group: int, exclude: list[str], *_: Any, **__: Any
    ) -> None:
        self.is_serialized, self.kv_cache, self.group_size = serialized, cache, group
        self.exclude_modules = exclude

    body = [compile_pattern, ast.ClassDef("Fp4", [], [], list(found.values()), [])]
    module = ast.fix_missing_locations(ast.Module(body, []))
    space: dict[str, Any] = {
        "re": regex, "lru_cache": lru_cache, "Dict": dict, "List": list, "Any": Any,
        "QuantizationConfig": object,
    }  # fmt: skip
    exec(compile(module, str(file), "exec"), space)
    found_class: type = space["Fp4"]
    space["ModelOptFp4Config"] = found_class
    found_class.__init__ = init  # type: ignore[misc]
    found_class.get_from_keys = staticmethod(lambda config, keys: config[keys[0]])  # type: ignore[attr-defined]
    return found_class


def read_by(server: str) -> Callable[[dict[str, Any]], Any]:
    return ModelOptNvFp4Config.from_config if server == "vllm" else sglang_class().from_config  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_either_file_is_read_as_the_same_nvfp4(checkpoint: Path, server: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    older = json.loads((checkpoint / "hf_quant_config.json").read_text())
    one, other = (read_by(server)(found) for found in (config, older))
    assert one.exclude_modules == other.exclude_modules and len(one.exclude_modules) > 5
    assert one.group_size == other.group_size == 16
    if server == "vllm":
        assert one.quant_method == other.quant_method == "NVFP4"
        assert one.kv_cache_quant_algo is None and other.kv_cache_quant_algo is None
    else:
        assert one.is_serialized and other.is_serialized
        assert one.kv_cache == other.kv_cache == "auto"


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("source", SOURCES)
def test_all_but_the_experts_is_excluded(names: dict[str, Any], source: str, server: str) -> None:
    found = names[source]
    config = read_by(server)(found["modelopt"])
    if server == "vllm":
        config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    experts = [n for n in found["experts"] if ".experts.0." in n or ".experts.7." in n]
    mixtures = {n.rsplit(".", 2)[0] for n in experts}
    assert len(found["plain"]) > 20 and len(experts) >= 2 * 2 * 3
    assert [n for n in found["plain"] if not config.is_layer_excluded(n)] == []
    assert [n for n in [*experts, *sorted(mixtures)] if config.is_layer_excluded(n)] == []


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    config = configure(checkpoint)
    assert config.model_config.quantization == "modelopt_fp4"
    with set_current_vllm_config(config):
        place = tmp_path_factory.mktemp("group") / "init"
        init_distributed_environment(1, 0, f"file://{place}", 0, "gloo")
    return load(config)


def test_experts_get_modelopts_method_and_nothing_else_is_quantized(loaded: Loaded) -> None:
    methods = {
        name: type(module.quant_method).__name__
        for name, module in loaded.model.named_modules()
        if hasattr(module, "quant_method")
    }
    experts = {f"{EXPERTS_NAME.format(layer)}.routed_experts" for layer in LAYERS}
    assert {n for n, method in methods.items() if method == "ModelOptNvFp4FusedMoE"} == experts
    assert {method for name, method in methods.items() if name not in experts} == {
        "UnquantizedLinearMethod",
        "UnquantizedEmbeddingMethod",
        "ModelOptKVCacheMethod",
    }


def test_every_parameter_is_loaded_and_experts_are_the_checkpoints_bytes(
    loaded: Loaded, checkpoint: Path
) -> None:
    assert loaded.poisoned() == []
    tensors = read_all(checkpoint)
    for layer in LAYERS:
        stem = EXPERTS_NAME.format(layer)
        for leaf in LEAVES:
            w13, w2 = (
                loaded.parameters[f"{stem}.routed_experts.{w}_{leaf}"] for w in ("w13", "w2")
            )
            for expert in range(EXPERTS):
                gate, up, down = (
                    tensors[f"{stem}.{expert}.{p}.{leaf}"].float()
                    for p in ("gate_proj", "up_proj", "down_proj")
                )
                both = torch.cat([torch.atleast_1d(gate), torch.atleast_1d(up)])
                assert torch.equal(w13[expert].float(), both), (layer, expert, leaf)
                assert torch.equal(w2[expert].float(), down), (layer, expert, leaf)


def test_served_scales_are_the_compressed_tensors_ones(loaded: Loaded, made: Path) -> None:
    """vLLM divides where it multiplied: what it computes with is equal within a rounding."""
    dense: dict[str, Tensor] = read_all(made / "run" / "checkpoint")
    for layer in LAYERS:
        scales = loaded.experts(layer).quant_method.moe_quant_config
        stem = f"{EXPERTS_NAME.format(layer)}.0"
        for served, name in (
            (scales.a1_gscale, "gate_proj.input_global_scale"),
            (scales.a2_gscale, "down_proj.input_global_scale"),
            (1 / scales.g1_alphas[0], "gate_proj.weight_global_scale"),
            (1 / scales.g2_alphas[0], "down_proj.weight_global_scale"),
        ):
            written = dense[f"{stem}.{name}"]
            torch.testing.assert_close(served.reshape(1), written, rtol=1e-6, atol=0)


def test_engine_answers_as_the_dense_twin(checkpoint: Path, made: Path) -> None:
    twins = load_file(made / "twin.safetensors")
    with in_the_emulations_slot():
        engine = LLM(model=str(checkpoint), **SETTINGS)
        answer = ask(engine, twins["tokens"][:, :-NEW_TOKENS])
    assert torch.equal(answer.tokens_BS, twins["tokens"])
    assert kl(twins["logprobs.original"][:, :-1], answer.logprobs_BSV).max() < 1e-6
    assert kl(twins["logprobs.source"][:, :-1], answer.logprobs_BSV).mean() > 0.1
