"""Block scales under another divisor: every E4M3 number against exact fractions."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from p48ray.numerics.shared_scale import rescaled, shared_divisor

POSITIVE = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
VALUES = [Fraction(value) for value in POSITIVE.double().tolist()]
PAIRS = [
    (divisor, float(torch.tensor(shared, dtype=torch.float32)))
    for divisor, shared in [
        (1.0, 1.0), (2.0, 1.0), (1.0, 2.0**-3), (1.0, 2.0**-9), (1.0, 2.0**-17), (4.0, 3.0),
        (7.0, 6.0), (3.0, 1.0), (7 * 2.0**20, 6 * 2.0**-3), (16.0, 15.0), (1.0, 0.999),
        (32.0, 17.0), (3119.25, 2113.7), (1.0, 1e-4),
    ]
]  # fmt: skip
"""Old and new divisor, float32. With 7 and 6 some products are E4M3 numbers, most are not."""


def nearest(exact: Fraction) -> Fraction:
    """Of zero and all E4M3 numbers, ties to the even byte."""
    candidates = [Fraction(0), *VALUES]
    return candidates[min(range(127), key=lambda i: (abs(candidates[i] - exact), i % 2))]


@pytest.mark.parametrize(("divisor", "shared"), PAIRS)
def test_every_scale_goes_to_the_nearest_one(divisor: float, shared: float) -> None:
    found = rescaled(POSITIVE[None], torch.ones(1, 126, dtype=torch.bool), divisor, shared)
    exact = [value * Fraction(shared) / Fraction(divisor) for value in VALUES]
    wanted = [nearest(value) for value in exact]
    smallest = VALUES[0]
    assert [Fraction(v) for v in found.scale_OS[0].double().tolist()] == [
        max(value, smallest) for value in wanted
    ]
    assert found.is_vanished_OS[0].tolist() == [value == 0 for value in wanted]
    roundings = [abs(w - e) / e for w, e in zip(wanted, exact, strict=True)]
    assert found.num_rounded == sum(r > 0 for r in roundings)
    assert found.num_vanished == sum(w == 0 for w in wanted)
    assert found.largest_rounding == pytest.approx(float(max(roundings)), rel=1e-12)


@pytest.mark.parametrize("power", [0, 1, 5, 12])
def test_power_of_two_is_exact_above_subnormal_numbers(power: int) -> None:
    is_normal = POSITIVE.double() * 2.0**-power >= 2.0**-6
    scales = POSITIVE[is_normal][None]
    found = rescaled(scales, torch.ones_like(scales, dtype=torch.bool), 2.0**power, 1.0)
    assert torch.equal(found.scale_OS.double(), scales.double() * 2.0**-power)
    assert (found.num_rounded, found.largest_rounding) == (0, 0.0)


@pytest.mark.parametrize("ratio", [0.51, 6 / 7, 0.9371, 0.95, 0.99])
def test_no_normal_number_is_rounded_by_more_than_a_seventeenth(ratio: float) -> None:
    scales = POSITIVE[POSITIVE.double() * ratio >= 2.0**-6][None]
    found = rescaled(scales, torch.ones_like(scales, dtype=torch.bool), 1.0, ratio)
    assert 0 < found.largest_rounding <= 1 / 17


def test_spans_without_codes_are_not_counted() -> None:
    is_used: Tensor = torch.zeros(1, 126, dtype=torch.bool)
    found = rescaled(POSITIVE[None], is_used, 1.0, 1e-4)
    assert (found.num_rounded, found.num_vanished, found.largest_rounding) == (0, 0, 0.0)
    assert bool(found.is_vanished_OS.any())


def test_smaller_divisor_is_shared() -> None:
    assert shared_divisor(3.0, 2.0) == shared_divisor(2.0, 3.0) == 2.0
