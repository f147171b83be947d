"""Charts draw what they are given where it belongs."""

import re

import pytest
from markupsafe import Markup

from p48ray.report.charts import axis, columns, dots, segment_rows, spread_rows, stacked_area, tag
from p48ray.report.scales import Scale

SCALE = Scale(0.0, 10.0)


def drawn(picture: str, element: str) -> list[dict[str, str]]:
    """Attributes of the elements of one kind, in their order."""
    found = re.findall(rf"<{element} ([^>]*)>", picture)
    return [dict(re.findall(r'([\w-]+)="([^"]*)"', attributes)) for attributes in found]


def test_tag_keeps_markup_and_escapes_text() -> None:
    found = tag("g", tag("title", "a < b"), "&", css="s1", aria_label='"')
    assert found == Markup('<g class="s1" aria-label="&#34;"><title>a &lt; b</title>&amp;</g>')
    assert tag("line", x1="0") == Markup('<line x1="0"/>')


def test_segments_lie_at_their_times_in_their_rows() -> None:
    first = [("s1", 0.25, 0.75, "a"), ("s2", 1.0, 1.0, "b")]
    chart = segment_rows([(1, first), (2, [("s3", 0.0, 1.0, "c")])], [(0.5, "1 h")], "")
    a, b, c = drawn(chart.picture, "rect")
    assert (a["x"], a["width"], b["x"], b["width"]) == ("25.000%", "50.000%", "99.700%", "0.300%")
    assert (a["y"], b["y"], c["y"], c["height"]) == ("1", "1", "23", "20")
    assert [line["x1"] for line in drawn(chart.picture, "line")] == ["50.000%"]
    assert re.findall(">([^<]+)</text>", chart.names) == ["1", "2", "layer"]


def test_columns_are_as_high_as_their_values() -> None:
    chart = columns([1.0, 0.0, 2.0, 4.0], ["a", "b", "c", "d"], [], "", "4")
    bars = drawn(chart.picture, "rect")
    assert [bar["height"] for bar in bars] == ["26.0", "52.0", "104.0"]
    assert [bar["x"] for bar in bars] == ["1.500%", "51.500%", "76.500%"]
    assert {float(bar["y"]) + float(bar["height"]) for bar in bars} == {110.0}


def test_areas_stand_on_each_other() -> None:
    chart = stacked_area([("s1", [1.0, 0.0]), ("s2", [1.0, 1.0])], "", 2)
    low, high, alone = drawn(chart.picture, "rect")
    assert [(bar["class"], bar["x"], bar["y"], bar["height"]) for bar in (low, high, alone)] == [
        ("s1", "0.000%", "38.0", "34.0"),
        ("s2", "0.000%", "4.0", "34.0"),
        ("s2", "50.000%", "38.0", "34.0"),
    ]


def test_spread_has_its_five_quantiles_and_the_mark() -> None:
    chart = spread_rows([(3, (0.0, 1.0, 5.0, 9.0, 10.0))], SCALE, "", (0.2, "few"))
    lines = {line["class"]: (line["x1"], line["x2"]) for line in drawn(chart.picture, "line")}
    assert lines["mark"] == ("20.000%", "20.000%")
    assert lines["whole"] == ("0.000%", "100.000%")
    assert lines["inner"] == ("10.000%", "90.000%")
    assert [dot["cx"] for dot in drawn(chart.picture, "circle")] == ["50.000%"]
    assert "<title>layer 3: 0, 1, 5, 9, 10</title>" in chart.picture


def test_dots_of_narrow_rows_do_not_touch() -> None:
    """420 pixels for 52 rows are 8 a row."""
    rows = [(n, (0.0, 1.0, 5.0, 9.0, 10.0)) for n in range(52)]
    chart = spread_rows(rows, SCALE, "", (0.2, "few"))
    assert {dot["r"] for dot in drawn(chart.picture, "circle")} == {"2.7"}


def test_dots_have_a_line_at_their_mean() -> None:
    chart = dots([("up", [(2.0, "a"), (4.0, "b")])], SCALE, "", [(5.0, "half")])
    places = [(dot["cx"], dot["cy"]) for dot in drawn(chart.picture, "circle")]
    assert places == [("20.000%", "15"), ("40.000%", "15")]
    lines = [(line["class"], line["x1"]) for line in drawn(chart.picture, "line")]
    assert lines == [("grid", "50.000%"), ("mark", "30.000%")]


@pytest.mark.parametrize(("at", "anchor"), [(0.0, "start"), (0.5, "middle"), (1.0, "end")])
def test_outermost_labels_are_turned_inwards(at: float, anchor: str) -> None:
    (text,) = drawn(axis([(at, "a")]), "text")
    assert text["text-anchor"] == anchor
