"""Figures by domain and position on the page, in the card and in the printed report: every one of
them, and nothing where nobody has measured."""

import io
import re

import pytest
from rich.console import Console

from p48ray.report.card import model_card
from p48ray.report.domain_section import (
    domain_pieces,
    domain_tables,
    domains,
    print_domains,
    stretch_pieces,
)
from p48ray.report.html import report_html
from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.stages.evaluate import (
    CompressedQuality,
    DomainQuality,
    EvaluationResult,
    StretchQuality,
    TextQuality,
)
from tests.report.test_html import Page
from tests.stages.small_run import SmallRun


def quality(tokens: int, kl: float, sparse: float | None = None) -> TextQuality:
    return TextQuality(
        num_tokens=tokens,
        source_perplexity=8.0,
        source_accuracy=0.5,
        compressed_perplexity=8.0 + kl,
        compressed_accuracy=0.25,
        kl=kl,
        in_groups_of_32=None
        if sparse is None
        else CompressedQuality(perplexity=9.0, accuracy=0.125, kl=sparse),
    )


def stretches(tokens: int, *kls: float) -> tuple[StretchQuality, ...]:
    ends = (512, 2048, 4096)
    return tuple(
        StretchQuality(**quality(tokens, kl).model_dump(), first=first, last=last)
        for kl, first, last in zip(kls, (1, 513, 2049), ends, strict=True)
    )


def result(kl: float, *named: tuple[str, float], sparse: float | None = None) -> EvaluationResult:
    return EvaluationResult(
        **quality(12_288, kl, sparse).model_dump(),
        stretches=stretches(4096, kl / 2, kl, 2 * kl),
        domains=tuple(
            DomainQuality(
                **quality(6144, own, sparse).model_dump(),
                name=name,
                stretches=stretches(2048, own + 0.001, own + 0.002, own + 0.003),
            )
            for name, own in named
        ),
    )


OWN = result(0.125, ("prose", 0.0625), ("tool calls", 0.25))
THEIRS = result(0.5, ("tool calls", 0.75), ("prose", 0.375))


@pytest.fixture(scope="module")
def units(finished: SmallRun) -> list[UnitManifest]:
    store = finished.prepared.store
    keys = [run_root.unit_manifest(unit.id) for unit in finished.prepared.plan.units]
    return [UnitManifest.load(store, key) for key in keys]


def page(
    finished: SmallRun,
    units: list[UnitManifest],
    own: EvaluationResult | None,
    theirs: EvaluationResult | None = None,
) -> Page:
    report = finished.report.model_copy(update={"quality": own, "baseline": theirs})
    return Page(report_html(finished.context, report, units))


def test_page_has_every_domain_every_position_and_both(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    words = page(finished, units, OWN).words["domains"]
    for row in (
        "Quality by domain and position",
        "prose 6,144 8.0000 8.0625 +0.78% 0.0625",
        "tool calls 6,144 8.0000 8.2500 +3.12% 0.2500",
        "1 to 512 4,096 8.0000 8.0625 +0.78% 0.0625",
        "513 to 2,048 4,096 8.0000 8.1250 +1.56% 0.1250",
        "2,049 to 4,096 4,096 8.0000 8.2500 +3.12% 0.2500",
        "prose 0.0635 0.0645 0.0655",
        "tool calls 0.2510 0.2520 0.2530",
    ):
        assert row in words
    assert "one-shot" not in words and "sparse kernels" not in words


def test_baseline_and_sparse_kernels_stand_beside_the_same_piece(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    own = result(0.125, ("prose", 0.0625), ("tool calls", 0.25), sparse=0.875)
    words = page(finished, units, own, THEIRS).words["domains"]
    assert "KL to source one-shot's KL KL on sparse kernels" in words
    assert "prose 6,144 8.0000 8.0625 +0.78% 0.0625 0.3750 0.8750" in words
    assert "tool calls 6,144 8.0000 8.2500 +3.12% 0.2500 0.7500 0.8750" in words
    assert "1 to 512 4,096 8.0000 8.0625 +0.78% 0.0625 0.2500" in words
    # a baseline that was measured before a source got its name
    pieces = domain_pieces(own, result(0.5, ("prose", 0.375)))
    assert [p.one_shot_kl for p in pieces] == [0.375, None]
    assert [p.one_shot_kl for p in stretch_pieces(own, THEIRS)] == [0.25, 0.5, 1.0]


def test_without_names_only_positions_are_shown(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    found = page(finished, units, result(0.125))
    assert "Quality by position" in found.words["domains"]
    assert "domain" not in found.words["domains"]
    assert "1 to 512 4,096" in found.words["domains"]
    assert "domains" not in page(finished, units, None).words
    assert domains(None, None) is None


def test_card_has_the_same_figures(finished: SmallRun, units: list[UnitManifest]) -> None:
    card = model_card(finished.context, units, OWN, THEIRS)
    section = card.partition("## Evaluation")[2].partition("\n## ")[0]
    for line in (
        "| domain | tokens | source's perplexity | perplexity | KL | one-shot's KL |",
        "| prose | 6,144 | 8.0000 | 8.0625 | 0.0625 | 0.3750 |",
        "| tool calls | 6,144 | 8.0000 | 8.2500 | 0.2500 | 0.7500 |",
        "| position in the sequence | tokens | source's perplexity | perplexity | KL |"
        " one-shot's KL |",
        "| 2,049 to 4,096 | 4,096 | 8.0000 | 8.2500 | 0.2500 | 1.0000 |",
    ):
        assert line in section.splitlines()
    assert len(domain_tables(result(0.125), None)) == 1, "positions alone"
    assert "one-shot" not in domain_tables(OWN, None)[0]
    assert "domain" not in model_card(finished.context, units, None, None)


def test_name_stays_text_in_the_card() -> None:
    (table, _) = domain_tables(result(0.1, ("a_b+c", 0.1), ("_x", 0.2)), None)
    assert "| &#95;x | 6,144" in table and "| a_b+c |" in table


def printed(q: EvaluationResult | None) -> str:
    out = io.StringIO()
    print_domains(q, Console(file=out, width=160))
    return re.sub(r"[^\w.,\n]+", " ", out.getvalue())


def test_printed_report_has_a_row_a_domain_with_kl_by_position() -> None:
    text = printed(OWN)
    assert "tokens source s perplexity perplexity KL 1 to 512 513 to 2,048 2,049 to 4,096" in text
    assert "prose 6,144 8.0000 8.0625 0.0625 0.0635 0.0645 0.0655" in text
    assert "tool calls 6,144 8.0000 8.2500 0.2500 0.2510 0.2520 0.2530" in text
    assert printed(result(0.125)) == printed(None) == ""
