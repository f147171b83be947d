"""Small random checkpoints of every family, in the layouts of their releases: names, dtypes, config
keys, quantization and sidecar files.

The weights are random, with seeds of their own; the tokenizer is the sample model's. Written with
safetensors' own writer and encoders of the tests, so that nothing under test makes its own
evidence.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint.tiny_variants import TINY, load_tiny, write_folder
from tests.reference import fp8

NAMES = ("kimi_k25", "kimi_k2", "deepseek_v3", "qwen3_moe")
VOCAB, EXPERTS, GROUP = 2048, 8, 32
SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)

Tensors = dict[str, Tensor]
Store = Callable[[Tensors, str, Tensor], None]
"""Puts a linear's weight among the tensors in some storage."""

FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [fp8.BLOCK, fp8.BLOCK],
}


class Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def linear(self, out: int, inputs: int, gain: float = 1.0) -> Tensor:
        return self.normal(out, inputs, scale=gain * inputs**-0.5)

    def norm(self, size: int) -> Tensor:
        return (1 + self.normal(size, scale=0.1)).to(torch.bfloat16)


def as_bf16(tensors: Tensors, name: str, weight: Tensor) -> None:
    tensors[f"{name}.weight"] = weight.to(torch.bfloat16)


def as_fp8(tensors: Tensors, name: str, weight: Tensor) -> None:
    tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = fp8.encode(weight)


def as_int4(tensors: Tensors, name: str, weight: Tensor) -> None:
    """Eight codes a word, low nibble first, code = value + 8; one BF16 scale per 32 inputs."""
    out, inputs = weight.shape
    grouped = weight.reshape(out, -1, GROUP)
    scale = (grouped.abs().amax(-1) / 7).to(torch.bfloat16)
    codes = (grouped / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int64).reshape(
        out, -1, 8
    ) + 8
    words = (codes << (torch.arange(8) * 4)).sum(-1)
    tensors[f"{name}.weight_packed"] = torch.where(words >= 2**31, words - 2**32, words).to(
        torch.int32
    )
    tensors[f"{name}.weight_scale"] = scale
    tensors[f"{name}.weight_shape"] = torch.tensor([out, inputs], dtype=torch.int32)


def write_release(name: str, folder: Path) -> Path:
    """A checkpoint of a family. Returns its folder."""
    config, tensors = {
        "kimi_k25": kimi_k25, "kimi_k2": kimi_k2, "deepseek_v3": deepseek_v3,
        "qwen3_moe": qwen3_moe,
    }[name]()  # fmt: skip
    write_folder(folder, config, tensors, num_files=3)
    for file in SIDECARS:
        shutil.copy(TINY / file, folder / file)
    return folder


def mlp(draw: Draw, tensors: Tensors, name: str, hidden: int, inner: int, store: Store) -> None:
    for projection, shape in (
        ("gate_proj", (inner, hidden)),
        ("up_proj", (inner, hidden)),
        ("down_proj", (hidden, inner)),
    ):
        store(tensors, f"{name}.{projection}", draw.linear(*shape))


def ends(draw: Draw, tensors: Tensors, prefix: str, hidden: int) -> None:
    tensors[f"{prefix}model.embed_tokens.weight"] = draw.normal(VOCAB, hidden).to(torch.bfloat16)
    tensors[f"{prefix}model.norm.weight"] = draw.norm(hidden)
    tensors[f"{prefix}lm_head.weight"] = draw.linear(VOCAB, hidden, gain=2.0).to(torch.bfloat16)


