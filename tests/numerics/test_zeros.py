"""Linears with nothing to solve: zeros come out as zeros, and what is tiny as near as NVFP4 gets,
beside a float64 reference."""

import math

import pytest
import torch
from torch import Tensor

from p48ray.numerics import e2m1, nvfp4, paired48
from p48ray.numerics.activation import input_global_scale, quantize_activations
from p48ray.numerics.relative_errors import relative_output_error, relative_weight_error
from p48ray.numerics.solution import Solution
from p48ray.numerics.solvers import solve
from p48ray.numerics.zeros import (
    SMALLEST,
    ZERO_INPUTS,
    ZERO_WEIGHTS,
    enlargement,
    vanishes,
    zero_reasons,
)
from tests.numerics.test_solvers import COMBINATIONS, each_solver, run, settings
from tests.reference.formats import quantize_token
from tests.reference.problems import correlated, identity

TINY_FACTORS = [2.0**-60, 1e-30, 2.0**-119, 2.0**-128]


def bytes_of(solution: Solution) -> list[Tensor]:
    return [solution.packed_NOB, solution.scale_NOG.view(torch.uint8), solution.keep_NOP]


def error64(w: Tensor, q: Tensor) -> float:
    """|w - q|^2 / |w|^2 in float64, whose squares reach down to 1e-308."""
    delta = w.double() - q.double()
    return float(delta.square().sum() / w.double().square().sum())


@each_solver
def test_zero_weights_are_their_own_outcome_and_leave_others_alone(
    solver: str, sparsity: str
) -> None:
    weight, hessian = correlated(1, 3, 16, 64)
    weight[1] = 0
    solution = run(weight, hessian, settings(solver, sparsity))
    assert solution.outcome == ("solved", "zero", "solved")
    assert solution.reason == ("", ZERO_WEIGHTS, "")
    assert not solution.packed_NOB[1].any() and not solution.values_NOI[1].any()
    assert solution.global_scale_N1[1] == 1 and (solution.scale_NOG[1].float() == 2.0**-9).all()
    assert solution.damp_rel[1] == 0
    others = run(weight[[0, 2]], hessian[[0, 2]], settings(solver, sparsity))
    for ours, theirs in zip(bytes_of(solution), bytes_of(others), strict=True):
        assert torch.equal(ours[[0, 2]], theirs)


@each_solver
def test_zero_weights_under_a_zero_hessian_are_zero(solver: str, sparsity: str) -> None:
    solution = run(torch.zeros(1, 4, 64), torch.zeros(1, 64, 64), settings(solver, sparsity))
    assert solution.outcome == ("zero",) and not solution.packed_NOB.any()


@each_solver
def test_inputs_that_are_zero_are_told_from_a_hessian_that_is_missing(
    solver: str, sparsity: str
) -> None:
    weight, hessian = correlated(2, 3, 16, 64)
    hessian[1:] = 0
    solution = solve(
        weight, hessian, [20.0] * 3, settings(solver, sparsity), sees_zeros=[False, True, False]
    )
    missing = "solved" if solver == "round_to_nearest" else "round_to_nearest"
    assert solution.outcome == ("solved", "zero", missing)
    assert solution.reason[1] == ZERO_INPUTS
    nearest = run(weight, hessian, settings("round_to_nearest", sparsity))
    for ours, rounded in zip(bytes_of(solution), bytes_of(nearest), strict=True):
        assert torch.equal(ours[1], rounded[1])


