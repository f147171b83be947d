"""Kimi-K2.5: Kimi-K2's text model under `language_model.`, INT4 experts, and a vision tower with
its projector."""

from p48ray.checkpoint.families.deepseek_v3 import (
    CLASSES,
    FLOAT32_TENSORS,
    ROUTER_BIASES,
    RULES,
    SUPPORTED,
)
from p48ray.checkpoint.families.record import Family, layers_from_first_dense

FAMILY = Family(
    model_type="kimi_k25",
    text_config_path=("text_config",),
    text_model_types=("kimi_k2", "deepseek_v3"),
    moe_layers=layers_from_first_dense,
    moe_layers_key="first_k_dense_replace",
    num_experts_key="n_routed_experts",
    supported=SUPPORTED,
    rules=RULES,
    float32_tensors=FLOAT32_TENSORS,
    router_biases=ROUTER_BIASES,
    vision_prefixes=("vision_tower.", "mm_projector."),
    transformers=CLASSES,
    serving_flags=(
        "--mm-encoder-tp-mode data",
        "--trust-remote-code",
        "--tool-call-parser kimi_k2",
        "--reasoning-parser kimi_k2",
    ),
)
