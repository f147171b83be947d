"""Verify a checkpoint that others have made paired-4:8 sparse: nothing promises its bytes, so what
is checked is that every expert can be converted (finished.foreign), and that no other value is NaN
or infinite without being told."""

from collections.abc import Iterator

from p48ray.checkpoint.families import describe_foreign
from p48ray.checkpoint.finite_values import FiniteCheck
from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layout import PROJECTIONS, ModelLayout
from p48ray.errors import ConfigError, SourceError
from p48ray.finished.foreign_units import EXPERTS_PER_UNIT, dense_unit
from p48ray.finished.survey import ForeignCheck, Survey
from p48ray.run.checkpoint_manifest import MANIFEST_FILE
from p48ray.run.plan import WorkUnit, plan_units
from p48ray.stages.read_ahead import chunks, readers
from p48ray.store.base import Store


def survey_foreign(checkpoint: Store, source: Store | None) -> Survey:
    """Headers and config.json; one check a file.

    Raises: SourceError, naming file and tensor, for a checkpoint that is not whole, or not of the
        layout that checkpoint.foreign describes; ConfigError where it is to be held against a
        source.
    """
    if source is not None:
        raise ConfigError(
            f"--source: expected a checkpoint with a {MANIFEST_FILE}, found none in"
            f" {checkpoint.uri}; convert it (p48ray convert --storage dense), and hold the result"
            " against it"
        )
    index = open_checkpoint(checkpoint)
    layout = describe_foreign(index)
    units: dict[str, list[WorkUnit]] = {file: [] for file in index.files}
    for unit in plan_units(layout, EXPERTS_PER_UNIT):
        first = layout.expert_tensor_names(unit.layer, unit.first_expert)[0]
        units[index.tensors[first].file].append(unit)
    others: dict[str, list[TensorEntry]] = {file: [] for file in index.files}
    for entry in index.outside_experts(layout):
        others[entry.file].append(entry)
    return Survey(
        checkpoint=checkpoint.uri,
        compared_with_source=False,
        num_shards=len(index.files),
        num_linears=len(layout.moe_layers) * layout.num_experts * len(PROJECTIONS),
        checks=tuple(
            foreign_check(index, layout, file, units[file], others[file]) for file in index.files
        ),
        problems=(),
        file_problems=(),
    )


def foreign_check(
    source: CheckpointIndex,
    layout: ModelLayout,
    file: str,
    units: list[WorkUnit],
    others: list[TensorEntry],
) -> ForeignCheck:
    """The check of one file.

    Args:
        source, layout: of the whole checkpoint.
        file: its name.
        units, others: what is to be looked at.
    """
    names = [n for u in units for e in u.experts for n in layout.expert_tensor_names(u.layer, e)]
    tensors = {name: source.tensors[name] for name in names}
    return ForeignCheck(
        file=file,
        size_bytes=sum(e.num_bytes for e in [*tensors.values(), *others]),
        source=CheckpointIndex(source.store, {}, tensors, (file,), (), source.fingerprint),
        layout=layout,
        units=tuple(units),
        others=tuple(others),
    )


def foreign_problems(check: ForeignCheck) -> Iterator[str]:
    """What is wrong with the experts; of each unit the first that is."""
    for unit in check.units:
        try:
            dense_unit(check.source, check.layout, unit)
        except SourceError as error:
            yield str(error)


def foreign_notes(check: ForeignCheck) -> Iterator[str]:
    """Other tensors with values that are not finite."""
    with readers(check.size_bytes) as threads:
        for entry in check.others:
            values = FiniteCheck(entry.dtype, entry.shape)
            for data in chunks(check.source.store, entry, threads.reads):
                values.add(data)
            if values.found:
                yield f"{entry.file}: {entry.name}: holds {values.found}"
