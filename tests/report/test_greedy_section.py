"""Greedy agreement on the page and on a terminal."""

import io
import re

import pytest
from rich.console import Console

from p48ray.report.greedy_section import print_agreements
from p48ray.report.html import report_html
from p48ray.report.report import Report, print_report
from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.stages.greedy import GreedyAgreement
from tests.report.test_html import Page
from tests.stages.small_run import SmallRun

OWN = GreedyAgreement(
    num_prompts=40,
    prompt_tokens=1024,
    tokens=32,
    median=32,
    reached_by_90=7,
    never_differed=0.525,
    margin_at_difference=0.25,
    mean_margin=2.5,
    num_parts=2,
    passes=61,
)
BASELINE = OWN.model_copy(
    update={
        "median": 11,
        "reached_by_90": 3,
        "never_differed": 0.1,
        "margin_at_difference": 0.875,
    }
)


@pytest.fixture
def report(finished: SmallRun) -> Report:
    return finished.report.model_copy(update={"greedy": OWN, "baseline_greedy": BASELINE})


def shown(report: Report) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_agreements(report.agreements, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_terminal_has_the_baseline_and_then_the_result(report: Report) -> None:
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in shown(report).splitlines()]
    assert [row for row in rows if row] == [
        ["one-shot baseline", "11", "3", "10.0%", "0.88"],
        ["block_descent, paired-4:8", "at least 32", "7", "52.5%", "0.25"],
    ]
    text = " ".join(shown(report).split())
    assert "40 held-out prompts of 1,024 tokens, continued greedily by 32." in text
    assert "over all tokens 2.50 nats on average" in text
    assert "the source was read 61 times, in 2 parts" in text
    console = Console(file=io.StringIO(), width=160)
    print_report(report, console)
    assert shown(report) in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_never_differed_has_no_margin(report: Report) -> None:
    never = OWN.model_copy(update={"margin_at_difference": None, "num_parts": 1})
    text = shown(report.model_copy(update={"greedy": never, "baseline_greedy": None}))
    assert "one-shot" not in text and re.search(r"52\.5% │ +- │", text) and "in one part" in text


def test_page_has_a_section_where_it_was_looked_at(finished: SmallRun, report: Report) -> None:
    units = [
        UnitManifest.load(finished.prepared.store, run_root.unit_manifest(u.id))
        for u in finished.prepared.plan.units
    ]
    page = Page(report_html(finished.context, report, units))
    words = re.sub(r"\s+", " ", page.words["greedy"])
    for expected in (
        "one-shot baseline 11 3 10.0% 0.88",
        "block_descent, paired-4:8 at least 32 7 52.5% 0.25",
        "40 held-out prompts of 1,024 tokens, continued greedily by 32.",
        "NVFP4 activations emulated",
        "the source was read 61 times, in 2 parts",
    ):
        assert expected in words
    plain = Page(report_html(finished.context, finished.report, units))
    assert "greedy" not in plain.words and shown(finished.report) == ""


def test_report_of_before_has_none(finished: SmallRun) -> None:
    said = finished.report.model_dump(mode="json", exclude={"greedy", "baseline_greedy"})
    assert Report.model_validate(said).agreements == {}
