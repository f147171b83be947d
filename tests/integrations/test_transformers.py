"""A finished checkpoint in transformers: what the stock loader makes of it, and what ours does."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from p48ray.errors import SourceError
from p48ray.finished.converter import convert_folder
from p48ray.integrations import transformers as integration
from p48ray.numerics import e2m1, nvfp4
from p48ray.store import LocalStore
from tests.reference import whole_model
from tests.stages.small_run import SmallRun

LAYERS, EXPERTS, PROJECTIONS = (1, 2, 3, 4), 16, ("gate_proj", "up_proj", "down_proj")


STOCK = CompressedTensorsHfQuantizer.get_load_operations


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it came."""
    monkeypatch.setattr(CompressedTensorsHfQuantizer, "get_load_operations", STOCK)


@pytest.fixture(scope="module")
def loaded(finished: SmallRun) -> Iterator[PreTrainedModel]:
    yield integration.load_model(str(finished.checkpoint), dtype=torch.float32)
    CompressedTensorsHfQuantizer.get_load_operations = STOCK


def by_compressed_tensors(tensors: dict[str, Tensor], linear: str) -> Tensor:
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    decoder = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    weight: Tensor = decoder.decompress(
        {n: tensors[f"{linear}.{n}"] for n in names}, preset_name_to_scheme("NVFP4", ["Linear"])
    )["weight"]
    return weight


