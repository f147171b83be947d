"""Second moments against a sum token by token; damping and shrinkage at their anchor points."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics import curvature
from p48ray.numerics.activation import quantize_activations
from p48ray.numerics.curvature import (
    SecondMoment,
    damp,
    damp_from_tokens,
    shrink_towards,
    shrinkage_from_tokens,
)
from tests.reference.descent import hessian_sum


def tokens(
    seed: int, num_tokens: int = 300, num_inputs: int = 24
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (T, I), weights (T,), y (T, I)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_inputs, generator=generator)
    return (
        x,
        torch.rand(num_tokens, generator=generator),
        x + torch.randn(num_tokens, num_inputs, generator=generator),
    )


@pytest.mark.parametrize("slice_tokens", [4096, 128, 7])
def test_weighted_cross_moment_is_the_sum_token_by_token(
    monkeypatch: pytest.MonkeyPatch, slice_tokens: int
) -> None:
    monkeypatch.setattr(curvature, "SLICE_TOKENS", slice_tokens)
    x, weight, y = tokens(0)
    moment = SecondMoment.zeros(24, "cpu")
    moment.add_(x[:100], weight[:100], y[:100])
    moment.add_(x[100:], weight[100:], y[100:])
    expected = hessian_sum(x, weight, y)
    torch.testing.assert_close(moment.sum_II.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        moment.mean().double(), expected / weight.double().sum(), rtol=1e-5, atol=1e-6
    )
    assert moment.num_tokens == 300
    assert moment.weight_sum == pytest.approx(weight.double().sum().item(), rel=1e-12)


def test_rows_of_a_cross_moment_belong_to_y() -> None:
    moment = SecondMoment.zeros(2, "cpu")
    moment.add_(torch.tensor([[1.0, 10.0]]), None, torch.tensor([[3.0, 5.0]]))
    assert moment.sum_II.tolist() == [[3.0, 30.0], [5.0, 50.0]]


def test_no_weight_means_weight_one() -> None:
    x, _, _ = tokens(1)
    plain, ones = SecondMoment.zeros(24, "cpu"), SecondMoment.zeros(24, "cpu")
    plain.add_(x, None)
    ones.add_(x, torch.ones(300))
    assert torch.equal(plain.mean(), ones.mean())
    assert plain.weight_sum == 300.0


def test_float64_is_available_for_references() -> None:
    x, weight, _ = tokens(2)
    moment = SecondMoment.zeros(24, "cpu", torch.float64)
    moment.add_(x, weight)
    torch.testing.assert_close(moment.sum_II, hessian_sum(x, weight, x), rtol=1e-13, atol=1e-13)


def test_no_tokens_have_a_mean_of_zero() -> None:
    assert not SecondMoment.zeros(3, "cpu").mean().any()


def test_mean_is_a_new_tensor_and_tokens_are_unchanged() -> None:
    x, weight, y = tokens(3)
    before = x.clone(), weight.clone(), y.clone()
    moment = SecondMoment.zeros(24, "cpu")
    moment.add_(x, weight, y)
    moment.mean().zero_()
    assert moment.sum_II.any()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, y), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_what_is_not_finite_is_refused_by_the_mean(bad: float, where: str) -> None:
    x, weight, _ = tokens(4)
    if where == "x":
        x[7, 3] = bad
    else:
        weight[7] = bad
    moment = SecondMoment.zeros(24, "cpu")
    moment.add_(x, weight)
    with pytest.raises(NumericsError, match="not finite"):
        moment.mean()


def test_damp_adds_a_share_of_the_mean_diagonal() -> None:
    hessian = torch.tensor([[1.0, 0.5], [0.5, 3.0]])
    assert damp(hessian, 0.1).tolist() == [[pytest.approx(1.2), 0.5], [0.5, pytest.approx(3.2)]]
    assert hessian.tolist() == [[1.0, 0.5], [0.5, 3.0]]


def test_damp_takes_one_share_per_expert() -> None:
    batch = torch.tensor([[[2.0]], [[4.0]]])
    assert damp(batch, torch.tensor([0.5, 0.25])).flatten().tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    ("per_input", "expected"),
    [(0.0, 0.1), (1.0, 0.1), (6.0, 0.1), (12.0, 0.05), (60.0, 0.01), (1e6, 0.01), (-1.0, 0.1)],
)
def test_damping_falls_from_a_tenth_at_6_tokens_per_input_to_a_hundredth_at_60(
    per_input: float, expected: float
) -> None:
    assert damp_from_tokens(per_input) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0.0, 1.0), (2.0, 0.5), (6.0, 0.25), (18.0, 0.1)]
)
def test_shrinkage_is_one_without_tokens_and_a_half_at_half_tokens(
    num_tokens: float, expected: float
) -> None:
    assert shrinkage_from_tokens(num_tokens, 2.0) == pytest.approx(expected)


def moment(matrix: list[list[float]] | Tensor) -> SecondMoment:
    """Of one token, whose mean is the matrix."""
    return replace(
        SecondMoment.zeros(2, "cpu"),
        sum_II=torch.as_tensor(matrix),
        weight_total=torch.tensor(1.0),
        num_tokens=1,
    )


def test_shrinking_mixes_the_pool_at_the_experts_own_size() -> None:
    own, pool = torch.tensor([[2.0, 0.0], [0.0, 6.0]]), torch.tensor([[50.0, 10.0], [10.0, 30.0]])
    expected = 0.75 * own + 0.25 * pool * (4.0 / 40.0)
    torch.testing.assert_close(shrink_towards(moment(own), moment(pool), 0.25), expected)
    torch.testing.assert_close(shrink_towards(moment(own), moment(pool), 1.0), pool * (4.0 / 40.0))
    assert torch.equal(shrink_towards(moment(own), moment(pool), 0.0), own)


def test_sizes_are_those_of_other_moments_where_they_are_given() -> None:
    """A cross moment's diagonal may be of any sign."""
    cross, pool = torch.tensor([[-3.0, 1.0], [2.0, 3.0]]), torch.tensor([[1.0, 5.0], [-5.0, -1.0]])
    by = (moment(torch.eye(2) * 6.0), moment(torch.eye(2) * 2.0))
    torch.testing.assert_close(
        shrink_towards(moment(cross), moment(pool), 0.5, by), 0.5 * cross + 0.5 * 3.0 * pool
    )


