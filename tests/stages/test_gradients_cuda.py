"""The backward pass on a GPU: whoever takes a step, and however often, it comes to the same
bits."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RotaryEmbedding,
)

from p48ray.stages.derivatives import through_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
}
HEADS = {
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 512,
    "first_k_dense_replace": 1,
}
LENGTH = 2048


def test_attention_gives_the_same_gradient_every_time() -> None:
    """Kimi-K2.5's head sizes, sequences of many blocks. And what it was set to stays as it was."""
    torch.manual_seed(0)
    config = DeepseekV3Config(**SIZES, **HEADS)
    config._attn_implementation = "sdpa"
    layer = DeepseekV3DecoderLayer(config, 0).to("cuda", torch.bfloat16).requires_grad_(False)
    positions = DeepseekV3RotaryEmbedding(config).to("cuda")(
        torch.empty(0, dtype=torch.bfloat16, device="cuda"),
        torch.arange(LENGTH, device="cuda")[None],
    )
    x_BSH = torch.randn(2, LENGTH, 1024, device="cuda").bfloat16()
    gradient_BSH = torch.randn_like(x_BSH)
    first, *others = [through_attention(layer, x_BSH, gradient_BSH, positions, 1) for _ in range(6)]
    assert all(torch.equal(first, other) for other in others)
    assert bool(torch.isfinite(first).all()) and float(first.abs().max()) > 0
    assert not torch.are_deterministic_algorithms_enabled()
