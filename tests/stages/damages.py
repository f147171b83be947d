"""Every way in which the tests damage a finished checkpoint, and the names that have to come up."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.conftest import TINY
from tests.stages.damage import INDEX, Folder, raw

EXPERT = re.compile(r".*layers\.\d+\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.\w+")
LAYER_1 = "language_model.model.layers.1.mlp.experts"
GATE, UP, DOWN = (f"{LAYER_1}.3.{p}" for p in ("gate_proj", "up_proj", "down_proj"))
UNTOUCHED = "language_model.model.layers.2.self_attn.o_proj.weight"
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


def first(condition: Tensor) -> tuple[int, ...]:
    """Index of the first True, by rows."""
    return tuple(torch.nonzero(condition)[0].tolist())


def packed(folder: Folder, linear: str) -> Tensor:
    return folder.tensors(folder.file_of(f"{linear}.weight_packed"))[f"{linear}.weight_packed"]


def with_illegal_pattern(folder: Folder) -> Folder:
    """A third byte in a group of four that has two."""
    bytes_OB = packed(folder, DOWN)
    is_full = ((bytes_OB.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).repeat_interleave(4, 1)
    row, column = first(is_full & (bytes_OB == 0))
    return folder.with_bytes(f"{DOWN}.weight_packed", row * bytes_OB.shape[1] + column, b"\x10")


def with_minus_zero(folder: Folder) -> Folder:
    """A kept weight that is zero becomes minus zero: the value stays, the byte tells a sparse
    converter something else."""
    bytes_OB = packed(folder, GATE)
    row, column = first(((bytes_OB & 0x0F) == 0) & (bytes_OB >= 0x10))
    return folder.flipped(f"{GATE}.weight_packed", row * bytes_OB.shape[1] + column, 0x08)


def with_scale(low: int, high: int) -> Callable[[Folder], Folder]:
    """The two scale bytes of one span of 32 inputs."""
    return lambda folder: folder.with_bytes(f"{UP}.weight_scale", 6, bytes([low, high]))


def with_global(linears: tuple[str, ...], suffix: str, value: float) -> Callable[[Folder], Folder]:
    def damage(folder: Folder) -> Folder:
        for linear in linears:
            folder = folder.with_bytes(f"{linear}.{suffix}", 0, raw(torch.tensor([value])))
        return folder

    return damage


def reshaped(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Folder], Folder]:
    def damage(folder: Folder) -> Folder:
        file = folder.file_of(name)
        tensors = folder.tensors(file)
        return folder.with_tensors(file, tensors | {name: change(tensors[name])})

    return damage


def without_tensor(name: str, is_unlisted: bool) -> Callable[[Folder], Folder]:
    """`is_unlisted`: the index does not name it either, and its total is right for what is
    there."""

    def damage(folder: Folder) -> Folder:
        file = folder.file_of(name)
        tensors = folder.tensors(file)
        size = len(raw(tensors.pop(name)))

        def unlist(index: dict) -> None:
            del index["weight_map"][name]
            index["metadata"]["total_size"] -= size

        result = folder.with_tensors(file, tensors)
        return result.with_json(INDEX, unlist) if is_unlisted else result

    return damage


def with_extra_tensor(name: str, is_listed: bool) -> Callable[[Folder], Folder]:
    def damage(folder: Folder) -> Folder:
        file = folder.shards[0]

        def enlist(index: dict) -> None:
            index["weight_map"][name] = file
            index["metadata"]["total_size"] += 8

        result = folder.with_tensors(
            file, folder.tensors(file) | {name: torch.tensor([128, 256], dtype=torch.int32)}
        )
        return result.with_json(INDEX, enlist) if is_listed else result

    return damage


def with_index(change: Callable[[dict], object]) -> Callable[[Folder], Folder]:
    return lambda folder: folder.with_json(INDEX, change)


def with_config(change: Callable[[dict], object]) -> Callable[[Folder], Folder]:
    return lambda folder: folder.with_json("config.json", change)


def with_shard(change: Callable[[bytes], bytes]) -> Callable[[Folder], Folder]:
    return lambda folder: folder.with_file(SHARD_2, change(folder.files[SHARD_2]))


def swapped_experts(folder: Folder) -> Folder:
    """Two experts' gates trade all four tensors: each is sound in itself."""
    result = folder
    for suffix in SUFFIXES:
        for mine, theirs in ((GATE, f"{LAYER_1}.4.gate_proj"), (f"{LAYER_1}.4.gate_proj", GATE)):
            file, start, size = folder.place(f"{theirs}.{suffix}")
            result = result.with_bytes(
                f"{mine}.{suffix}", 0, folder.files[file][start : start + size]
            )
    return result


def int4_config() -> dict:
    config: dict = json.loads((TINY / "config.json").read_text())["text_config"][
        "quantization_config"
    ]
    return config


SHARD_2 = "model-00002-of-00006.safetensors"
# either names the place: bytes are vouched for unit by unit
UNIT = (LAYER_1, "model-00001-of-00006.safetensors")
EXTRA_FILE = "model-00007-of-00006.safetensors"


