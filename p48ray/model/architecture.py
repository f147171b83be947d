"""The modules that transformers has for a model: its config, and one decoder layer, built empty."""

from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from p48ray.checkpoint.families import Family
from p48ray.errors import P48Error

NOT_PASSED = ("quantization_config", "model_type", "architectures", "auto_map")
"""Keys of a config that say what loads a checkpoint, not what the model computes."""


class Architecture(NamedTuple):
    """The transformers classes of a family."""

    config: Any
    layer: Any
    rotary: Any
    norm: Any


def architecture(family: Family) -> Architecture:
    """The classes that a family's record names. Raises: P48Error, naming class and record, where
    transformers has none of that name."""
    import transformers  # half a second and 100 MB: only where a model is run

    names = family.transformers
    try:
        module = import_module(names.module)
        return Architecture(
            *(
                getattr(module, name)
                for name in (names.config, names.layer, names.rotary, names.norm)
            )
        )
    except (ImportError, AttributeError) as error:
        raise P48Error(
            f"family {family.model_type}: transformers {transformers.__version__} has not what its"
            f" file names: {error}"
        ) from error


def model_config(arch: Architecture, text_config: Mapping[str, Any]) -> Any:
    """The config object of the family's class. Raises: whatever the class has against the values
    (model.source_check says it to the user)."""
    # transformers writes into the mappings that it is given: those are config.json's
    settings = deepcopy({k: v for k, v in text_config.items() if k not in NOT_PASSED})
    config = arch.config.from_dict(settings)
    config._attn_implementation = "sdpa"
    return config


def empty_layer(arch: Architecture, config: Any, number: int, experts: nn.Module | None) -> Any:
    """Layer `number` on the meta device: shapes without values.

    Args:
        arch, config: the family's classes, and what model_config made.
        number: of the layer, from 0.
        experts: takes the place of its routed experts; None for a dense layer.
    Raises: P48Error where the class disagrees on which layers have experts.
    """
    with torch.device("meta"):
        module = arch.layer(config, number)
    if hasattr(module.mlp, "experts") != (experts is not None):
        kind = "a dense layer" if experts is None else "a layer with experts"
        raise P48Error(
            f"layer {number}: expected {kind} by the family's record, found that"
            f" {type(module).__name__} makes another"
        )
    if experts is not None:
        module.mlp.experts = experts
    return module
