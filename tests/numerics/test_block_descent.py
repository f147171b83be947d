"""Block descent against least squares over all six patterns, and its laws."""

import itertools

import pytest
import torch

from p48ray.errors import NumericsError
from p48ray.numerics.block_descent import block_descent
from p48ray.numerics.curvature import damp
from p48ray.numerics.paired48 import keep_top_pairs, pairs_to_inputs
from tests.reference import descent as slow
from tests.reference.problems import correlated, identity

Start = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def start(seed: int, num_experts: int = 2, num_outputs: int = 8, num_inputs: int = 64) -> Start:
    """(target, start values, start mask, damped Hessian): magnitude pruning."""
    target, hessian = correlated(seed, num_experts, num_outputs, num_inputs)
    keep = keep_top_pairs(target.square().unflatten(2, (-1, 2)).sum(-1))
    return target, target * pairs_to_inputs(keep), keep, damp(hessian, 0.01)


def losses(target: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> list[float]:
    return [slow.loss(t, v, h) for t, v, h in zip(target, values, hessian, strict=True)]


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("column_block", [8, 24, 128])
def test_agrees_with_least_squares_over_all_patterns(sweeps: int, column_block: int) -> None:
    target, values, keep, hessian = start(0, num_outputs=6, num_inputs=48)
    ours, kept = block_descent(target, values, keep, hessian, sweeps, column_block)
    for k in range(2):
        for r in range(6):
            expected = slow.descend_row(target[k, r], values[k, r], hessian[k], sweeps)
            torch.testing.assert_close(ours[k, r].double(), expected, rtol=1e-3, atol=1e-5)
            assert torch.equal(kept[k, r], expected.unflatten(0, (-1, 2)).ne(0).any(-1))


def test_no_sweep_raises_the_loss_and_the_first_ones_lower_it_much() -> None:
    target, values, keep, hessian = start(1, num_outputs=16, num_inputs=160)
    trace = [losses(target, values, hessian)]
    for sweeps in range(1, 9):
        trace.append(
            losses(target, block_descent(target, values, keep, hessian, sweeps)[0], hessian)
        )
    for before, after in itertools.pairwise(trace):
        assert all(a <= b * (1 + 1e-6) for a, b in zip(after, before, strict=True))
    assert all(last < 0.4 * first for first, last in zip(trace[0], trace[-1], strict=True))


def test_values_are_zero_exactly_outside_the_mask_and_the_mask_is_legal() -> None:
    target, values, keep, hessian = start(2)
    values, keep = block_descent(target, values, keep, hessian, 2)
    assert (keep.unflatten(2, (-1, 4)).sum(-1) == 2).all()
    assert not values[~pairs_to_inputs(keep)].any()
    assert (values[pairs_to_inputs(keep)] != 0).all()


def test_white_inputs_keep_the_two_largest_pairs_as_they_are() -> None:
    target, _, keep, _ = start(3)
    worst = keep_top_pairs(-target.square().unflatten(2, (-1, 2)).sum(-1))
    values, found = block_descent(
        target, target * pairs_to_inputs(worst), worst, identity(2, 64), 1
    )
    assert torch.equal(found, keep)
    torch.testing.assert_close(values, target * pairs_to_inputs(keep))


def test_ties_go_to_the_current_pattern() -> None:
    target = torch.ones(1, 6, 8)
    keep = torch.tensor(
        [
            [
                list(p)
                for p in (
                    (1, 1, 0, 0),
                    (1, 0, 1, 0),
                    (1, 0, 0, 1),
                    (0, 1, 1, 0),
                    (0, 1, 0, 1),
                    (0, 0, 1, 1),
                )
            ]
        ]
    ).bool()
    _, found = block_descent(target, target * pairs_to_inputs(keep), keep, identity(1, 8), 3)
    assert torch.equal(found, keep)


def test_a_target_that_is_already_sparse_is_found_and_kept() -> None:
    target, _, keep, hessian = start(4)
    sparse = target * pairs_to_inputs(keep)
    values, found = block_descent(sparse, sparse, keep, hessian, 3)
    assert torch.equal(found, keep)
    torch.testing.assert_close(values, sparse, rtol=1e-4, atol=1e-7)


def test_batched_equals_single_bitwise_and_a_second_run_too() -> None:
    target, values, keep, hessian = start(5, num_experts=3, num_inputs=160)
    batched = block_descent(target, values, keep, hessian, 2)
    again = block_descent(target, values, keep, hessian, 2)
    assert all(torch.equal(a, b) for a, b in zip(batched, again, strict=True))
    for k in range(3):
        part = slice(k, k + 1)
        single = block_descent(target[part], values[part], keep[part], hessian[part], 2)
        assert all(torch.equal(a[0], b[k]) for a, b in zip(single, batched, strict=True))


def test_no_sweeps_return_the_start_as_new_tensors() -> None:
    target, values, keep, hessian = start(6)
    found, kept = block_descent(target, values, keep, hessian, 0)
    assert torch.equal(found, values)
    assert torch.equal(kept, keep)
    assert found.data_ptr() != values.data_ptr()


def test_stops_early_once_a_sweep_gains_too_little() -> None:
    target, values, keep, hessian = start(7)
    stopped = block_descent(target, values, keep, hessian, 50, min_relative_gain=0.5)
    one_sweep = block_descent(target, values, keep, hessian, 1)
    two_sweeps = block_descent(target, values, keep, hessian, 2)
    # the first halves the loss, the second does not and is the last
    assert torch.equal(stopped[0], two_sweeps[0])
    assert not torch.equal(stopped[0], one_sweep[0])


def test_inputs_are_unchanged() -> None:
    inputs = start(8)
    before = [t.clone() for t in inputs]
    block_descent(*inputs, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_inputs_that_do_not_fill_pair_groups_are_refused() -> None:
    target, values, keep, hessian = start(9)
    with pytest.raises(NumericsError, match="multiple of 8"):
        block_descent(target, values, keep, hessian, 1, column_block=12)
