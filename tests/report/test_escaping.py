"""Text of others stays text: a record, a setting or a chart's label adds no element to the page."""

import ast
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest
from pydantic import BaseModel

from p48ray.config import RunConfig
from p48ray.report import charts, fold, heat, html
from p48ray.report.html import SECTIONS, environment, render, report_html
from p48ray.report.report import Report, build_report
from p48ray.report.sample import LinearSample, sample_checkpoint
from p48ray.report.scales import Scale
from p48ray.run import run_root
from p48ray.run.manifest import LinearRecord, UnitManifest
from p48ray.unit.context import StageContext
from tests.conftest import REPO
from tests.report.test_benchmark_section import TABLE
from tests.report.test_html import with_ladder
from tests.stages.small_run import SmallRun

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")

EVIL = (
    "#</script></style></title></pre>"
    "<script>alert(1)</script><img src=x onerror='a'>\" b=\"&lt;{{ 7 * 7 }}"
)  # fmt: skip
HARMLESS = str.maketrans("<>&\"'{}/", "1234567-")
PLAIN = EVIL.translate(HARMLESS)
"""As long as EVIL, with no character that means something in HTML or to a template."""

KEPT_FIELDS = {"role", "unit"}
"""What says which of the code's own columns or units a record belongs to."""
KEPT_KEYS = {"gate_proj", "up_proj", "down_proj", "gate_up", "down"}


def marked(value: object, mark: str) -> Any:
    """`value` with `mark` before every string in it, whatever its field is called."""
    if isinstance(value, BaseModel):
        names = set(type(value).model_fields) - KEPT_FIELDS
        return value.model_copy(update={n: marked(getattr(value, n), mark) for n in names})
    if isinstance(value, dict):
        keys = [key if key in KEPT_KEYS else marked(key, mark) for key in value]
        return dict(zip(keys, marked(list(value.values()), mark), strict=True))
    if isinstance(value, (list, tuple)):
        return type(value)(marked(v, mark) for v in value)
    return mark + value if isinstance(value, str) else value


def harmless(text: str) -> str:
    """EVIL as PLAIN. Settings are shown as JSON, which puts a backslash before a quote."""
    return text.replace('\\"', '"').translate(HARMLESS)


class Tree(HTMLParser):
    """Elements, attributes and texts in their order, EVIL being PLAIN in texts and values."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.events: list[tuple[str, ...]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = [f"{name}={harmless(value or '')}" for name, value in attrs]
        self.events.append(("open", tag, *named))

    def handle_endtag(self, tag: str) -> None:
        self.events.append(("close", tag))

    def handle_data(self, data: str) -> None:
        self.events.append(("text", harmless(data)))

    def handle_comment(self, data: str) -> None:
        self.events.append(("comment", data))


@dataclass(frozen=True)
class Run:
    """What a page is made of."""

    context: StageContext
    config: RunConfig
    report: Report
    units: list[UnitManifest]

    def page(self) -> str:
        plan = self.context.plan.model_copy(update={"config": self.config})
        return report_html(replace(self.context, plan=plan), self.report, self.units)


@pytest.fixture(scope="module")
def run(finished: SmallRun) -> Run:
    """A run whose page tells all it can: steps, clipping, benchmarks, experts that fell back."""
    prepared = finished.prepared
    keys = [run_root.unit_manifest(u.id) for u in prepared.plan.units]
    units = [UnitManifest.load(prepared.store, key) for key in keys]
    steps = (("dense", 0.01, 0.02), ("block_descent", 0.02, 0.04))
    units = [fallen(unit) for unit in with_ladder(units, *steps, is_weighted=True)]
    seconds = {"capture": 2.0, "compress": 3.0}
    quality = finished.report.quality
    report = build_report(finished.context, units, prepared.shards, quality, seconds)
    report = report.model_copy(update={"baseline": quality, "benchmarks": TABLE})
    return Run(finished.context, prepared.plan.config, report, units)


def fallen(unit: UnitManifest) -> UnitManifest:
    odd = {"outcome": "round_to_nearest", "reason": "no factor", "tokens": 0}
    odd |= {"relative_output_error": 1.5}
    linears = [r.model_copy(update=odd) if ".experts.0." in r.name else r for r in unit.linears]
    return unit.model_copy(update={"linears": tuple(linears), "clipped_input_share": 0.01})


@pytest.fixture(scope="module")
def samples(finished: SmallRun) -> list[LinearSample]:
    return sample_checkpoint(finished.context, finished.prepared.store)


@pytest.fixture(autouse=True)
def one_look(samples: list[LinearSample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings may be hostile here, on which the look into the checkpoint depends."""
    monkeypatch.setattr(fold, "sample_checkpoint", lambda *_: samples)


