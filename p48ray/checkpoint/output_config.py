"""The config.json of the compressed checkpoint: the source's, with the NVFP4 quantization_config in
place of any other.

Targets have to hold under two naming schemes, because transformers renames modules
("language_model.model.layers" becomes "model.language_model.layers") and vLLM does not, and both
match from the start of the name: hence one target that names the experts and begins with `.*`.
What else there is, `ignore` names (checkpoint.ignore).
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from p48ray.checkpoint.ignore import ignored
from p48ray.checkpoint.index import CONFIG_KEY, CheckpointIndex
from p48ray.checkpoint.layout import ModelLayout

EXPERTS_TARGET = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
NVFP4_FORMAT = "nvfp4-pack-quantized"
CACHE_KEY = "kv_cache_scheme"
IGNORE_KEY = "ignore"


def output_config(source: CheckpointIndex, layout: ModelLayout) -> dict[str, Any]:
    """A new config: the source's without its quantization_config, wherever that was, and with ours
    at the top level.

    What the old one said of a quantized cache of keys and values (kv_cache_scheme) is said on:
    the scales that go with it pass through.
    """
    config = _without(source.config, CONFIG_KEY)
    assert isinstance(config, dict)
    old = layout.text_config.get(CONFIG_KEY) or source.config.get(CONFIG_KEY)
    cache = old.get(CACHE_KEY) if isinstance(old, Mapping) else None
    config[CONFIG_KEY] = {**nvfp4_config(ignored(source, layout)), CACHE_KEY: deepcopy(cache)}
    return config


def nvfp4_config(ignore: list[str]) -> dict[str, Any]:
    """W4A4 NVFP4 for the routed experts, plain JSON. `ignore`: patterns for all other linears."""
    # Two seconds of every command's start otherwise, and of every worker's.
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    scheme = preset_name_to_scheme("NVFP4", [EXPERTS_TARGET])
    scheme.format = NVFP4_FORMAT
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=NVFP4_FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    # Newer than most clients, and None here: older releases of compressed-tensors refuse keys that
    # they do not know.
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude={"moe_sparsity_config"})
    return dumped


def _without(value: object, key: str) -> object:
    """A deep copy of JSON without one key at any depth."""
    if isinstance(value, Mapping):
        return {name: _without(inner, key) for name, inner in value.items() if name != key}
    if isinstance(value, list):
        return [_without(inner, key) for inner in value]
    return value


def config_json(config: Mapping[str, Any]) -> bytes:
    """config.json as a checkpoint has it."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def index_json(index: Mapping[str, Any]) -> bytes:
    """model.safetensors.index.json as a checkpoint has it."""
    return (json.dumps(index, indent=2) + "\n").encode()
