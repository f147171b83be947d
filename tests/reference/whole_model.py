"""A small model run whole by transformers, from files read with safetensors alone: what capture,
gradients and evaluation are compared with."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.reference import fp8

CLASSES = {
    "kimi_k2": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
"""By the text model's type."""

PREFIX = "language_model."
"""Of the text model inside Kimi-K2.5."""


@dataclass
class Seen:
    """What the experts module of one layer was called with."""

    hidden_TH: Tensor
    expert_ids_TK: Tensor
    router_weights_TK: Tensor


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def decode_int4(tensors: dict[str, Tensor], stem: str) -> Tensor:
    """(code - 8) * scale, rounded to the scale's dtype, by plain arithmetic on the stored words."""
    words = tensors[f"{stem}.weight_packed"].to(torch.int64) & 0xFFFFFFFF
    out, inputs = tensors[f"{stem}.weight_shape"].tolist()
    codes = ((words.unsqueeze(-1) >> (torch.arange(8) * 4)) & 15).reshape(out, inputs) - 8
    scale = tensors[f"{stem}.weight_scale"]
    return (
        (codes.float().view(out, -1, 32) * scale.float().unsqueeze(-1))
        .to(scale.dtype)
        .float()
        .view(out, inputs)
    )


def plain_weight(tensors: dict[str, Tensor], stem: str) -> Tensor:
    """A linear's weight in float32, however it is stored."""
    if f"{stem}.weight_packed" in tensors:
        return decode_int4(tensors, stem)
    weight, scale_inv = tensors[f"{stem}.weight"], tensors.get(f"{stem}.weight_scale_inv")
    return (weight if scale_inv is None else fp8.decode(weight, scale_inv)).float()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The text model of a folder, in `dtype` but for what transformers keeps in float32."""
    tensors = read_all(folder)
    whole = json.loads((folder / "config.json").read_text())
    settings, prefix = (whole["text_config"], PREFIX) if "text_config" in whole else (whole, "")
    config_class, model_class = CLASSES[settings["model_type"]]
    for name in ("quantization_config", "model_type", "architectures", "auto_map", "torch_dtype"):
        settings.pop(name, None)
    config = config_class.from_dict(settings)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    model = model_class(config).float().eval()
    state = {}
    for name in model.state_dict():
        stem, _, leaf = f"{prefix}{name}".rpartition(".")
        experts = range(config.num_local_experts)
        if leaf == "gate_up_proj":
            pairs = [
                [plain_weight(tensors, f"{stem}.{e}.{p}") for p in ("gate_proj", "up_proj")]
                for e in experts
            ]
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif leaf == "down_proj":
            state[name] = torch.stack(
                [plain_weight(tensors, f"{stem}.{e}.down_proj") for e in experts]
            )
        else:
            state[name] = (
                plain_weight(tensors, stem)
                if leaf == "weight"
                else tensors[f"{prefix}{name}"].float()
            )
    model.load_state_dict(state)
    # not buffers: the router's bias and the rotary frequencies stay as they are
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)


def run_and_record(model: PreTrainedModel, token_ids_BS: Tensor) -> tuple[Tensor, dict[int, Seen]]:
    """Logits (B, S, V), and what every mixture's experts saw, by layer."""
    seen: dict[int, Seen] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):

            def record(_module: object, args: tuple[Tensor, ...], number: int = number) -> None:
                seen[number] = Seen(args[0].clone(), args[1].clone(), args[2].clone())

            hooks.append(layer.mlp.experts.register_forward_pre_hook(record))
    with torch.no_grad():
        logits = model(input_ids=token_ids_BS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, seen
