"""From an index to a layout: which family a checkpoint is, and whether it holds what that family
holds.

What differs between families stands in their files (see record and docs/families.md). Where the
text model's names start is read off the experts' names, sizes come from the config, and the two are
checked against each other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from p48ray.checkpoint.expert_checks import (
    ExpertEntries,
    check_divisibility,
    check_experts,
    check_untouched,
    int4_group_size,
)
from p48ray.checkpoint.families.record import Family, TextConfig
from p48ray.checkpoint.families.registry import FAMILIES
from p48ray.checkpoint.foreign import foreign_storage, is_foreign
from p48ray.checkpoint.fp8 import check_fp8
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CONFIG_FILE, CheckpointIndex
from p48ray.checkpoint.layout import (
    EXPERT_NAME,
    EXPERT_SUFFIXES,
    FOREIGN_STORAGES,
    PROJECTIONS,
    SOURCE_STORAGES,
    ExpertStorage,
    LayerNames,
    ModelLayout,
)
from p48ray.collection import nothing_collected
from p48ray.errors import SourceError

__all__ = [
    "FAMILIES",
    "PROJECTIONS",
    "Family",
    "LayerNames",
    "ModelLayout",
    "check_divisibility",
    "describe_any",
    "describe_foreign",
    "describe_model",
    "describe_names",
]


@nothing_collected()
def describe_model(index: CheckpointIndex) -> ModelLayout:
    """The layout of a checkpoint, all of whose expert tensors have been checked to be there with
    the right dtype and shape.

    Raises: SourceError, naming file and key, for a family that is not known and whatever config and
        headers disagree on.
    """
    return _layout(index, SOURCE_STORAGES)


@nothing_collected()
def describe_foreign(index: CheckpointIndex) -> ModelLayout:
    """The layout of a checkpoint that others have made paired-4:8 sparse (checkpoint.foreign), all
    of whose expert tensors have been checked to be there with the right dtype and shape.

    Raises: SourceError as describe_model; for another quantization; and for weights outside the
        experts that are not plain.
    """
    layout = _layout(index, (foreign_storage(index.config),))
    for entry in index.outside_experts(layout):
        if entry.dtype.startswith("F8"):
            raise SourceError(
                f"{entry.file}: tensor {entry.name}: expected plain weights outside the routed"
                f" experts of a checkpoint whose experts are NVFP4, found {entry.dtype}"
            )
    return layout


def describe_any(index: CheckpointIndex) -> ModelLayout:
    """describe_foreign where config.json speaks of such a checkpoint, else describe_model."""
    return describe_foreign(index) if is_foreign(index.config) else describe_model(index)


def _layout(index: CheckpointIndex, storages: Sequence[ExpertStorage]) -> ModelLayout:
    """Args: storages: that the experts may have."""
    family = _family(index.config)
    text = _text_config(index.config, family)
    text.check_sizes()
    family.check_supported(text)
    num_layers = text.integer("num_hidden_layers")
    fp8_block = None if storages[0] in FOREIGN_STORAGES else check_fp8(index, text.values)
    prefix, experts, passthrough_layers = _find_experts(index, num_layers)
    storage = storages[0] if len(storages) == 1 else _storage(experts, storages)
    num_experts, top_k = text.integer(family.num_experts_key), text.integer(family.top_k_key)
    if top_k > num_experts:
        raise SourceError(
            f"{text.where(family.top_k_key)}: expected at most the {num_experts} experts of a layer"
            f" ({family.num_experts_key}), found {top_k}"
        )
    text.integer("vocab_size")
    layout = ModelLayout(
        family=family.model_type,
        text_config=dict(text.values),
        text_config_path=family.text_config_path,
        layer_prefix=f"{prefix}layers.",
        embed_name=f"{prefix}embed_tokens.weight",
        norm_name=f"{prefix}norm.weight",
        head_name=_head_name(index, text.values, prefix),
        num_layers=num_layers,
        moe_layers=_moe_layers(family, text),
        passthrough_expert_layers=passthrough_layers,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=text.integer(family.hidden_size_key),
        moe_intermediate_size=text.integer(family.moe_intermediate_size_key),
        expert_storage=storage,
        int4_group_size=int4_group_size(index.config, text.values) if storage == "int4" else None,
        fp8_block=fp8_block,
    )
    _check_ends(index, layout)
    check_experts(layout, experts)
    check_untouched(index, layout)
    return layout


def describe_names(index: CheckpointIndex) -> LayerNames:
    """What a checkpoint calls its layers and experts. Also of a finished one; of tensors' forms
    nothing is checked.

    Raises: SourceError, naming file and key, for a family that is not known, or no experts.
    """
    family = _family(index.config)
    text = _text_config(index.config, family)
    num_layers = text.integer("num_hidden_layers")
    prefix, _, _ = _find_experts(index, num_layers)
    return LayerNames(
        layer_prefix=f"{prefix}layers.",
        embed_name=f"{prefix}embed_tokens.weight",
        num_layers=num_layers,
        moe_layers=_moe_layers(family, text),
    )


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SourceError(
            f"{CONFIG_FILE}: model_type: expected one of {', '.join(FAMILIES)}, found"
            f" {model_type!r}; a family is one file in p48ray/checkpoint/families (docs/families.md"
            " shows how to add it)"
        )
    return FAMILIES[model_type]


def _text_config(config: Mapping[str, Any], family: Family) -> TextConfig:
    """The text model's config. Raises: SourceError if it is not there, or is of another
    architecture."""
    found: Any = config
    for key in family.text_config_path:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise SourceError(
            f"{CONFIG_FILE}: {'.'.join(family.text_config_path)}: expected an object, found"
            f" {found!r}"
        )
    text = TextConfig(found, family.text_config_path)
    if found.get("model_type") not in family.text_model_types:
        known = ", ".join(family.text_model_types)
        raise SourceError(
            f"{text.where('model_type')}: expected one of {known}, found"
            f" {found.get('model_type')!r}"
        )
    return text


def _moe_layers(family: Family, text: TextConfig) -> tuple[int, ...]:
    layers = tuple(family.moe_layers(text))
    if not layers:
        raise SourceError(
            f"{text.where(family.moe_layers_key)}: expected a layer with experts, found none"
        )
    return layers


def _find_experts(
    index: CheckpointIndex, num_layers: int
) -> tuple[str, ExpertEntries, tuple[int, ...]]:
    """Returns: (what stands before "layers.", the experts' tensors in layers below num_layers, the
    layers behind that have experts)."""
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
        raise SourceError(
            "expected routed experts under one (prefix)layers.N.mlp.experts.E, found"
            f" {', '.join(names) or 'none'}"
        )
    if not experts:
        raise SourceError(
            f"expected routed experts in layers below num_hidden_layers {num_layers}, found only"
            f" {sorted(layers_behind)}"
        )
    return next(iter(prefixes)), experts, tuple(sorted(layers_behind))


def _storage(experts: ExpertEntries, storages: Sequence[ExpertStorage]) -> ExpertStorage:
    """How the experts are stored, by the first one; check_experts then holds all others to it.
    Raises: SourceError for an unknown way."""
    entries = experts[min(experts)]
    for storage in storages:
        if EXPERT_SUFFIXES[storage][0] in entries:
            return storage
    entry = next(iter(entries.values()))
    found = ", ".join(sorted(entries))
    raise SourceError(
        f"{entry.file}: tensor {entry.name}: expected weight_packed or weight for this linear,"
        f" found {found}"
    )


def _head_name(index: CheckpointIndex, text_config: Mapping[str, Any], prefix: str) -> str:
    """The head lies beside the inner "model."; what transformers 5 wrote of a model with a vision
    part has it at the top. A model whose config ties it to the embedding need not store it."""
    name = f"{prefix.removesuffix('model.')}lm_head.weight"
    if name not in index.tensors and "lm_head.weight" in index.tensors:
        name = "lm_head.weight"
    is_tied = bool(
        text_config.get("tie_word_embeddings", index.config.get("tie_word_embeddings", False))
    )
    return f"{prefix}embed_tokens.weight" if is_tied and name not in index.tensors else name


def _check_ends(index: CheckpointIndex, layout: ModelLayout) -> None:
    """Raises: SourceError unless embedding, last norm and head are there: the calibration's forward
    pass needs them."""
    for name in (layout.embed_name, layout.norm_name, layout.head_name):
        if name not in index.tensors:
            raise SourceError(
                f"tensor {name}: expected in the checkpoint (the experts' names start the same"
                " way), found none"
            )
