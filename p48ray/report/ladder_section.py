"""What report.html says about the solve, step by step: the error ladder.

Beside it stands what the steps are worth on held-out text, where that was measured.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from p48ray.numerics.solution import PAIRED_48
from p48ray.numerics.solvers import SOLVERS
from p48ray.report.fold import Facts, Values
from p48ray.report.run_sections import worst_kl
from p48ray.unit.ladder import DENSE, ONE_SHOT, REFINED

SIDE_TITLES = (("gate and up", "gate_up"), ("down", "down"))
STEP_WORDS = {DENSE: "NVFP4, dense", ONE_SHOT: "one-shot", REFINED: "refined"}
"""Steps that every solver may have; a solver's last one is its record's."""
STEP_COLOURS = {DENSE: "s5", ONE_SHOT: "s2"}
"""Colours: dense as a reference, the one-shot's own, the run's own."""


class Step(NamedTuple):
    """A bar: what it is of, how high, its length as a share of the longest, its CSS class."""

    name: str
    value: float
    share: float
    css: str


def ladder(facts: Facts) -> Values | None:
    """Values of ladder.html.j2; None where no unit has measured its steps."""
    steps = facts.report.ladder
    if not steps:
        return None
    names = [(step_words(facts, s.step), STEP_COLOURS.get(s.step, "s1")) for s in steps]
    plain = by_side(names, [s.output_error for s in steps])
    is_two_sided = bool(steps[0].loss_error)
    return {
        "is_two_sided": is_two_sided,
        "is_sparse": facts.report.sparsity == PAIRED_48,
        "num_experts": steps[0].experts,
        "sides": by_side(names, [s.loss_error for s in steps]) if is_two_sided else plain,
        "plain": plain if is_two_sided else [],
        "kl": kl_steps(facts),
    }


def step_words(facts: Facts, step: str) -> str:
    """The step, and on how many sides a solver's descent worked."""
    solver = next((s for s in SOLVERS.values() if s.step == step), None)
    if solver is None or step in STEP_WORDS:
        return STEP_WORDS.get(step, step)
    is_two_sided = facts.context.plan.uses_gradients
    return solver.label + (", two-sided" if solver.descends and is_two_sided else "")


def by_side(names: Sequence[tuple[str, str]], errors: Sequence[Mapping[str, float]]) -> Values:
    """Side -> its bars, on one scale for both. `names`: (words, CSS class) of each step. `errors`:
    its errors by side."""
    most = max(e[side] for e in errors for _, side in SIDE_TITLES) or 1.0
    return {
        title: ladder_bars(names, [e[side] for e in errors], most) for title, side in SIDE_TITLES
    }


def ladder_bars(
    names: Sequence[tuple[str, str]], values: Sequence[float], most: float
) -> list[Step]:
    """`most`: what a full bar stands for."""
    pairs = zip(names, values, strict=True)
    return [Step(name, value, value / most, css) for (name, css), value in pairs]


def kl_steps(facts: Facts) -> list[Step]:
    """KL of this checkpoint and the published one-shot's; nothing where there is no other to set
    it beside."""
    r = facts.report
    if r.quality is None or r.baseline is None:
        return []
    names = [("one-shot, as published", STEP_COLOURS[ONE_SHOT]), ("this checkpoint", "s1")]
    return ladder_bars(names, [r.baseline.kl, r.quality.kl], worst_kl(r))
