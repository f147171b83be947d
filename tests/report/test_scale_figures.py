"""What scales cost, layer by layer, and what is warned of."""

from io import StringIO

import pytest
from rich.console import Console

from p48ray.report.html import report_html
from p48ray.report.report import build_report, print_report
from p48ray.report.scale_figures import (
    KINDS,
    LayerScaleFigures,
    headroom_words,
    scale_figures,
    scale_warnings,
)
from p48ray.run import run_root
from p48ray.run.manifest import LayerScales, UnitManifest
from p48ray.run.plan import WorkUnit
from p48ray.run.scale_counts import LayerScaleCounts, ScaleCounts
from tests.report.test_html import Page
from tests.stages.small_run import SmallRun


@pytest.fixture
def units(finished: SmallRun) -> list[UnitManifest]:
    return [
        UnitManifest.load(finished.prepared.store, run_root.unit_manifest(u.id))
        for u in finished.prepared.plan.units
    ]


FINE = ScaleCounts(groups=10_000, subnormal=10)
BAD = ScaleCounts(groups=10_000, saturated=30, subnormal=25, zero=5)


def figures(layer: int, **changes: object) -> LayerScaleFigures:
    record = LayerScaleFigures(
        layer=layer, headroom=(16.0, 4.0), calibration=(FINE, FINE), weights=FINE
    )
    return record.model_copy(update=changes)


def test_figures_are_the_scales_the_units_and_the_evaluations(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    store = finished.prepared.store
    held_out = LayerScaleCounts(layer=2, gate_up=BAD, down=FINE)
    found = scale_figures(store, units, [held_out])
    assert [f.layer for f in found] == list(finished.prepared.plan.layers)
    for f in found:
        scales = LayerScales.load(store, run_root.layer_scales(f.layer))
        assert (f.headroom, f.calibration) == (scales.headroom, scales.calibration)
        own = [u.weight_scales for u in units if WorkUnit.layer_of(u.unit) == f.layer]
        assert f.weights.groups == sum(w.groups for w in own) > 0
        assert f.held_out == ((BAD, FINE) if f.layer == 2 else None)
    assert finished.report.scales == scale_figures(
        store, units, finished.report.quality.activation_scales if finished.report.quality else ()
    )


def test_nothing_is_warned_of_up_to_a_thousandth() -> None:
    assert scale_warnings([figures(1), figures(2, held_out=(FINE, FINE))]) == []
    assert scale_warnings([]) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"calibration": (BAD, FINE)}, ["inputs, calibration: too small"]),
        ({"calibration": (FINE, BAD)}, ["intermediates, calibration: too small"]),
        (
            {"held_out": (BAD, FINE)},
            ["inputs, held-out: saturated", "inputs, held-out: too small"],
        ),
        (
            {"held_out": (FINE, BAD)},
            ["intermediates, held-out: saturated", "intermediates, held-out: too small"],
        ),
        ({"weights": BAD}, ["weights: too small"]),
    ],
)
def test_each_kind_is_warned_of_with_its_worst_layer(
    changes: dict[str, object], expected: list[str]
) -> None:
    fine = figures(3, held_out=(FINE, FINE))
    found = scale_warnings([fine, figures(7, **{"held_out": (FINE, FINE)} | changes)])
    assert [line.rpartition(": ")[0] for line in found] == expected
    for line in found:
        assert line.endswith(
            "more than 0.1% of the groups in 1 of 2 layers, most in layer 7 (0.30%)"
        )
    assert set(expected) <= {name for name, *_ in KINDS}


def test_room_is_said_as_a_range_where_layers_differ() -> None:
    words = headroom_words([figures(1), figures(2, headroom=(16.0, 1.0))])
    assert words == ("room above the calibration's maxima: 16x (gate and up), 1x to 4x (down)")


def test_page_and_terminal_show_every_layer_and_what_passes_the_share(
    finished: SmallRun, units: list[UnitManifest]
) -> None:
    drowned = [u.model_copy(update={"weight_scales": BAD}) for u in units]
    report = build_report(finished.context, drowned, finished.prepared.shards, None, {})
    words = Page(report_html(finished.context, report, drowned)).words["scales"]
    line = "weights: too small: more than 0.1% of the groups in 4 of 4 layers, most in layer 1"
    assert line in words and "0.30%" in words
    assert "Held-out text was not run through quantized activations." in words
    out = StringIO()
    print_report(report, Console(file=out, width=160))
    assert f"warning: {line}" in out.getvalue()
    words = Page(report_html(finished.context, finished.report, units)).words["scales"]
    assert "No layer has more than 0.1% of its groups saturated or too small." in words
    assert "inputs, held-out: saturated" in words
    assert "Room above the calibration's maxima: " in words
