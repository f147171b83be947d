"""Compressed linears as a finished checkpoint has them, in whatever form: which units there are,
whether their tensors are there, and what their global scales are."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from p48ray.checkpoint.header import TensorEntry
from p48ray.checkpoint.index import HEADER_THREADS
from p48ray.checkpoint.layout import EXPERT_NAME, PROJECTIONS
from p48ray.checkpoint.modelopt import (
    DIVISORS,
    Form,
    GlobalScales,
    divisor_problem,
    factor_problem,
    form_suffixes,
    tensor_forms,
)
from p48ray.checkpoint.sparse_storage import PACKED
from p48ray.checkpoint.tensors import read_tensors
from p48ray.errors import ConfigError, ShardCorruptError, SourceError
from p48ray.run.checkpoint_manifest import MANIFEST_FILE, CheckpointManifest
from p48ray.run.output_layout import unit_tensor_names
from p48ray.run.plan import WorkUnit, ranges
from p48ray.store.base import Store


def units_of(manifest: CheckpointManifest) -> Iterator[tuple[WorkUnit, list[str]]]:
    """Every unit with its linears in shard order, from the names and the unit size in the
    manifest."""
    layers: dict[tuple[int, str], set[int]] = {}
    for name in manifest.relative_weight_errors:
        found = EXPERT_NAME.fullmatch(f"{name}.weight")
        if found is None:
            raise ShardCorruptError(
                f"{MANIFEST_FILE}: relative_weight_errors: expected names of expert linears, found"
                f" {name!r}"
            )
        layers.setdefault((int(found[2]), found[1]), set()).add(int(found[3]))
    for (layer, prefix), experts in sorted(layers.items()):
        for first, count in ranges(max(experts) + 1, manifest.experts_per_unit):
            unit = WorkUnit(layer=layer, first_expert=first, num_experts=count)
            yield (
                unit,
                [
                    f"{prefix}layers.{layer}.mlp.experts.{e}.{p}"
                    for e in unit.experts
                    for p in PROJECTIONS
                ],
            )


def check_form(linear: str, entries: Mapping[str, TensorEntry], form: Form) -> list[str]:
    """A linear's tensors are there, in dtypes and shapes that fit each other."""
    names = unit_tensor_names([linear], form)
    if missing := [f"{name}: missing" for name in names if name not in entries]:
        return missing
    codes = form_suffixes(PACKED, form)[0]
    expected = tensor_forms(entries[f"{linear}.{codes}"].shape, form)
    problems = []
    for name in names:
        wanted = expected[name.rpartition(".")[2]]
        found = (entries[name].dtype, entries[name].shape)
        if found != wanted:
            problems.append(f"{name}: expected {wanted}, found {found}")
    return problems


def check_forms(
    linears: Iterable[str], entries: Mapping[str, TensorEntry], form: Form
) -> list[str]:
    """check_form of many linears, each with its file; of those that have no tensor at all their
    files' headers tell."""
    found: list[str] = []
    for linear in linears:
        there = [n for n in unit_tensor_names([linear], form) if n in entries]
        if there:
            file = entries[there[0]].file
            found += [f"{file}: {text}" for text in check_form(linear, entries, form)]
    return found


def global_scales_of(manifest: CheckpointManifest) -> GlobalScales:
    """Those that p48ray.json keeps of a checkpoint in ModelOpt's layout; empty for any other.

    Raises: SourceError where it does not have every linear's.
    """
    if manifest.modelopt is None:
        return {}
    held = manifest.modelopt.global_scales
    if differing := sorted(held.keys() ^ manifest.relative_weight_errors.keys()):
        raise SourceError(
            f"{MANIFEST_FILE}: modelopt.global_scales: expected the linears of"
            f" relative_weight_errors, found {differing[0]} in one of the two alone"
        )
    return held


def check_source_is_comparable(form: Form) -> None:
    """Raises: ConfigError for a form that is not held against a source."""
    if form == "modelopt":
        raise ConfigError(
            "--source: expected a checkpoint in compressed-tensors' format, found one in ModelOpt's"
            " layout; verify it without --source, or convert it back first (p48ray convert --format"
            " compressed-tensors)"
        )


def read_scalars(
    checkpoint: Store, manifest: CheckpointManifest, entries: Mapping[str, TensorEntry], form: Form
) -> dict[str, tuple[float, float]]:
    """The two scalars of every compressed linear, as stored: a small read a unit.

    Args:
        checkpoint, manifest: of the checkpoint.
        entries: every tensor by name.
        form: that they are in.
    """
    suffixes = [form_suffixes(divisor, form)[0] for divisor in DIVISORS]

    def read(linears: list[str]) -> dict[str, tuple[float, float]]:
        names = [f"{linear}.{suffix}" for suffix in suffixes for linear in linears]
        found = read_tensors(checkpoint, [entries[name] for name in names])
        return {
            linear: (
                float(found[f"{linear}.{suffixes[0]}"]),
                float(found[f"{linear}.{suffixes[1]}"]),
            )
            for linear in linears
        }

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        read_units = list(pool.map(read, [linears for _, linears in units_of(manifest)]))
    return {linear: pair for unit in read_units for linear, pair in unit.items()}


def scalar_problems(
    scalars: GlobalScales, kept: GlobalScales, entries: Mapping[str, TensorEntry], form: Form
) -> Iterator[str]:
    """What is wrong with scalars that are to become their reciprocals, or to be taken back.

    Args:
        scalars: as stored.
        kept: the divisors that p48ray.json has, of a checkpoint in ModelOpt's layout.
        entries: every tensor by name.
        form: that the scalars are in.
    """
    for linear, pair in scalars.items():
        for place, divisor in enumerate(DIVISORS):
            problem = (
                divisor_problem(kept[linear][place])
                or factor_problem(pair[place], kept[linear][place])
                if form == "modelopt"
                else divisor_problem(pair[place])
            )
            if problem:
                name = f"{linear}.{form_suffixes(divisor, form)[0]}"
                yield f"{entries[name].file}: {name}: {problem}"
