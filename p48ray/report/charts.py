"""Charts as SVG: small pure functions from numbers to markup. No script, nothing fetched.

Text never scales with the picture: an SVG here has no viewBox, its horizontal coordinates are
percentages and its vertical ones pixels. So a chart is as wide as its column on a desk and on a
phone, and its letters stay the size of the page's. Series differ by their names too, not by colour
alone. Every element is made by `tag`, which escapes what it is given.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape

from p48ray.report.scales import Scale, number, round_step

EMPTY = Markup("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing and what stands beside it: names of its rows or `top`, what the highest stands for.

    The templates put them into their frame (`rows` and `columns` in parts.html.j2).
    """

    picture: Markup
    axis: Markup = EMPTY
    names: Markup = EMPTY
    top: str = ""


class Part(NamedTuple):
    """A part of a bar: its CSS class, its name, its share of the whole, what the key says of it."""

    css: str
    name: str
    share: float
    words: str


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """An element. Texts inside and values of attributes are escaped, Markup inside is kept.

    Args:
        name: of the element.
        inside: texts and elements; without any the element closes itself.
        attributes: `css` is the class; `aria_label` is written aria-label.
    """
    names = ("class" if key == "css" else key.replace("_", "-") for key in attributes)
    pairs = zip(names, attributes.values(), strict=True)
    head = Markup(" ").join((name, *(Markup('{}="{}"').format(*pair) for pair in pairs)))
    if not inside:
        return Markup("<{}/>").format(head)
    return Markup("<{}>{}</{}>").format(head, EMPTY.join(map(escape, inside)), name)


def svg(height: float, *inside: object, **attributes: object) -> Markup:
    """A drawing as wide as its column and `height` pixels high."""
    return tag("svg", *inside, width="100%", height=f"{height:g}", **attributes)


def pct(share: float) -> str:
    return f"{100 * share:.3f}%"


