"""A checkpoint of Kimi-K2.5's real shape without its weights: true headers, data that is a hole in
the file.

For dry runs and for measuring what planning costs at full scale: 64 files, 207,000 tensors, 69,120
expert linears, about 595 GB by their sizes and 51 MB on a disk that stores holes as holes. Tensors
read as zeros, `weight_shape` too, so its experts do not decode.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from p48ray.checkpoint.header import DTYPE_BYTES, encode_header
from p48ray.checkpoint.index import CONFIG_FILE, INDEX_FILE

NUM_LAYERS = 61
NUM_EXPERTS = 384
HIDDEN = 7168
MOE_INTERMEDIATE = 2048
DENSE_INTERMEDIATE = 18432
VOCAB = 163840
HEADS = 64
Q_LORA, KV_LORA, NOPE, ROPE, V_HEAD = 1536, 512, 128, 64, 128
VISION_BLOCKS, VISION_HIDDEN, VISION_INTERMEDIATE, PATCH, POS_EMB, MERGE = 27, 1152, 4304, 14, 64, 2
INT4_GROUP = 32

Spec = tuple[str, str, tuple[int, ...]]
"""(name, dtype, shape)."""


def write_kimi_k25_skeleton(folder: str | Path) -> None:
    """Writes the files into a folder, which is created. Takes seconds; needs a file system with
    sparse files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards()
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, specs in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        total_bytes += _write_sparse(folder / file, specs)
        weight_map.update({name: file for name, _, _ in specs})
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=0))
    (folder / CONFIG_FILE).write_text(json.dumps(kimi_k25_config(), indent=2))


