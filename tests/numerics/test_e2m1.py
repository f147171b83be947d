"""Every code, every byte, every tie."""

import pytest
import torch

from p48ray.errors import NumericsError
from p48ray.numerics import e2m1
from tests.reference import formats

ALL_CODES = torch.arange(16, dtype=torch.uint8)
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def awkward_values() -> torch.Tensor:
    """Every value, every midpoint, their float32 neighbours, and what lies beyond the range; both
    signs."""
    values = torch.tensor(formats.E2M1)
    points = torch.cat(
        [values, (values[1:] + values[:-1]) / 2, torch.tensor([1e-45, 1e-30, 7.0, 1e30, torch.inf])]
    )
    near = torch.cat(
        [
            points,
            torch.nextafter(points, torch.tensor(torch.inf)),
            torch.nextafter(points, torch.tensor(-torch.inf)),
        ]
    )
    return torch.cat([near, -near])


def test_the_sixteen_codes_decode_to_the_standard_values() -> None:
    expected = torch.tensor(formats.E2M1 + [-v for v in formats.E2M1])
    assert torch.equal(e2m1.decode(ALL_CODES).view(torch.int32), expected.view(torch.int32))


def test_every_code_but_minus_zero_survives_decode_and_encode() -> None:
    expected = torch.where(ALL_CODES == 8, 0, ALL_CODES).to(torch.uint8)
    assert torch.equal(e2m1.encode(e2m1.decode(ALL_CODES)), expected)


def test_rounding_is_to_nearest_with_ties_to_the_even_code_and_saturates() -> None:
    x = awkward_values()
    assert e2m1.encode(x).tolist() == [formats.e2m1_code(v) for v in x.tolist()]


def test_ties_by_hand() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1.round_to_e2m1(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_round_equals_decode_of_encode_bit_for_bit() -> None:
    x = torch.cat(
        [awkward_values(), 4 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))]
    )
    through_codes = e2m1.decode(e2m1.encode(x))
    assert torch.equal(e2m1.round_to_e2m1(x).view(torch.int32), through_codes.view(torch.int32))


@pytest.mark.parametrize("x", [-0.0, -0.25, -1e-45, 0.0])
def test_nothing_that_rounds_to_zero_becomes_minus_zero(x: float) -> None:
    assert e2m1.encode(torch.tensor([x])).item() == 0
    assert not torch.signbit(e2m1.round_to_e2m1(torch.tensor([x]))).item()


def test_bfloat16_is_rounded_like_its_float32_value() -> None:
    x = (4 * torch.randn(1000, generator=torch.Generator().manual_seed(1))).bfloat16()
    assert torch.equal(e2m1.encode(x), e2m1.encode(x.float()))


def test_all_256_bytes_survive_unpack_and_pack() -> None:
    codes = e2m1.unpack(ALL_BYTES.view(2, 128))
    assert codes.shape == (2, 256)
    assert codes.max() == 15
    assert torch.equal(e2m1.pack(codes), ALL_BYTES.view(2, 128))


def test_low_nibble_is_the_lower_index() -> None:
    assert e2m1.pack(torch.tensor([0x3, 0xA], dtype=torch.uint8)).tolist() == [0xA3]
    assert e2m1.unpack(torch.tensor([0xA3], dtype=torch.uint8)).tolist() == [0x3, 0xA]


def test_an_odd_number_of_codes_cannot_be_packed() -> None:
    with pytest.raises(NumericsError, match="found 3"):
        e2m1.pack(torch.zeros(2, 3, dtype=torch.uint8))


def test_inputs_are_unchanged() -> None:
    x = awkward_values()
    before = x.clone()
    e2m1.round_to_e2m1(x), e2m1.encode(x)
    assert torch.equal(x, before)


def test_decoding_a_byte_at_a_time_gives_the_same_values_with_the_sign_of_zero() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(2, 4, 32)
    expected = e2m1.decode(e2m1.unpack(every))
    assert torch.equal(e2m1.decode_packed(every).view(torch.int32), expected.view(torch.int32))
    assert e2m1.decode_packed(every[:, :, :0]).shape == (2, 4, 0)
