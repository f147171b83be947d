"""Charts as text: small pure functions from numbers to HTML and SVG. No library, no script, nothing fetched.

Text never scales with the picture: an SVG here has no viewBox, its horizontal coordinates are percentages and its vertical ones pixels, so a chart is as wide
as its column on a desk and on a phone, and its letters stay the size of the page's. Colours of pictures come in a light and a dark palette and are safe
for colour-blind eyes (magma; orange against blue); series also differ by their names.
"""

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Rgb = tuple[int, int, int]
NO_VALUE = 255  # palette index of cells that a scale has no place for
STEPS = 254  # last palette index of a ramp


@dataclass(frozen=True, slots=True)
class Ramp:
    """A colour ramp from low to high, on light and on dark paper; `odd_*` is for cells without a value."""

    name: str
    light: tuple[str, ...]
    dark: tuple[str, ...]
    odd_light: str = "#00a0a0"
    odd_dark: str = "#35e0e0"


ERROR_RAMP = Ramp(
    "error",
    ("#fcf6d6", "#fec98d", "#fd9567", "#ec5f61", "#c03a76", "#8c2981", "#56147d", "#221150"),
    ("#1f1147", "#51127c", "#842681", "#b83779", "#e75263", "#fc8961", "#fec488", "#fcfdbf"),
)
LOAD_RAMP = Ramp(
    "load",
    ("#7f3b00", "#c96a0a", "#f2ae5c", "#f2f0ec", "#8fc0ea", "#2f7fd0", "#0a3a75"),
    ("#ffc27a", "#d9822b", "#7d4a17", "#33333a", "#1d4d82", "#3d8fe0", "#b5dcff"),
    "#c4007a",
    "#ff5cb4",
)


@dataclass(frozen=True, slots=True)
class Scale:
    """Where a value lies between two ends, 0 to 1; beyond them it sticks to the end."""

    low: float
    high: float
    kind: Literal["log", "linear"] = "linear"

    def place(self, value: float) -> float | None:
        """None for what has no place: not finite, or not above 0 on a logarithmic scale."""
        if not math.isfinite(value) or (self.kind == "log" and value <= 0):
            return None
        low, high, at = (math.log(v) for v in (self.low, self.high, value)) if self.kind == "log" else (self.low, self.high, value)
        return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers inside."""
        if self.kind == "linear":
            step = round_step((self.high - self.low) / most)
            first = math.ceil(self.low / step - 1e-9)
            return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
            if len(found) <= most:
                return found or [self.low, self.high]
        return found[:: -(-len(found) // most)]


def round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(d * power for d in (1, 2, 5, 10) if d * power >= rough * (1 - 1e-9))


def time_ticks(total_s: float, most: int = 6) -> list[tuple[float, str]]:
    """(seconds, label) at round times."""
    minute, hour, day = 60, 3600, 86400
    steps = (
        1,
        2,
        5,
        10,
        15,
        30,
        *(n * minute for n in (1, 2, 5, 10, 15, 30)),
        *(n * hour for n in (1, 2, 3, 6, 12)),
        *(n * day for n in (1, 2, 5, 10, 30)),
    )
    step = next((s for s in steps if total_s / s <= most), steps[-1])
    size, unit = next((s, u) for s, u in ((day, "d"), (hour, "h"), (minute, "min"), (1, "s")) if step % s == 0)
    return [(n * step, f"{n * step // size} {unit}") for n in range(int(total_s // step) + 1)]


def esc(text: object) -> str:
    return html.escape(str(text), quote=True)


def pct(share: float) -> str:
    return f"{100 * share:.3f}%"


def number(value: float) -> str:
    """Short, for axes: 0.002, 0.5, 43,008, 1.2M."""
    if 1000 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return "0" if not value else f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.0e}".replace("e-0", "e-")


def hex_rgb(colour: str) -> Rgb:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def palette(stops: Sequence[str], odd: str) -> bytes:
    """256 colours for a PNG: the ramp, then that of cells without a value."""
    colours, found = [hex_rgb(s) for s in stops], bytearray()
    for i in range(STEPS + 1):
        at = i / STEPS * (len(colours) - 1)
        n = min(int(at), len(colours) - 2)
        found += bytes(round(a + (b - a) * (at - n)) for a, b in zip(colours[n], colours[n + 1], strict=True))
    return bytes(found) + bytes(hex_rgb(odd))


def png(rows: Sequence[bytes], colours: bytes) -> bytes:
    """An indexed PNG, one byte a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"PLTE", colours) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def cell_index(value: float | None, scale: Scale) -> int:
    at = None if value is None else scale.place(value)
    return NO_VALUE if at is None else round(at * STEPS)


