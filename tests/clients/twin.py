"""Makes what the clients' tests look at, with the main environment: `python -m tests.clients.twin
FOLDER [FAMILY]`.

FOLDER/run/checkpoint is a checkpoint of the small model. Three models run by transformers in
float32 are asked about it: `source`; `original`, the dense twin, which has the checkpoint's experts
decoded to float32 in place of the source's; and `w4a4`, the twin whose experts' inputs are
quantized as p48ray's evaluation does it. FOLDER/twin.safetensors holds `tokens` (B, S), held-out
prompts and what the twin greedily adds to them, and for each model `logprobs.NAME` (B, S, V), what
it says at every position. With the name of a family, the same of its small random checkpoint.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from p48ray.model.experts import ActivationScales, ExpertWeights, RoutedExperts
from p48ray.numerics import e2m1, nvfp4
from tests.conftest import TINY
from tests.reference import whole_model
from tests.stages.family_runs import finished_family
from tests.stages.small_run import finished_run

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 96, 8
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def decode(tensors: dict[str, Tensor], linear: str) -> Tensor:
    """(out, in) float32, what the solver meant."""
    packed, scale, divisor = (
        tensors[f"{linear}.{name}"]
        for name in ("weight_packed", "weight_scale", "weight_global_scale")
    )
    return nvfp4.dequantize(e2m1.unpack(packed)[None], scale[None], divisor)[0]


def put_experts(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """The checkpoint's experts in transformers' own module."""
    for stem, module in mixtures(model, tensors):
        for expert in range(model.config.num_local_experts):
            gate, up, down = (decode(tensors, f"{stem}.{expert}.{p}") for p in PROJECTIONS)
            module.experts.gate_up_proj[expert].copy_(torch.cat([gate, up]))
            module.experts.down_proj[expert].copy_(down)


def put_quantizing_experts(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """The checkpoint's experts in p48ray's module, which quantizes their inputs under the layer's
    scales."""
    for stem, module in mixtures(model, tensors):
        experts = [
            ExpertWeights(*(decode(tensors, f"{stem}.{e}.{p}") for p in PROJECTIONS))
            for e in range(model.config.num_local_experts)
        ]
        gate_up, down = (
            float(tensors[f"{stem}.0.{p}.input_global_scale"]) for p in ("gate_proj", "down_proj")
        )
        module.experts = RoutedExperts(
            len(experts), experts.__getitem__, ActivationScales(gate_up, down, group=16)
        )


def mixtures(model: PreTrainedModel, tensors: dict[str, Tensor]) -> list[tuple[str, nn.Module]]:
    """(the checkpoint's name of a layer's experts, the module that holds them)."""
    prefix = whole_model.PREFIX if f"{whole_model.PREFIX}lm_head.weight" in tensors else ""
    found = [
        (f"{prefix}model.layers.{number}.mlp.experts", layer.mlp)
        for number, layer in enumerate(model.model.layers)
    ]
    return [(name, module) for name, module in found if hasattr(module, "experts")]


def read_prompts(source: Path) -> Tensor:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    lines = (TINY / "heldout.jsonl").read_text().splitlines()
    ids = [tokenizer.encode(json.loads(line)["text"]).ids for line in lines]
    return torch.tensor([i[:PROMPT_TOKENS] for i in ids if len(i) >= PROMPT_TOKENS][:NUM_PROMPTS])


def continue_greedily(model: PreTrainedModel, tokens_BS: Tensor) -> Tensor:
    """Tokens with NEW_TOKENS more; no cache."""
    for _ in range(NEW_TOKENS):
        chosen_B = model(input_ids=tokens_BS, use_cache=False).logits[:, -1].argmax(-1)
        tokens_BS = torch.cat([tokens_BS, chosen_B[:, None]], 1)
    return tokens_BS


@torch.no_grad()
def main(folder: Path, family: str | None = None) -> None:
    run = finished_family(family, folder) if family else finished_run(folder)
    tensors, prompts_BS, facts = whole_model.read_all(run.checkpoint), read_prompts(run.source), {}
    models = {name: whole_model.load(run.source) for name in ("source", "original", "w4a4")}
    put_experts(models["original"], tensors)
    put_quantizing_experts(models["w4a4"], tensors)
    tokens_BS = facts["tokens"] = continue_greedily(models["original"], prompts_BS)
    for name, model in models.items():
        facts[f"logprobs.{name}"] = (
            model(input_ids=tokens_BS, use_cache=False).logits.double().log_softmax(-1)
        )
    save_file(facts, folder / "twin.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
