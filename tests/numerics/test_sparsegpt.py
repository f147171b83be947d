"""The column loop against brain surgery with an explicit inverse, and its laws."""

import pytest
import torch

from p48ray.errors import NumericsError
from p48ray.numerics import nvfp4, paired48
from p48ray.numerics.factor import inverse_factor
from p48ray.numerics.paired48 import keep_top_pairs
from p48ray.numerics.relative_errors import hessian_loss
from p48ray.numerics.sparsegpt import Codes, prune_columns, quantize_columns
from tests.reference.elimination import eliminations, prune_row, quantize_row
from tests.reference.problems import correlated, identity

DAMP = 0.05


def global_scale(weight: torch.Tensor) -> torch.Tensor:
    return nvfp4.global_scale_from_amax(weight.abs().amax((1, 2)))


def run(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    span: int = 16,
    keep: torch.Tensor | None = None,
    sparse: bool = True,
    block: int = 128,
) -> Codes:
    upper = inverse_factor(hessian, DAMP).upper_NII
    return quantize_columns(
        weight,
        upper,
        global_scale(weight),
        span=span,
        keep=keep,
        sparsity=sparse,
        column_block=block,
    )


def values(codes: Codes, weight: torch.Tensor) -> torch.Tensor:
    return nvfp4.dequantize(codes.codes, codes.scale, global_scale(weight))


def bytes_of(codes: Codes) -> list[torch.Tensor]:
    return [codes.codes, codes.scale.view(torch.uint8), codes.keep]


def random_mask(weight: torch.Tensor) -> torch.Tensor:
    n, o, i = weight.shape
    return keep_top_pairs(torch.rand(n, o, i // 2, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("span", [16, 32])
@pytest.mark.parametrize("mode", ["picked", "fixed", "dense"])
@pytest.mark.parametrize("block", [32, 128])
def test_agrees_with_elimination_one_column_at_a_time(span: int, mode: str, block: int) -> None:
    weight, hessian = correlated(0, 2, 12, 96)
    keep = random_mask(weight) if mode == "fixed" else None
    codes = run(weight, hessian, span, keep, sparse=mode != "dense", block=block)
    ours, scales = values(codes, weight), codes.scale.float()
    same_rows, divisor = [], global_scale(weight)
    for k in range(2):
        steps = eliminations(hessian[k], DAMP)
        for r in range(12):
            fixed = keep[k, r].tolist() if keep is not None else None
            expected, spans, kept = quantize_row(
                weight[k, r], steps, divisor[k].item(), span, fixed, mode != "dense"
            )
            same = (
                torch.allclose(ours[k, r], torch.tensor(expected), rtol=1e-5, atol=0)
                and codes.keep[k, r].tolist() == kept
            )
            same_rows.append(
                same and scales[k, r].tolist() == [s for s in spans for _ in range(span // 16)]
            )
    # A row may part from float64 where a float32 value falls on the other side of a rounding tie;
    # from there on its errors differ.
    assert sum(same_rows) >= 23, f"{sum(same_rows)} of 24 rows agree"


@pytest.mark.parametrize("span", [16, 32])
def test_white_inputs_give_exactly_round_to_nearest(span: int) -> None:
    weight, _ = correlated(1, 2, 8, 64)
    codes = run(weight, identity(2, 64), span, sparse=False)
    divisor = global_scale(weight)
    scale = nvfp4.choose_scales(weight, divisor, span, search=True)
    assert torch.equal(codes.scale.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(codes.codes, nvfp4.quantize(weight, scale, divisor))


def test_white_inputs_give_the_magnitude_mask() -> None:
    weight, _ = correlated(2, 2, 8, 64)
    codes = run(weight, identity(2, 64))
    assert torch.equal(codes.keep, keep_top_pairs(weight.square().unflatten(2, (-1, 2)).sum(-1)))


def test_error_feedback_lowers_the_loss_on_correlated_inputs() -> None:
    weight, hessian = correlated(3, 2, 32, 128)
    divisor = global_scale(weight)
    scale = nvfp4.choose_scales(weight, divisor, 16, search=True)
    nearest = nvfp4.dequantize(nvfp4.quantize(weight, scale, divisor), scale, divisor)
    looped = values(run(weight, hessian, sparse=False), weight)
    assert (
        hessian_loss(weight - looped, hessian) < 0.6 * hessian_loss(weight - nearest, hessian)
    ).all()


def test_the_mask_is_legal_and_zero_is_code_zero() -> None:
    weight, hessian = correlated(4, 2, 16, 128)
    codes = run(weight, hessian)
    assert (codes.keep.unflatten(2, (-1, 4)).sum(-1) == 2).all()
    pruned = ~paired48.pairs_to_inputs(codes.keep)
    assert (codes.codes[pruned] == 0).all()
    assert not (codes.codes == 8).any()


def test_a_fixed_mask_is_kept() -> None:
    weight, hessian = correlated(5, 2, 16, 64)
    keep = random_mask(weight)
    codes = run(weight, hessian, keep=keep)
    assert torch.equal(codes.keep, keep)
    assert (codes.codes[~paired48.pairs_to_inputs(keep)] == 0).all()


def test_without_sparsity_every_pair_is_kept() -> None:
    weight, hessian = correlated(6, 1, 8, 32)
    codes = run(weight, hessian, sparse=False)
    assert codes.keep.all()
    assert (codes.codes != 0).float().mean() > 0.8


def test_span_32_stores_one_byte_twice() -> None:
    weight, hessian = correlated(7, 1, 8, 64)
    scale = run(weight, hessian, span=32).scale.view(torch.uint8)
    assert torch.equal(scale[..., 0::2], scale[..., 1::2])
    assert scale.shape == (1, 8, 4)


def test_the_column_block_changes_nothing_but_rounding() -> None:
    weight, hessian = correlated(8, 2, 16, 96)
    narrow, wide = (
        values(run(weight, hessian, block=16), weight),
        values(run(weight, hessian, block=96), weight),
    )
    same_rows = (narrow == wide).all(-1).float().mean()
    assert same_rows >= 0.9
    losses = [hessian_loss(weight - v, hessian) for v in (narrow, wide)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)


def test_batched_equals_single_bitwise() -> None:
    weight, hessian = correlated(9, 3, 16, 160)
    batched = run(weight, hessian)
    for k in range(3):
        single = run(weight[k : k + 1], hessian[k : k + 1])
        assert all(
            torch.equal(a[0], b[k])
            for a, b in zip(bytes_of(single), bytes_of(batched), strict=True)
        )


@pytest.mark.parametrize("power", [-40, 40])
def test_scaling_weights_or_curvature_by_a_power_of_two_changes_no_byte(power: int) -> None:
    weight, hessian = correlated(10, 1, 8, 64)
    plain = bytes_of(run(weight, hessian))
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain, bytes_of(run(weight * 2.0**power, hessian)), strict=True)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain, bytes_of(run(weight, hessian * 2.0**power)), strict=True)
    )


def test_zero_weights_give_zero_codes_and_a_legal_mask() -> None:
    codes = run(torch.zeros(1, 4, 32), identity(1, 32))
    assert not codes.codes.any()
    assert (codes.keep.unflatten(2, (-1, 4)).sum(-1) == 2).all()


def test_inputs_are_unchanged() -> None:
    weight, hessian = correlated(11, 1, 8, 32)
    keep = random_mask(weight)
    before = weight.clone(), hessian.clone(), keep.clone()
    run(weight, hessian)
    run(weight, hessian, keep=keep)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, keep), strict=True))