def kimi_k25_config() -> dict[str, Any]:
    """config.json with the release's values. The vision part has the release's own keys, which are
    not those that transformers 5 uses; the text model's are both's. `auto_map` is left out: there
    is no code beside it."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "pad_token_id": 163839,
        "ignore_index": -100,
        "media_placeholder_token_id": 163605,
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "text_config": _text_config(),
        "vision_config": _vision_config(),
    }


def _vision_config() -> dict[str, Any]:
    tower = {
        "patch_size": PATCH, "init_pos_emb_height": POS_EMB, "init_pos_emb_width": POS_EMB,
        "init_pos_emb_time": 4, "pos_emb_type": "divided_fixed", "vt_num_attention_heads": 16,
        "vt_num_hidden_layers": VISION_BLOCKS, "vt_hidden_size": VISION_HIDDEN,
        "vt_intermediate_size": VISION_INTERMEDIATE, "merge_kernel_size": [MERGE, MERGE],
        "video_attn_type": "spatial_temporal", "merge_type": "sd2_tpool",
    }  # fmt: skip
    projector = {
        "mm_projector_type": "patchmerger", "mm_hidden_size": VISION_HIDDEN,
        "projector_hidden_act": "gelu", "projector_ln_eps": 1e-05, "text_hidden_size": HIDDEN,
    }  # fmt: skip
    return tower | projector


def _text_config() -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": DENSE_INTERMEDIATE,
        "moe_intermediate_size": MOE_INTERMEDIATE, "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": Q_LORA,
        "kv_lora_rank": KV_LORA, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE,
        "v_head_dim": V_HEAD, "n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": 8,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "num_nextn_predict_layers": 0, "max_position_embeddings": 262144,
    }  # fmt: skip
    behaviour = {
        "model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16",
        "hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "norm_topk_prob": True, "routed_scaling_factor": 2.827, "rms_norm_eps": 1e-05,
        "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "ep_size": 1,
        "use_cache": True, "tie_word_embeddings": False, "bos_token_id": 163584,
        "eos_token_id": 163585, "pad_token_id": 163839,
    }  # fmt: skip
    rope = {
        "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 64.0, "original_max_position_embeddings": 4096,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    }  # fmt: skip
    return sizes | behaviour | rope | {"quantization_config": _int4_config()}


def _int4_config() -> dict[str, Any]:
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": INT4_GROUP, "dynamic": False, "observer": "minmax", "observer_kwargs": {},
        "actorder": None, "block_structure": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "input_activations": None,
                "output_activations": None,
                "weights": weights,
            },
        },
    }


def _write_sparse(path: Path, specs: list[Spec]) -> int:
    """A header, then a hole where the data would be. Returns the size of the data in bytes."""
    header = encode_header(specs)
    num_bytes = sum(_num_bytes(spec) for spec in specs)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + num_bytes)
    return num_bytes


def _num_bytes(spec: Spec) -> int:
    _, dtype, shape = spec
    count = DTYPE_BYTES[dtype]
    for size in shape:
        count *= size
    return count


def _shards() -> list[list[Spec]]:
    """One file a layer, one each for embedding, head, and vision; wide types first, then by name,
    as the reference writer does."""
    prefix = "language_model."
    shards = [list(layer_specs(layer)) for layer in range(NUM_LAYERS)]
    shards.append([(f"{prefix}model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN))])
    shards.append(
        [
            (f"{prefix}model.norm.weight", "BF16", (HIDDEN,)),
            (f"{prefix}lm_head.weight", "BF16", (VOCAB, HIDDEN)),
        ]
    )
    shards.append([*_vision(), *_projector()])
    return [sorted(specs, key=lambda spec: (-DTYPE_BYTES[spec[1]], spec[0])) for specs in shards]


def layer_specs(layer: int) -> Iterator[Spec]:
    """Every tensor of one decoder layer."""
    prefix = f"language_model.model.layers.{layer}."
    attention = {
        "q_a_proj": (Q_LORA, HIDDEN), "q_a_layernorm": (Q_LORA,),
        "q_b_proj": (HEADS * (NOPE + ROPE), Q_LORA), "kv_a_proj_with_mqa": (KV_LORA + ROPE, HIDDEN),
        "kv_a_layernorm": (KV_LORA,), "kv_b_proj": (HEADS * (NOPE + V_HEAD), KV_LORA),
        "o_proj": (HIDDEN, HEADS * V_HEAD),
    }  # fmt: skip
    for name, shape in attention.items():
        yield f"{prefix}self_attn.{name}.weight", "BF16", shape
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", "BF16", (HIDDEN,)
    if layer == 0:
        yield from _mlp(f"{prefix}mlp.", DENSE_INTERMEDIATE)
        return
    yield f"{prefix}mlp.gate.weight", "BF16", (NUM_EXPERTS, HIDDEN)
    yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", (NUM_EXPERTS,)
    yield from _mlp(f"{prefix}mlp.shared_experts.", MOE_INTERMEDIATE)
    for expert in range(NUM_EXPERTS):
        for name, _, (out_features, in_features) in _mlp(
            f"{prefix}mlp.experts.{expert}.", MOE_INTERMEDIATE
        ):
            yield f"{name}_packed", "I32", (out_features, in_features // 8)
            yield f"{name}_scale", "BF16", (out_features, in_features // INT4_GROUP)
            yield f"{name}_shape", "I32", (2,)


def _mlp(prefix: str, intermediate: int) -> Iterator[tuple[str, str, tuple[int, int]]]:
    yield f"{prefix}gate_proj.weight", "BF16", (intermediate, HIDDEN)
    yield f"{prefix}up_proj.weight", "BF16", (intermediate, HIDDEN)
    yield f"{prefix}down_proj.weight", "BF16", (HIDDEN, intermediate)


def _vision() -> Iterator[Spec]:
    hidden = VISION_HIDDEN
    linears = {
        "mlp.fc0": (VISION_INTERMEDIATE, hidden), "mlp.fc1": (hidden, VISION_INTERMEDIATE),
        "wqkv": (3 * hidden, hidden), "wo": (hidden, hidden),
    }  # fmt: skip
    for block in range(VISION_BLOCKS):
        prefix = f"vision_tower.encoder.blocks.{block}."
        for name, shape in linears.items():
            yield f"{prefix}{name}.weight", "BF16", shape
            yield f"{prefix}{name}.bias", "BF16", shape[:1]
        yield from _norm(f"{prefix}norm0")
        yield from _norm(f"{prefix}norm1")
    yield from _norm("vision_tower.encoder.final_layernorm")
    yield "vision_tower.patch_embed.pos_emb.weight", "BF16", (POS_EMB, POS_EMB, hidden)
    yield "vision_tower.patch_embed.proj.weight", "BF16", (hidden, 3, PATCH, PATCH)
    yield "vision_tower.patch_embed.proj.bias", "BF16", (hidden,)


def _projector() -> Iterator[Spec]:
    merged = VISION_HIDDEN * MERGE * MERGE
    yield from _norm("mm_projector.pre_norm")
    for name, out_features in (("proj.0", merged), ("proj.2", HIDDEN)):
        yield f"mm_projector.{name}.weight", "BF16", (out_features, merged)
        yield f"mm_projector.{name}.bias", "BF16", (out_features,)


def _norm(name: str) -> Iterator[Spec]:
    yield f"{name}.weight", "BF16", (VISION_HIDDEN,)
    yield f"{name}.bias", "BF16", (VISION_HIDDEN,)