def experts_of(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """(experts, out, in) by projection."""
    module = model.model.language_model.layers[layer].mlp.experts
    gate, up = module.gate_up_proj.chunk(2, 1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": module.down_proj}


def test_modelopts_layout_is_refused_by_its_key(finished: SmallRun, tmp_path: Path) -> None:
    target = LocalStore(tmp_path / "other")
    convert_folder(LocalStore(finished.checkpoint), target, "modelopt", None)
    words = r"other/config\.json: .*quant_method: expected 'compressed-tensors', found 'modelopt'"
    with pytest.raises(SourceError, match=words):
        integration.load_model(str(tmp_path / "other"), dtype=torch.float32)


def test_sparse_storage_is_refused_by_its_key(finished: SmallRun, tmp_path: Path) -> None:
    convert_folder(LocalStore(finished.checkpoint), LocalStore(tmp_path / "sparse"), "sparse", None)
    with pytest.raises(
        SourceError,
        match=(
            r"sparse/config\.json: quantization_config\.paired48_sparse: expected dense storage,"
            r" found sparse"
        ),
    ):
        integration.load_model(str(tmp_path / "sparse"), dtype=torch.float32)


def test_every_expert_linear_is_what_compressed_tensors_decodes(
    finished: SmallRun, loaded: PreTrainedModel
) -> None:
    tensors = whole_model.read_all(finished.checkpoint)
    for layer in LAYERS:
        found = experts_of(loaded, layer)
        for expert in range(EXPERTS):
            for projection in PROJECTIONS:
                linear = f"language_model.model.layers.{layer}.mlp.experts.{expert}.{projection}"
                assert torch.equal(
                    found[projection][expert], by_compressed_tensors(tensors, linear).float()
                ), linear


def test_what_compressed_tensors_decodes_is_what_the_solver_meant_rounded_to_bf16(
    finished: SmallRun,
) -> None:
    tensors = whole_model.read_all(finished.checkpoint)
    for layer in LAYERS:
        for expert in range(EXPERTS):
            for projection in PROJECTIONS:
                linear = f"language_model.model.layers.{layer}.mlp.experts.{expert}.{projection}"
                packed, scale, divisor = (
                    tensors[f"{linear}.{n}"]
                    for n in ("weight_packed", "weight_scale", "weight_global_scale")
                )
                meant = nvfp4.dequantize(e2m1.unpack(packed)[None], scale[None], divisor)[0]
                torch.testing.assert_close(
                    by_compressed_tensors(tensors, linear).float(), meant, rtol=2**-7, atol=0
                )


def test_everything_else_is_the_sources(finished: SmallRun, loaded: PreTrainedModel) -> None:
    tensors = whole_model.read_all(finished.checkpoint)
    state = loaded.state_dict()
    for name in (
        "layers.2.self_attn.o_proj.weight",
        "layers.1.mlp.gate.weight",
        "layers.0.mlp.up_proj.weight",
        "norm.weight",
        "embed_tokens.weight",
    ):
        assert torch.equal(
            state[f"model.language_model.{name}"], tensors[f"language_model.model.{name}"].float()
        ), name
    assert torch.equal(state["lm_head.weight"], tensors["language_model.lm_head.weight"].float())


def test_logits_are_those_of_the_dense_twin(finished: SmallRun, loaded: PreTrainedModel) -> None:
    """The source run whole by transformers, the decoded experts put in by hand."""
    tensors = whole_model.read_all(finished.checkpoint)
    twin = whole_model.load(finished.source)
    with torch.no_grad():
        for layer in LAYERS:
            module = twin.model.layers[layer].mlp.experts
            for expert in range(EXPERTS):
                linear = f"language_model.model.layers.{layer}.mlp.experts.{expert}"
                gate, up, down = (
                    by_compressed_tensors(tensors, f"{linear}.{p}").float() for p in PROJECTIONS
                )
                module.gate_up_proj[expert].copy_(torch.cat([gate, up]))
                module.down_proj[expert].copy_(down)
        ids = torch.arange(5, 69)[None]
        expected, found = twin(ids).logits, loaded(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_stock_transformers_still_loses_the_global_scale(
    finished: SmallRun, stock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, the installed release is right by itself: `install` has retired, and the
    card may stop mentioning it."""
    assert integration.is_needed()
    monkeypatch.setattr(integration, "install", lambda: False)
    model = integration.load_model(str(finished.checkpoint), dtype=torch.float32)
    tensors = whole_model.read_all(finished.checkpoint)
    linear = "language_model.model.layers.1.mlp.experts.0.gate_proj"
    right, scale = (
        by_compressed_tensors(tensors, linear).float(),
        tensors[f"{linear}.weight_global_scale"],
    )
    torch.testing.assert_close(
        experts_of(model, 1)["gate_proj"][0].float(), right * scale, rtol=2**-6, atol=0
    )


def test_install_replaces_nothing_where_transformers_is_right(
    stock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = CompressedTensorsHfQuantizer.get_load_operations
    monkeypatch.setattr(integration, "is_needed", lambda: False)
    assert not integration.install()
    assert CompressedTensorsHfQuantizer.get_load_operations is before


def test_probe_tells_an_operation_that_heeds_the_scale_from_one_that_does_not() -> None:
    assert integration.heeds_global_scale(integration.DequantizeNvfp4Experts)
    assert not integration.heeds_global_scale(integration.CompressedTensorsDequantize)


@pytest.mark.parametrize(
    "operation", [integration.CompressedTensorsDequantize, integration.DequantizeNvfp4Experts]
)
def test_int4_experts_go_through_the_stock_operation(
    operation: type[integration.CompressedTensorsDequantize],
) -> None:
    """The source's own format: eight codes of 15, that is 7, under a scale of 0.5."""
    scheme = QuantizationScheme(
        targets=["re:.*experts.*"],
        weights=QuantizationArgs(num_bits=4, group_size=8, strategy="group"),
    )
    config = SimpleNamespace(config_groups={"group_0": scheme}, format="pack-quantized")
    tensors = {
        "experts.*.weight_packed": [torch.tensor([[-1]], dtype=torch.int32)],
        "experts.*.weight_scale": [torch.full((1, 1), 0.5, dtype=torch.bfloat16)],
        "experts.*.weight_shape": [torch.tensor([1, 8], dtype=torch.int32)],
    }
    loader = operation(SimpleNamespace(compressor=SimpleNamespace(quantization_config=config)))
    model = SimpleNamespace(get_parameter=lambda name: torch.zeros(1))
    decoded = loader.convert(tensors, [], [], full_layer_name="experts", model=model)[
        "experts.*.weight_packed"
    ]
    assert decoded.tolist() == [[[3.5] * 8]]
