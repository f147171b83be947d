"""Two-sided descent against every mask of a tiny linear, its laws, and the solver that is built on
it."""

import itertools

import pytest
import torch
from torch import Tensor

from p48ray.numerics import solvers, two_sided
from p48ray.numerics.block_descent import block_descent
from p48ray.numerics.curvature import damp
from p48ray.numerics.paired48 import keep_top_pairs, pairs_to_inputs
from p48ray.numerics.solution import Solution, SolverSettings
from p48ray.numerics.solver_inputs import damped_output_hessian
from p48ray.numerics.solvers import solve
from p48ray.numerics.two_sided import row_partitions, two_sided_descent, two_sided_loss
from tests.reference import two_sided as slow
from tests.reference.problems import correlated, identity

Start = tuple[Tensor, Tensor, Tensor, Tensor]


def start(
    seed: int, num_experts: int = 2, num_outputs: int = 16, num_inputs: int = 64, rel: float = 0.01
) -> Start:
    """(target, start values, start mask, damped H): magnitude pruning."""
    target, hessian = correlated(seed, num_experts, num_outputs, num_inputs)
    keep = keep_top_pairs(target.square().unflatten(2, (-1, 2)).sum(-1))
    return target, target * pairs_to_inputs(keep), keep, damp(hessian, rel)


def output_moment(
    seed: int, num_experts: int, num_outputs: int, num_tokens: int | None = None
) -> Tensor:
    """Mean second moment of correlated gradients."""
    return correlated(1000 + seed, num_experts, 1, num_outputs, num_tokens)[1]


def couplings(num_experts: int, num_outputs: int) -> dict[str, Tensor]:
    """Output Hessians from harmless to all rows in lockstep."""
    ones = torch.ones(num_experts, num_outputs, num_outputs)
    signs = torch.randn(
        num_experts, num_outputs, 1, generator=torch.Generator().manual_seed(9)
    ).sign()
    eye = identity(num_experts, num_outputs)
    return {
        "identity": eye,
        "correlated": damp(output_moment(0, num_experts, num_outputs), 0.05),
        "few tokens": damp(output_moment(1, num_experts, num_outputs, num_tokens=5), 0.3),
        "lockstep": ones + 0.01 * eye,
        "lockstep with signs": signs * signs.mT + 0.01 * eye,
        "rows of very different weight": (
            torch.logspace(-6, 6, num_outputs).diag().expand_as(eye) + 1e-7 * ones
        ),
        "tiny": 1e-20 * (ones + eye),
    }


each_coupling = pytest.mark.parametrize("coupling", list(couplings(1, 1)))


def exact_losses(target: Tensor, values: Tensor, hessian: Tensor, output_hessian: Tensor) -> Tensor:
    """float64 (N,)."""
    delta = target.double() - values.double()
    return ((output_hessian.double() @ delta) * (delta @ hessian.double())).sum((1, 2))


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_the_kronecker_form(seed: int) -> None:
    delta, hessian = correlated(seed, 3, 8, 16)
    output_hessian = output_moment(seed, 3, 8)
    expected = [slow.loss(d, h, g) for d, h, g in zip(delta, hessian, output_hessian, strict=True)]
    assert two_sided_loss(delta, hessian, output_hessian).tolist() == pytest.approx(
        expected, rel=1e-5
    )


