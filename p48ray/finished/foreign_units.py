"""Units of a checkpoint that others have made paired-4:8 sparse, in dense storage: what converts
such a checkpoint and what verifies it have in common."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from p48ray.checkpoint.decode import expert_entries
from p48ray.checkpoint.foreign import (
    Folding,
    ForeignLinear,
    is_foreign,
    read_linear,
    shared_expert,
    weight_values,
)
from p48ray.checkpoint.header import json_object
from p48ray.checkpoint.index import CONFIG_FILE, CheckpointIndex
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.checkpoint.tensors import read_tensors
from p48ray.config import RunSettings
from p48ray.numerics import nvfp4
from p48ray.numerics.relative_errors import relative_weight_error
from p48ray.run.checkpoint_manifest import MANIFEST_FILE
from p48ray.run.output_layout import unit_tensor_names
from p48ray.run.plan import WorkUnit
from p48ray.store.base import Store

EXPERTS_PER_UNIT: int = RunSettings.model_fields["experts_per_unit"].default


def is_foreign_folder(checkpoint: Store) -> bool:
    """Whether it has no p48ray.json, and a config.json as others write it of paired-4:8 experts."""
    if checkpoint.head(MANIFEST_FILE) is not None or checkpoint.head(CONFIG_FILE) is None:
        return False
    return is_foreign(json_object(CONFIG_FILE, checkpoint.get(CONFIG_FILE), unique_keys=False))


@dataclass(frozen=True, slots=True)
class DenseUnit:
    """A unit's tensors in the order of its own shard; of its linears, |W - Q|^2 / |W|^2 against the
    checkpoint that it comes from, and foldings, by module name."""

    tensors: dict[str, Tensor]
    errors: dict[str, float]
    foldings: dict[str, Folding]


def dense_unit(source: CheckpointIndex, layout: ModelLayout, unit: WorkUnit) -> DenseUnit:
    """Read a unit's experts and share their global scales.

    Raises: SourceError, naming file and tensor.
    """
    entries = expert_entries(source, layout, unit.layer, unit.experts)
    stored = read_tensors(source.store, entries)
    by_name: dict[str, Tensor] = {}
    linears: list[str] = []
    errors: dict[str, float] = {}
    foldings: dict[str, Folding] = {}
    for expert in unit.experts:
        names = {p: layout.expert_linear_name(unit.layer, expert, p) for p in PROJECTIONS}
        where = {p: place_of(source, layout, name) for p, name in names.items()}
        theirs = {
            p: read_linear(
                {s: stored[f"{name}.{s}"] for s in layout.expert_suffixes},
                layout.expert_storage,
                where[p],
            )
            for p, name in names.items()
        }
        dense, changed = shared_expert(theirs, where)
        for projection, name in names.items():
            linears.append(name)
            by_name |= {f"{name}.{s}": tensor for s, tensor in dense[projection].items()}
            errors[name] = 0.0
            if projection in changed:
                foldings[name] = changed[projection]
                errors[name] = folding_error(theirs[projection], dense[projection])
    return DenseUnit({name: by_name[name] for name in unit_tensor_names(linears)}, errors, foldings)


def place_of(source: CheckpointIndex, layout: ModelLayout, linear: str) -> str:
    """File and name of a linear, for messages."""
    file = source.tensors[f"{linear}.{layout.expert_suffixes[0]}"].file
    return f"{source.store.uri}/{file}: tensor {linear}"


def folding_error(before: ForeignLinear, after: Mapping[str, Tensor]) -> float:
    """|W - Q|^2 / |W|^2."""
    values = nvfp4.dequantize_packed(
        after["weight_packed"][None], after["weight_scale"][None], after["weight_global_scale"]
    )
    return relative_weight_error(weight_values(before)[None], values).item()
