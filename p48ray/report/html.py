"""report/report.html: a run as one page to look at.

It is self-contained: its own policy forbids the browser to fetch anything. It is a pure function of
what the run root holds; the clock of the machine that writes it plays no part.

How the page looks and what it says is in templates/: a file a section, and parts.html.j2 for what
several of them are made of. They escape whatever they are given. Functions here and in the modules
named *_section(s).py give them plain values; fold.py reads those from the run root, sample.py from
the checkpoint; charts.py and heat.py draw.
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from p48ray import __version__
from p48ray.numerics.solution import PAIRED_48
from p48ray.report.benchmark_section import benchmarks
from p48ray.report.charts import pct
from p48ray.report.domain_section import domains
from p48ray.report.expert_sections import errors, masks, outcomes, regularization, routing
from p48ray.report.fold import Facts, Values, gather_facts
from p48ray.report.gains import gains
from p48ray.report.greedy_section import greedy
from p48ray.report.heat import ERROR_RAMP, LOAD_RAMP
from p48ray.report.ladder_section import ladder
from p48ray.report.plan_table import size
from p48ray.report.report import Report
from p48ray.report.run_sections import cost, made, quality, timeline
from p48ray.report.scale_section import scales
from p48ray.report.status import RunStatus
from p48ray.report.work import duration, gpu_hours
from p48ray.run.manifest import UnitManifest
from p48ray.store.base import Store
from p48ray.unit.context import StageContext

SECTIONS: tuple[tuple[str, Callable[[Facts], Values | None]], ...] = (
    ("quality", quality),
    ("domains", lambda facts: domains(facts.report.quality, facts.report.baseline)),
    ("greedy", lambda facts: greedy(facts.report.agreements, emulates_w4a4(facts))),
    ("benchmarks", lambda facts: benchmarks(facts.report.benchmarks)),
    ("ladder", ladder),
    ("timeline", timeline),
    ("errors", errors),
    ("routing", routing),
    ("outcomes", outcomes),
    ("scales", scales),
    ("regularization", regularization),
    ("masks", masks),
    ("cost", cost),
    ("made", made),
)
"""Sections in the page's order: anchor, which is the template's name too, and what gives values.

A section without values is not shown.
"""


def report_html(
    context: StageContext,
    report: Report,
    units: Sequence[UnitManifest],
    baseline_store: Store | None = None,
    status: RunStatus | None = None,
) -> str:
    """The page.

    Args:
        context: of the run; its store is read.
        report: of the run.
        units: manifests of the run's units, all of them once it is finished.
        baseline_store: run root of the one-shot reference, for the overlap of masks.
        status: of a run that is not finished, which the page then says; None for one that is.
    """
    facts = gather_facts(context, report, units, baseline_store)
    found = [(anchor, values(facts)) for anchor, values in SECTIONS]
    sections = [(anchor, render(anchor, values)) for anchor, values in found if values is not None]
    script = Markup("\n" + asset("report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    frame = {
        "sections": sections,
        "style": Markup(asset("report.css")),
        "ramps": (ERROR_RAMP, LOAD_RAMP),
        "script": script,
        "script_digest": digest,
        "data": data(facts),
        "version": __version__,
    }
    return str(render("page", {**top(facts), **frame, "unfinished": unfinished(status)}))


def unfinished(status: RunStatus | None) -> Values | None:
    """What the page of a run that goes on says first: its stages, and of when they are."""
    if status is None:
        return None
    at = status.last_finished_at
    moment = None if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}"
    return {"stages": status.stages, "moment": moment}


def emulates_w4a4(facts: Facts) -> bool:
    settings = facts.context.plan.config.evaluation
    return settings is not None and settings.activations == "nvfp4"


def render(name: str, values: Values) -> Markup:
    """A template filled in.

    Args: name: of the file, without its ending. values: by the names that the template uses.
    Raises: jinja2.UndefinedError if the template uses a name that has no value.
    """
    return Markup(environment().get_template(f"{name}.html.j2").render(values))


@cache
def environment() -> Environment:
    """Templates with escaping on. A name without a value is an error.

    Filters: `fmt` with a format code of Python's, `duration` of seconds, `size` of bytes,
    `css_percent` of a share.
    """
    found = Environment(
        loader=PackageLoader("p48ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    filters = {"css_percent": css_percent, "duration": duration, "fmt": format, "size": size}
    assert not set(filters) & set(found.filters), "a filter of Jinja's own has that name"
    found.filters |= filters
    return found


def css_percent(share: float) -> str:
    """A length or a place within a bar, between nothing and the whole."""
    return pct(max(0.0, min(1.0, share)))


def asset(name: str) -> str:
    return resources.files("p48ray.report").joinpath(name).read_text(encoding="utf-8")


def data(facts: Facts) -> Values:
    """What the script reads out: four digits of every error, and every token count."""
    return {
        "layers": list(facts.layers),
        "experts": facts.context.layout.num_experts,
        "few": facts.few_tokens,
        "tokens": facts.tokens,
        "error": {p: [[finite(v) for v in row] for row in facts.errors(p)] for p in facts.records},
    }


def finite(value: float | None) -> float | None:
    return float(f"{value:.4g}") if value is not None and value - value == 0 else None


def top(facts: Facts) -> Values:
    """Values of the page's head: what was made, and the figures that a person asks for first."""
    r, run = facts.report, facts.context.plan.config.run
    hours = gpu_hours(facts.context.plan, facts.work)
    fallen = {
        k.replace("_", " "): n for k, n in sorted(r.outcomes.items()) if k not in ("solved", "zero")
    }
    return {
        "report": r,
        "is_pilot": facts.context.plan.is_pilot,
        "num_units": (len(facts.units), len(facts.context.plan.units)),
        "gains": gains(facts.context),
        "is_sparse": r.sparsity == PAIRED_48,
        "num_layers": len(facts.layers),
        "num_experts": facts.context.layout.num_experts,
        "fallen": fallen,
        "gpu_hours": hours,
        "price": run.gpu_hour_price,
        "worker_seconds": sum(w.worker_seconds for w in facts.work),
    }
