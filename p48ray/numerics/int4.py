"""INT4 weights of the source, as compressed-tensors packs them, to floating point.

    w = (code - 8) * scale, rounded to the scale's dtype

8 codes an int32 word, lowest nibble first; one scale per group of inputs.

Source: compressed-tensors' `pack-quantized` format; its own decoder is the definition and the tests
hold this one to it, bit for bit. The format's decoder takes 0.2 s for an expert of Kimi-K2.5, and
three copies of it; a stream that meets every expert of every layer can not wait for that.

Legend: O outputs, I inputs, W words (I/8), B bytes (I/2), G groups.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from p48ray.errors import NumericsError

CODES_PER_WORD = 8
ZERO_POINT = 8


def decode_int4(
    packed: Int32[Tensor, "o w"],
    scale: Float[Tensor, "o g"],
    out: Float[Tensor, "o i"] | None = None,
) -> Float[Tensor, "o i"]:
    """Weights in the scale's dtype, on the device of the arguments; (o, 8 w).

    Args:   out: contiguous, of that shape and dtype, to be filled.
    Raises: NumericsError unless whole groups fill the inputs.
    """
    rows, inputs = packed.shape[0], packed.shape[1] * CODES_PER_WORD
    if scale.shape[1] == 0 or inputs % scale.shape[1]:
        raise NumericsError(
            f"decode_int4: expected groups that divide {inputs} inputs, found {scale.shape[1]} of"
            " them"
        )
    if packed.is_cuda and scale.dtype == torch.bfloat16 and packed.shape[1] % scale.shape[1] == 0:
        from p48ray.kernels.int4 import decode_int4_bf16

        return decode_int4_bf16(packed, scale, out)
    bytes_OB = packed.contiguous().view(torch.uint8)
    values = (
        torch.empty((rows, inputs), dtype=scale.dtype, device=packed.device) if out is None else out
    )
    values = values.view(rows, inputs // 2, 2)
    values[..., 0] = bytes_OB & 15
    values[..., 1] = bytes_OB >> 4
    values -= ZERO_POINT
    values = values.view(rows, scale.shape[1], -1)
    values *= scale[..., None]
    return values.view(rows, inputs)
