"""Heat maps: a PNG of one pixel a cell, in a palette for light paper and one for dark.

The palettes are safe for colour-blind eyes (magma; orange against blue).
"""

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from p48ray.report.charts import axis, column_axis, row_height, row_labels
from p48ray.report.scales import Scale, number

Rgb = tuple[int, int, int]
NO_VALUE = 255  # palette index of cells that a scale has no place for
STEPS = 254  # last palette index of a ramp


@dataclass(frozen=True, slots=True)
class Ramp:
    """A colour ramp from low to high, on light and on dark paper.

    `odd_light` and `odd_dark` are for cells without a value.
    """

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


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """A picture whose rows are layers and whose columns are experts.

    `key`: where the page's script finds the numbers. `alt`: the picture in words. `light` and
    `dark`: data URIs. `min_width` and `height`: pixels; a wider picture scrolls inside its own
    frame. `names`: the rows' labels. `axis`: the columns'.
    """

    key: str
    alt: str
    light: str
    dark: str
    min_width: int
    height: int
    names: Markup
    axis: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Legend:
    """A ramp by its name, the words at its ends, and the numbers under it."""

    ramp: str
    low: str
    high: str
    axis: Markup


def hex_rgb(colour: str) -> Rgb:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def palette(stops: Sequence[str], odd: str) -> bytes:
    """256 colours for a PNG: the ramp, then that of cells without a value."""
    colours, found = [hex_rgb(s) for s in stops], bytearray()
    for i in range(STEPS + 1):
        at = i / STEPS * (len(colours) - 1)
        n = min(int(at), len(colours) - 2)
        pairs = zip(colours[n], colours[n + 1], strict=True)
        found += bytes(round(a + (b - a) * (at - n)) for a, b in pairs)
    return bytes(found) + bytes(hex_rgb(odd))


def png(rows: Sequence[bytes], colours: bytes) -> bytes:
    """An indexed PNG, one byte a pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        size, check = len(data), zlib.crc32(kind + data)
        return struct.pack(">I", size) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = ((b"IHDR", head), (b"PLTE", colours), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def cell_index(value: float | None, scale: Scale) -> int:
    at = None if value is None else scale.place(value)
    return NO_VALUE if at is None else round(at * STEPS)


def heat_map(
    key: str,
    alt: str,
    cells: Sequence[Sequence[float | None]],
    labels: Sequence[object],
    scale: Scale,
    ramp: Ramp,
) -> HeatMap:
    """The picture of `cells`, layer by layer. A column is never narrower than two pixels.

    Args:
        key: see HeatMap.
        alt: see HeatMap.
        cells: (layers, experts); None where there is no value.
        labels: one a layer.
        scale: where a value lies on the ramp.
        ramp: the colours.
    """
    rows = [bytes(cell_index(value, scale) for value in row) for row in cells]
    columns, height = len(rows[0]), row_height(len(rows), 7, 26) * len(rows)
    return HeatMap(
        key=key,
        alt=alt,
        light=data_uri(png(rows, palette(ramp.light, ramp.odd_light))),
        dark=data_uri(png(rows, palette(ramp.dark, ramp.odd_dark))),
        min_width=2 * columns,
        height=height,
        names=row_labels(labels, height),
        axis=column_axis(columns),
    )


def legend(
    scale: Scale,
    ramp: Ramp,
    low: str,
    high: str,
    marks: Sequence[tuple[float, str]] | None = None,
) -> Legend:
    """The key to a heat map.

    Args:
        scale: where a value lies on the ramp.
        ramp: the colours.
        low, high: words at the ends.
        marks: (place on the ramp, label); None for round numbers of the scale.
    """
    ticks = [(scale.place(t) or 0.0, number(t)) for t in scale.ticks()] if marks is None else marks
    return Legend(ramp=ramp.name, low=low, high=high, axis=axis(ticks))
