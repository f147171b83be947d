"""A narrow sample model: the sample's layers, experts and names, a quarter of its widths.

Tests of what the job does (resumption, deletion, runners, stores) run on it: as many units, tensors
and tasks as of the sample, at a fraction of the arithmetic. Tests of how good the result is run on
the sample itself. Rows and columns are the sample's first ones.
"""

import json
import shutil
from pathlib import Path

from torch import Tensor

from tests.checkpoint.tiny_variants import TINY, load_tiny, plain_experts, write_folder
from tests.reference.tiny_families import SIDECARS, as_int4

HIDDEN, INTERMEDIATE = 64, 32
"""Of 256 and 128."""
HEADS_AXIS = {"q_b_proj": 0, "kv_b_proj": 0, "o_proj": 1}
"""What belongs to the heads, of which there are as many, and as wide, as in the sample."""


def narrowed(name: str, tensor: Tensor, wide: dict[str, int]) -> Tensor:
    """The first rows and columns. wide: the model's hidden size and its experts' inner size."""
    sizes = {wide["hidden_size"]: HIDDEN}
    if ".experts." in name or ".shared_experts." in name:
        sizes[wide["moe_intermediate_size"]] = INTERMEDIATE
    for axis, size in enumerate(tensor.shape):
        if axis != HEADS_AXIS.get(name.split(".")[-2]):
            tensor = tensor.narrow(axis, 0, sizes.get(size, size))
    return tensor.contiguous()


def write_narrow(folder: Path) -> Path:
    """The checkpoint and the sample's texts. Returns its folder."""
    config = json.loads((TINY / "config.json").read_text())
    text = config["text_config"]
    wide = {key: text[key] for key in ("hidden_size", "moe_intermediate_size")}
    tensors: dict[str, Tensor] = {}
    for name, tensor in plain_experts(load_tiny()).items():
        if name.startswith("language_model."):
            tensor = narrowed(name, tensor, wide)
        if ".mlp.experts." in name:
            as_int4(tensors, name.removesuffix(".weight"), tensor.float())
        else:
            tensors[name] = tensor
    text |= {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE}
    write_folder(folder, config, tensors, num_files=3)
    for file in (*SIDECARS, "calibration.jsonl", "heldout.jsonl"):
        shutil.copy(TINY / file, folder / file)
    return folder
