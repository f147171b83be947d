"""A finished checkpoint in vLLM: how it reads the configuration, what it loads, and what its engine
answers."""

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm import LLM, SamplingParams, envs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as oracle
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.clients.torch_nvfp4 import TorchNvfp4Experts, in_the_emulations_slot

LAYERS, EXPERTS, NEW_TOKENS = (1, 2, 3, 4), 16, 8
EXPERTS_NAME = "language_model.model.layers.{}.mlp.experts"
SETTINGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 4,
    "max_logprobs": -1,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "compilation_config": {"custom_ops": ["-rotary_embedding"]},  # see README.md
}
POISON = {
    torch.uint8: 0x88,
    torch.float8_e4m3fn: 0x7F,
}  # two codes -0, which p48ray never writes; and NaN. Other dtypes have their own NaN.


def is_derived(name: str) -> bool:
    """Scales of the KV cache, which vLLM sets itself where a checkpoint has none."""
    return ".self_attn.attn." in name


def poison(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_derived(name):
            continue
        if parameter.dtype in POISON:
            parameter.data.view(torch.uint8).fill_(POISON[parameter.dtype])
        else:
            parameter.data.fill_(torch.nan)


def is_poisoned(tensor: Tensor) -> bool:
    return bool(
        (tensor.view(torch.uint8) == POISON[tensor.dtype]).any()
        if tensor.dtype in POISON
        else tensor.isnan().any()
    )


@dataclass(frozen=True)
class Loaded:
    """A model that vLLM loaded, and its parameters as the loader had left them, before any kernel
    took them over."""

    model: nn.Module
    parameters: dict[str, Tensor]

    def experts(self, layer: int) -> nn.Module:
        return self.model.get_submodule(f"{EXPERTS_NAME.format(layer)}.routed_experts")

    def poisoned(self) -> list[str]:
        return [
            name
            for name, tensor in self.parameters.items()
            if not is_derived(name) and is_poisoned(tensor)
        ]


def load(config: VllmConfig) -> Loaded:
    """By vLLM's own loader, into poisoned parameters."""
    parameters: dict[str, Tensor] = {}
    stock = DefaultModelLoader.load_weights

    def load_weights(self: DefaultModelLoader, model: nn.Module, model_config: object) -> None:
        poison(model)
        stock(self, model, model_config)
        parameters.update({name: p.detach().clone() for name, p in model.named_parameters()})

    # vLLM's CPU worker replaces empty_cache too; here there is no worker
    no_accelerator = mock.patch.object(torch.accelerator, "empty_cache", lambda: None)
    recorded = mock.patch.object(DefaultModelLoader, "load_weights", load_weights)
    with in_the_emulations_slot(), no_accelerator, recorded, set_current_vllm_config(config):
        ensure_model_parallel_initialized(1, 1)
        return Loaded(get_model(vllm_config=config), parameters)


def read_all(checkpoint: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def configure(checkpoint: Path) -> VllmConfig:
    return EngineArgs(model=str(checkpoint), **SETTINGS).create_engine_config()


@pytest.fixture(scope="module")
def checkpoint(made: Path) -> Path:
    return made / "run" / "checkpoint"


@pytest.fixture(scope="module")
def config(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    config = configure(checkpoint)
    with set_current_vllm_config(config):
        init_distributed_environment(
            1, 0, f"file://{tmp_path_factory.mktemp('group')}/init", 0, "gloo"
        )
    return config


@pytest.fixture(scope="module")
def loaded(config: VllmConfig) -> Loaded:
    return load(config)


@pytest.fixture(scope="module")
def engine(config: VllmConfig, checkpoint: Path) -> Iterator[LLM]:
    with in_the_emulations_slot():
        yield LLM(model=str(checkpoint), **SETTINGS)


def test_configuration_is_read_as_nvfp4_of_the_experts(config: VllmConfig) -> None:
    assert config.model_config.architectures == ["KimiK25ForConditionalGeneration"]
    assert config.model_config.quantization == "compressed-tensors"
    quantization = config.quant_config
    assert isinstance(quantization, CompressedTensorsConfig)
    assert quantization.quant_format == "nvfp4-pack-quantized"
    (target, scheme), *others = quantization.target_scheme_map.items()
    assert not others
    assert target == r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
    for part in ("weights", "input_activations"):
        assert quantization._is_nvfp4_format(scheme[part])


def test_experts_get_the_nvfp4_method_and_nothing_else_is_quantized(loaded: Loaded) -> None:
    methods = {
        name: type(module.quant_method).__name__
        for name, module in loaded.model.named_modules()
        if hasattr(module, "quant_method")
    }
    experts = {f"{EXPERTS_NAME.format(layer)}.routed_experts" for layer in LAYERS}
    assert {
        name for name, method in methods.items() if method == "CompressedTensorsW4A4Nvfp4MoEMethod"
    } == experts
    others = Counter(method for name, method in methods.items() if name not in experts)
    # the attention's method only says where the KV cache's scales would come from
    assert set(others) == {
        "UnquantizedLinearMethod",
        "UnquantizedEmbeddingMethod",
        "CompressedTensorsKVCacheMethod",
    }
    assert others["CompressedTensorsKVCacheMethod"] == 5
    linear = [
        n
        for n, m in loaded.model.named_modules()
        if hasattr(m, "weight") and hasattr(m, "quant_method")
    ]
    assert {
        "language_model.lm_head",
        "vision_tower.encoder.blocks.0.wqkv",
        "language_model.model.layers.1.mlp.gate",
    } <= set(linear)
    assert not any(hasattr(module, "scheme") for module in loaded.model.modules())


def test_every_parameter_is_loaded(loaded: Loaded) -> None:
    assert loaded.poisoned() == []
    assert sum(map(is_derived, loaded.parameters)) == 6 * 5
    assert any(name.startswith("vision_tower.") for name in loaded.parameters)


def test_loaded_experts_are_the_checkpoints_bytes(loaded: Loaded, checkpoint: Path) -> None:
    tensors = read_all(checkpoint)
    for layer in LAYERS:
        stem = f"{EXPERTS_NAME.format(layer)}"
        for leaf in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
            w13, w2 = (
                loaded.parameters[f"{stem}.routed_experts.{w}_{leaf}"] for w in ("w13", "w2")
            )
            for expert in range(EXPERTS):
                gate, up, down = (
                    tensors[f"{stem}.{expert}.{p}.{leaf}"]
                    for p in ("gate_proj", "up_proj", "down_proj")
                )
                assert torch.equal(w13[expert].float(), torch.cat([gate, up]).float()), (
                    layer,
                    expert,
                    leaf,
                )
                assert torch.equal(w2[expert].float().reshape(down.shape), down.float()), (
                    layer,
                    expert,
                    leaf,
                )


def test_served_input_scales_are_the_layers(loaded: Loaded, checkpoint: Path) -> None:
    """vLLM takes one scale for all experts of a layer."""
    tensors = read_all(checkpoint)
    for layer in LAYERS:
        scales = loaded.experts(layer).quant_method.moe_quant_config
        for served, projection in (
            (scales.a1_gscale, "gate_proj"),
            (scales.a2_gscale, "down_proj"),
        ):
            written = tensors[f"{EXPERTS_NAME.format(layer)}.0.{projection}.input_global_scale"]
            torch.testing.assert_close(served.reshape(1), written, rtol=1e-6, atol=0)


def test_a_missing_tensor_is_seen_as_poison(
    config: VllmConfig, checkpoint: Path, tmp_path: Path
) -> None:
    """vLLM itself says nothing of it: the test above would."""
    gone = f"{EXPERTS_NAME.format(3)}.7.down_proj.weight_scale"
    change(checkpoint, tmp_path / "changed", lambda tensors: tensors.pop(gone, None))
    assert load(configure(tmp_path / "changed")).poisoned() == [
        f"{EXPERTS_NAME.format(3)}.routed_experts.w2_weight_scale"
    ]


def test_a_stray_tensor_is_refused(config: VllmConfig, checkpoint: Path, tmp_path: Path) -> None:
    """Why p48ray writes no weight_shape."""
    linear = f"{EXPERTS_NAME.format(3)}.7.down_proj"

    def add(tensors: dict[str, Tensor]) -> None:
        if f"{linear}.weight_packed" in tensors:
            tensors[f"{linear}.weight_shape"] = torch.tensor([256, 128], dtype=torch.int32)

    change(checkpoint, tmp_path / "changed", add)
    with pytest.raises(KeyError, match="weight_shape"):
        load(configure(tmp_path / "changed"))


def change(checkpoint: Path, to: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """A copy, each of whose shards went through `edit`."""
    shutil.copytree(checkpoint, to)
    index = json.loads((to / "model.safetensors.index.json").read_text())
    index["weight_map"] = {}
    for file in sorted(to.glob("*.safetensors")):
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)
        index["weight_map"] |= dict.fromkeys(tensors, file.name)
    (to / "model.safetensors.index.json").write_text(json.dumps(index))


def test_stock_vllm_has_no_kernel_for_this_processor(loaded: Loaded, config: VllmConfig) -> None:
    """When this fails, vLLM's own kernel can take the place of the one in torch_nvfp4.py."""
    experts = loaded.experts(1)
    assert isinstance(experts, RoutedExperts)
    with (
        set_current_vllm_config(config),
        pytest.raises(NotImplementedError, match="No NvFp4 MoE backend"),
    ):
        oracle.select_nvfp4_moe_backend(experts.moe_config, kNvfp4Static, kNvfp4Dynamic)


@dataclass(frozen=True)
class Answer:
    """What an engine said to prompts: all tokens (B, S), and log-probabilities (B, S - 1, V) at all
    positions but the last one."""

    tokens_BS: Tensor
    logprobs_BSV: Tensor


def ask(engine: LLM, prompts_BS: Tensor) -> Answer:
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS,
        temperature=0,
        prompt_logprobs=-1,
        logprobs=-1,
        detokenize=False,
        ignore_eos=True,
    )
    tokens, logprobs = [], []
    for output in engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts_BS.tolist()], sampling, use_tqdm=False
    ):
        (completion,) = output.outputs
        tokens.append([*output.prompt_token_ids, *completion.token_ids])
        rows = [*output.prompt_logprobs[1:], *completion.logprobs]
        logprobs.append([[row[i].logprob for i in range(len(row))] for row in rows])
    return Answer(torch.tensor(tokens), torch.tensor(logprobs).double().log_softmax(-1))


