"""Kimi-K2: DeepSeek-V3's architecture without groups of experts, text only. Instruct releases are
FP8, Kimi-K2-Thinking has INT4 experts."""

from p48ray.checkpoint.families.deepseek_v3 import (
    CLASSES,
    FLOAT32_TENSORS,
    ROUTER_BIASES,
    RULES,
    SUPPORTED,
)
from p48ray.checkpoint.families.record import Family, layers_from_first_dense

FAMILY = Family(
    model_type="kimi_k2",
    text_model_types=("kimi_k2", "deepseek_v3"),
    moe_layers=layers_from_first_dense,
    moe_layers_key="first_k_dense_replace",
    num_experts_key="n_routed_experts",
    supported=SUPPORTED,
    rules=RULES,
    float32_tensors=FLOAT32_TENSORS,
    router_biases=ROUTER_BIASES,
    transformers=CLASSES,
    serving_flags=("--trust-remote-code", "--tool-call-parser kimi_k2"),
)
