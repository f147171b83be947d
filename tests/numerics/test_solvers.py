"""What every solver must hold to, the order of their losses, and what becomes of experts that
cannot be solved."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from p48ray.errors import NumericsError
from p48ray.numerics import e2m1, nvfp4, paired48, solvers
from p48ray.numerics.curvature import damp
from p48ray.numerics.relative_errors import hessian_loss
from p48ray.numerics.solution import Solution, SolverSettings
from p48ray.numerics.solvers import SOLVERS, solve, sparse_values
from tests.reference.problems import correlated, identity

COMBINATIONS = [
    ("round_to_nearest", "none"),
    ("round_to_nearest", "paired-4:8"),
    ("gptq", "none"),
    ("sparsegpt_gptq", "paired-4:8"),
    ("block_descent", "paired-4:8"),
]
each_solver = pytest.mark.parametrize(("solver", "sparsity"), COMBINATIONS)


def settings(
    solver: str,
    sparsity: str = "paired-4:8",
    span: int = 16,
    damp: float | None = 0.01,
    sweeps: int = 4,
) -> SolverSettings:
    return SolverSettings(
        solver=solver, sparsity=sparsity, scale_span=span, damp=damp, sweeps=sweeps
    )


def run(
    weight: Tensor, hessian: Tensor, chosen: SolverSettings, target: Tensor | None = None
) -> Solution:
    return solve(weight, hessian, [20.0] * len(weight), chosen, target)


def bytes_of(solution: Solution) -> list[Tensor]:
    return [solution.packed_NOB, solution.scale_NOG.view(torch.uint8), solution.keep_NOP]


@each_solver
@pytest.mark.parametrize("span", [16, 32])
def test_every_solution_is_a_valid_checkpoint_entry(solver: str, sparsity: str, span: int) -> None:
    weight, hessian = correlated(0, 2, 16, 128)
    solution = run(weight, hessian, settings(solver, sparsity, span))
    codes = e2m1.unpack(solution.packed_NOB)
    assert not (codes == 8).any()
    scale = solution.scale_NOG.float()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert solution.global_scale_N1.shape == (2, 1)
    assert torch.isfinite(solution.global_scale_N1).all()
    assert (solution.global_scale_N1 > 0).all()
    decoded = nvfp4.dequantize(codes, solution.scale_NOG, solution.global_scale_N1[:, 0])
    assert torch.equal(solution.values_NOI, decoded)
    assert not solution.values_NOI[~paired48.pairs_to_inputs(solution.keep_NOP)].any()
    if span == 32:
        assert torch.equal(scale[..., 0::2], scale[..., 1::2])
    if sparsity == "paired-4:8":
        assert (solution.keep_NOP.unflatten(2, (-1, 4)).sum(-1) == 2).all()
        assert not paired48.find_illegal(solution.packed_NOB).any()
    else:
        assert solution.keep_NOP.all()
    assert solution.outcome == ("solved", "solved")
    assert solution.reason == ("", "")
    assert solution.damp_rel == ((0.0, 0.0) if solver == "round_to_nearest" else (0.01, 0.01))


@pytest.mark.parametrize("span", [16, 32])
def test_block_descent_beats_one_shot_beats_round_to_nearest_on_correlated_inputs(
    span: int,
) -> None:
    weight, hessian = correlated(1, 3, 64, 128)
    names = ("block_descent", "sparsegpt_gptq", "round_to_nearest")
    descent, one, nearest = (
        hessian_loss(weight - run(weight, hessian, settings(s, span=span)).values_NOI, hessian)
        for s in names
    )
    assert (descent < 0.6 * one).all()
    assert (one < 0.6 * nearest).all()


def test_gptq_beats_round_to_nearest_on_correlated_inputs() -> None:
    weight, hessian = correlated(2, 2, 64, 128)
    gptq, nearest = (
        hessian_loss(weight - run(weight, hessian, settings(s, "none")).values_NOI, hessian)
        for s in ("gptq", "round_to_nearest")
    )
    assert (gptq < 0.6 * nearest).all()


@pytest.mark.parametrize(
    ("solver", "sparsity"), [("gptq", "none"), ("sparsegpt_gptq", "paired-4:8")]
)
def test_white_inputs_give_exactly_round_to_nearest(solver: str, sparsity: str) -> None:
    weight, _ = correlated(3, 2, 16, 64)
    ours, nearest = (
        run(weight, identity(2, 64), settings(solver, sparsity)),
        run(weight, identity(2, 64), settings("round_to_nearest", sparsity)),
    )
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(ours), bytes_of(nearest), strict=True))


@each_solver
def test_batched_equals_single_bitwise(solver: str, sparsity: str) -> None:
    weight, hessian = correlated(4, 3, 16, 160)
    batched = run(weight, hessian, settings(solver, sparsity))
    for k in range(3):
        single = run(weight[k : k + 1], hessian[k : k + 1], settings(solver, sparsity))
        assert all(
            torch.equal(a[0], b[k])
            for a, b in zip(bytes_of(single), bytes_of(batched), strict=True)
        )
        assert single.global_scale_N1[0] == batched.global_scale_N1[k]


@each_solver
def test_inputs_are_unchanged(solver: str, sparsity: str) -> None:
    weight, hessian = correlated(5, 1, 8, 64)
    target = weight + 0.001
    before = weight.clone(), hessian.clone(), target.clone()
    run(weight, hessian, settings(solver, sparsity), target)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, target), strict=True))


@each_solver
@pytest.mark.parametrize("power", [-40, 40])
def test_the_size_of_weights_and_inputs_moves_only_the_global_scale(
    solver: str, sparsity: str, power: int
) -> None:
    weight, hessian = correlated(6, 1, 8, 64)
    plain, scaled = (
        run(weight, hessian, settings(solver, sparsity)),
        run(weight * 2.0**power, hessian, settings(solver, sparsity)),
    )
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(plain), bytes_of(scaled), strict=True))
    assert torch.equal(scaled.global_scale_N1 * 2.0**power, plain.global_scale_N1)
    louder = run(weight, hessian * 2.0**power, settings(solver, sparsity))
    assert all(torch.equal(a, b) for a, b in zip(bytes_of(plain), bytes_of(louder), strict=True))


@each_solver
def test_zero_weights_become_zeros_with_usable_scales(solver: str, sparsity: str) -> None:
    _, hessian = correlated(7, 1, 1, 64)
    solution = run(torch.zeros(1, 4, 64), hessian, settings(solver, sparsity))
    assert not solution.packed_NOB.any()
    assert solution.global_scale_N1.item() == 1.0
    assert (solution.scale_NOG.float() == 2.0**-9).all()


def test_a_global_scale_is_shared_by_all_outputs_of_an_expert_and_by_no_other() -> None:
    weight, hessian = correlated(8, 2, 16, 64)
    weight[1] *= 3
    scales = run(weight, hessian, settings("sparsegpt_gptq")).global_scale_N1[:, 0]
    torch.testing.assert_close(
        scales, torch.full((2,), 2688.0) / weight.abs().amax((1, 2)), rtol=0, atol=0
    )


def test_a_target_is_what_the_values_aim_at() -> None:
    weight, hessian = correlated(9, 1, 32, 64)
    target = weight.flip(1)
    for solver, sparsity in COMBINATIONS:
        solution = run(weight, hessian, settings(solver, sparsity), target)
        assert hessian_loss(target - solution.values_NOI, hessian) < 0.4 * hessian_loss(
            target, hessian
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                bytes_of(solution),
                bytes_of(run(target, hessian, settings(solver, sparsity))),
                strict=True,
            )
        )


def broken_hessians(good: Tensor) -> dict[str, Tensor]:
    nan, indefinite = good.clone(), good.clone()
    nan[2, 3] = torch.nan
    indefinite[0, 1] = indefinite[1, 0] = 1e6
    return {
        "is zero": torch.zeros_like(good),
        "is not finite": nan,
        "has no Cholesky factor up to damping 10": indefinite,
    }


@pytest.mark.parametrize(("solver", "sparsity"), COMBINATIONS[2:])
@pytest.mark.parametrize(
    "reason", ["is zero", "is not finite", "has no Cholesky factor up to damping 10"]
)
def test_an_expert_without_usable_curvature_is_rounded_to_nearest_from_its_weight_and_says_so(
    solver: str, sparsity: str, reason: str
) -> None:
    weight, hessian = correlated(10, 3, 16, 64)
    untouched = run(weight, hessian, settings(solver, sparsity))
    hessian[1] = broken_hessians(hessian[1])[reason]
    target = weight.clone()
    target[1] += 1.0
    solution = run(weight, hessian, settings(solver, sparsity), target)
    nearest = run(weight, hessian, settings("round_to_nearest", sparsity))
    assert solution.outcome == ("solved", "round_to_nearest", "solved")
    assert solution.reason == ("", f"the Hessian {reason}", "")
    for ours, rounded, solved in zip(
        bytes_of(solution), bytes_of(nearest), bytes_of(untouched), strict=True
    ):
        assert torch.equal(ours[1], rounded[1])
        assert torch.equal(ours[[0, 2]], solved[[0, 2]])
    assert torch.isfinite(solution.values_NOI).all()


def test_more_damping_than_asked_for_is_reported() -> None:
    hessian = identity(1, 32)
    hessian[0, 0, 0] = -0.5
    solution = run(correlated(11, 1, 4, 32)[0], hessian, settings("sparsegpt_gptq", damp=0.01))
    assert solution.damp_rel == pytest.approx((1.0,))
    assert solution.outcome == ("solved",)


def test_damping_follows_from_the_token_count_unless_it_is_set() -> None:
    weight, hessian = correlated(12, 3, 4, 32)
    chosen = settings("sparsegpt_gptq", damp=None)
    assert solve(weight, hessian, [0.0, 12.0, 1000.0], chosen).damp_rel == pytest.approx(
        (0.1, 0.05, 0.01)
    )


def test_block_descent_keeps_the_one_shot_start_where_the_end_is_worse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, hessian = correlated(13, 2, 16, 64)
    descend = solvers.block_descent

    def spoil_second(*args: object) -> tuple[Tensor, Tensor]:
        values, keep = descend(*args)  # type: ignore[arg-type]
        values[1] *= -1
        return values, keep

    good = run(weight, hessian, settings("block_descent"))
    monkeypatch.setattr(solvers, "block_descent", spoil_second)
    solution = run(weight, hessian, settings("block_descent"))
    start = run(weight, hessian, settings("sparsegpt_gptq"))
    assert solution.outcome == ("solved", "one_shot")
    assert "higher loss than its one-shot start" in solution.reason[1]
    for ours, first, second in zip(
        bytes_of(solution), bytes_of(good), bytes_of(start), strict=True
    ):
        assert torch.equal(ours[0], first[0])
        assert torch.equal(ours[1], second[1])
    assert solution.global_scale_N1[1] == start.global_scale_N1[1]


def test_block_descent_is_never_worse_than_its_start_by_the_undamped_objective() -> None:
    weight, hessian = correlated(14, 32, 8, 32, num_tokens=20)
    # so damped that descent fits another Hessian
    chosen = [settings(s, damp=30.0, sweeps=8) for s in ("block_descent", "sparsegpt_gptq")]
    descent, one = (run(weight, hessian, c) for c in chosen)
    assert set(descent.outcome) == {"solved", "one_shot"}
    losses = [hessian_loss(weight - s.values_NOI, hessian) for s in (descent, one)]
    assert (losses[0] <= losses[1]).all()


def test_block_descent_runs_on_the_hessian_as_damped_for_the_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, hessian = correlated(19, 2, 16, 64)
    hessian[1] = torch.eye(64)
    hessian[1, 0, 0] = -0.5  # needs more damping than asked for
    seen = []
    descend = solvers.block_descent

    def record(*args: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((args[3], descend(*args)))  # type: ignore[arg-type]
        return seen[0][1]

    monkeypatch.setattr(solvers, "block_descent", record)
    solution = run(weight, hessian, settings("block_descent", damp=0.01))
    damped, (_, keep) = seen[0]
    assert solution.damp_rel == pytest.approx((0.01, 1.0))
    torch.testing.assert_close(damped, damp(hessian, torch.tensor(solution.damp_rel)))
    assert torch.equal(solution.keep_NOP[0], keep[0])


def test_block_descent_keeps_the_mask_it_found() -> None:
    weight, hessian = correlated(20, 2, 128, 128)
    chosen = settings("block_descent", sweeps=2)
    start = run(weight, hessian, settings("sparsegpt_gptq"))
    _, keep = solvers.block_descent(
        weight, start.values_NOI, start.keep_NOP, damp(hessian, 0.01), 2
    )
    assert torch.equal(run(weight, hessian, chosen).keep_NOP, keep)


def test_more_sweeps_end_lower() -> None:
    weight, hessian = correlated(15, 2, 32, 128)
    one, six = (
        hessian_loss(
            weight - run(weight, hessian, settings("block_descent", sweeps=s)).values_NOI, hessian
        )
        for s in (1, 6)
    )
    assert (six < one).all()


@each_solver
def test_what_the_estimate_counts_of_a_solver_is_what_it_does(
    solver: str, sparsity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Column loops, factors and descents of a solve are those of its record."""
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        real = getattr(solvers, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(solvers, name, counted)

    for name in ("quantize_columns", "inverse_factor", "block_descent"):
        count(name)
    weight, hessian = correlated(15, 2, 32, 128)
    run(weight, hessian, settings(solver, sparsity))
    record = SOLVERS[solver]
    found = {name: calls[name] for name in ("quantize_columns", "inverse_factor", "block_descent")}
    assert found == {
        "quantize_columns": record.column_passes,
        "inverse_factor": int(record.needs_hessian),
        "block_descent": int(record.descends),
    }


def test_every_registered_solver_is_tested_here() -> None:
    assert {(s.name, sparsity) for s in SOLVERS.values() for sparsity in s.sparsities} == set(
        COMBINATIONS
    )


@pytest.mark.parametrize(
    ("solver", "sparsity"),
    [
        ("gptq", "paired-4:8"),
        ("sparsegpt_gptq", "none"),
        ("block_descent", "none"),
        ("magic", "none"),
        ("gptq", "2:4"),
    ],
)
def test_solvers_refuse_a_sparsity_that_is_not_theirs(solver: str, sparsity: str) -> None:
    weight, hessian = correlated(16, 1, 4, 32)
    with pytest.raises(NumericsError, match=f"solver '{solver}'"):
        run(weight, hessian, settings(solver, sparsity))


@pytest.mark.parametrize("where", ["weight", "target"])
def test_values_that_are_not_finite_are_refused(where: str) -> None:
    weight, hessian = correlated(17, 1, 4, 32)
    bad = weight.clone()
    bad[0, 1, 2] = torch.nan
    with pytest.raises(NumericsError, match=f"{where} holds values"):
        run(
            bad if where == "weight" else weight,
            hessian,
            settings("block_descent"),
            bad if where == "target" else None,
        )


def test_spans_and_counts_that_do_not_fit_are_refused() -> None:
    weight, hessian = correlated(18, 1, 4, 48)
    with pytest.raises(NumericsError, match="dividing 48 inputs"):
        run(weight, hessian, settings("block_descent", span=32))
    with pytest.raises(NumericsError, match="token counts"):
        solve(weight, hessian, [1.0, 1.0], settings("block_descent"))


def test_sparsity_alone_loses_less_than_with_codes_and_block_descent_less_than_one_shot() -> None:
    weight, hessian = correlated(23, 8, 64, 128)
    chosen = [settings(s) for s in ("sparsegpt_gptq", "block_descent")]
    sparse = [sparse_values(weight, hessian, [20.0] * 8, c) for c in chosen]
    for values, c in zip(sparse, chosen, strict=True):
        kept = values.unflatten(2, (-1, 4, 2)).abs().sum(-1) > 0
        assert (kept.sum(-1) <= 2).all()
        with_codes = hessian_loss(weight - run(weight, hessian, c).values_NOI, hessian)
        # a single expert's greedy masks may fall luckier
        assert hessian_loss(weight - values, hessian).sum() < 0.97 * with_codes.sum()
    one_shot, descent = (hessian_loss(weight - values, hessian) for values in sparse)
    assert (descent < one_shot).all()


def test_sparsity_alone_is_refused_for_a_dense_solver_and_without_a_factor() -> None:
    weight, hessian = correlated(24, 1, 8, 32)
    with pytest.raises(NumericsError, match="expected a solver that chooses masks by a Hessian"):
        sparse_values(weight, hessian, [20.0], settings("gptq", "none"))
    with pytest.raises(NumericsError, match="Hessian is zero"):
        sparse_values(weight, hessian * 0, [20.0], settings("sparsegpt_gptq"))