def latent_layer(
    draw: Draw,
    tensors: Tensors,
    prefix: str,
    config: dict[str, Any],
    store: Store,
    store_expert: Store,
    is_dense: bool,
) -> None:
    """A layer of DeepSeek-V3's architecture."""
    hidden, heads, rope = (
        config["hidden_size"],
        config["num_attention_heads"],
        config["qk_rope_head_dim"],
    )
    q_rank, kv_rank, nope, v = (
        config["q_lora_rank"],
        config["kv_lora_rank"],
        config["qk_nope_head_dim"],
        config["v_head_dim"],
    )
    for name, shape in (
        ("q_a_proj", (q_rank, hidden)),
        ("q_b_proj", (heads * (nope + rope), q_rank)),
        ("kv_a_proj_with_mqa", (kv_rank + rope, hidden)),
        ("kv_b_proj", (heads * (nope + v), kv_rank)),
        ("o_proj", (hidden, heads * v)),
    ):
        store(tensors, f"{prefix}self_attn.{name}", draw.linear(*shape, gain=1.5))
    tensors[f"{prefix}self_attn.q_a_layernorm.weight"] = draw.norm(q_rank)
    tensors[f"{prefix}self_attn.kv_a_layernorm.weight"] = draw.norm(kv_rank)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = draw.norm(hidden)
    if is_dense:
        mlp(draw, tensors, f"{prefix}mlp", hidden, config["intermediate_size"], store)
        return
    inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    tensors[f"{prefix}mlp.gate.weight"] = draw.linear(experts, hidden, gain=2.0).to(torch.bfloat16)
    tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = draw.normal(experts, scale=0.05)
    mlp(
        draw,
        tensors,
        f"{prefix}mlp.shared_experts",
        hidden,
        inner * config["n_shared_experts"],
        store,
    )
    for expert in range(experts):
        mlp(draw, tensors, f"{prefix}mlp.experts.{expert}", hidden, inner, store_expert)


def latent_config(**values: Any) -> dict[str, Any]:
    """config.json of DeepSeek-V3's architecture, with the keys and spellings of its releases
    (`type`, whole numbers, torch_dtype)."""
    rope = {
        "beta_fast": 32, "beta_slow": 1, "factor": 8, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128, "type": "yarn",
    }  # fmt: skip
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 128,
        "initializer_range": 0.02, "intermediate_size": 192, "kv_lora_rank": 64,
        "max_position_embeddings": 1024, "moe_intermediate_size": 64, "moe_layer_freq": 1,
        "n_group": 1, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 4, "num_experts_per_tok": 3, "num_hidden_layers": 3,
        "num_key_value_heads": 4, "num_nextn_predict_layers": 0, "q_lora_rank": 48,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "rms_norm_eps": 1e-6, "rope_scaling": rope,
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 32, "vocab_size": VOCAB,
    } | values  # fmt: skip


def latent_model(
    draw: Draw, config: dict[str, Any], prefix: str, store: Store, store_expert: Store
) -> Tensors:
    tensors: Tensors = {}
    ends(draw, tensors, prefix, config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        is_dense = layer < config["first_k_dense_replace"]
        latent_layer(
            draw, tensors, f"{prefix}model.layers.{layer}.", config, store, store_expert, is_dense
        )
    return tensors


def kimi_k25() -> tuple[dict[str, Any], Tensors]:
    """INT4 experts under language_model., yarn, and the sample model's vision tower."""
    sample = json.loads((TINY / "config.json").read_text())
    quantization = sample["text_config"]["quantization_config"]
    text = latent_config(
        model_type="kimi_k2",
        first_k_dense_replace=1,
        routed_scaling_factor=2.827,
        quantization_config=quantization,
    )
    tensors = latent_model(Draw(1), text, "language_model.", as_bf16, as_int4)
    for name, tensor in load_tiny().items():
        if name.startswith(("vision_tower.", "mm_projector.")):
            tensors[name] = (
                tensor[: text["hidden_size"]].clone()
                if name.startswith("mm_projector.proj.2.")
                else tensor
            )
    return sample | {"text_config": text}, tensors


def kimi_k2() -> tuple[dict[str, Any], Tensors]:
    """Everything but norms, router and ends in FP8; no groups of experts; rotary frequencies, which
    old transformers stored."""
    code = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    config = latent_config(
        model_type="kimi_k2",
        auto_map=code,
        quantization_config=FP8_CONFIG,
        routed_scaling_factor=2.827,
    )
    tensors = latent_model(Draw(2), config, "", as_fp8, as_fp8)
    for layer in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.logspace(
            0, -3, config["qk_rope_head_dim"] // 2
        )
    return config, tensors


def deepseek_v3() -> tuple[dict[str, Any], Tensors]:
    """FP8, blocks cut at the edges (192 inputs), four groups of two experts, and a layer of
    multi-token prediction."""
    code = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    config = latent_config(
        model_type="deepseek_v3", auto_map=code, quantization_config=FP8_CONFIG, hidden_size=192,
        n_group=4, topk_group=2, num_nextn_predict_layers=1,
    )  # fmt: skip
    draw = Draw(3)
    tensors = latent_model(draw, config, "", as_fp8, as_fp8)
    hidden, prefix = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}."
    latent_layer(draw, tensors, prefix, config, as_fp8, as_fp8, is_dense=False)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{prefix}{name}.weight"] = draw.norm(hidden)
    tensors[f"{prefix}eh_proj.weight"] = draw.linear(hidden, 2 * hidden).to(torch.bfloat16)
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return config, tensors


