"""A writer and a reader of paired-4:8 checkpoints as the authors of MoESQ release them, in NumPy,
from the description of the layout alone (checkpoint.foreign); no code is shared with p48ray.

The weights are those of a finished dense checkpoint, every row times a factor near 1 (else few
ratios of global scales would occur), quantized again as the authors do it: one
scale per 32 inputs, amax / 6; a global scale of its own for every linear, 448 over the largest of
these; codes to nearest, minus zero among them.
"""

import json
from collections.abc import Mapping
from math import floor, log2
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.reference.modelopt import E2M1, E4M3, read_all

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
POSITIVE = E4M3[1:127]  # 2^-9 to 448, rising
MARKER = {"layout": "pair-bitmask", "version": 1}
Arrays = dict[str, tuple[str, np.ndarray]]
"""name -> (safetensors' dtype, array; U8 for F8_E4M3 and raw bytes for BF16)."""


def dense_weight(tensors: Mapping[str, tuple[str, list[int], bytes]], linear: str) -> np.ndarray:
    """[out, in] float64 of a dense checkpoint, scales per 16 or per 32."""
    _, (out, width), raw = tensors[f"{linear}.weight_packed"]
    codes = nibbles(np.frombuffer(raw, np.uint8).reshape(out, width))
    _, shape, raw = tensors[f"{linear}.weight_scale"]
    scale = E4M3[np.frombuffer(raw, np.uint8).reshape(shape)]
    (divisor,) = np.frombuffer(tensors[f"{linear}.weight_global_scale"][2], np.float32)
    return E2M1[codes] * np.repeat(scale, 2 * width // shape[1], axis=1) / np.float64(divisor)


def sparse_weight(tensors: Mapping[str, tuple[str, list[int], bytes]], linear: str) -> np.ndarray:
    """[out, in] float64 of a sparse one, byte by byte."""
    _, (out, width), raw = tensors[f"{linear}.weight_sparse_mask"]
    mask = nibbles(np.frombuffer(raw, np.uint8).reshape(out, width))  # 4 bytes each
    kept = np.frombuffer(tensors[f"{linear}.weight_sparse_packed"][2], np.uint8)
    is_kept = (mask[..., None] >> np.arange(4) & 1).astype(bool)
    packed = np.zeros(is_kept.shape, np.uint8)
    packed[is_kept] = kept
    dense = dict(tensors)
    flat = packed.reshape(out, -1)
    dense[f"{linear}.weight_packed"] = ("U8", list(flat.shape), flat.tobytes())
    return dense_weight(dense, linear)


def nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def own_divisor(weight: np.ndarray) -> np.float32:
    scales = np.abs(weight).reshape(len(weight), -1, 32).max(-1) / 6
    return np.float32(448 / max(float(scales.max()), 1e-12))


def quantized(weight: np.ndarray, divisor: np.float32, name: str, is_sparse: bool) -> Arrays:
    """One linear's tensors."""
    spans = weight.reshape(len(weight), -1, 32)
    wanted = np.clip(np.abs(spans).max(-1) / 6 * divisor, POSITIVE[0], 448)
    place = np.abs(POSITIVE - wanted[..., None]).argmin(-1)
    unit = POSITIVE[place] / np.float64(divisor)
    ratio = spans / unit[..., None]
    code = np.abs(E2M1[:8] - np.abs(ratio)[..., None]).argmin(-1).astype(np.uint8)
    # what was dropped is +0, and what rounds to zero keeps its sign
    code |= (np.signbit(ratio) & (ratio != 0)).astype(np.uint8) << 3
    flat = code.reshape(len(weight), -1)
    packed = flat[:, 0::2] | flat[:, 1::2] << 4
    arrays: Arrays = {
        f"{name}.weight_scale": ("F8_E4M3", (place + 1).astype(np.uint8)),
        f"{name}.weight_global_scale": ("F32", np.array([divisor], np.float32)),
        f"{name}.input_global_scale": ("F32", np.array(1.0, np.float32)),
    }
    if not is_sparse:
        return arrays | {f"{name}.weight_packed": ("U8", packed)}
    groups = packed.reshape(len(weight), -1, 4)
    order = np.argsort(groups == 0, axis=-1, kind="stable")[..., :2]  # nonzero first, then lowest
    order.sort(axis=-1)
    kept = np.take_along_axis(groups, order, -1).reshape(len(weight), -1)
    bits = (1 << order).sum(-1).astype(np.uint8)
    mask = bits[:, 0::2] | bits[:, 1::2] << 4
    return arrays | {
        f"{name}.weight_sparse_packed": ("U8", np.ascontiguousarray(kept)),
        f"{name}.weight_sparse_mask": ("U8", mask),
    }


def quantizer(**more: Any) -> dict[str, Any]:
    return {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 32,
        "symmetric": True, "observer_kwargs": {}, "scale_dtype": "torch.float8_e4m3fn", **more,
    }  # fmt: skip


def config_of(config: Mapping[str, Any], is_sparse: bool) -> dict[str, Any]:
    """config.json with the authors' quantization_config in place of any other."""
    quantization: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {
                "input_activations": quantizer(
                    dynamic="local", observer="static_minmax", zp_dtype="torch.float8_e4m3fn"
                ),
                "output_activations": None,
                "targets": ["Linear"],
                "weights": quantizer(dynamic=False, observer="memoryless_minmax"),
            }
        },
        "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", r"re:.*mlp\.gate$", "re:.*shared_expert.*"],
        "quantization_status": "compressed",
    }
    if is_sparse:
        quantization["paired48_sparse"] = dict(MARKER)
    return {**config, "quantization_config": quantization}


