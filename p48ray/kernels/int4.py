"""numerics.int4 for CUDA tensors: one launch, every byte read and written once.

Legend: N words of 8 codes, P codes of a word.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS_PER_PROGRAM = 1024


@triton.jit
def _decode(packed_ptr, scale_ptr, out_ptr, num_words, words_per_group, BLOCK: tl.constexpr):
    n_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_N = n_N < num_words
    word_N = tl.load(packed_ptr + n_N, mask=inside_N, other=0)
    scale_N = tl.load(scale_ptr + n_N // words_per_group, mask=inside_N, other=0.0).to(tl.float32)
    place_P = tl.arange(0, 8)
    code_NP = (word_N[:, None] >> (4 * place_P[None, :])) & 15
    # The product of a bf16 and a 4-bit integer is exact in float32, so this rounds once, as a bf16
    # product does.
    value_NP = (code_NP - 8).to(tl.float32) * scale_N[:, None]
    tl.store(
        out_ptr + n_N[:, None] * 8 + place_P[None, :],
        value_NP.to(tl.bfloat16),
        mask=inside_N[:, None],
    )


def decode_int4_bf16(packed: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """See numerics.int4.decode_int4; packed (o, w) int32, scale (o, g) bf16, both on one CUDA
    device -> (o, 8 w) bf16."""
    packed, scale = packed.contiguous(), scale.contiguous()
    if out is None:
        out = torch.empty(
            packed.shape[0], packed.shape[1] * 8, dtype=torch.bfloat16, device=packed.device
        )
    num_words = packed.numel()
    grid = (triton.cdiv(num_words, WORDS_PER_PROGRAM),)
    _decode[grid](
        packed, scale, out, num_words, packed.shape[1] // scale.shape[1], BLOCK=WORDS_PER_PROGRAM
    )
    return out
