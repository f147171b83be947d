"""Activations against a quantizer one float at a time, and at the edges of the format."""

import pytest
import torch

from p48ray.errors import NumericsError
from p48ray.numerics.activation import count_clipped, input_global_scale, quantize_activations
from tests.reference import formats


def tokens(seed: int, num_tokens: int = 12, num_inputs: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-4, 2, (num_tokens, 1), generator=generator)
    return sizes * torch.randn(num_tokens, num_inputs, generator=generator)


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("amax", [1e-3, 5.0, 1e4])
def test_agrees_with_a_quantizer_one_float_at_a_time(group: int, amax: float) -> None:
    x, scale = tokens(0), input_global_scale(amax)
    expected = torch.tensor([formats.quantize_token(row, scale, group) for row in x.tolist()])
    torch.testing.assert_close(quantize_activations(x, scale, group), expected, rtol=1e-6, atol=0)


def test_ties_and_exact_values_with_a_scale_of_one() -> None:
    x = torch.tensor(
        [
            [
                6.0,
                5.0,
                3.5,
                2.5,
                1.75,
                1.25,
                0.75,
                0.25,
                -0.25,
                -0.75,
                -1.25,
                -1.75,
                -2.5,
                -3.5,
                -5.0,
                0.3,
            ]
        ]
    )
    expected = [
        [6.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, 0.5]
    ]
    assert quantize_activations(x, 1.0).tolist() == expected


def test_a_group_whose_scale_rounds_to_zero_becomes_zeros() -> None:
    tiny = torch.full((1, 16), 6 * 2.0**-10)  # scale exactly between 0 and 2^-9: ties to even, 0
    assert quantize_activations(tiny, 1.0).tolist() == [[0.0] * 16]
    larger = torch.full((1, 16), 6 * 2.0**-10 * 1.01)
    assert quantize_activations(larger, 1.0).tolist() == [[6 * 2.0**-9 * 0.5] * 16]
    assert torch.isfinite(quantize_activations(torch.zeros(2, 32), 1.0)).all()


def test_values_beyond_the_global_scale_saturate() -> None:
    x = torch.zeros(1, 16)
    x[0, :3] = torch.tensor([1e6, -1e6, 2688.0])
    assert quantize_activations(x, 1.0)[0, :3].tolist() == [2688.0, -2688.0, 2688.0]


def test_group_32_shares_one_scale() -> None:
    x = torch.cat([torch.full((1, 16), 0.01), torch.full((1, 16), 6.0)], dim=1)
    assert quantize_activations(x, 1.0, 32)[0, :16].abs().max() == 0
    assert quantize_activations(x, 1.0, 16)[0, :16].abs().min() > 0.009


def test_bfloat16_tokens_and_a_tensor_scale_are_accepted() -> None:
    x = tokens(1).bfloat16()
    assert torch.equal(
        quantize_activations(x, torch.tensor(100.0)), quantize_activations(x.float(), 100.0)
    )


def test_tokens_do_not_influence_each_other_and_stay_unchanged() -> None:
    x = tokens(3)
    before = x.clone()
    whole = quantize_activations(x, 30.0)
    assert torch.equal(torch.cat([quantize_activations(row[None], 30.0) for row in x]), whole)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("group", "inputs"), [(8, 64), (16, 24), (32, 48)])
def test_groups_that_do_not_fit_are_refused(group: int, inputs: int) -> None:
    with pytest.raises(NumericsError, match="group of 16 or 32"):
        quantize_activations(torch.zeros(1, inputs), 1.0, group)


def test_input_global_scale_is_a_float32_value() -> None:
    assert input_global_scale(6.0) == 448.0
    assert input_global_scale(0.0) == 1.0
    scale = input_global_scale(0.3)
    assert scale == torch.tensor(scale, dtype=torch.float32).item()
    assert scale == (torch.tensor([2688.0]) / torch.tensor([0.3])).item()


@pytest.mark.parametrize("amax", [float("nan"), float("inf"), -1.0])
def test_input_global_scale_refuses_what_is_no_maximum(amax: float) -> None:
    with pytest.raises(NumericsError, match="finite amax"):
        input_global_scale(amax)


@pytest.mark.parametrize("amax", [0.37, 11.3, 1.7e-5, 900.1])
def test_the_maximum_that_made_the_scale_is_not_clipped_but_more_is(amax: float) -> None:
    largest = torch.tensor([[amax, -amax, amax / 2] + [0.0] * 13])
    assert count_clipped(largest, input_global_scale(amax)).item() == 0
    assert count_clipped(largest * 1.00001, input_global_scale(amax)).item() == 2
    assert count_clipped(largest * 1.00001, torch.tensor(input_global_scale(amax))).item() == 2
