"""Gradients at an expert's linears against float64 autograd, and the laws of token weights."""

import pytest
import torch
from torch import Tensor

from p48ray.numerics.output_gradients import expert_gradients, norm_weights


def expert(seed: int, num_tokens: int = 23, hidden: int = 20, size: int = 12) -> tuple[Tensor, ...]:
    """(x, delta, router_weight, gate, up, down), float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (num_tokens, hidden),
        (num_tokens, hidden),
        (num_tokens,),
        (size, hidden),
        (size, hidden),
        (hidden, size),
    ]
    x, delta, router_weight, *weights = [
        torch.randn(*shape, generator=generator) for shape in shapes
    ]
    return x, delta, router_weight.abs(), *(0.5 * w for w in weights)


def autograd(
    x: Tensor, delta: Tensor, router_weight: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """Of sum_t delta_t . (w_t down(silu(gate x_t) * up x_t)), at what gate and up give and at what
    down gives, in float64."""
    x, delta, router_weight, gate, up, down = (
        t.double() for t in (x, delta, router_weight, gate, up, down)
    )
    gated, raised = (x @ gate.T).requires_grad_(True), (x @ up.T).requires_grad_(True)
    lowered = (torch.nn.functional.silu(gated) * raised) @ down.T
    y = router_weight[:, None] * lowered
    at_gate, at_up, at_down = torch.autograd.grad((y * delta).sum(), [gated, raised, lowered])
    return torch.cat([at_gate, at_up], dim=1), at_down


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_autograds(seed: int) -> None:
    problem = expert(seed)
    for ours, theirs in zip(expert_gradients(*problem), autograd(*problem), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours.double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item()
        )


def test_saturated_gates_stay_exact_and_finite() -> None:
    x, delta, router_weight, gate, up, down = expert(5)
    problem = (x, delta, router_weight, 200 * gate, up, down)
    for ours, theirs in zip(expert_gradients(*problem), autograd(*problem), strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item()
        )


def test_tokens_are_independent_and_an_expert_without_tokens_has_no_rows() -> None:
    x, delta, router_weight, *weights = expert(6)
    whole = expert_gradients(x, delta, router_weight, *weights)
    part = expert_gradients(x[3:9], delta[3:9], router_weight[3:9], *weights)
    for rows, all_rows in zip(part, whole, strict=True):
        torch.testing.assert_close(rows, all_rows[3:9])
    empty = expert_gradients(x[:0], delta[:0], router_weight[:0], *weights)
    assert [tuple(t.shape) for t in empty] == [(0, 24), (0, 20)]


def test_inputs_are_unchanged() -> None:
    problem = expert(7)
    before = [t.clone() for t in problem]
    expert_gradients(*problem)
    norm_weights(problem[2], 1.5)
    assert all(torch.equal(a, b) for a, b in zip(before, problem, strict=True))


def test_weights_have_mean_one_before_they_are_clipped_and_keep_proportions() -> None:
    norms = torch.rand(300, generator=torch.Generator().manual_seed(0)) ** 3 * 1e-6
    weights = norm_weights(norms, clip=1e9)
    assert weights.double().mean().item() == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(weights / weights[0], norms / norms[0])


def test_the_clip_is_times_the_mean_of_what_is_not_yet_clipped() -> None:
    norms = torch.ones(100)
    norms[17] = 901.0  # mean 10
    weights = norm_weights(norms, clip=20.0)
    assert weights[17] == 20
    torch.testing.assert_close(weights[torch.arange(100) != 17], torch.full((99,), 0.1))
    torch.testing.assert_close(norm_weights(norms, clip=95.0)[17], torch.tensor(90.1))


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_gradients_that_are_all_zero_give_ones(num_tokens: int) -> None:
    assert torch.equal(norm_weights(torch.zeros(num_tokens), 20.0), torch.ones(num_tokens))


def test_a_token_without_gradient_has_no_weight_among_others() -> None:
    assert torch.equal(
        norm_weights(torch.tensor([0.0, 2.0, 1.0]), 20.0), torch.tensor([0.0, 2.0, 1.0])
    )