def test_expert_without_tokens_takes_the_pool_and_one_without_weight_stays_zero() -> None:
    pool = torch.tensor([[50.0, 0.0], [0.0, 30.0]])
    assert torch.equal(shrink_towards(SecondMoment.zeros(2, "cpu"), moment(pool), 1.0), pool)
    assert torch.equal(
        shrink_towards(moment(torch.zeros(2, 2)), moment(pool), 0.5), torch.zeros(2, 2)
    )


def test_a_pool_of_zeros_leaves_the_moment() -> None:
    """It used to be halved by it, and to be no number where it was large."""
    for size in (1.0, 1e30):
        own = torch.eye(2) * size
        assert torch.equal(shrink_towards(moment(own), moment(torch.zeros(2, 2)), 0.5), own)
    assert torch.equal(
        shrink_towards(moment(torch.eye(2)), SecondMoment.zeros(2, "cpu"), 0.5), torch.eye(2)
    )


@pytest.mark.parametrize("has_y", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_sums_as_a_gpu_makes_them(
    monkeypatch: pytest.MonkeyPatch, has_y: bool, is_weighted: bool
) -> None:
    """The bookkeeping of GpuSums (waiting tokens, block triangle, mirror, scale) without a GPU:
    only its product is replaced."""

    def addmm(
        into: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        out_dtype: torch.dtype,
        out: torch.Tensor,
    ) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        assert a.shape[1] <= 64
        return out.copy_(into + a.to(out_dtype) @ b.to(out_dtype))

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(curvature, "GPU_SLICE_TOKENS", 64)
    monkeypatch.setattr(curvature, "TRIANGLE_BLOCK", 24)
    generator = torch.Generator().manual_seed(0)
    x = quantize_activations(torch.randn(500, 64, generator=generator) ** 3, 37.1)
    y = torch.randn(500, 64, generator=generator) if has_y else None
    weight = torch.rand(500, generator=generator) if is_weighted else None
    moment = SecondMoment.zeros(64, "cpu")
    moment.on_gpu = curvature.GpuSums(moment.sum_II)
    for start, stop in ((0, 5), (5, 12), (12, 300), (300, 500)):
        part = slice(start, stop)
        moment.add_(
            x[part],
            None if weight is None else weight[part],
            None if y is None else y[part],
            x_scale=37.1,
        )
        if stop == 300:
            moment.mean()  # reading in between changes nothing
    wanted = SecondMoment.zeros(64, "cpu", torch.float64)
    wanted.add_(x, weight, y)
    # bf16 operands, of a few hundred tokens; exact on the grid
    bound = 2e-3 if has_y or is_weighted else 1e-6
    assert (moment.mean() - wanted.mean()).norm() < bound * wanted.mean().norm()
    if not has_y:
        assert torch.equal(moment.mean(), moment.mean().mT)
    with pytest.raises(NumericsError, match="x_scale"):
        moment.add_(x, None, y, x_scale=1.0)
