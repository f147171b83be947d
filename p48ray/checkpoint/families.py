"""From an index to a layout: which family a checkpoint is, and whether it holds what that family holds.

Nothing but the model types is hard-wired: where the text model's names start is read off the experts' names, sizes come from the config,
and the two are checked against each other.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from p48ray.checkpoint.experts import ExpertEntries, check_divisibility, check_experts, check_no_fp8, check_untouched, int4_group_size
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CONFIG_FILE, CheckpointIndex
from p48ray.checkpoint.layout import EXPERT_NAME, EXPERT_SUFFIXES, PROJECTIONS, ExpertStorage, ModelLayout
from p48ray.errors import SourceError

FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType({"kimi_k25": ("text_config",), "kimi_k2": (), "deepseek_v3": ()})
"""model_type -> where in config.json the text model's config is."""

TEXT_MODEL_TYPES = ("kimi_k2", "deepseek_v3")
"""The architectures that the layers behind a layout may have: DeepSeek-V3's, under two names."""

__all__ = ["FAMILIES", "PROJECTIONS", "TEXT_MODEL_TYPES", "ModelLayout", "check_divisibility", "describe_model"]


def describe_model(index: CheckpointIndex) -> ModelLayout:
    """The layout of a checkpoint, all of whose expert tensors have been checked to be there with the right dtype and shape.

    Raises: SourceError, naming file and key, for a family that is not known, FP8 weights, and whatever config and headers disagree on.
    """
    family = _family(index.config)
    path = FAMILIES[family]
    text_config = _text_config(index.config, path)
    check_no_fp8(index)
    prefix, experts, passthrough_layers = _find_experts(index, _size(text_config, path, "num_hidden_layers"))
    storage = _storage(experts)
    layout = ModelLayout(
        family=family,
        text_config=text_config,
        text_config_path=path,
        layer_prefix=f"{prefix}layers.",
        embed_name=f"{prefix}embed_tokens.weight",
        norm_name=f"{prefix}norm.weight",
        head_name=_head_name(index, text_config, prefix),
        num_layers=_size(text_config, path, "num_hidden_layers"),
        moe_layers=_moe_layers(text_config, path),
        passthrough_expert_layers=passthrough_layers,
        num_experts=_size(text_config, path, "n_routed_experts"),
        top_k=_size(text_config, path, "num_experts_per_tok"),
        hidden_size=_size(text_config, path, "hidden_size"),
        moe_intermediate_size=_size(text_config, path, "moe_intermediate_size"),
        expert_storage=storage,
        int4_group_size=int4_group_size(index.config, text_config) if storage == "int4" else None,
    )
    _check_ends(index, layout)
    check_experts(layout, experts)
    check_untouched(index, layout)
    return layout


def _family(config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise SourceError(f"{CONFIG_FILE}: model_type: expected one of {', '.join(FAMILIES)}, found {family!r}")
    return family


def _text_config(config: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The text model's config. Raises: SourceError if it is not there, or is of another architecture."""
    found: Any = config
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise SourceError(f"{CONFIG_FILE}: {'.'.join(path)}: expected an object, found {found!r}")
    if found.get("model_type") not in TEXT_MODEL_TYPES:
        where = ".".join((*path, "model_type"))
        raise SourceError(f"{CONFIG_FILE}: {where}: expected one of {', '.join(TEXT_MODEL_TYPES)}, found {found.get('model_type')!r}")
    return found


def _size(text_config: Mapping[str, Any], path: tuple[str, ...], key: str, *, least: int = 1) -> int:
    """A number of the text config. Raises: SourceError, naming its dotted path, if it is no integer of at least `least`."""
    value = text_config.get(key)
    if type(value) is not int or value < least:
        raise SourceError(f"{CONFIG_FILE}: {'.'.join((*path, key))}: expected an integer >= {least}, found {value!r}")
    return value


def _moe_layers(text_config: Mapping[str, Any], path: tuple[str, ...]) -> tuple[int, ...]:
    """Layers with routed experts, by DeepSeek-V3's rule: from first_k_dense_replace on, every moe_layer_freq-th."""
    first = _size(text_config, path, "first_k_dense_replace", least=0)
    step = _size(text_config, path, "moe_layer_freq") if "moe_layer_freq" in text_config else 1
    layers = tuple(layer for layer in range(first, _size(text_config, path, "num_hidden_layers")) if layer % step == 0)
    if not layers:
        raise SourceError(f"{CONFIG_FILE}: {'.'.join((*path, 'first_k_dense_replace'))}: expected a layer with experts, found none")
    return layers


def _find_experts(index: CheckpointIndex, num_layers: int) -> tuple[str, ExpertEntries, tuple[int, ...]]:
    """Returns: (what stands before "layers.", the experts' tensors in layers below num_layers, the layers behind that have experts)."""
    prefixes: dict[str, TensorEntry] = {}
    experts: dict[tuple[int, int, str], dict[str, TensorEntry]] = {}
    layers_behind: set[int] = set()
    for entry in index.tensors.values():
        if ".experts." not in entry.name or not (found := EXPERT_NAME.fullmatch(entry.name)):
            continue
        prefix, layer = found[1], int(found[2])
        prefixes.setdefault(prefix, entry)
        if layer < num_layers:
            experts.setdefault((layer, int(found[3]), found[4]), {})[found[5]] = entry
        else:
            layers_behind.add(layer)
    if len(prefixes) != 1:
        names = [f"{entry.name} ({entry.file})" for entry in prefixes.values()]
        raise SourceError(f"expected routed experts under one (prefix)layers.N.mlp.experts.E, found {', '.join(names) or 'none'}")
    if not experts:
        raise SourceError(f"expected routed experts in layers below num_hidden_layers {num_layers}, found only {sorted(layers_behind)}")
    return next(iter(prefixes)), experts, tuple(sorted(layers_behind))


def _storage(experts: ExpertEntries) -> ExpertStorage:
    """How the experts are stored, by the first one; check_experts then holds all others to it. Raises: SourceError for an unknown way."""
    entries = experts[min(experts)]
    for storage, suffixes in EXPERT_SUFFIXES.items():
        if suffixes[0] in entries:
            return storage
    entry = next(iter(entries.values()))
    known = " or ".join(suffixes[0] for suffixes in EXPERT_SUFFIXES.values())
    raise SourceError(f"{entry.file}: tensor {entry.name}: expected {known} for this linear, found {', '.join(sorted(entries))}")


def _head_name(index: CheckpointIndex, text_config: Mapping[str, Any], prefix: str) -> str:
    """The head lies beside the inner "model."; a model whose config ties it to the embedding need not store it."""
    name = f"{prefix.removesuffix('model.')}lm_head.weight"
    is_tied = bool(text_config.get("tie_word_embeddings", index.config.get("tie_word_embeddings", False)))
    return f"{prefix}embed_tokens.weight" if is_tied and name not in index.tensors else name


def _check_ends(index: CheckpointIndex, layout: ModelLayout) -> None:
    """Raises: SourceError unless embedding, last norm and head are there: the calibration's forward pass needs them."""
    for name in (layout.embed_name, layout.norm_name, layout.head_name):
        if name not in index.tensors:
            raise SourceError(f"tensor {name}: expected in the checkpoint (the experts' names start the same way), found none")
