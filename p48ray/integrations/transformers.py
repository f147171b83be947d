"""Loads NVFP4 mixtures of experts in transformers with their global scales.

    from p48ray.integrations.transformers import load_model
    model = load_model("path/to/checkpoint")

transformers (5.23 and 5.24) hands compressed-tensors' decoder the codes and the local scales of
per-expert NVFP4 weights, and drops `weight_global_scale`: every expert weight is then wrong by that
factor, and nothing says so. Here the loading operation is replaced by one that hands over all
three.
`is_needed` asks the installed transformers itself, with one small expert, so that this retires on
its own once a release decodes correctly.

Sources: compressed-tensors' NVFP4PackedCompressor; transformers' CompressedTensorsDequantize, whose
operation this extends.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.compressed_tensors import (
    CompressedTensorsDequantize,
    get_experts_scheme,
)
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from p48ray.errors import SourceError

STORED_FORMAT = "nvfp4-pack-quantized"
STORED_METHOD = "compressed-tensors"
SPARSE_KEY = "paired48_sparse"
HUB_OPTIONS = ("revision", "token", "trust_remote_code")
SAME_ARCHITECTURE = {"kimi_k2": DeepseekV3Config}
"""Model types that transformers knows under another name only; their releases bring code for old
releases of transformers."""
PROBE_SCALE = 4.0  # of the expert that is decoded to see whether the stock operation heeds it


class DequantizeNvfp4Experts(CompressedTensorsDequantize):
    """The stock operation, but for NVFP4 experts, which are decoded one by one with their global
    scales."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Serialized tensors of all experts by pattern -> their stacked weights by the pattern of
        `weight_packed`."""
        config = self.hf_quantizer.compressor.quantization_config
        packed = [key for key in input_dict if key.endswith("weight_packed")]
        scheme = self.scheme or get_experts_scheme(config)
        if (
            not packed
            or "weight" in input_dict
            or (scheme.format or config.format) != STORED_FORMAT
        ):
            converted: dict[str, Any] = super().convert(input_dict, *args, **kwargs)
            return converted
        decoder = BaseCompressor.get_value_from_registry(STORED_FORMAT)
        dtype = kwargs["model"].get_parameter(kwargs["full_layer_name"]).dtype
        return {
            key: decode_experts(
                decoder, scheme, input_dict, key.removesuffix("weight_packed"), dtype
            )
            for key in packed
        }


def decode_experts(
    decoder: Any, scheme: Any, tensors: dict[str, Any], stem: str, dtype: torch.dtype
) -> Tensor:
    """(experts, out, in) of one projection in the model's dtype; the buffer is allocated once,
    because a list and its stack would take twice the memory.

    Args:
        decoder: compressed-tensors' compressor for the format.
        scheme: how the experts are quantized.
        tensors: pattern of names -> a tensor per expert.
        stem: of these patterns, up to "weight_packed" and the like.
        dtype: of the result.
    """
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    stacked: Tensor | None = None
    for i, one in enumerate(zip(*(tensors[stem + name] for name in names), strict=True)):
        weight = decoder.decompress(dict(zip(names, one, strict=True)), scheme)["weight"]
        if stacked is None:
            stacked = torch.empty(
                len(tensors[f"{stem}weight_packed"]),
                *weight.shape,
                dtype=dtype,
                device=weight.device,
            )
        stacked[i].copy_(weight)
    assert stacked is not None
    return stacked


@cache
def is_needed() -> bool:
    """Whether the installed transformers, as it came, loses the global scale of an NVFP4 expert."""
    return not heeds_global_scale(CompressedTensorsDequantize)


def heeds_global_scale(operation: type[CompressedTensorsDequantize]) -> bool:
    """Decode one expert of ones under a global scale through a loading operation."""
    scheme = preset_name_to_scheme("NVFP4", ["re:.*experts.*"])
    config = SimpleNamespace(config_groups={"group_0": scheme}, format=STORED_FORMAT)
    tensors = {
        # two codes of 1.0 a byte
        "experts.*.weight_packed": [torch.full((1, 8), 0x22, dtype=torch.uint8)],
        "experts.*.weight_scale": [torch.ones(1, 1, dtype=torch.float8_e4m3fn)],
        "experts.*.weight_global_scale": [torch.tensor([PROBE_SCALE])],
    }
    model = SimpleNamespace(get_parameter=lambda name: torch.zeros(1))
    loader = operation(SimpleNamespace(compressor=SimpleNamespace(quantization_config=config)))
    decoded = loader.convert(tensors, [], [], full_layer_name="experts", model=model)[
        "experts.*.weight_packed"
    ]
    return bool((torch.as_tensor(decoded[0]).float() == 1 / PROBE_SCALE).all())


def install() -> bool:
    """Make transformers load such checkpoints correctly, where it does not by itself. Returns
    whether anything had to be replaced."""
    if not is_needed():
        return False
    CompressedTensorsHfQuantizer.get_load_operations = lambda self: {
        "dequantize": DequantizeNvfp4Experts
    }
    return True


def read_config(checkpoint: str, **options: Any) -> PreTrainedConfig:
    """The checkpoint's configuration, of the class whose model transformers has."""
    values, _ = PreTrainedConfig.get_config_dict(
        checkpoint, **{k: v for k, v in options.items() if k != "trust_remote_code"}
    )
    known = SAME_ARCHITECTURE.get(values.get("model_type"))
    if known is None:
        return AutoConfig.from_pretrained(checkpoint, **options)
    return known.from_dict({k: v for k, v in values.items() if k not in ("model_type", "auto_map")})


def load_model(checkpoint: str, **options: Any) -> PreTrainedModel:
    """A checkpoint of this project as a transformers model, decoded to dense weights.

    Args:
        checkpoint: folder or Hub id.
        options: for `from_pretrained`.
    Returns: the model in evaluation mode.
    Raises: SourceError for a checkpoint in sparse storage or in ModelOpt's layout, neither of which
        transformers decodes.
    """
    install()
    config = read_config(checkpoint, **{k: v for k, v in options.items() if k in HUB_OPTIONS})
    if SPARSE_KEY in config.quantization_config:
        raise SourceError(
            f"{checkpoint}/config.json: quantization_config.{SPARSE_KEY}: expected dense storage,"
            " found sparse; `p48ray convert CHECKPOINT OUT --storage dense` makes the one of the"
            " other"
        )
    if (method := config.quantization_config.get("quant_method")) != STORED_METHOD:
        raise SourceError(
            f"{checkpoint}/config.json: quantization_config.quant_method: expected"
            f" {STORED_METHOD!r}, found {method!r}; `p48ray convert CHECKPOINT OUT --format"
            f" {STORED_METHOD}` makes the one of ModelOpt's layout"
        )
    config.quantization_config = {**config.quantization_config, "dequantize": True}
    loader = (
        AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    )
    model: PreTrainedModel = loader.from_pretrained(checkpoint, config=config, **options)
    return model.eval()