def foreign_checkpoint(
    files: Mapping[str, bytes], is_sparse: bool = True, by_powers_of_two: bool = False
) -> dict[str, bytes]:
    """All files of such a checkpoint, from those of a finished dense one.

    Args:
        by_powers_of_two: up's global scale is gate's times a power of two.
    """
    tensors = read_all(files)
    linears = {n.rpartition(".")[0] for n in tensors if n.endswith(".weight_packed")}
    arrays: Arrays = {}
    for name, (dtype, shape, raw) in tensors.items():
        if name.rpartition(".")[0] not in linears:
            kind = {"F32": np.float32, "I32": np.int32}.get(dtype, np.uint8)
            flat = np.frombuffer(raw, kind)
            arrays[name] = (dtype, flat if kind == np.uint8 else flat.reshape(shape))
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, (_, shape, _) in tensors.items()}
    for expert in sorted({linear.rpartition(".")[0] for linear in linears}):
        weights = {
            p: dense_weight(tensors, f"{expert}.{p}")
            * rng.uniform(0.7, 1.4)
            * rng.uniform(0.9, 1.1, (shapes[f"{expert}.{p}.weight_packed"][0], 1))
            for p in PROJECTIONS
        }
        divisors = {p: own_divisor(w) for p, w in weights.items()}
        if by_powers_of_two:
            power = floor(log2(divisors["up_proj"] / divisors["gate_proj"]))
            divisors["up_proj"] = divisors["gate_proj"] * np.float32(2.0**power)
        for p in PROJECTIONS:
            arrays |= quantized(weights[p], divisors[p], f"{expert}.{p}", is_sparse)
    config = json.loads(files["config.json"])
    kept = {n: d for n, d in files.items() if not n.endswith(".safetensors")}
    del kept["p48ray.json"]
    return {
        **kept,
        **sharded(arrays, shapes),
        "config.json": json.dumps(config_of(config, is_sparse), indent=2).encode(),
        "README.md": b"---\nlicense: mit\n---\n\n# Theirs\n\nA text.\n",
    }


def sharded(arrays: Arrays, shapes: Mapping[str, list[int]]) -> dict[str, bytes]:
    """A file a layer, and one for all else; the index."""
    by_layer: dict[int, Arrays] = {}
    for name, array in arrays.items():
        number = name.partition("layers.")[2].partition(".")[0]
        by_layer.setdefault(int(number) + 1 if number.isdigit() else 0, {})[name] = array
    count = max(by_layer) + 1
    found: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    for place, of_file in sorted(by_layer.items()):
        file = f"model-{place + 1:05d}-of-{count:05d}.safetensors"
        found[file] = written(of_file, shapes)
        weight_map |= dict.fromkeys(of_file, file)
    total = sum(a.nbytes for _, a in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    found["model.safetensors.index.json"] = json.dumps(index).encode()
    return found


def written(arrays: Arrays, shapes: Mapping[str, list[int]]) -> bytes:
    """One file; safetensors' NumPy writer knows neither FP8 nor BF16, so names of dtypes and shapes
    are put into the header that it has made of bytes."""
    raw = save({n: np.frombuffer(a.tobytes(), np.uint8) for n, (_, a) in arrays.items()})
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, (dtype, array) in arrays.items():
        is_bytes = array.dtype == np.uint8 and dtype not in ("U8", "F8_E4M3")
        header[name]["dtype"] = dtype
        header[name]["shape"] = shapes[name] if is_bytes else list(array.shape)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]