def kl(expected_BSV: Tensor, found_BSV: Tensor) -> Tensor:
    """(B, S), nats."""
    return (expected_BSV.exp() * (expected_BSV - found_BSV)).sum(-1)


@pytest.fixture(scope="module")
def twins(made: Path) -> dict[str, Tensor]:
    """See twin.py."""
    return load_file(made / "twin.safetensors")


def test_engine_answers_as_the_dense_twin(
    engine: LLM, twins: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in one batch, and their continuation token by token from the KV cache."""
    monkeypatch.setattr(TorchNvfp4Experts, "calls", 0)
    answer = ask(engine, twins["tokens"][:, :-NEW_TOKENS])
    assert TorchNvfp4Experts.calls == len(LAYERS) * NEW_TOKENS
    assert torch.equal(answer.tokens_BS, twins["tokens"])
    assert kl(twins["logprobs.original"][:, :-1], answer.logprobs_BSV).max() < 1e-6
    assert kl(twins["logprobs.source"][:, :-1], answer.logprobs_BSV).mean() > 0.1


def test_engine_quantizes_activations_as_the_evaluation_does(
    engine: LLM, twins: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value within float32 noise of a rounding tie may fall to either side, so at some positions
    they differ by more than noise."""
    monkeypatch.setattr(TorchNvfp4Experts, "quantizes_activations", True)
    positions = twins["tokens"].shape[1]
    found_BSV = ask(engine, twins["tokens"]).logprobs_BSV[:, :positions]
    found_BS, distance_BS = (
        kl(twins[f"logprobs.{name}"], found_BSV) for name in ("w4a4", "original")
    )
    assert found_BS.median() < 1e-6
    assert found_BS.mean() < 0.05 * distance_BS.mean()
    assert distance_BS.median() > 1e-3


def test_vllm_takes_the_commands_of_the_card(made: Path) -> None:
    """Every flag, and every value that has a list: the parsers' names are looked up. The older
    form's variable is none of this version's."""
    card = (made / "run" / "checkpoint" / "README.md").read_text()
    newer, older = re.findall(r"```\n((?:\w+=1 )?vllm serve .*?)\n```", card, re.DOTALL)
    parser = make_arg_parser(FlexibleArgumentParser())
    one_line = newer.replace("\\\n", "").replace(
        "<this repository>", str(made / "run" / "checkpoint")
    )
    found = parser.parse_args(shlex.split(one_line)[2:])
    assert (found.tensor_parallel_size, found.moe_backend, found.mm_encoder_tp_mode) == (
        1,  # its bytes fit on one GPU
        "flashinfer_trtllm",
        "data",
    )
    assert found.trust_remote_code
    oracle.map_nvfp4_backend(found.moe_backend)
    assert found.tool_call_parser in ToolParserManager.list_registered()
    assert found.reasoning_parser in ReasoningParserManager.list_registered()
    variable = older.partition("=")[0]
    assert variable == "VLLM_USE_FLASHINFER_MOE_FP4" and variable not in envs.environment_variables
