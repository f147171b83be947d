"""Where numbers lie on an axis, and how an axis says them."""

import math
from dataclasses import dataclass
from typing import Literal


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
        low, high, at = self.low, self.high, value
        if self.kind == "log":
            low, high, at = (math.log(v) for v in (low, high, at))
        return min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 0.5

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers inside."""
        if self.kind == "linear":
            step = round_step((self.high - self.low) / most)
            first = math.ceil(self.low / step - 1e-9)
            return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            round_numbers = [d * 10.0**e for e in decades for d in digits]
            found = [n for n in round_numbers if self.low <= n <= self.high]
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
    units = ((day, "d"), (hour, "h"), (minute, "min"), (1, "s"))
    size, unit = next((s, u) for s, u in units if step % s == 0)
    return [(n * step, f"{n * step // size} {unit}") for n in range(int(total_s // step) + 1)]


def number(value: float) -> str:
    """Short, for axes: 0.002, 0.5, 43,008, 1.2M."""
    if 1000 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    if not value:
        return "0"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.0e}".replace("e-0", "e-")