@dataclass(frozen=True)
class Damage:
    """`names`: what the report must say, all in one problem, of a tuple any."""

    make: Callable[[Folder], Folder]
    names: tuple[str | tuple[str, ...], ...]


DAMAGES: dict[str, Damage] = {
    "byte of an untouched tensor": Damage(
        lambda f: f.flipped(UNTOUCHED, 1000, 0x01), (UNTOUCHED, "bytes differ")
    ),
    "last byte of the embedding": Damage(
        lambda f: f.flipped("language_model.model.embed_tokens.weight", 2048 * 256 * 2 - 1, 0x80),
        ("embed_tokens.weight",),
    ),
    "illegal pattern": Damage(
        with_illegal_pattern,
        (f"{DOWN}.weight_packed", "1 groups of 8 inputs keep more than 2 of 4 pairs"),
    ),
    "minus zero": Damage(with_minus_zero, (f"{GATE}.weight_packed", "code 8")),
    "scale 0": Damage(with_scale(0, 0), (f"{UP}.weight_scale", "finite and above 0")),
    "scale NaN": Damage(with_scale(0x7F, 0x7F), (f"{UP}.weight_scale", "finite and above 0")),
    "scale below 0": Damage(with_scale(0xB8, 0xB8), (f"{UP}.weight_scale", "finite and above 0")),
    "unequal scales in a span": Damage(
        with_scale(0x38, 0x39), (f"{UP}.weight_scale", "scale_span 32")
    ),
    "gate and up with other weight globals": Damage(
        with_global((UP,), "weight_global_scale", 777.0), (f"{UP}.weight_global_scale", "found 777")
    ),
    "gate and up with other input globals": Damage(
        with_global((UP,), "input_global_scale", 777.0), (f"{UP}.input_global_scale", "found 777")
    ),
    "global 0": Damage(
        with_global((GATE, UP), "weight_global_scale", 0.0),
        (f"{GATE}.weight_global_scale", "above 0", "found 0"),
    ),
    "global infinite": Damage(
        with_global((DOWN,), "weight_global_scale", math.inf),
        (f"{DOWN}.weight_global_scale", "found inf"),
    ),
    "input global NaN": Damage(
        with_global((DOWN,), "input_global_scale", math.nan),
        (f"{DOWN}.input_global_scale", "found nan"),
    ),
    "input global below 0": Damage(
        with_global((DOWN,), "input_global_scale", -5.0), (f"{DOWN}.input_global_scale", "found -5")
    ),
    "one expert's input global is not its layer's": Damage(
        with_global((GATE, UP), "input_global_scale", 300.0), (UNIT,)
    ),
    "weights under a global of twice the size": Damage(
        with_global((GATE, UP), "weight_global_scale", 9000.0), (UNIT,)
    ),
    "global without a dimension": Damage(
        reshaped(f"{DOWN}.weight_global_scale", lambda t: t[0].clone()),
        (f"{DOWN}.weight_global_scale",),
    ),
    "global of two values": Damage(
        reshaped(f"{DOWN}.weight_global_scale", lambda t: t.repeat(2)),
        (f"{DOWN}.weight_global_scale",),
    ),
    "scales as plain bytes": Damage(
        reshaped(f"{DOWN}.weight_scale", lambda t: t.view(torch.uint8)), (f"{DOWN}.weight_scale",)
    ),
    "experts swapped": Damage(swapped_experts, (UNIT,)),
    "expert tensor gone": Damage(
        without_tensor(f"{UP}.weight_scale", is_unlisted=False), (f"{UP}.weight_scale", "missing")
    ),
    "expert tensor gone, index too": Damage(
        without_tensor(f"{UP}.weight_scale", is_unlisted=True), (f"{UP}.weight_scale", "missing")
    ),
    "untouched tensor gone": Damage(without_tensor(UNTOUCHED, is_unlisted=False), (UNTOUCHED,)),
    "untouched tensor gone, index too": Damage(
        without_tensor(UNTOUCHED, is_unlisted=True), (UNTOUCHED, "missing")
    ),
    "stray expert tensor": Damage(
        with_extra_tensor(f"{GATE}.weight_shape", is_listed=True), (f"{GATE}.weight_shape",)
    ),
    "stray expert tensor, not in the index": Damage(
        with_extra_tensor(f"{GATE}.weight_shape", is_listed=False), (f"{GATE}.weight_shape",)
    ),
    "stray tensor elsewhere": Damage(
        with_extra_tensor("language_model.stray.weight", is_listed=True),
        ("language_model.stray.weight",),
    ),
    "stray tensor elsewhere, not in the index": Damage(
        with_extra_tensor("language_model.stray.weight", is_listed=False),
        ("language_model.stray.weight",),
    ),
    "extra shard": Damage(
        lambda f: f.with_tensors(EXTRA_FILE, {"more.weight": torch.zeros(4)}), (EXTRA_FILE,)
    ),
    "extra shard that is no safetensors file": Damage(
        lambda f: f.with_file(EXTRA_FILE, b"abc"), (EXTRA_FILE,)
    ),
    "code that nobody made": Damage(
        lambda f: f.with_file("modeling_more.py", b"import os"), ("modeling_more.py", "nobody made")
    ),
    "a pickle": Damage(lambda f: f.with_file("extra.bin", b"abc"), ("extra.bin", "nobody made")),
    "a dot file": Damage(lambda f: f.with_file(".env", b"A=b"), (".env", "nobody made")),
    "a folder": Damage(lambda f: f.with_file("more/a.json", b"{}"), ("more/a.json", "nobody made")),
    "shard gone": Damage(lambda f: f.without_file(SHARD_2), (SHARD_2,)),
    "shard truncated": Damage(with_shard(lambda data: data[:-10]), (SHARD_2, "truncated")),
    "shard truncated in its header": Damage(
        with_shard(lambda data: data[:100]), (SHARD_2, "truncated")
    ),
    "shard empty": Damage(with_shard(lambda data: b""), (SHARD_2, "truncated")),
    "shard with bytes behind the end": Damage(
        with_shard(lambda data: data + b"\0" * 8), (SHARD_2, "bytes that belong to no tensor")
    ),
    "header is not JSON": Damage(
        with_shard(lambda data: data[:8] + b"[" + data[9:]), (SHARD_2, "JSON")
    ),
    "header of an absurd length": Damage(
        with_shard(lambda data: data[:7] + b"\x7f" + data[8:]), (SHARD_2, "header")
    ),
    "header with another offset": Damage(
        with_shard(lambda data: data.replace(b'"data_offsets":[4,8]', b'"data_offsets":[0,4]', 1)),
        (SHARD_2, "overlap"),
    ),
    "header with another dtype": Damage(
        with_shard(lambda data: data.replace(b'"dtype":"BF16"', b'"dtype":"FP16"', 1)),
        (SHARD_2, "FP16"),
    ),
    "index places a tensor in another shard": Damage(
        with_index(
            lambda i: i["weight_map"].update({UNTOUCHED: "model-00001-of-00006.safetensors"})
        ),
        (INDEX, UNTOUCHED),
    ),
    "index lacks a tensor": Damage(
        with_index(lambda i: i["weight_map"].pop(f"{UP}.weight_packed")),
        (INDEX, f"{UP}.weight_packed"),
    ),
    "index names a tensor that is nowhere": Damage(
        with_index(lambda i: i["weight_map"].update({"no.such": SHARD_2})), (INDEX, "no.such")
    ),
    "index names a file that is not there": Damage(
        with_index(
            lambda i: i["weight_map"].update({UNTOUCHED: "model-00009-of-00006.safetensors"})
        ),
        (INDEX, "model-00009-of-00006"),
    ),
    "index leads outside": Damage(
        with_index(lambda i: i["weight_map"].update({UNTOUCHED: "../model.safetensors"})),
        (INDEX, "../model.safetensors"),
    ),
    "index leads up": Damage(
        with_index(lambda i: i["weight_map"].update({UNTOUCHED: ".."})), (INDEX, "'..'")
    ),
    "index has a number for a file": Damage(
        with_index(lambda i: i["weight_map"].update({UNTOUCHED: 5})), (INDEX, "5")
    ),
    "total_size wrong": Damage(
        with_index(lambda i: i["metadata"].update(total_size=1)), (INDEX, "total_size", "found 1")
    ),
    "total_size gone": Damage(
        with_index(lambda i: i["metadata"].clear()), (INDEX, "total_size", "found None")
    ),
    "metadata gone": Damage(
        with_index(lambda i: i.pop("metadata")), (INDEX, "total_size", "found None")
    ),
    "metadata is null": Damage(with_index(lambda i: i.update(metadata=None)), (INDEX, "metadata")),
    "weight_map is a list": Damage(
        with_index(lambda i: i.update(weight_map=[])), (INDEX, "weight_map")
    ),
    "index is not JSON": Damage(lambda f: f.with_file(INDEX, b"{"), (INDEX, "not JSON")),
    "index gone": Damage(lambda f: f.without_file(INDEX), (INDEX, "missing")),
    "INT4 config in text_config": Damage(
        with_config(lambda c: c["text_config"].update(quantization_config=int4_config())),
        ("config.json", "text_config.quantization_config"),
    ),
    "INT4 config at the top": Damage(
        with_config(lambda c: c.update(quantization_config=int4_config())),
        ("config.json", "quantization_config.format", "'pack-quantized'"),
    ),
    "no quantization config": Damage(
        with_config(lambda c: c.pop("quantization_config")), ("config.json", "quantization_config")
    ),
    "quantization config is a text": Damage(
        with_config(lambda c: c.update(quantization_config="nvfp4")),
        ("config.json", "quantization_config"),
    ),
    "config is not JSON": Damage(
        lambda f: f.with_file("config.json", b"nothing"), ("config.json", "not JSON")
    ),
    "config gone": Damage(lambda f: f.without_file("config.json"), ("config.json", "missing")),
}
