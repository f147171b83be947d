"""What a checkpoint has to be worth to be published: `--require 'kl<=0.12'`.

    kl, perplexity, accuracy         of the run's own evaluation, KL in nats a token
    kl_in_groups_of_32, ...          the same, as kernels of paired-4:8 see the checkpoint
    recovery, recovery.TASK          benchmarks in parts of the base's: their average, or one
    benchmark.TASK                   one benchmark, as a fraction

A figure that nobody has measured is not good enough. Nor is the average of some tasks, or a trial's
(benchmarks.limit).
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from p48ray.errors import ConfigError, RequirementError
from p48ray.finished.own_figures import OwnFigures
from p48ray.run.benchmark_results import BenchmarkTable
from p48ray.stages.evaluate import EvaluationResult

SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
FORM = re.compile(r"\s*([\w.-]+)\s*(<=|>=|<|>)\s*(\S+)\s*")
OF_EVALUATION = ("kl", "perplexity", "accuracy")
IN_GROUPS_OF_32 = "_in_groups_of_32"
FIGURES = (
    *OF_EVALUATION,
    *(f"{name}{IN_GROUPS_OF_32}" for name in OF_EVALUATION),
    "recovery",
    "recovery.TASK",
    "benchmark.TASK",
)
TASK = re.compile(r"(?:recovery|benchmark)\.(.+)")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One comparison. `text`: as it was asked for."""

    text: str
    figure: str
    sign: str
    bound: float

    def is_met(self, found: float) -> bool:
        """Never by what is no number."""
        return SIGNS[self.sign](found, self.bound)


def parse_requirement(text: str) -> Requirement:
    """Raises: ConfigError for what is no comparison of a known figure with a number."""
    found = FORM.fullmatch(text)
    if found is None or not (found[1] in FIGURES or TASK.fullmatch(found[1])):
        raise ConfigError(
            f"--require {text!r}: expected a figure ({', '.join(FIGURES)}), one of"
            f" {' '.join(SIGNS)} and a number, for instance 'kl<=0.12'"
        )
    try:
        bound = float(found[3])
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise ConfigError(
            f"--require {text!r}: expected a number behind {found[2]}, found {found[3]!r}"
        )
    return Requirement(text.strip(), found[1], found[2], bound)


def check_requirements(requirements: Sequence[Requirement], figures: OwnFigures) -> None:
    """Raises: RequirementError with all that are not met, and what was found in their place."""
    unmet = []
    for requirement in requirements:
        found = find_figure(requirement.figure, figures)
        if isinstance(found, str):
            unmet.append(f"{requirement.text}: {requirement.figure} is missing: {found}")
        elif not requirement.is_met(found):
            unmet.append(f"{requirement.text}: {requirement.figure} is {found:.6g}")
    if unmet:
        lines = "\n".join(f"  {line}" for line in unmet)
        raise RequirementError(
            f"--require: {len(unmet)} of {len(requirements)} not met; nothing was sent\n{lines}"
        )


def find_figure(name: str, figures: OwnFigures) -> float | str:
    """The figure, or why there is none."""
    if name == "recovery" or TASK.fullmatch(name):
        return find_benchmark(name, figures.table)
    return find_quality(name, figures.quality)


def find_quality(name: str, quality: EvaluationResult | None) -> float | str:
    if quality is None:
        return "the run root has no evaluation of this checkpoint (section evaluation)"
    if not name.endswith(IN_GROUPS_OF_32):
        return {
            "kl": quality.kl,
            "perplexity": quality.compressed_perplexity,
            "accuracy": quality.compressed_accuracy,
        }[name]
    if (other := quality.in_groups_of_32) is None:
        return "the checkpoint was not evaluated with activations in groups of 32"
    found: float = getattr(other, name.removesuffix(IN_GROUPS_OF_32))
    return found


def find_benchmark(name: str, table: BenchmarkTable | None) -> float | str:
    if table is None:
        return "the run root has no benchmarks of this checkpoint (jobs/evaluate.py)"
    if table.limit is not None:
        return f"benchmarks were a trial of at most {table.limit} documents a task"
    task = TASK.fullmatch(name)
    if task is None and len(table.averaged) < len(table.tasks):
        return f"only {len(table.averaged)} of {len(table.tasks)} tasks have a figure everywhere"
    ours, base = (
        table.average(role) if task is None else table.value(role, task[1])
        for role in ("ours", "base")
    )
    if ours is None:
        return "it was not measured"
    if name.startswith("benchmark."):
        return ours / 100
    return ours / base if base else "the table has no figure of the base"
