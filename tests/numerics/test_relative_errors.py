"""Errors against their definitions."""

import math

import torch

from p48ray.numerics.relative_errors import (
    hessian_loss,
    relative_output_error,
    relative_weight_error,
)
from tests.reference.problems import correlated, identity


def test_hessian_loss_is_the_mean_squared_output_error_of_the_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta = (
        torch.randn(2, 50, 16, generator=generator),
        torch.randn(2, 4, 16, generator=generator),
    )
    expected = (x @ delta.mT).square().sum((1, 2)) / 50
    torch.testing.assert_close(hessian_loss(delta, x.mT @ x / 50), expected)


def test_relative_weight_error_is_a_ratio_of_squares() -> None:
    w = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    q = torch.tensor([[[3.0, 3.0]], [[1.0, 0.0]]])
    torch.testing.assert_close(relative_weight_error(w, q), torch.tensor([1 / 25, 0.0]))


def test_nothing_lost_of_nothing_is_zero_and_something_for_nothing_is_infinite() -> None:
    zero, one = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert relative_weight_error(zero, zero).item() == 0.0
    assert relative_weight_error(zero, one).item() == math.inf
    assert relative_output_error(zero, one, identity(1, 2)).item() == math.inf


def test_relative_output_error_is_one_when_nothing_is_left_and_ignores_unused_inputs() -> None:
    w, hessian = correlated(1, 2, 8, 16)
    torch.testing.assert_close(
        relative_output_error(w, torch.zeros_like(w), hessian), torch.ones(2)
    )
    hessian[:, 3] = hessian[:, :, 3] = 0
    q = w.clone()
    q[:, :, 3] = 9
    assert relative_output_error(w, q, hessian).max() == 0


def test_relative_output_error_with_white_inputs_is_the_weight_error() -> None:
    w, _ = correlated(2, 2, 8, 16)
    q = w + 0.001
    torch.testing.assert_close(
        relative_output_error(w, q, identity(2, 16)), relative_weight_error(w, q)
    )