def row_height(count: int, least: int, most: int) -> int:
    """Pixels a row, so that `count` of them are about as high as a picture should be."""
    return max(least, min(most, 420 // count))


def row_labels(labels: Sequence[object], height: float, below: str = "layer") -> Markup:
    """Names of rows of equal height, as many as there is room for, right-aligned in a gutter.

    Args:
        labels: one a row.
        height: of all rows, pixels.
        below: what they name; it stands under them.
    """
    every = max(1, math.ceil(15 * len(labels) / height))
    step = height / len(labels)
    texts = [
        tag("text", label, x="100%", y=f"{(i + 0.5) * step:.1f}", dy=".35em", text_anchor="end")
        for i, label in enumerate(labels)
        if i % every == 0
    ]
    unit = tag("text", below, x="100%", y=f"{height + 16:g}", text_anchor="end")
    return svg(height, *texts, unit, aria_hidden="true")


def column_axis(columns: int) -> Markup:
    """Numbers of the columns, under their middles."""
    every = int(round_step(columns / 8)) or 1
    marks = [((i + 0.5) / columns, str(i)) for i in range(0, columns, max(1, every))]
    return axis([*(m for m in marks if m[0] < 0.88), (1.0, "expert")])


def axis(marks: Iterable[tuple[float, str]]) -> Markup:
    """Labels under a chart at shares of its width.

    The outermost are turned inwards, so that none sticks out.
    """
    drawn = []
    for at, label in marks:
        anchor = "start" if at < 0.03 else "end" if at > 0.97 else "middle"
        drawn.append(tag("line", x1=pct(at), x2=pct(at), y1="0", y2="4"))
        drawn.append(tag("text", label, x=pct(at), y="16", text_anchor=anchor))
    return svg(20, *drawn, css="axis", aria_hidden="true")


def upright(css: str, at: float, top: float, bottom: float, *inside: object) -> Markup:
    """A line from top to bottom at a share of the width.

    Args:
        css: its class.
        at: share of the width, 0 to 1.
        top, bottom: pixels from the top of the chart.
        inside: elements of the line, a title for instance.
    """
    return tag("line", *inside, css=css, x1=pct(at), x2=pct(at), y1=f"{top:g}", y2=f"{bottom:g}")


def columns(
    heights: Sequence[float],
    names: Sequence[str],
    marks: Sequence[tuple[float, str]],
    label: str,
    top: str,
) -> Chart:
    """Columns from zero.

    Args:
        heights: from 0 on; a column of 0 is not drawn.
        names: what a pointer sees, one a column.
        marks: (share of the width, label) under them.
        label: the chart in words.
        top: what the highest stands for.
    """
    most, width = max(heights, default=0.0) or 1.0, 1 / max(1, len(heights))
    bars = [
        tag(
            "rect",
            tag("title", name),
            css="s1",
            x=pct((i + 0.06) * width),
            width=pct(0.88 * width),
            y=f"{110 - 104 * h / most:.1f}",
            height=f"{104 * h / most:.1f}",
        )
        for i, (h, name) in enumerate(zip(heights, names, strict=True))
        if h
    ]
    base = tag("line", css="base", x1="0", x2="100%", y1="110", y2="110")
    picture = svg(111, base, *bars, role="img", aria_label=label)
    return Chart(picture=picture, axis=axis(marks), top=top)


TimelineBar = tuple[str, float, float, str]
"""CSS class, start and end as shares of the width, what a pointer sees."""


def segment_rows(
    rows: Sequence[tuple[object, Sequence[TimelineBar]]],
    marks: Sequence[tuple[float, str]],
    label: str,
) -> Chart:
    """Rows of bars along one axis: a timeline.

    Args:
        rows: (name, segments).
        marks: (share of the width, label).
        label: the chart in words.
    """
    step = row_height(len(rows), 8, 22)
    height = step * len(rows)
    grid = [upright("grid", at, 0, height) for at, _ in marks]
    bars = [
        tag(
            "rect",
            tag("title", name),
            css=css,
            x=pct(min(start, 0.997)),
            width=pct(max(end - start, 0.003)),
            y=i * step + 1,
            height=step - 2,
        )
        for i, (_, segments) in enumerate(rows)
        for css, start, end, name in segments
    ]
    picture = svg(height, *grid, *bars, role="img", aria_label=label)
    names = row_labels([name for name, _ in rows], height)
    return Chart(picture=picture, axis=axis(marks), names=names)


def stacked_area(series: Sequence[tuple[str, Sequence[float]]], label: str, most: int) -> Chart:
    """Series on top of each other over equal steps.

    Args:
        series: (CSS class, values), all of one length, of which no sum is above `most`.
        label: the chart in words.
        most: what the whole height stands for.
    """
    height, steps = 72, len(series[0][1])
    width, below = 1 / steps, [0.0] * steps
    bars = []
    for css, values in series:
        for i, value in enumerate(values):
            if value > 0:
                below[i] += value
                y = f"{height - (height - 4) * below[i] / most:.1f}"
                high = f"{(height - 4) * value / most:.1f}"
                at = {"x": pct(i * width), "width": pct(width), "y": y, "height": high}
                bars.append(tag("rect", css=css, **at))
    words = {"role": "img", "aria_label": label, "shape_rendering": "crispEdges"}
    return Chart(picture=svg(height, *bars, **words), top=f"{most:,}")


def spread_rows(
    rows: Sequence[tuple[object, Sequence[float]]],
    scale: Scale,
    label: str,
    mark: tuple[float, str],
) -> Chart:
    """Rows of five quantiles: a thin line over all, a thick one between the inner two, a dot.

    Args:
        rows: (layer, five quantiles).
        scale: where a value lies.
        label: the chart in words.
        mark: (place, words) of a reference line.
    """
    step = row_height(len(rows), 8, 20)
    height = step * len(rows)
    ticks = [(scale.place(t) or 0.0, number(t)) for t in scale.ticks()]
    body = [upright("grid", at, 0, height) for at, _ in ticks]
    body.append(upright("mark", mark[0], 0, height, tag("title", mark[1])))
    for i, (name, quantiles) in enumerate(rows):
        words = f"layer {name}: {', '.join(f'{q:,.0f}' for q in quantiles)}"
        places = [pct(scale.place(q) or 0.0) for q in quantiles]
        body.append(tag("g", tag("title", words), *spread(places, (i + 0.5) * step, step)))
    picture = svg(height, *body, css="spread", role="img", aria_label=label)
    names = row_labels([name for name, _ in rows], height)
    return Chart(picture=picture, axis=axis(ticks), names=names)


def spread(places: Sequence[str], middle: float, step: int) -> tuple[Markup, Markup, Markup]:
    """One row of `spread_rows`: five places in it, its middle and its height in pixels."""
    least, inner, half, outer, most = places
    y = f"{middle:.1f}"
    thick = f"stroke-width:{min(7, step - 4)}"
    return (
        tag("line", css="whole", x1=least, x2=most, y1=y, y2=y),
        tag("line", css="inner", x1=inner, x2=outer, y1=y, y2=y, style=thick),
        tag("circle", cx=half, cy=y, r=f"{min(4, step / 3):.1f}"),
    )


def dots(
    rows: Sequence[tuple[str, Sequence[tuple[float, str]]]],
    scale: Scale,
    label: str,
    ticks: Sequence[tuple[float, str]],
) -> Chart:
    """A row of points per name, a line at their mean.

    Args:
        rows: (name, points), a point being a value and what a pointer sees.
        scale: where a value lies.
        label: the chart in words.
        ticks: (value, label) of the axis.
    """
    step = 30
    height = step * len(rows)
    marks = [(scale.place(value) or 0.0, text) for value, text in ticks]
    body = [upright("grid", at, 0, height) for at, _ in marks]
    for i, (_, points) in enumerate(rows):
        mean = scale.place(sum(v for v, _ in points) / len(points)) or 0.0
        body.append(upright("mark", mean, i * step + 3, (i + 1) * step - 3))
        for value, words in points:
            at = {"cx": pct(scale.place(value) or 0.0), "cy": f"{(i + 0.5) * step:g}", "r": "4"}
            body.append(tag("circle", tag("title", words), **at))
    picture = svg(height, *body, css="spread faint", role="img", aria_label=label)
    return Chart(
        picture=picture,
        axis=axis(marks),
        names=row_labels([name for name, _ in rows], height, ""),
    )
