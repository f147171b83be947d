"""DeepSeek-V3 and R1, and the architecture of the Kimi models: latent attention, sigmoid router
with groups of experts, a shared expert.

Releases store every linear in FP8 (see checkpoint.fp8) and one layer of multi-token prediction
behind the last one.
"""

from p48ray.checkpoint.families.record import (
    Family,
    TextConfig,
    TransformersClasses,
    layers_from_first_dense,
)
from p48ray.errors import SourceError

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


def check_groups(text: TextConfig) -> None:
    """The router takes the best experts of the best groups: groups are of one size, of two experts
    or more (their two best are summed), and those taken hold as many experts as a token gets.

    Raises: SourceError.
    """
    experts, groups = text.integer("n_routed_experts"), text.integer("n_group", default=1)
    taken, top_k = text.integer("topk_group", default=1), text.integer("num_experts_per_tok")
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise SourceError(
            f"{text.where('n_group')}: expected groups of one size, two or more, of {experts}"
            f" experts (n_routed_experts), found {groups}"
        )
    if taken > groups:
        raise SourceError(
            f"{text.where('topk_group')}: expected at most the {groups} groups (n_group), found"
            f" {taken}"
        )
    if top_k > (held := taken * (experts // groups)):
        raise SourceError(
            f"{text.where('num_experts_per_tok')}: expected at most the {held} experts of"
            f" {taken} groups (topk_group), found {top_k}"
        )


RULES = (check_groups,)

FAMILY = Family(
    model_type="deepseek_v3",
    text_model_types=("deepseek_v3",),
    moe_layers=layers_from_first_dense,
    moe_layers_key="first_k_dense_replace",
    num_experts_key="n_routed_experts",
    supported=SUPPORTED,
    rules=RULES,
    float32_tensors=FLOAT32_TENSORS,
    router_biases=ROUTER_BIASES,
    transformers=CLASSES,
)
