"""What a model family is: where its config and names differ from the others', as one frozen record.

A family is one file of this package with a constant FAMILY (docs/families.md). The names of its
routed experts follow one pattern, `layers.N.mlp.experts.E.{gate,up,down}_proj`, and its decoder
layers have the parts `input_layernorm`, `self_attn`, `post_attention_layernorm` and `mlp`; whatever
else there is comes from the record, from the config or from the headers.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from p48ray.checkpoint.index import CONFIG_FILE
from p48ray.errors import SourceError

MOST: Mapping[str, int] = MappingProxyType(
    {
        "num_hidden_layers": 10**4,
        "first_k_dense_replace": 10**4,
        "decoder_sparse_step": 10**4,
        "num_nextn_predict_layers": 10**4,
        "n_routed_experts": 10**5,
        "num_experts": 10**5,
        "num_experts_per_tok": 10**5,
        "n_shared_experts": 10**5,
        "n_group": 10**5,
        "topk_group": 10**5,
        "hidden_size": 2**20,
        "intermediate_size": 2**24,
        "moe_intermediate_size": 2**24,
        "num_attention_heads": 10**5,
        "num_key_value_heads": 10**5,
        "head_dim": 2**20,
        "q_lora_rank": 2**20,
        "kv_lora_rank": 2**20,
        "qk_nope_head_dim": 2**20,
        "qk_rope_head_dim": 2**20,
        "v_head_dim": 2**20,
        "vocab_size": 2**28,
        "max_position_embeddings": 2**40,
    }
)
"""Sizes in a config, far beyond those of any model. What is larger would be found wanting only
after lists and tensors of that size were made."""

CACHE_SCALE = re.compile(
    r"(.*\.)?self_attn\.(attn\.)?"
    r"([qkv]|kv|prob)_(scale|zero_point)"
    r"|(.*\.)?self_attn\.(q|k|v|qkv)_proj\.([kv]_scale|output_scale)"
)
"""Names of the scales that servers use for keys and values in an FP8 cache, in the spellings that
releases have. The model's own layers know nothing of them."""


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The text model's part of config.json, read with checks: every error names the dotted path of
    its key."""

    values: Mapping[str, Any]
    path: tuple[str, ...] = ()

    def where(self, key: str) -> str:
        """'config.json: text_config.key', for messages."""
        return f"{CONFIG_FILE}: {'.'.join((*self.path, key))}"

    def integer(self, key: str, *, least: int = 1, default: int | None = None) -> int:
        """A number. Raises: SourceError if it is no integer of at least `least`; an absent one is
        `default`, where there is one."""
        value = self.values.get(key) if key in self.values or default is None else default
        if type(value) is not int or value < least:
            raise SourceError(f"{self.where(key)}: expected an integer >= {least}, found {value!r}")
        return value

    def check_sizes(self) -> None:
        """Raises: SourceError for a number above MOST. What else is wrong with one, its reader
        says."""
        for key, most in MOST.items():
            value = self.values.get(key)
            if isinstance(value, int | float) and not value <= most:  # NaN neither
                raise SourceError(
                    f"{self.where(key)}: expected at most {most:,}, found {repr(value)[:80]}"
                )

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of numbers >= 0; absent or null: none. Raises: SourceError for anything else."""
        value = self.values.get(key)
        found = [] if value is None else value
        if not isinstance(found, list) or not all(
            type(item) is int and item >= 0 for item in found
        ):
            raise SourceError(
                f"{self.where(key)}: expected a list of integers >= 0, found {value!r}"
            )
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersClasses:
    """The family's classes in transformers, by name: this package reads headers and imports no
    model code (model.decoder resolves them)."""

    module: str
    config: str
    layer: str
    rotary: str
    norm: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family. Config keys are those of the release's config.json; sizes are named where
    families disagree on the name."""

    model_type: str
    text_model_types: tuple[str, ...]
    """Model types that the text model's config may name."""
    moe_layers: Callable[[TextConfig], Iterator[int]]
    """Layers with routed experts. Raises what TextConfig raises."""
    moe_layers_key: str
    """The config key to blame where there is no such layer."""
    transformers: TransformersClasses
    text_config_path: tuple[str, ...] = ()
    num_experts_key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    hidden_size_key: str = "hidden_size"
    moe_intermediate_size_key: str = "moe_intermediate_size"
    supported: Mapping[str, tuple[object, ...]] = field(
        default_factory=lambda: {"hidden_act": ("silu",)}
    )
    """Config keys whose other values are refused: nothing here would compute what they say. An
    absent key is fine."""
    rules: tuple[Callable[[TextConfig], None], ...] = ()
    """What has to hold between config keys. Each raises what TextConfig raises."""
    float32_tensors: tuple[str, ...] = ()
    """Ends of names that stay in float32 whatever layers are computed in."""
    router_biases: tuple[str, ...] = ()
    """Ends of names of what the router adds to its scores before it chooses: -inf there keeps an
    expert from being chosen."""
    recomputed_tensors: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of names that some releases store although the model computes them: they pass through,
    and no layer is filled with them."""
    vision_prefixes: tuple[str, ...] = ()
    """Starts of the names of parts that read images: they pass through, and calibration never runs
    them."""
    serving_flags: tuple[str, ...] = ()
    """Flags for vLLM that this family's models need, for the card."""

    def fills_layer(self, name: str) -> bool:
        """False for a layer's tensor that passes through and that no layer is filled with."""
        return not name.endswith(self.recomputed_tensors) and not self.is_cache_scale(name)

    def is_cache_scale(self, name: str) -> bool:
        """True for a scale of keys or values that only servers read."""
        return CACHE_SCALE.fullmatch(name) is not None

    def check_supported(self, text: TextConfig) -> None:
        """Raises: SourceError for a setting that neither this project nor the transformers classes
        above would heed, and for settings that do not go together."""
        for key, allowed in self.supported.items():
            found = text.values.get(key)
            if key in text.values and not any(
                type(found) is type(value) and found == value for value in allowed
            ):  # JSON's true is Python's 1
                expected = " or ".join(repr(value) for value in allowed)
                raise SourceError(
                    f"{text.where(key)}: expected {expected} for model_type {self.model_type},"
                    f" found {found!r}"
                )
        for rule in self.rules:
            rule(text)


def layers_from_first_dense(text: TextConfig) -> Iterator[int]:
    """DeepSeek-V3's rule: all layers from first_k_dense_replace on."""
    return iter(
        range(text.integer("first_k_dense_replace", least=0), text.integer("num_hidden_layers"))
    )
