"""What report.html says about the solve, step by step: the error ladder, and what the steps are worth on held-out text where that was measured."""

from collections.abc import Mapping, Sequence

from p48ray.numerics.solution import PAIRED_48
from p48ray.numerics.solvers import SOLVERS
from p48ray.report import charts
from p48ray.report.charts import esc
from p48ray.report.expert_sections import figure, section
from p48ray.report.fold import Facts
from p48ray.report.report import LadderMean
from p48ray.stages.ladder import DENSE, ONE_SHOT, REFINED

SIDES = (("gate and up", "gate_up"), ("down", "down"))
STEP_WORDS = {DENSE: "NVFP4, dense", ONE_SHOT: "one-shot", REFINED: "refined"}
"""Steps that every solver may have; a solver's last one is its record's."""
PATH = {DENSE: "s5", ONE_SHOT: "s2"}
"""Colours: dense as a reference, the one-shot's own, the run's own."""


def ladder_section(facts: Facts) -> str:
    """Nothing where no unit has measured its steps."""
    ladder = facts.report.ladder
    if not ladder:
        return ""
    is_two_sided = bool(ladder[0].loss_error)
    metric = (
        "in the metric of the model's own loss (G, from gradients), which is what the solver lowers" if is_two_sided else "of the outputs"
    )
    price = (
        "The first bar of gate and up is the price of NVFP4 alone; sparsity adds the rest, and the steps after it take some of that back. "
    )
    intro = (
        f"How far the outputs of a linear are off after each step of its solve, {metric}: relative, over the calibration tokens, the mean of "
        f"{ladder[0].experts:,} experts (one a unit). {price if facts.report.sparsity == PAIRED_48 else ''}down answers for what gate and up lost before it; "
        "refinement lowers what an expert puts out as a whole, which may cost gate and up a little."
    )
    main = [step.loss_error if is_two_sided else step.output_error for step in ladder]
    figures = ladder_figures(facts, ladder, main)
    quality = kl_figure(facts)
    plain = ""
    if is_two_sided:
        shown = ladder_figures(facts, ladder, [step.output_error for step in ladder])
        plain = (
            "<details><summary>the same without the metric</summary><p>Mean |Wh − Qh′|² over mean |Wh|², every output counting the same. The descent "
            f"trades outputs that the loss does not feel for those that it does.</p>{shown}</details>"
        )
    return section("ladder", "Error ladder", intro, figures, quality, plain)


def words(facts: Facts, step: str) -> str:
    sides = ", two-sided" if facts.context.plan.config.compression.output_curvature else ""
    solver = next((s for s in SOLVERS.values() if s.step == step and step not in STEP_WORDS), None)
    if solver is None:
        return STEP_WORDS.get(step, step)
    return solver.label + (sides if solver.descends else "")


def ladder_figures(facts: Facts, ladder: Sequence[LadderMean], errors: Sequence[Mapping[str, float]]) -> str:
    """A figure a side: a bar a step, from zero."""
    figures = []
    for title, side in SIDES:
        values = [e[side] for e in errors]
        most = max(values) or 1.0
        rows = [
            [esc(words(facts, step.step)), f"{value:.4f}", charts.bar(value / most, PATH.get(step.step, "s1"))]
            for step, value in zip(ladder, values, strict=True)
        ]
        figures.append(figure(title, charts.table(("after", "error", ""), rows, (0, 2))))
    return f'<div class="pair">{"".join(figures)}</div>'


def kl_figure(facts: Facts) -> str:
    """KL of whole checkpoints: this one's, and the published one-shot's where it was run. Only what was evaluated."""
    r = facts.report
    if r.quality is None:
        return ""
    rows = [("this checkpoint", r.quality.kl, "s1")]
    if r.baseline is not None:
        rows.insert(0, ("one-shot, as published", r.baseline.kl, PATH[ONE_SHOT]))
    most = max(kl for _, kl, _ in rows) or 1.0
    body = [[esc(name), f"{kl:.4f}", charts.bar(kl / most, css)] for name, kl, css in rows]
    return figure("the whole checkpoint: KL to the source, nats a token", charts.table(("", "KL", ""), body, (0, 2)))