def test_spans_that_do_not_fit_and_masks_without_sparsity_are_refused() -> None:
    weight, hessian = correlated(12, 1, 4, 48)
    with pytest.raises(NumericsError, match="span of 16 or 32"):
        run(weight, hessian, span=32)
    with pytest.raises(NumericsError, match="span of 16 or 32"):
        run(weight, hessian, span=16, block=24)
    with pytest.raises(NumericsError, match="fixed mask"):
        run(weight, hessian, keep=random_mask(weight), sparse=False)


@pytest.mark.parametrize("block", [8, 32, 128])
def test_sparsity_alone_agrees_with_elimination_one_column_at_a_time(block: int) -> None:
    weight, hessian = correlated(21, 2, 12, 96)
    ours, keep = prune_columns(weight, inverse_factor(hessian, DAMP).upper_NII, column_block=block)
    for k in range(2):
        steps = eliminations(hessian[k], DAMP)
        for r in range(12):
            values, kept = prune_row(weight[k, r], steps)
            assert keep[k, r].tolist() == kept
            torch.testing.assert_close(ours[k, r], torch.tensor(values), rtol=1e-4, atol=1e-6)


def test_sparsity_alone_leaves_white_inputs_weights_as_they_are() -> None:
    weight = correlated(22, 1, 8, 64)[0]
    ours, keep = prune_columns(weight, inverse_factor(identity(1, 64), DAMP).upper_NII)
    assert torch.equal(keep, keep_top_pairs(weight.square().unflatten(2, (-1, 2)).sum(-1)))
    assert torch.equal(ours, weight * paired48.pairs_to_inputs(keep))
