"""An independent reader of ModelOpt's NVFP4 layout, in float64, from the description of the layout
alone: two E2M1 codes a byte, the lower input in the low nibble; a weight is code x E4M3 block scale
x weight_scale_2. It shares no code with p48ray, torch or ModelOpt."""

import math
import struct
from collections.abc import Mapping

import numpy as np

from tests.reference.sparse_storage import read_file

Tensors = dict[str, tuple[str, list[int], bytes]]


def e2m1(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if sign else value


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; no infinities."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


E2M1 = np.array([e2m1(code) for code in range(16)])
E4M3 = np.array([e4m3(byte) for byte in range(256)])


def scalar(tensor: tuple[str, list[int], bytes]) -> float:
    """A float32 without axes."""
    dtype, shape, raw = tensor
    assert (dtype, shape) == ("F32", [])
    return float(struct.unpack("<f", raw)[0])


def weight(tensors: Mapping[str, tuple[str, list[int], bytes]], linear: str) -> np.ndarray:
    """[out, in], float64."""
    dtype, (out, width), raw = tensors[f"{linear}.weight"]
    assert dtype == "U8"
    packed = np.frombuffer(raw, np.uint8).reshape(out, width)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(out, 2 * width)
    dtype, shape, raw = tensors[f"{linear}.weight_scale"]
    assert (dtype, shape) == ("F8_E4M3", [out, width // 8])
    blocks = E4M3[np.frombuffer(raw, np.uint8).reshape(shape)]
    factor = scalar(tensors[f"{linear}.weight_scale_2"])
    return E2M1[codes] * np.repeat(blocks, 16, axis=1) * factor


def read_all(files: Mapping[str, bytes]) -> Tensors:
    """All tensors of a checkpoint's safetensors files."""
    return {
        name: tensor
        for file, data in files.items()
        if file.endswith(".safetensors")
        for name, tensor in read_file(data).items()
    }