def assert_stays_text(change: Callable[[str], Run]) -> list[tuple[str, ...]]:
    """The page with EVIL has the elements of the one with PLAIN, and its text. Returns them."""
    found, expected = Tree(change(EVIL).page()).events, Tree(change(PLAIN).page()).events
    pairs = zip(found, expected, strict=False)
    assert next((pair for pair in pairs if pair[0] != pair[1]), None) is None
    assert len(found) == len(expected)
    return found


@pytest.mark.parametrize("field", sorted(set(Report.model_fields) - KEPT_FIELDS))
def test_no_field_of_the_report_adds_an_element(run: Run, field: str) -> None:
    def change(mark: str) -> Run:
        update = {field: marked(getattr(run.report, field), mark)}
        return replace(run, report=run.report.model_copy(update=update))

    if change(EVIL) != run:
        assert_stays_text(change)


@pytest.mark.parametrize("field", sorted(set(UnitManifest.model_fields) - KEPT_FIELDS))
def test_no_field_of_a_unit_adds_an_element(run: Run, field: str) -> None:
    def change(mark: str) -> Run:
        units = [u.model_copy(update={field: marked(getattr(u, field), mark)}) for u in run.units]
        return replace(run, units=units)

    if change(EVIL) != run:
        assert_stays_text(change)


@pytest.mark.parametrize("field", sorted(LinearRecord.model_fields))
def test_no_field_of_a_linear_adds_an_element(run: Run, field: str) -> None:
    def changed(record: LinearRecord, mark: str) -> LinearRecord:
        return record.model_copy(update={field: marked(getattr(record, field), mark)})

    def change(mark: str) -> Run:
        linears = [tuple(changed(r, mark) for r in u.linears) for u in run.units]
        pairs = zip(run.units, linears, strict=True)
        return replace(run, units=[u.model_copy(update={"linears": own}) for u, own in pairs])

    if change(EVIL) != run:
        assert_stays_text(change)


@pytest.mark.parametrize("field", sorted(RunConfig.model_fields))
def test_no_setting_adds_an_element(run: Run, field: str) -> None:
    def change(mark: str) -> Run:
        update = {field: marked(getattr(run.config, field), mark)}
        return replace(run, config=run.config.model_copy(update=update))

    if change(EVIL) != run:
        assert_stays_text(change)


def test_everything_at_once_stays_text_and_is_shown(run: Run) -> None:
    def change(mark: str) -> Run:
        config, report, units = (marked(v, mark) for v in (run.config, run.report, run.units))
        return replace(run, config=config, report=report, units=units)

    said = " ".join(word for event in assert_stays_text(change) for word in event[1:])
    r, name = run.report, run.units[0].linears[0].name
    names = [r.name, r.source, r.checkpoint, r.solver, r.sparsity, r.plan_digest]
    names += [*r.devices, *r.versions, *r.versions.values(), *r.stage_seconds, *r.unit_seconds]
    names += ["round to nearest", "no factor", "dense", name, name.removesuffix(".gate_proj")]
    names += [*(t.title for t in TABLE.tasks), "<base>", "a paper, table 3", "vllm 0.32.0"]
    names += [run.config.calibration.documents[0].path, run.config.compression.solver]
    assert [name for name in names if PLAIN + harmless(name) not in said] == []