@each_solver
@pytest.mark.parametrize("factor", TINY_FACTORS)
def test_tiny_weights_are_rounded_as_well_as_weights_of_any_size(
    solver: str, sparsity: str, factor: float
) -> None:
    """The mask and the scales are those of the same weights enlarged; where the format ends, the
    nearest that it has."""
    weight, hessian = correlated(3, 1, 16, 64)
    tiny = (weight.double() * factor).float()
    solution = run(tiny, hessian, settings(solver, sparsity))
    assert solution.outcome == ("zero",) and solution.reason == (ZERO_WEIGHTS,)
    assert torch.isfinite(solution.global_scale_N1).all()
    assert 0 < solution.global_scale_N1.item() <= nvfp4.MAX_GLOBAL_SCALE
    if sparsity == "paired-4:8":
        assert not paired48.find_illegal(solution.packed_NOB).any()
    decoded = nvfp4.dequantize(
        e2m1.unpack(solution.packed_NOB), solution.scale_NOG, solution.global_scale_N1[:, 0]
    )
    assert torch.equal(solution.values_NOI, decoded)
    nearest = run(weight, hessian, settings("round_to_nearest", sparsity))
    usual = error64(weight, nearest.values_NOI)
    assert 0.001 < usual < 0.4
    found = error64(tiny, solution.values_NOI)
    if factor == 2.0**-128:  # the format's least value is 2^-127: all lie below half of it
        assert found == 1 and not solution.packed_NOB.any()
    elif factor == 2.0**-119:  # some do
        assert usual < found < 0.9
    else:
        assert found == pytest.approx(usual, rel=1e-3)
    assert relative_weight_error(tiny, solution.values_NOI).item() == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("factor", [1.0, *TINY_FACTORS[:2]])
def test_relative_errors_do_not_depend_on_the_size(factor: float) -> None:
    weight, hessian = correlated(4, 2, 16, 64)
    q = weight * 0.75
    tiny, tiny_q = ((v.double() * factor).float() for v in (weight, q))
    assert relative_weight_error(tiny, tiny_q).tolist() == pytest.approx([1 / 16] * 2, rel=1e-5)
    assert relative_output_error(tiny, tiny_q, hessian).tolist() == pytest.approx(
        [1 / 16] * 2, rel=1e-4
    )


@pytest.mark.parametrize("power", [0, -49, -50, -51, -60, -126, -149])
def test_enlargement_is_a_power_of_two_that_brings_what_is_tiny_within_squares(power: int) -> None:
    values = torch.tensor([[[0.0, -(2.0**power)]], [[0.0, 0.0]]])
    factor = enlargement(values).tolist()
    assert math.frexp(factor[0])[0] == 0.5 and factor[1] == 1
    assert vanishes(values).tolist() == [2.0**power < SMALLEST, True]
    if 2.0**power >= SMALLEST:
        assert factor[0] == 1
    else:
        assert 2.0**-30 <= factor[0] * 2.0**power <= 1


def test_reasons_are_those_that_hold() -> None:
    weight = torch.stack([torch.zeros(2, 4), torch.ones(2, 4), torch.ones(2, 4)])
    assert zero_reasons(weight) == (ZERO_WEIGHTS, "", "")
    assert zero_reasons(weight, [True, True, False]) == (
        f"{ZERO_WEIGHTS}; {ZERO_INPUTS}",
        ZERO_INPUTS,
        "",
    )
    assert not vanishes(torch.full((1, 1, 4), math.nan))


@pytest.mark.parametrize("group", [16, 32])
def test_activations_of_zeros_are_zeros_under_the_scale_of_a_layer_of_zeros(group: int) -> None:
    scale = input_global_scale(0.0)
    assert scale == 1
    x = torch.zeros(3, 64)
    x[1, :4] = torch.tensor([0.0, 0.5, -1.0, 3.0])  # held-out texts may differ
    found = quantize_activations(x, scale, group)
    expected = [quantize_token(row, scale, group) for row in x.tolist()]
    assert found.tolist() == expected
    assert not found[[0, 2]].any() and found[1].any()


def test_nothing_is_lost_of_zeros_in_any_solver() -> None:
    for solver, sparsity in COMBINATIONS:
        zero = torch.zeros(1, 4, 64)
        found = run(zero, identity(1, 64), settings(solver, sparsity)).values_NOI
        assert relative_weight_error(zero, found).item() == 0
        assert relative_output_error(zero, found, identity(1, 64)).item() == 0
