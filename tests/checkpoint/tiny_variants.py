"""The sample checkpoint and its relatives: the same model under flat names, and with experts stored
as plain bf16.

The relatives are made with safetensors' own writer and a decoder written here, so that nothing
under test makes its own evidence.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TINY = Path(__file__).parents[2] / "examples" / "tiny-kimi-k2.5"


def decode_reference(packed: Tensor, scale: Tensor) -> Tensor:
    """(code - 8) * scale, rounded to the scale's dtype; low nibble first, one scale per 32
    inputs."""
    nibbles = (packed.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    values = (nibbles.flatten(1) - 8).to(torch.float64)
    return (values * scale.to(torch.float64).repeat_interleave(32, dim=1)).to(scale.dtype)


def load_tiny() -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(TINY.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], num_files: int = 2
) -> None:
    """A Hugging Face folder, tensors dealt to files in turn."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:06d}.safetensors"
        mine = {name: tensors[name] for name in names[number::num_files]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(config))


def flat_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text model alone, named as Kimi-K2 and DeepSeek-V3 are."""
    prefix = "language_model."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def plain_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Packed experts replaced by `.weight`."""
    plain = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(("_packed", "_scale", "_shape"))
    }
    for name, packed in tensors.items():
        if name.endswith(".weight_packed"):
            linear = name.removesuffix("_packed")
            plain[linear] = decode_reference(packed, tensors[f"{linear}_scale"])
    return plain