def heat_map(key: str, alt: str, cells: Sequence[Sequence[float | None]], labels: Sequence[object], scale: Scale, ramp: Ramp) -> str:
    """Rows are layers, columns experts: one pixel a cell, drawn large. `key` is where the page's script finds the numbers.

    Where the columns would get narrower than two pixels, the picture scrolls inside its own frame.
    """
    rows = [bytes(cell_index(value, scale) for value in row) for row in cells]
    light, dark = (data_uri(png(rows, palette(*p))) for p in ((ramp.light, ramp.odd_light), (ramp.dark, ramp.odd_dark)))
    columns, height = len(rows[0]), row_height(len(rows), 7, 26) * len(rows)
    return (
        f'<div class="heat"><div class="gutter">{row_labels(labels, height)}</div><div class="scroll" tabindex="-1">'
        f'<div class="cells" style="min-width:{2 * columns}px" tabindex="0" data-heat="{esc(key)}" role="img" aria-label="{esc(alt)}">'
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}"><img alt="" src="{light}" style="height:{height}px"></picture>'
        f'<span class="cursor"></span></div>'
        f'<div style="min-width:{2 * columns}px">{column_axis(columns)}</div></div></div>'
    )


def row_height(count: int, least: int, most: int) -> int:
    return max(least, min(most, 420 // count))


def row_labels(labels: Sequence[object], height: float, below: str = "layer") -> str:
    """Names of rows of equal height, as many as there is room for, right-aligned in a gutter; what they name stands `below`."""
    every = max(1, math.ceil(15 * len(labels) / height))
    step = height / len(labels)
    texts = "".join(
        f'<text x="100%" y="{(i + 0.5) * step:.1f}" dy=".35em" text-anchor="end">{esc(label)}</text>'
        for i, label in enumerate(labels)
        if i % every == 0
    )
    unit = f'<text x="100%" y="{height + 16:g}" text-anchor="end">{esc(below)}</text>'
    return f'<svg width="100%" height="{height:g}" aria-hidden="true">{texts}{unit}</svg>'


def column_axis(columns: int) -> str:
    """Numbers of the columns, under their middles."""
    every = int(round_step(columns / 8)) or 1
    marks = [((i + 0.5) / columns, str(i)) for i in range(0, columns, max(1, every))]
    return axis([*(m for m in marks if m[0] < 0.88), (1.0, "expert")])


def axis(marks: Iterable[tuple[float, str]]) -> str:
    """Labels under a chart at shares of its width; the outermost are turned inwards so that none sticks out."""
    texts = []
    for at, label in marks:
        anchor = "start" if at < 0.03 else "end" if at > 0.97 else "middle"
        texts.append(
            f'<line x1="{pct(at)}" x2="{pct(at)}" y1="0" y2="4"/><text x="{pct(at)}" y="16" text-anchor="{anchor}">{esc(label)}</text>'
        )
    return f'<svg class="axis" width="100%" height="20" aria-hidden="true">{"".join(texts)}</svg>'


def legend(scale: Scale, ramp: Ramp, low: str, high: str, marks: Sequence[tuple[float, str]] | None = None) -> str:
    """The ramp with numbers under it and words at its ends."""
    found = marks if marks is not None else [(scale.place(t) or 0.0, number(t)) for t in scale.ticks()]
    return (
        f'<div class="legend"><span>{esc(low)}</span><div class="ramp"><div class="ramp-{ramp.name}"></div>{axis(found)}</div>'
        f"<span>{esc(high)}</span></div>"
    )


def ramp_styles(ramps: Sequence[Ramp]) -> str:
    """CSS of the legends: the same stops as the pictures'."""
    light, dark = (
        "".join(f".ramp-{r.name}{{background:linear-gradient(to right,{','.join(getattr(r, side))})}}" for r in ramps)
        + "".join(f".odd-{r.name}{{background:{getattr(r, f'odd_{side}')}}}" for r in ramps)
        for side in ("light", "dark")
    )
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


def columns(
    heights: Sequence[float], names: Sequence[str], marks: Sequence[tuple[float, str]], label: str, top: str, css: str = "s1"
) -> str:
    """Columns from zero. `top` is what the highest stands for; `names` are what a pointer sees."""
    most, width = max(heights, default=0.0) or 1.0, 1 / max(1, len(heights))
    bars = "".join(
        f'<rect class="{css}" x="{pct((i + 0.06) * width)}" width="{pct(0.88 * width)}" y="{110 - 104 * h / most:.1f}" height="{104 * h / most:.1f}">'
        f"<title>{esc(name)}</title></rect>"
        for i, (h, name) in enumerate(zip(heights, names, strict=True))
        if h
    )
    base = '<line class="base" x1="0" x2="100%" y1="110" y2="110"/>'
    drawn = f'<svg role="img" aria-label="{esc(label)}" width="100%" height="111">{base}{bars}</svg>'
    return f'<div class="chart"><span class="top">{esc(top)}</span>{drawn}{axis(marks)}</div>'


Segment = tuple[str, float, float, str]
"""CSS class, start and end as shares of the width, what a pointer sees."""


def segment_rows(rows: Sequence[tuple[object, Sequence[Segment]]], marks: Sequence[tuple[float, str]], label: str) -> str:
    """Rows of bars along one axis: a timeline."""
    step = row_height(len(rows), 8, 22)
    height = step * len(rows)
    grid = "".join(f'<line class="grid" x1="{pct(at)}" x2="{pct(at)}" y1="0" y2="{height}"/>' for at, _ in marks)
    bars = "".join(
        f'<rect class="{css}" x="{pct(min(start, 0.997))}" width="{pct(max(end - start, 0.003))}" y="{i * step + 1}" height="{step - 2}">'
        f"<title>{esc(name)}</title></rect>"
        for i, (_, segments) in enumerate(rows)
        for css, start, end, name in segments
    )
    return (
        f'<div class="heat"><div class="gutter">{row_labels([name for name, _ in rows], height)}</div><div class="chart">'
        f'<svg role="img" aria-label="{esc(label)}" width="100%" height="{height}">{grid}{bars}</svg>{axis(marks)}</div></div>'
    )


def stacked_area(series: Sequence[tuple[str, Sequence[float]]], label: str, top: str, height: int = 72) -> str:
    """Series on top of each other over equal steps."""
    sums = [sum(values) for values in zip(*(v for _, v in series), strict=True)]
    most, width, below = max(sums) or 1.0, 1 / len(sums), [0.0] * len(sums)
    bars = []
    for css, values in series:
        for i, value in enumerate(values):
            if value > 0:
                below[i] += value
                at = f'x="{pct(i * width)}" width="{pct(width)}" y="{height - (height - 4) * below[i] / most:.1f}"'
                bars.append(f'<rect class="{css}" {at} height="{(height - 4) * value / most:.1f}"/>')
    return (
        f'<div class="heat"><div class="gutter"><span class="top">{esc(top)}</span></div><div class="chart">'
        f'<svg role="img" aria-label="{esc(label)}" width="100%" height="{height}" shape-rendering="crispEdges">{"".join(bars)}</svg></div></div>'
    )


def spread_rows(rows: Sequence[tuple[object, Sequence[float]]], scale: Scale, label: str, mark: tuple[float, str] | None = None) -> str:
    """Rows of five quantiles: a thin line from first to last, a thick one between the inner two, a dot in the middle."""
    step = row_height(len(rows), 8, 20)
    height = step * len(rows)
    ticks = [(scale.place(t) or 0.0, number(t)) for t in scale.ticks()]
    body = [f'<line class="grid" x1="{pct(at)}" x2="{pct(at)}" y1="0" y2="{height}"/>' for at, _ in ticks]
    if mark is not None:
        body.append(f'<line class="mark" x1="{pct(mark[0])}" x2="{pct(mark[0])}" y1="0" y2="{height}"><title>{esc(mark[1])}</title></line>')
    for i, (name, quantiles) in enumerate(rows):
        low, inner, middle, outer, high = (pct(scale.place(q) or 0.0) for q in quantiles)
        y = (i + 0.5) * step
        words = f"layer {name}: {', '.join(f'{q:,.0f}' for q in quantiles)}"
        body.append(
            f'<g><title>{esc(words)}</title><line class="whole" x1="{low}" x2="{high}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<line class="inner" x1="{inner}" x2="{outer}" y1="{y:.1f}" y2="{y:.1f}" style="stroke-width:{min(7, step - 4)}"/>'
            f'<circle cx="{middle}" cy="{y:.1f}" r="{min(4, step / 3):.1f}"/></g>'
        )
    return (
        f'<div class="heat"><div class="gutter">{row_labels([name for name, _ in rows], height)}</div><div class="chart">'
        f'<svg class="spread" role="img" aria-label="{esc(label)}" width="100%" height="{height}">{"".join(body)}</svg>{axis(ticks)}</div></div>'
    )


def dots(rows: Sequence[tuple[str, Sequence[tuple[float, str]]]], scale: Scale, label: str, ticks: Sequence[tuple[float, str]]) -> str:
    """A row of points per name, a line at their mean."""
    step, body = 30, []
    height = step * len(rows)
    body += [
        f'<line class="grid" x1="{pct(scale.place(t) or 0.0)}" x2="{pct(scale.place(t) or 0.0)}" y1="0" y2="{height}"/>' for t, _ in ticks
    ]
    for i, (_, points) in enumerate(rows):
        mean = scale.place(sum(v for v, _ in points) / len(points)) or 0.0
        body.append(f'<line class="mark" x1="{pct(mean)}" x2="{pct(mean)}" y1="{i * step + 3}" y2="{(i + 1) * step - 3}"/>')
        body += [
            f'<circle cx="{pct(scale.place(v) or 0.0)}" cy="{(i + 0.5) * step:g}" r="4"><title>{esc(name)}</title></circle>'
            for v, name in points
        ]
    return (
        f'<div class="heat"><div class="gutter wide">{row_labels([name for name, _ in rows], height, "")}</div><div class="chart">'
        f'<svg class="spread faint" role="img" aria-label="{esc(label)}" width="100%" height="{height}">{"".join(body)}</svg>'
        f"{axis([(scale.place(t) or 0.0, text) for t, text in ticks])}</div></div>"
    )


def bar(share: float, css: str = "s1", mark: float | None = None) -> str:
    """A bar inside a table's cell, with a reference line if asked."""
    line = "" if mark is None else f'<i style="left:{pct(mark)}"></i>'
    return f'<div class="bar"><b class="{css}" style="width:{pct(max(0.0, min(1.0, share)))}"></b>{line}</div>'


def stack_bar(parts: Sequence[tuple[str, str, float, str]], label: str) -> str:
    """One bar cut into parts (css, name, amount, words), with a key that carries the words."""
    whole = sum(p[2] for p in parts) or 1.0
    bars = "".join(
        f'<b class="{css}" style="width:{pct(amount / whole)}" title="{esc(name)}"></b>' for css, name, amount, _ in parts if amount
    )
    return f'<div class="stack" role="img" aria-label="{esc(label)}">{bars}</div>{key([(css, f"{name} {words}") for css, name, _, words in parts])}'


def key(entries: Sequence[tuple[str, str]]) -> str:
    """What colours mean."""
    return '<ul class="key">' + "".join(f'<li><i class="{css}"></i>{esc(text)}</li>' for css, text in entries) + "</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table that scrolls in its own frame. Cells are HTML already."""
    side = ['class="left"' if i in left else "" for i in range(len(head))]
    top = "".join(f'<th scope="col" {s}>{h}</th>' for h, s in zip(head, side, strict=True))
    body = "".join("<tr>" + "".join(f"<td {s}>{c}</td>" for c, s in zip(row, side, strict=True)) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
