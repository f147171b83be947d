"""Block-scaled FP8 by its definition, element by element in Python's numbers: what the decoder is
compared with, and how test sources are made."""

import struct

import torch
from torch import Tensor

BLOCK = 128


def e4m3_value(byte: int) -> float:
    """Sign, four bits of exponent (bias 7), three of mantissa; exponent 0 is subnormal, 0x7F and
    0xFF are NaN, there is no infinity."""
    sign, exponent, mantissa = (-1.0 if byte & 0x80 else 1.0), (byte >> 3) & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    )


def to_float32(value: float) -> float:
    """The nearest float32, as a Python float."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def to_bfloat16_bits(value: float) -> int:
    """The bits of the nearest BF16 of a float32, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def decode(weight: Tensor, scale_inv: Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> Tensor:
    """(out, in) BF16. The product of an E4M3 and a float32 is exact in a float64 and rounded twice,
    to float32 and to BF16."""
    codes, scales = weight.view(torch.uint8).tolist(), scale_inv.double().tolist()
    table = [e4m3_value(byte) for byte in range(256)]
    rows = [
        [
            to_bfloat16_bits(to_float32(table[byte] * scales[o // block[0]][i // block[1]]))
            for i, byte in enumerate(row)
        ]
        for o, row in enumerate(codes)
    ]
    bits = torch.tensor(rows, dtype=torch.int32)
    return torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16).view(torch.bfloat16)


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float weight as a release stores it: E4M3, and amax / 448 of every 128 x 128 block in
    float32."""
    out, inputs = weight.shape
    scale_inv = torch.empty(-(-out // BLOCK), -(-inputs // BLOCK))
    stored = torch.empty(out, inputs, dtype=torch.float8_e4m3fn)
    for o in range(scale_inv.shape[0]):
        for i in range(scale_inv.shape[1]):
            area = (slice(o * BLOCK, (o + 1) * BLOCK), slice(i * BLOCK, (i + 1) * BLOCK))
            scale_inv[o, i] = weight[area].abs().max() / 448
            stored[area] = (weight[area] / scale_inv[o, i]).to(torch.float8_e4m3fn)
    return stored, scale_inv