def qwen3_moe() -> tuple[dict[str, Any], Tensors]:
    """BF16 throughout; mixtures in layers 0 and 2, a dense layer between them."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "decoder_sparse_step": 1, "eos_token_id": 1, "head_dim": 32,
        "hidden_act": "silu", "hidden_size": 96, "initializer_range": 0.02,
        "intermediate_size": 160, "max_position_embeddings": 1024, "max_window_layers": 3,
        "mlp_only_layers": [1], "model_type": "qwen3_moe", "moe_intermediate_size": 64,
        "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": EXPERTS,
        "num_experts_per_tok": 3, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False, "vocab_size": VOCAB,
    }  # fmt: skip
    draw, tensors = Draw(4), {}
    ends(draw, tensors, "", config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        grouped_layer(
            draw, tensors, f"model.layers.{layer}.", config, layer in config["mlp_only_layers"]
        )
    return config, tensors


def grouped_layer(
    draw: Draw, tensors: Tensors, prefix: str, config: dict[str, Any], is_dense: bool
) -> None:
    """A layer of Qwen3-MoE's architecture."""
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    for name, shape in (
        ("q_proj", (queries, hidden)),
        ("k_proj", (keys, hidden)),
        ("v_proj", (keys, hidden)),
        ("o_proj", (hidden, queries)),
    ):
        as_bf16(tensors, f"{prefix}self_attn.{name}", draw.linear(*shape, gain=1.5))
    for name in ("self_attn.q_norm", "self_attn.k_norm"):
        tensors[f"{prefix}{name}.weight"] = draw.norm(size)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = draw.norm(hidden)
    if is_dense:
        mlp(draw, tensors, f"{prefix}mlp", hidden, config["intermediate_size"], as_bf16)
        return
    tensors[f"{prefix}mlp.gate.weight"] = draw.linear(config["num_experts"], hidden, gain=2.0).to(
        torch.bfloat16
    )
    for expert in range(config["num_experts"]):
        mlp(
            draw,
            tensors,
            f"{prefix}mlp.experts.{expert}",
            hidden,
            config["moe_intermediate_size"],
            as_bf16,
        )


def moe_layers(name: str) -> tuple[int, ...]:
    return (0, 2) if name == "qwen3_moe" else (1, 2)


def expert_linears(name: str) -> Iterator[str]:
    """Module names of the linears that are compressed."""
    prefix = "language_model." if name == "kimi_k25" else ""
    for layer in moe_layers(name):
        for expert in range(EXPERTS):
            yield from (
                f"{prefix}model.layers.{layer}.mlp.experts.{expert}.{p}"
                for p in ("gate_proj", "up_proj", "down_proj")
            )