@each_coupling
@pytest.mark.parametrize("row_groups", [1, 4])
def test_no_row_group_raises_the_loss(
    coupling: str, row_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, values, keep, hessian = start(0)
    output_hessian = couplings(2, 16)[coupling]
    trace: list[Tensor] = []
    majorise = two_sided.majorised_target

    def spy(target: Tensor, values: Tensor, output_hessian: Tensor, rows: Tensor) -> Tensor:
        trace.append(exact_losses(target, values, hessian, output_hessian))
        return majorise(target, values, output_hessian, rows)

    monkeypatch.setattr(two_sided, "majorised_target", spy)
    found, _ = two_sided_descent(target, values, keep, hessian, output_hessian, 4, row_groups)
    trace.append(exact_losses(target, found, hessian, output_hessian))
    assert len(trace) == 4 * row_groups + 1
    first = trace[0]
    for before, after in itertools.pairwise(trace):
        assert (after <= before + 2e-6 * first).all()
    assert (trace[-1] < 0.6 * first).all()


@pytest.mark.slow
@each_coupling
def test_a_start_that_is_already_good_does_not_get_worse(coupling: str) -> None:
    target, values, keep, hessian = start(1)
    output_hessian = couplings(2, 16)[coupling]
    values, keep = two_sided_descent(target, values, keep, hessian, output_hessian, 12)
    before = exact_losses(target, values, hessian, output_hessian)
    for sweeps in (1, 3):
        again, _ = two_sided_descent(target, values, keep, hessian, output_hessian, sweeps)
        assert (exact_losses(target, again, hessian, output_hessian) <= before * (1 + 1e-5)).all()


@pytest.mark.parametrize(("sweeps", "row_groups"), [(1, 1), (2, 5), (3, 16)])
def test_the_identity_gives_one_sided_descent(sweeps: int, row_groups: int) -> None:
    target, values, keep, hessian = start(2, num_inputs=160)
    one_sided, one_sided_keep = block_descent(target, values, keep, hessian, sweeps)
    found, found_keep = two_sided_descent(
        target, values, keep, hessian, identity(2, 16), sweeps, row_groups
    )
    assert torch.equal(found_keep, one_sided_keep)
    torch.testing.assert_close(found, one_sided, rtol=1e-5, atol=1e-5 * target.abs().max().item())


def test_rows_that_are_not_coupled_descend_on_their_own_whatever_their_weight() -> None:
    target, values, keep, hessian = start(3)
    diagonal = torch.logspace(-3, 3, 16).diag().expand(2, 16, 16)
    one_sided, one_sided_keep = block_descent(target, values, keep, hessian, 2)
    found, found_keep = two_sided_descent(target, values, keep, hessian, diagonal, 2)
    assert torch.equal(found_keep, one_sided_keep)
    torch.testing.assert_close(found, one_sided, rtol=1e-5, atol=1e-5 * target.abs().max().item())


@pytest.mark.parametrize("coupling", ["correlated", "few tokens", "lockstep"])
def test_single_rows_are_minimised_exactly(coupling: str) -> None:
    """A row group of one row has no bound to pay for: every step is the least-squares optimum over
    all six patterns of the whole objective."""
    target, values, keep, hessian = start(4, num_outputs=4, num_inputs=24, rel=0.1)
    output_hessian = couplings(2, 4)[coupling]
    rows = [int(r) for r in torch.cat(list(row_partitions(4, 4, 2, target.device)))]
    found, found_keep = two_sided_descent(
        target, values, keep, hessian, output_hessian, 2, row_groups=4, column_block=16
    )
    for k in range(2):
        expected = slow.descend(target[k], values[k], hessian[k], output_hessian[k], rows)
        torch.testing.assert_close(
            found[k].double(), expected, rtol=1e-3, atol=1e-3 * target.abs().max().item()
        )
        assert torch.equal(found_keep[k], expected.unflatten(1, (-1, 2)).ne(0).any(-1))


def test_coupling_pays() -> None:
    """Under strong coupling the two-sided objective ends far below where one-sided descent leaves
    it."""
    target, values, keep, hessian = start(5, num_outputs=32)
    output_hessian = damp(output_moment(5, 2, 32), 0.05)
    one_sided, _ = block_descent(target, values, keep, hessian, 6)
    found, _ = two_sided_descent(target, values, keep, hessian, output_hessian, 6)
    ours, theirs = (exact_losses(target, v, hessian, output_hessian) for v in (found, one_sided))
    assert (ours < 0.7 * theirs).all()


def tiny(seed: int, coupling: str) -> tuple[Tensor, Tensor, Tensor]:
    """(target, H, G) of 2 rows and 16 inputs, repeated for every one of the 1,296 masks."""
    target, hessian = correlated(seed, 1, 2, 16)
    hessian = damp(hessian, 0.3)
    output_hessian = (
        damp(output_moment(seed, 1, 2, num_tokens=6), 0.1)
        if coupling == "correlated"
        else couplings(1, 2)["lockstep"]
    )
    return target.repeat(1296, 1, 1), hessian.repeat(1296, 1, 1), output_hessian.repeat(1296, 1, 1)


@pytest.mark.parametrize("coupling", ["correlated", "lockstep"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("row_groups", [1, 2])
def test_the_best_of_all_masks_is_a_fixed_point(seed: int, coupling: str, row_groups: int) -> None:
    target, hessian, output_hessian = (t[:1] for t in tiny(seed, coupling))
    masks = slow.every_mask(2, 16)
    values, losses = slow.best_values(target[0], masks, hessian[0], output_hessian[0])
    best = int(losses.argmin())
    found, keep = two_sided_descent(
        target,
        values[best : best + 1].float(),
        masks[best : best + 1],
        hessian,
        output_hessian,
        20,
        row_groups=row_groups,
    )
    assert torch.equal(keep[0], masks[best])
    torch.testing.assert_close(
        found[0].double(), values[best], rtol=1e-3, atol=1e-4 * target.abs().max().item()
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_from_every_mask_of_a_tiny_linear_descent_ends_no_worse_and_from_some_at_the_best_of_all(
    seed: int,
) -> None:
    """Starts: the least-squares optimum under each mask. Local as the method is, none but the best
    can be where most end."""
    target, hessian, output_hessian = tiny(seed, "correlated")
    masks = slow.every_mask(2, 16)
    values, losses = slow.best_values(target[0], masks, hessian[0], output_hessian[0])
    found, keep = two_sided_descent(
        target, values.float(), masks, hessian, output_hessian, 60, row_groups=2
    )
    ends = exact_losses(target, found, hessian, output_hessian)
    assert (ends <= losses * (1 + 1e-5)).all()
    assert (ends >= losses.min() * (1 - 1e-6)).all(), "nothing is better than the best of all masks"
    is_best = ends <= losses.min() * (1 + 1e-4)
    assert (keep[is_best] == masks[losses.argmin()]).all()
    assert is_best.sum() > 10
    assert ends.median() < 0.6 * losses.median()


def test_ends_are_optimal_in_every_pair_group() -> None:
    target, hessian, output_hessian = tiny(0, "correlated")
    picks = torch.arange(0, 1296, 81)
    masks = slow.every_mask(2, 16)[picks]
    target, hessian, output_hessian = target[picks], hessian[picks], output_hessian[picks]
    found, _ = two_sided_descent(
        target, target * pairs_to_inputs(masks), masks, hessian, output_hessian, 400, row_groups=2
    )
    for values in found:
        reached = slow.loss(target[0] - values, hessian[0], output_hessian[0])
        for row, first in itertools.product(range(2), (0, 8)):
            others = slow.refits(target[0], values, hessian[0], output_hessian[0], row, first)
            assert min(
                slow.loss(target[0] - v, hessian[0], output_hessian[0]) for v in others
            ) >= reached * (1 - 1e-4)


@each_coupling
def test_masks_are_legal_and_values_zero_exactly_outside_them(coupling: str) -> None:
    target, values, keep, hessian = start(6)
    found, kept = two_sided_descent(target, values, keep, hessian, couplings(2, 16)[coupling], 2)
    assert (kept.unflatten(2, (-1, 4)).sum(-1) == 2).all()
    assert not found[~pairs_to_inputs(kept)].any()
    assert torch.isfinite(found).all()
    assert not torch.equal(kept, keep)


def test_batched_equals_single_bitwise_and_a_second_run_too() -> None:
    target, values, keep, hessian = start(7, num_experts=3)
    output_hessian = damp(output_moment(7, 3, 16), 0.05)
    batched = two_sided_descent(target, values, keep, hessian, output_hessian, 2)
    again = two_sided_descent(target, values, keep, hessian, output_hessian, 2)
    assert all(torch.equal(a, b) for a, b in zip(batched, again, strict=True))
    for k in range(3):
        part = slice(k, k + 1)
        single = two_sided_descent(
            target[part], values[part], keep[part], hessian[part], output_hessian[part], 2
        )
        assert all(torch.equal(a[0], b[k]) for a, b in zip(single, batched, strict=True))


def test_inputs_are_unchanged_and_no_sweeps_return_the_start_as_new_tensors() -> None:
    inputs = (*start(8), couplings(2, 16)["correlated"])
    before = [t.clone() for t in inputs]
    two_sided_descent(*inputs, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    found, kept = two_sided_descent(*inputs, 0)
    assert torch.equal(found, inputs[1])
    assert torch.equal(kept, inputs[2])
    assert found.data_ptr() != inputs[1].data_ptr()


@pytest.mark.parametrize(("num_rows", "row_groups"), [(16, 16), (16, 5), (3, 16), (1, 16), (40, 1)])
def test_every_row_is_visited_once_a_sweep_in_groups_drawn_anew(
    num_rows: int, row_groups: int
) -> None:
    groups = list(row_partitions(num_rows, row_groups, 3, torch.device("cpu")))
    assert len(groups) % 3 == 0
    sweeps = [
        torch.cat(groups[k * len(groups) // 3 : (k + 1) * len(groups) // 3]) for k in range(3)
    ]
    assert all(torch.equal(s.sort().values, torch.arange(num_rows)) for s in sweeps)
    again = row_partitions(num_rows, row_groups, 3, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(groups, again, strict=True))
    if num_rows > 3:
        assert not torch.equal(sweeps[0], sweeps[1])


def settings(
    solver: str = "block_descent",
    damp: float | None = 0.01,
    output_damp: float | None = None,
    codes: int = 0,
) -> SolverSettings:
    return SolverSettings(
        solver=solver,
        sparsity="paired-4:8",
        scale_span=32,
        damp=damp,
        sweeps=6,
        output_damp=output_damp,
        code_sweeps=codes,
    )


def bytes_of(solution: Solution) -> list[Tensor]:
    return [
        solution.packed_NOB,
        solution.scale_NOG.view(torch.uint8),
        solution.keep_NOP,
        solution.global_scale_N1,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("codes", [0, 2])
@pytest.mark.parametrize("rel", [0.01, 30.0])
@pytest.mark.parametrize("coupling", ["correlated", "few tokens", "lockstep"])
def test_solve_is_never_worse_than_one_shot_by_the_two_sided_objective(
    coupling: str, rel: float, codes: int
) -> None:
    """However wrong the damping: rel 30 makes descent fit another Hessian."""
    weight, hessian = correlated(10, 8, 16, 64)
    output_hessian = couplings(8, 16)[coupling]
    chosen = settings(damp=rel, codes=codes)
    ours = solve(weight, hessian, [20.0] * 8, chosen, output_hessian=output_hessian)
    one = solve(weight, hessian, [20.0] * 8, settings("sparsegpt_gptq", damp=rel))
    damped = damped_output_hessian(output_hessian, [20.0] * 8, 64, chosen.output_damp)
    after, before = (exact_losses(weight, s.values_NOI, hessian, damped) for s in (ours, one))
    assert (after <= before * (1 + 1e-6)).all()
    for k, outcome in enumerate(ours.outcome):
        assert (
            (after[k] < before[k])
            if outcome == "solved"
            else torch.equal(ours.values_NOI[k], one.values_NOI[k])
        )
    if rel < 1:
        assert set(ours.outcome) == {"solved"}
        assert (after < 0.8 * before).all()


@pytest.mark.parametrize("spoiled", ["negated", "NaN"])
def test_an_expert_whose_descent_ends_worse_keeps_the_one_shot_result_and_says_so(
    spoiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = correlated(14, 2, 16, 64)
    output_hessian = output_moment(14, 2, 16)
    good = solve(weight, hessian, [20.0] * 2, settings(), output_hessian=output_hessian)

    def spoil_second(*args: object) -> tuple[Tensor, Tensor]:
        values, keep = two_sided_descent(*args)  # type: ignore[arg-type]
        values[1] *= -1 if spoiled == "negated" else torch.nan
        return values, keep

    monkeypatch.setattr(solvers, "two_sided_descent", spoil_second)
    ours = solve(weight, hessian, [20.0] * 2, settings(), output_hessian=output_hessian)
    one = solve(weight, hessian, [20.0] * 2, settings("sparsegpt_gptq"))
    assert ours.outcome == ("solved", "one_shot")
    assert "higher loss than its one-shot start" in ours.reason[1]
    for mine, descended, started in zip(bytes_of(ours), bytes_of(good), bytes_of(one), strict=True):
        assert torch.equal(mine[0], descended[0])
        assert torch.equal(mine[1], started[1])


def test_solve_with_gradients_beats_solve_without_by_the_two_sided_objective() -> None:
    weight, hessian = correlated(11, 4, 64, 64)
    output_hessian = output_moment(11, 4, 64)
    with_gradients, without = (
        solve(weight, hessian, [20.0] * 4, settings(), output_hessian=g)
        for g in (output_hessian, None)
    )
    ours, theirs = (
        exact_losses(weight, s.values_NOI, hessian, output_hessian)
        for s in (with_gradients, without)
    )
    assert (ours < 0.8 * theirs).all()


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "codes"), [(0.0, 0), (torch.nan, 1), (torch.inf, 0)])
def test_an_unusable_output_hessian_is_taken_as_the_identity(bad: float, codes: int) -> None:
    weight, hessian = correlated(12, 3, 16, 64)
    output_hessian = output_moment(12, 3, 16)
    untouched = solve(
        weight, hessian, [20.0] * 3, settings(codes=codes), output_hessian=output_hessian
    )
    if bad == 0.0:
        output_hessian[1] = 0
    else:
        output_hessian[1, 2, 3] = bad
    ours = solve(weight, hessian, [20.0] * 3, settings(codes=codes), output_hessian=output_hessian)
    plain = solve(
        weight,
        hessian,
        [20.0] * 3,
        settings(output_damp=0.0, codes=codes),
        output_hessian=identity(3, 16),
    )
    assert torch.isfinite(ours.values_NOI).all()
    assert ours.outcome == ("solved",) * 3
    for mine, same, unit in zip(bytes_of(ours), bytes_of(untouched), bytes_of(plain), strict=True):
        assert torch.equal(mine[[0, 2]], same[[0, 2]])
        assert torch.equal(mine[1], unit[1])


def test_an_unusable_hessian_falls_back_whatever_the_output_hessian_says() -> None:
    weight, hessian = correlated(13, 3, 16, 64)
    hessian[0] = 0
    hessian[2, 1, 1] = torch.nan
    output_hessian = output_moment(13, 3, 16)
    output_hessian[2] = torch.nan
    solution = solve(weight, hessian, [20.0] * 3, settings(codes=1), output_hessian=output_hessian)
    assert solution.outcome == ("round_to_nearest", "solved", "round_to_nearest")
    assert torch.isfinite(solution.values_NOI).all()


def test_damping_of_the_output_side_follows_from_tokens_per_output() -> None:
    output_hessian = identity(4, 16)
    # 64 inputs: 4, 12, 400, 0 tokens per output
    damped = damped_output_hessian(output_hessian, [1.0, 3.0, 100.0, 0.0], 64, None)
    torch.testing.assert_close(damped[:, 0, 0], 1 + torch.tensor([0.3, 0.15, 0.05, 0.3]))
    torch.testing.assert_close(
        damped_output_hessian(output_hessian, [1.0] * 4, 64, 0.7), 1.7 * output_hessian
    )


@pytest.mark.slow
@pytest.mark.parametrize("codes", [0, 2])
@pytest.mark.parametrize("per_input", [3, 6, 20, 200])
def test_few_tokens_never_make_solve_worse_than_one_shot_on_other_tokens(
    per_input: int, codes: int
) -> None:
    """H and G from so many tokens per input, no shrinkage, default damping; judged by the moments
    of 40,000 fresh ones."""
    experts, num_outputs, num_inputs = 4, 96, 64
    fresh, tokens = 40_000, per_input * num_inputs
    weight, _ = correlated(14, experts, num_outputs, num_inputs)
    estimated, judged = split_moment(15, experts, num_inputs, tokens, fresh)
    output_estimated, output_judged = split_moment(16, experts, num_outputs, tokens, fresh)
    counts = [float(per_input)] * experts
    ours = solve(
        weight, estimated, counts, settings(damp=None, codes=codes), output_hessian=output_estimated
    )
    assert set(ours.outcome) == {"solved"}
    after = exact_losses(weight, ours.values_NOI, judged, output_judged)
    for rel in (None, 0.1):  # ours, and the published one
        one = solve(weight, estimated, counts, settings("sparsegpt_gptq", damp=rel))
        before = exact_losses(weight, one.values_NOI, judged, output_judged)
        assert (after < 0.5 * before).all(), (after / before).tolist()


def split_moment(
    seed: int, num_experts: int, size: int, num_seen: int, num_fresh: int
) -> tuple[Tensor, Tensor]:
    """Second moments of some tokens and of fresh ones of the same correlated distribution, each (N,
    I, I)."""
    generator = torch.Generator().manual_seed(seed)
    mix = (
        torch.logspace(0, -1.5, size)[:, None]
        * torch.randn(num_experts, size, size, generator=generator)
        / size**0.5
    )
    moments = []
    for tokens in (num_seen, num_fresh):
        x = torch.randn(num_experts, tokens, size, generator=generator) @ mix
        moments.append(x.mT @ x / tokens)
    return moments[0], moments[1]
