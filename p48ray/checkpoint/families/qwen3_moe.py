"""Qwen3-MoE (30B-A3B, 235B-A22B): grouped-query attention with norms on query and key, softmax
router, no shared expert, BF16."""

from collections.abc import Iterator

from p48ray.checkpoint.families.record import Family, TextConfig, TransformersClasses


def sparse_layers(text: TextConfig) -> Iterator[int]:
    """Every decoder_sparse_step-th layer, counted from 1, but for those that mlp_only_layers
    names."""
    step, dense = text.integer("decoder_sparse_step", default=1), text.integers("mlp_only_layers")
    return (
        layer
        for layer in range(text.integer("num_hidden_layers"))
        if (layer + 1) % step == 0 and layer not in dense
    )


FAMILY = Family(
    model_type="qwen3_moe",
    text_model_types=("qwen3_moe",),
    moe_layers=sparse_layers,
    moe_layers_key="decoder_sparse_step",
    num_experts_key="num_experts",
    # Layers are run with full causal attention only.
    supported={"hidden_act": ("silu",), "use_sliding_window": (False, None)},
    transformers=TransformersClasses(
        module="transformers.models.qwen3_moe.modeling_qwen3_moe",
        config="Qwen3MoeConfig",
        layer="Qwen3MoeDecoderLayer",
        rotary="Qwen3MoeRotaryEmbedding",
        norm="Qwen3MoeRMSNorm",
    ),
)
