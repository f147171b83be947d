"""What is not finite, against torch's own opinion of every bit pattern."""

import random

import pytest
import torch

from p48ray.checkpoint.finite_values import FLOAT_DTYPES, FiniteCheck, NotFinite
from p48ray.checkpoint.header import TORCH_DTYPES


def patterns(dtype: torch.dtype) -> bytes:
    """Every pattern of a narrow format; of a wide one many, with all exponents set in a third."""
    width = dtype.itemsize
    if width <= 2:
        numbers = list(range(256**width))
    else:
        draw = random.Random(width)
        ones = {4: 0x7F80_0000, 8: 0x7FF0_0000_0000_0000}[width]
        numbers = [draw.getrandbits(8 * width) | ones * (n % 3 == 0) for n in range(9000)]
        numbers += [ones, ones | 1 << (8 * width - 1), ones | 1, ones - 1]
    return b"".join(n.to_bytes(width, "little") for n in numbers)


@pytest.mark.parametrize("name", sorted(FLOAT_DTYPES))
@pytest.mark.parametrize("num_pieces", [1, 7])
def test_every_pattern_is_what_torch_says(name: str, num_pieces: int) -> None:
    dtype = TORCH_DTYPES[name]
    data = patterns(dtype)
    count = len(data) // dtype.itemsize
    wide = torch.frombuffer(bytearray(data), dtype=dtype).double()
    check = FiniteCheck(name, (count,))
    size = -(-count // num_pieces) * dtype.itemsize
    for at in range(0, len(data), size):
        check.add(data[at : at + size])
    first = torch.nonzero(~wide.isfinite()).flatten()[0].item()
    assert check.found == NotFinite(
        first=(first,),
        num_nan=int(wide.isnan().sum()),
        num_inf=int(wide.isposinf().sum()),
        num_minus_inf=int(wide.isneginf().sum()),
    )
    assert check.found.num_nan > 0


def test_place_is_an_index_by_rows_and_counts_are_in_words() -> None:
    values = torch.zeros(3, 4, 5)
    assert not FiniteCheck("F32", (3, 4, 5)).found
    values[1, 2, 3], values[2, 0, 0], values[2, 0, 1] = torch.nan, -torch.inf, torch.inf
    check = FiniteCheck("F32", (3, 4, 5))
    for data in values.numpy().tobytes()[:100], values.numpy().tobytes()[100:]:
        check.add(data)
    assert str(check.found) == "1 NaN and 1 inf and 1 -inf, the first at [1, 2, 3]"
    single = FiniteCheck("BF16", ())
    single.add(b"\xc0\x7f")
    assert single.found == NotFinite(first=(), num_nan=1)
    assert single.found


def test_integers_and_empty_tensors_hold_nothing() -> None:
    packed = FiniteCheck("I32", (2,))
    packed.add(b"\xff" * 8)
    empty = FiniteCheck("F32", (0, 3))
    empty.add(b"")
    assert not packed.found and not empty.found
