"""The small model run whole by transformers, in float32, from files read with safetensors alone: what capture and evaluation are compared with."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

PREFIX = "language_model."


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
    return (codes.float().view(out, -1, 32) * scale.float().unsqueeze(-1)).to(scale.dtype).float().view(out, inputs)


def load(folder: Path) -> DeepseekV3ForCausalLM:
    """The text model of a Kimi-K2.5 folder."""
    tensors = read_all(folder)
    settings = json.loads((folder / "config.json").read_text())["text_config"]
    for name in ("quantization_config", "model_type", "architectures"):
        settings.pop(name)
    config = DeepseekV3Config.from_dict(settings)
    config._attn_implementation = "sdpa"
    config._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).float().eval()
    state = {}
    for name in model.state_dict():
        stem, _, leaf = f"{PREFIX}{name}".rpartition(".")
        experts = range(config.n_routed_experts)
        if leaf == "gate_up_proj":
            pairs = [[decode_int4(tensors, f"{stem}.{e}.{p}") for p in ("gate_proj", "up_proj")] for e in experts]
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif leaf == "down_proj":
            state[name] = torch.stack([decode_int4(tensors, f"{stem}.{e}.down_proj") for e in experts])
        else:
            state[name] = tensors[f"{PREFIX}{name}"].float()
    model.load_state_dict(state)
    return model.requires_grad_(False)


def run_and_record(model: DeepseekV3ForCausalLM, token_ids_BS: Tensor) -> tuple[Tensor, dict[int, Seen]]:
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
