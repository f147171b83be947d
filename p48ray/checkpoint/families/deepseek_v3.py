"""DeepSeek-V3 and R1, and the architecture of the Kimi models: latent attention, sigmoid router
with groups of experts, a shared expert.

Releases store every linear in FP8 (see checkpoint.fp8) and one layer of multi-token prediction
behind the last one.
"""

from p48ray.checkpoint.families.record import Family, TransformersClasses, layers_from_first_dense

CLASSES = TransformersClasses(
    module="transformers.models.deepseek_v3.modeling_deepseek_v3",
    config="DeepseekV3Config",
    layer="DeepseekV3DecoderLayer",
    rotary="DeepseekV3RotaryEmbedding",
    norm="DeepseekV3RMSNorm",
)

SUPPORTED = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}
"""transformers' classes heed none of these keys: they compute what the values here mean."""

ROUTER_BIASES = ("e_score_correction_bias",)
FLOAT32_TENSORS = ROUTER_BIASES
"""The router adds it to fp32 scores; bf16 would change which experts win."""

FAMILY = Family(
    model_type="deepseek_v3",
    text_model_types=("deepseek_v3",),
    moe_layers=layers_from_first_dense,
    moe_layers_key="first_k_dense_replace",
    num_experts_key="n_routed_experts",
    supported=SUPPORTED,
    float32_tensors=FLOAT32_TENSORS,
    router_biases=ROUTER_BIASES,
    transformers=CLASSES,
)
