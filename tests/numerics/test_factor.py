"""U against a float64 inverse, the damping ladder, and who is reported as failed."""

import pytest
import torch

from p48ray.numerics import factor
from p48ray.numerics.factor import inverse_factor, invert_lower
from tests.reference.problems import correlated, identity


def damped64(hessian: torch.Tensor, rel: float) -> torch.Tensor:
    size = hessian.shape[-1]
    return hessian.double() + rel * hessian.double().diagonal().mean() * torch.eye(
        size, dtype=torch.float64
    )


def test_inverse_is_u_transposed_u_with_u_upper_and_positive_on_the_diagonal() -> None:
    _, hessian = correlated(0, 3, 1, 72)
    result = inverse_factor(hessian, 0.01)
    for h, u in zip(hessian, result.upper_NII, strict=True):
        assert torch.equal(u, u.triu())
        assert (u.diagonal() > 0).all()
        inverse = torch.linalg.inv(damped64(h, 0.01))
        assert (u.double().T @ u.double() - inverse).norm() < 1e-4 * inverse.norm()
    assert result.failed == (False, False, False)
    assert result.damp_rel == (0.01, 0.01, 0.01)


def test_u_is_the_papers_factor() -> None:
    _, hessian = correlated(1, 1, 1, 48)
    papers = torch.linalg.cholesky(torch.linalg.inv(damped64(hessian[0], 0.05)), upper=True)
    torch.testing.assert_close(
        inverse_factor(hessian, 0.05).upper_NII[0].double(),
        papers,
        rtol=1e-3,
        atol=1e-3 * papers.abs().max().item(),
    )


@pytest.mark.parametrize("leaf", [1, 5, 64])
def test_triangular_inverse_by_halves_is_the_inverse_for_any_size(
    monkeypatch: pytest.MonkeyPatch, leaf: int
) -> None:
    monkeypatch.setattr(factor, "_TRIANGULAR_LEAF", leaf)
    generator = torch.Generator().manual_seed(2)
    lower = torch.randn(2, 37, 37, generator=generator).tril() / 6 + torch.eye(37)
    inverse = invert_lower(lower)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(lower @ inverse, identity(2, 37), rtol=0, atol=2e-5)


def test_every_expert_may_have_its_own_damping() -> None:
    result = inverse_factor(identity(2, 16), [0.01, 3.0])
    torch.testing.assert_close(
        result.upper_NII.diagonal(dim1=1, dim2=2)[:, 0], torch.tensor([1.01, 4.0]).rsqrt()
    )
    assert result.damp_rel == (0.01, 3.0)


def test_an_indefinite_hessian_climbs_the_ladder_and_its_neighbours_do_not() -> None:
    hessian = identity(3, 16)
    hessian[1, 0, 0] = -0.5  # mean diagonal 0.906: 0.01 and 0.1 are too little, 1.0 is enough
    result = inverse_factor(hessian, 0.01)
    assert result.damp_rel == pytest.approx((0.01, 1.0, 0.01))
    assert result.failed == (False, False, False)
    u = result.upper_NII[1].double()
    torch.testing.assert_close(
        u.T @ u, torch.linalg.inv(damped64(hessian[1], 1.0)), rtol=1e-5, atol=1e-6
    )


def test_a_singular_hessian_needs_only_its_damping() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    result = inverse_factor((x.T @ x)[None], 0.01)
    assert result.failed == (False,)
    assert result.damp_rel == (0.01,)


def broken(kind: str) -> torch.Tensor:
    hessian = torch.eye(16)
    if kind == "zero":
        return torch.zeros(16, 16)
    if kind == "beyond the ladder":
        hessian[0, 1] = hessian[1, 0] = 1e6
    else:
        hessian[3, 3] = float(kind)
    return hessian


@pytest.mark.parametrize(
    ("kind", "damp_rel"),
    [("zero", 0.0), ("nan", 0.0), ("inf", 0.0), ("-100", 0.0), ("beyond the ladder", 10.0)],
)
def test_who_cannot_be_factored_is_reported_with_an_identity_and_others_are_not(
    kind: str, damp_rel: float
) -> None:
    result = inverse_factor(torch.stack([torch.eye(16), broken(kind)]), 0.01)
    assert result.failed == (False, True)
    assert result.damp_rel == pytest.approx((0.01, damp_rel))
    assert torch.equal(result.upper_NII[1], torch.eye(16))


def test_batched_equals_single_bitwise_and_inputs_are_unchanged() -> None:
    _, hessian = correlated(4, 3, 1, 64)
    before = hessian.clone()
    batched = inverse_factor(hessian, 0.01).upper_NII
    for k in range(3):
        assert torch.equal(inverse_factor(hessian[k : k + 1], 0.01).upper_NII[0], batched[k])
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("size", [2.0**-40, 2.0**40])
def test_damping_is_relative_to_the_size_of_the_hessian(size: float) -> None:
    _, hessian = correlated(5, 1, 1, 32)
    scaled = inverse_factor(hessian * size, 0.01).upper_NII
    assert torch.equal(scaled * size**0.5, inverse_factor(hessian, 0.01).upper_NII)