SCALE = Scale(1.0, 2.0)
FIVE = (1.0, 1.2, 1.4, 1.6, 1.8)
CHARTS: dict[str, tuple[str, Callable[[str], object]]] = {
    "axis": ("", lambda s: charts.axis([(0.5, s)])),
    "columns": ("columns", lambda s: charts.columns([1.0], [s], [(0.5, s)], s, s)),
    "dots": ("rows", lambda s: charts.dots([(s, [(1.5, s)])], SCALE, s, [(1.5, s)])),
    "heat_map": ("heat", lambda s: heat.heat_map(s, s, [[1.5]], [s], SCALE, heat.LOAD_RAMP)),
    "legend": ("legend", lambda s: heat.legend(SCALE, heat.LOAD_RAMP, s, s, [(0.5, s)])),
    "parts": ("stack", lambda s: [charts.Part(s, s, 0.5, s)]),
    "row_labels": ("", lambda s: charts.row_labels([s], 30, s)),
    "segment_rows": ("rows", lambda s: charts.segment_rows([(s, [(s, 0, 1, s)])], [(0.5, s)], s)),
    "spread_rows": ("rows", lambda s: charts.spread_rows([(s, FIVE)], SCALE, s, (0.5, s))),
    "stacked_area": ("rows", lambda s: charts.stacked_area([(s, [1.0])], s, 1)),
    "tag": ("", lambda s: charts.tag("text", s, s, css=s, aria_label=s)),
}
"""Chart -> the macro that puts it into its frame, if any, and how it is drawn."""


@pytest.mark.parametrize("name", sorted(CHARTS))
def test_no_label_of_a_chart_adds_an_element(name: str) -> None:
    macro, draw = CHARTS[name]
    source = "{{ chart }}"
    if macro:
        inside = "stack(chart, label)" if macro == "stack" else f"{macro}(chart)"
        source = f'{{% from "parts.html.j2" import {macro} %}}{{{{ {inside} }}}}'

    def drawn(text: str) -> list[tuple[str, ...]]:
        shown = environment().from_string(source).render(chart=draw(text), label=text)
        return Tree(shown).events

    assert drawn(EVIL) == drawn(PLAIN)
    assert any(PLAIN in word for event in drawn(EVIL) for word in event)


# What keeps it so.

PACKAGE = Path(html.__file__).parent
TEMPLATES = sorted(p.name for p in (PACKAGE / "templates").iterdir())


def test_every_template_is_a_section_or_what_sections_are_made_of() -> None:
    names = [*(anchor for anchor, _ in SECTIONS), "page", "parts"]
    assert sorted(f"{name}.html.j2" for name in names) == TEMPLATES
    assert sorted(environment().list_templates()) == TEMPLATES


def test_whatever_the_page_is_made_of_is_packaged() -> None:
    """A wheel holds of a package's other files only those that pyproject.toml names."""
    setuptools = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["p48ray"]
    packaged = {path for pattern in patterns for path in (REPO / "p48ray").glob(pattern)}
    files = {path for path in (REPO / "p48ray" / "report").rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} <= packaged


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_switches_escaping_off(name: str) -> None:
    source = (PACKAGE / "templates" / name).read_text(encoding="utf-8")
    assert not re.search(r"\bsafe\b|autoescape|Markup", source)
    assert max(map(len, source.splitlines())) <= 100


def test_markup_is_never_made_of_others_text() -> None:
    """Only of constants, of files of the package, and of what a template has escaped."""
    made: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.glob("*.py")):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        own = [call for call in calls if ast.unparse(call.func) == "Markup"]
        made |= {path.name: [ast.unparse(call.args[0]) for call in own]} if own else {}
    assert set(made) == {"charts.py", "html.py"}
    assert all(isinstance(ast.literal_eval(text), str) for text in made["charts.py"])
    assert sorted(made["html.py"]) == [
        "'\\n' + asset('report.js')",
        "asset('report.css')",
        "environment().get_template(f'{name}.html.j2').render(values)",
    ]


def test_name_without_a_value_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'spreads' is undefined"):
        render("regularization", {})
