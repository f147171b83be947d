"""A checkpoint as others write it, and what the model is with its weights, made with the main
environment: `python -m tests.clients.foreign FOLDER`, where twin has made FOLDER.

FOLDER/foreign is the checkpoint (tests.reference.foreign), FOLDER/foreign-dense what `p48ray
convert` makes of it. FOLDER/foreign.safetensors holds `tokens` (B, S), held-out prompts and what
the second model greedily adds to them, and `logprobs.NAME` (B, S, V) of three models, decoded by
the independent reader: `theirs`, with the checkpoint's weights; `converted`, with the conversion's;
and `misread`, with up's codes under gate's global scale, as
servers have it that take one for both.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.clients.twin import PROJECTIONS, continue_greedily, mixtures, read_prompts
from tests.conftest import REPO
from tests.reference import whole_model
from tests.reference.foreign import dense_weight, foreign_checkpoint, sparse_weight
from tests.reference.modelopt import Tensors, read_all
from tests.stages.small_run import finished_run


def put_experts(
    model: PreTrainedModel, tensors: Tensors, weight: Callable[[Tensors, str], np.ndarray]
) -> None:
    for stem, module in mixtures(model, dict.fromkeys(tensors)):  # type: ignore[arg-type]
        for expert in range(model.config.num_local_experts):
            gate, up, down = (
                torch.from_numpy(weight(tensors, f"{stem}.{expert}.{p}")).float()
                for p in PROJECTIONS
            )
            module.experts.gate_up_proj[expert].copy_(torch.cat([gate, up]))
            module.experts.down_proj[expert].copy_(down)


def misread(tensors: Tensors, linear: str) -> np.ndarray:
    """What a server takes up's weights for that goes by gate's global scale."""
    gate = f"{linear.removesuffix('up_proj')}gate_proj" if linear.endswith("up_proj") else linear
    name = "weight_global_scale"
    return sparse_weight(tensors | {f"{linear}.{name}": tensors[f"{gate}.{name}"]}, linear)


@torch.no_grad()
def main(folder: Path) -> None:
    run = finished_run(folder)
    files = {file.name: file.read_bytes() for file in sorted(run.checkpoint.iterdir())}
    theirs, ours = folder / "foreign", folder / "foreign-dense"
    theirs.mkdir()
    for name, data in foreign_checkpoint(files).items():
        (theirs / name).write_bytes(data)
    command = [sys.executable, "-m", "p48ray.cli", "convert", str(theirs), str(ours)]
    subprocess.run([*command, "--storage", "dense"], cwd=REPO, check=True)
    tokens_BS, facts = read_prompts(run.source), dict[str, Tensor]()
    for name, place, weight in (
        ("converted", ours, dense_weight),
        ("theirs", theirs, sparse_weight),
        ("misread", theirs, misread),
    ):
        model = whole_model.load(run.source)
        put_experts(model, read_all({f.name: f.read_bytes() for f in place.iterdir()}), weight)
        if name == "converted":
            tokens_BS = facts["tokens"] = continue_greedily(model, tokens_BS)
        logits = model(input_ids=tokens_BS, use_cache=False).logits
        facts[f"logprobs.{name}"] = logits.double().log_softmax(-1)
    assert json.loads((ours / "p48ray.json").read_text())["foreign"]["foldings"]
    save_file(facts, folder / "foreign.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
