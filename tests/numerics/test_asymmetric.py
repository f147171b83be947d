"""The compensated target against least squares on the tokens themselves, and its fallbacks."""

import pytest
import torch

from p48ray.numerics.asymmetric import compensated_target


def problem(seed: int = 0, num_inputs: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight (1, O, I), original inputs h and changed inputs h^ (T, I)."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(400, num_inputs, generator=generator)
    changed = h @ (
        torch.eye(num_inputs) + 0.2 * torch.randn(num_inputs, num_inputs, generator=generator)
    )
    return (
        torch.randn(1, 5, num_inputs, generator=generator),
        h,
        changed + 0.1 * torch.randn(400, num_inputs, generator=generator),
    )


def moments(h: torch.Tensor, changed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (changed.T @ changed)[None], (h.T @ changed)[None]


def test_minimises_the_ridge_objective_on_the_tokens() -> None:
    weight, h, changed = problem()
    gram, cross = moments(h, changed)
    ridge = 0.01 * gram[0].diagonal().mean().double()
    eye = torch.eye(16, dtype=torch.float64)
    rows = torch.cat([changed.double(), ridge.sqrt() * eye])
    goals = torch.cat([h.double() @ weight[0].double().T, ridge.sqrt() * weight[0].double().T])
    expected = torch.linalg.lstsq(rows, goals).solution.T
    torch.testing.assert_close(
        compensated_target(weight, gram, cross)[0].double(), expected, rtol=1e-4, atol=1e-5
    )


def test_restores_most_of_the_output_that_the_changed_inputs_lost() -> None:
    weight, h, changed = problem(1)
    gram, cross = moments(h, changed)
    goal = h @ weight[0].T
    before = (goal - changed @ weight[0].T).square().sum()
    after = (goal - changed @ compensated_target(weight, gram, cross)[0].T).square().sum()
    assert after < 0.2 * before


def test_unchanged_inputs_return_the_weight_exactly() -> None:
    weight, h, _ = problem(2)
    gram, _ = moments(h, h)
    assert torch.equal(compensated_target(weight, gram, gram), weight)


def test_a_large_ridge_pulls_to_the_weight_not_to_zero() -> None:
    weight, h, changed = problem(3)
    gram, cross = moments(h, changed)
    torch.testing.assert_close(
        compensated_target(weight, gram, cross, ridge_rel=1e6), weight, rtol=1e-3, atol=1e-4
    )


def test_sums_and_means_give_the_same_target() -> None:
    weight, h, changed = problem(4)
    gram, cross = moments(h, changed)
    torch.testing.assert_close(
        compensated_target(weight, gram / 256, cross / 256), compensated_target(weight, gram, cross)
    )


@pytest.mark.parametrize("fault", ["zero", "nan gram", "inf cross", "indefinite"])
def test_an_unusable_expert_keeps_its_weight_and_its_neighbour_does_not(fault: str) -> None:
    weight, h, changed = problem(5)
    gram, cross = (m.repeat(2, 1, 1) for m in moments(h, changed))
    good = compensated_target(weight, gram[:1], cross[:1])
    if fault == "zero":
        gram[0] = 0
    elif fault == "nan gram":
        gram[0, 2, 2] = torch.nan
    elif fault == "inf cross":
        cross[0, 1, 2] = torch.inf
    else:
        gram[0, 0, 1] = gram[0, 1, 0] = 1e9
    target = compensated_target(weight.repeat(2, 1, 1), gram, cross)
    assert torch.equal(target[0], weight[0])
    assert torch.equal(target[1], good[0])
    assert not torch.allclose(target[1], weight[0])
