"""A checkpoint in the release's layout with random weights, as many experts and layers of it as a
benchmark needs, and texts.

    python bench/wide_checkpoint.py FOLDER --experts 48 --mixture-layers 2
        Kimi-K2.5's own width: 4.0 GB
    python bench/wide_checkpoint.py FOLDER --width small --experts 8 --mixture-layers 2
        for a CPU: 5 MB

Layer 0 is dense, mixtures follow, each layer a file; embedding, last norm and head are one more. A
file's tensors lie in safetensors' own order. The embedding has outlier channels, as trained models
have: without them eight bits and NVFP4 would have an easy time. Tokenizer and texts are the small
trained model's; the texts go round again with sentences and lines shuffled.
"""

import argparse
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p48ray.checkpoint import skeleton
from p48ray.checkpoint.header import encode_header
from p48ray.checkpoint.index import CONFIG_FILE, INDEX_FILE
from p48ray.checkpoint.skeleton import Spec
from p48ray.checkpoint.tensors import tensor_bytes

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny-kimi-k2.5"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
VOCAB = 2048  # of that tokenizer
CHARACTERS_PER_TOKEN = 8  # of it, at most: so texts never run short
SENTENCES = re.compile(r"(?<=\. )|(?<=\n)")
OUTLIER_EVERY, OUTLIER_FACTOR = 128, 20

DTYPE_ORDER: Mapping[str, int] = MappingProxyType({"F32": 0, "I32": 1, "BF16": 2})
"""Of the types here, as safetensors' own writer sorts them; within one it sorts by name."""

WIDTHS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "kimi": {},
        "small": {
            "HIDDEN": 256, "MOE_INTERMEDIATE": 128, "DENSE_INTERMEDIATE": 512, "HEADS": 4,
            "Q_LORA": 96, "KV_LORA": 64,
            "NOPE": 32, "ROPE": 32, "V_HEAD": 32,
        },
    }
)  # fmt: skip
"""Name -> what it replaces of the skeleton's sizes."""


@contextmanager
def skeleton_sizes(**sizes: Any) -> Iterator[None]:
    """Within it skeleton.layer_specs() and kimi_k25_config() speak of a model of other sizes (names
    of its constants, integers)."""
    with mock.patch.multiple(skeleton, **sizes):
        yield


def in_stored_order(specs: Iterable[Spec]) -> list[Spec]:
    """As safetensors.torch.save_file would lay them out. Raises: KeyError for a dtype that no
    checkpoint of this module holds."""
    return sorted(specs, key=lambda spec: (DTYPE_ORDER[spec[1]], spec[0]))


def write_shard(path: Path, specs: Iterable[Spec], make: Callable[[Spec], bytes]) -> int:
    """One file, its tensors in safetensors' order. make: the bytes of one. Returns: bytes of
    data."""
    ordered, num_bytes = in_stored_order(specs), 0
    with path.open("wb") as file:
        file.write(encode_header(ordered))
        for spec in ordered:
            num_bytes += file.write(make(spec))
    return num_bytes


def random_tensor(spec: Spec, generator: torch.Generator) -> Tensor:
    """A tensor's values by its name, made on the generator's device and left on the CPU."""
    name, dtype, shape = spec
    if name.endswith("weight_shape"):
        out = (skeleton.HIDDEN, skeleton.MOE_INTERMEDIATE)
        return torch.tensor(out if ".down_proj." in name else out[::-1], dtype=torch.int32)
    if dtype == "I32":
        words = torch.randint(-(2**31), 2**31, shape, generator=generator, device=generator.device)
        return words.to(torch.int32).cpu()
    if dtype == "F32":
        return torch.zeros(shape)
    values = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("_scale"):
        values = 0.004 * (0.6 * values).exp()
    elif "norm" in name:
        values = 1 + 0.05 * values
    elif "embed_tokens" in name:
        values[:, ::OUTLIER_EVERY] *= OUTLIER_FACTOR
    else:
        values *= 0.02
    return values.to(torch.bfloat16).cpu()


def write_checkpoint(
    folder: Path, width: str, experts: int, mixture_layers: int, device: str
) -> int:
    """Config, index, weights and tokenizer, into a folder that is created; the index comes last.

    Args:
        width: of WIDTHS.
        device: where random numbers are drawn; another one draws others.
    Returns: bytes of tensors.
    Raises: OSError.
    """
    layers = 1 + mixture_layers
    sizes = dict(WIDTHS[width]) | {"NUM_EXPERTS": experts, "NUM_LAYERS": layers, "VOCAB": VOCAB}
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device=device).manual_seed(0)
    with skeleton_sizes(**sizes):
        config = skeleton.kimi_k25_config()
        shards = [list(skeleton.layer_specs(layer)) for layer in range(layers)]
        prefix, hidden = "language_model.", skeleton.HIDDEN
        ends = {
            "model.embed_tokens": (VOCAB, hidden),
            "model.norm": (hidden,),
            "lm_head": (VOCAB, hidden),
        }
        shards.append([(f"{prefix}{name}.weight", "BF16", shape) for name, shape in ends.items()])
        weight_map, num_bytes = {}, 0
        for number, specs in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
            num_bytes += write_shard(
                folder / file, specs, lambda spec: tensor_bytes(random_tensor(spec, generator))
            )
            weight_map.update({name: file for name, _, _ in specs})
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config |= ids | {"media_placeholder_token_id": 3}
    config["text_config"] |= ids
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1))
    for name in TOKENIZER:
        shutil.copy(TINY / name, folder / name)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return num_bytes


def write_texts(path: Path, num_tokens: int) -> None:
    """The small model's calibration texts, and again with their sentences and lines in other
    orders, until there are that many tokens."""
    rng = random.Random(0)
    texts = [
        json.loads(line)["text"] for line in (TINY / "calibration.jsonl").read_text().splitlines()
    ]
    wanted, is_first = CHARACTERS_PER_TOKEN * num_tokens, True
    with path.open("w") as file:
        while wanted > 0 or is_first:
            for text in texts:
                pieces = SENTENCES.split(text)
                if not is_first:
                    rng.shuffle(pieces)
                file.write(json.dumps({"text": "".join(pieces)}) + "\n")
                wanted -= len(text)
            is_first = False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", choices=WIDTHS, default="kimi")
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--mixture-layers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    num_bytes = write_checkpoint(
        args.folder, args.width, args.experts, args.mixture_layers, args.device
    )
    print(f"{args.folder}: {num_bytes / 1e9:.2f} GB of tensors")


if __name__ == "__main__":
    main()
