"""nvidia-modelopt's own code reads what `p48ray convert --format modelopt` writes: its decoder
finds the weights, and its export would have written the same configuration."""

import json
from pathlib import Path

import numpy as np
import torch

from tests.reference import modelopt


def test_its_decoder_finds_the_weights(modelopt_checkpoint: Path) -> None:
    """In float32, against the independent reader's float64."""
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
    from safetensors.torch import load_file

    files = sorted(modelopt_checkpoint.glob("*.safetensors"))
    raw = modelopt.read_all({file.name: file.read_bytes() for file in files})
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    linears = [name.removesuffix(".weight_scale_2") for name in raw if name.endswith("_scale_2")]
    assert len(linears) == 192
    for linear in linears:
        packed = tensors[f"{linear}.weight"]
        shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
        found = NVFP4QTensor(shape, torch.float32, packed).dequantize(
            scale=tensors[f"{linear}.weight_scale"],
            double_scale=tensors[f"{linear}.weight_scale_2"],
            block_sizes={-1: 16},
        )
        expected = modelopt.weight(raw, linear)
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=2**-22, atol=0)


def test_its_export_would_write_the_same_configuration(modelopt_checkpoint: Path) -> None:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    older = json.loads((modelopt_checkpoint / "hf_quant_config.json").read_text())
    config = json.loads((modelopt_checkpoint / "config.json").read_text())
    expected = convert_hf_quant_config_format(older)
    assert config["quantization_config"] == expected
    assert list(config["quantization_config"]) == list(expected)
