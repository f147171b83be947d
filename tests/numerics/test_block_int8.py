"""Stored tokens against a coder one float at a time in float64, and its bounds."""

import math

import pytest
import torch

from p48ray.errors import NumericsError
from p48ray.numerics.block_int8 import BLOCK, MIN_SCALE, decode, encode


def tokens(num_tokens: int = 24, num_values: int = 96, seed: int = 0) -> torch.Tensor:
    """Rows of very different size, with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_values, generator=generator, dtype=torch.float64)
    x *= 10.0 ** torch.randint(-9, 4, (num_tokens, 1), generator=generator)
    x[:, ::29] *= 200
    return x.float()


def bf16(x: float) -> float:
    """The nearest number with 8 significant bits, ties to even."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def coded(row: list[float]) -> list[float]:
    result = []
    for start in range(0, len(row), BLOCK):
        block = row[start : start + BLOCK]
        scale = bf16(max(max(map(abs, block)) / 127, MIN_SCALE))
        result += [round(v / scale) * scale for v in block]
    return result


def test_agrees_with_a_coder_one_float_at_a_time() -> None:
    x = tokens()
    expected = torch.tensor([coded(row) for row in x.double().tolist()], dtype=torch.float64)
    assert torch.equal(decode(*encode(x)).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_no_value_is_off_by_more_than_half_a_step_of_its_block(
    dtype: torch.dtype, seed: int
) -> None:
    x = tokens(200, seed=seed).to(dtype)
    codes, scale = encode(x)
    half_step = scale.double().repeat_interleave(BLOCK, 1) / 2
    assert ((decode(codes, scale).double() - x.double()).abs() <= half_step * (1 + 1e-6)).all()
    # and the step is the block's own
    assert (scale.float() * 126.5 <= x.float().abs().unflatten(1, (-1, BLOCK)).amax(-1)).all()
    assert codes.abs().max() == 127 and codes.min() >= -127


def test_every_largest_value_has_code_127() -> None:
    """All significands that float32's first 12 bits can tell apart: the rounding of the scale
    pushes none beyond the codes."""
    x = torch.zeros(4096, BLOCK)
    x[:, 3] = -(1 + torch.arange(4096) / 4096)
    assert (encode(x)[0][:, 3] == -127).all()


def test_a_second_encoding_changes_nothing() -> None:
    codes, scale = encode(tokens(300))
    again = encode(decode(codes, scale))
    assert torch.equal(again[0], codes) and torch.equal(again[1], scale)


def test_zeros_and_the_smallest_and_largest_numbers() -> None:
    x = torch.zeros(4, 32)
    x[1, 0], x[2, 5], x[3, 20] = 2.0**-149, 2.0**-126, torch.finfo(torch.float32).max
    found = decode(*encode(x))
    assert found[0].tolist() == [0.0] * 32 and torch.isfinite(found).all()
    assert found[1, 0] == 0 and found[2, 5] == 2.0**-126
    assert found[3, 20] == pytest.approx(x[3, 20].item(), rel=2**-8)
    assert encode(x)[1].min() == MIN_SCALE


def test_blocks_do_not_influence_each_other_and_the_argument_stays_unchanged() -> None:
    x = tokens()
    before, whole = x.clone(), decode(*encode(x))
    pieces = [decode(*encode(piece)) for piece in x.split(BLOCK, 1)]
    assert torch.equal(torch.cat(pieces, 1), whole) and torch.equal(x, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = tokens(2, 32)
    x[1, 31] = bad
    with pytest.raises(NumericsError, match="found 1 of 64 that are not"):
        encode(x)


def test_rows_of_broken_blocks_are_refused() -> None:
    with pytest.raises(NumericsError, match="whole blocks of 16, found 40"):
        encode(torch.ones(2, 40))
