"""The Triton kernels against the torch code that defines them, in Triton's interpreter where there
is no GPU (tests/numerics/test_cuda.py runs them on one)."""

import importlib.util
import os

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which comes with torch's CUDA builds", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a GPU runs them itself", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import triton
import triton.language as tl

from p48ray.kernels import (
    activation,
    column_pass,
    descend_panel,
    descent,
    refine_step,
    rounding,
    strips,
)
from p48ray.numerics import block_descent, nvfp4, refine, sparsegpt, two_sided
from p48ray.numerics.activation import quantize_activations
from p48ray.numerics.curvature import damp
from p48ray.numerics.e2m1 import encode, round_to_e2m1
from p48ray.numerics.factor import inverse_factor
from p48ray.numerics.nvfp4 import round_to_e4m3
from p48ray.numerics.paired48 import keep_top_pairs, pairs_to_inputs
from tests.reference.problems import correlated


@triton.jit
def count_up(out, stop):
    for k in range(stop):
        tl.store(out + k, k)


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> None:
    """Triton 3.6's interpreter can not run a loop with numpy 2.4."""
    try:
        count_up[(1,)](torch.zeros(4, dtype=torch.int32), 4)
    except triton.runtime.errors.InterpreterError as error:
        pytest.skip(
            f"Triton {triton.__version__}'s interpreter does not work with this numpy: {error}"
        )


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small matrix has several column_blocks, panels and strips."""
    for module, panel in ((descend_panel, 64), (column_pass, 64)):
        monkeypatch.setattr(module, "PANEL", panel)
    monkeypatch.setattr(descent, "PANEL", 64)
    monkeypatch.setattr(descent, "COLUMN_BLOCK", 64)
    monkeypatch.setattr(column_pass, "COLUMN_BLOCK", 128)


def problem(num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, upper, global scale) of two experts."""
    weight, hessian = correlated(0, 2, num_outputs, num_inputs)
    return (
        weight,
        inverse_factor(hessian, 0.05).upper_NII,
        nvfp4.global_scale_from_amax(weight.abs().amax((1, 2))),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("span", "num_inputs", "num_outputs"), [(32, 96, 12), (16, 144, 10)])
@pytest.mark.parametrize("mode", ["picked", "fixed", "dense"])
def test_one_shot_gives_the_codes_of_the_definition(
    span: int, num_inputs: int, num_outputs: int, mode: str
) -> None:
    weight, upper, divisor = problem(num_outputs, num_inputs)
    keep = (
        keep_top_pairs(weight.flip(0).square().unflatten(2, (-1, 2)).sum(-1))
        if mode == "fixed"
        else None
    )
    wanted = sparsegpt.quantize_columns(
        weight, upper, divisor, span=span, keep=keep, sparsity=mode != "dense"
    )
    state = sparsegpt._opened(
        weight, upper, keep, divisor, span=span, picks_masks=mode == "picked", rounds=True
    )
    found = sparsegpt._one_shot_by_kernel(state)
    # A row may part from the definition where a sum in another order falls on the other side of a
    # tie; from there on its errors differ.
    rows_that_differ = (
        ((found.codes != wanted.codes).any(-1) | (found.keep != wanted.keep).any(-1)).float().mean()
    )
    assert rows_that_differ <= 0.05
    same = (found.codes == wanted.codes).all(-1)
    assert torch.equal(found.scale.float()[same], wanted.scale.float()[same])


@pytest.mark.slow
def test_sparse_values_are_those_of_the_definition() -> None:
    weight, upper, divisor = problem(12, 104)
    values, keep = sparsegpt.prune_columns(weight, upper)
    state = sparsegpt._opened(weight, upper, None, divisor, span=8, picks_masks=True, rounds=False)
    found, _ = sparsegpt._pass_by_kernel(state)
    assert torch.equal(state.keep_NPO.mT, keep)
    torch.testing.assert_close(found.mT, values, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_descents_of_one_and_both_sides_are_those_of_the_definition() -> None:
    target, hessian = correlated(0, 1, 34, 72)
    _, output_hessian = correlated(1, 1, 4, 34)
    hessian, output_hessian = damp(hessian, 0.01), damp(output_hessian, 0.05)
    keep = keep_top_pairs(target.square().unflatten(2, (-1, 2)).sum(-1))
    start = target * pairs_to_inputs(keep)
    pairs = (
        (
            block_descent.block_descent(target, start, keep, hessian, 2),
            block_descent._descend_by_kernel(target, start, keep, hessian, 2, 0.0),
        ),
        (
            two_sided.two_sided_descent(
                target, start, keep, hessian, output_hessian, 1, row_groups=2
            ),
            two_sided._descend_by_kernel(target, start, keep, hessian, output_hessian, 1, 2),
        ),
    )
    for (wanted, wanted_keep), (found, found_keep) in pairs:
        assert torch.equal(found_keep, wanted_keep)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_the_current_pattern_wins_ties() -> None:
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
    _, found = block_descent._descend_by_kernel(
        target, target * pairs_to_inputs(keep), keep, torch.eye(8)[None], 2, 0.0
    )
    assert torch.equal(found, keep)


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_bit_for_bit_the_definition_s(group: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(70, 64, generator=generator)
        * 10.0 ** torch.randint(-4, 3, (70, 1), generator=generator)
    ).to(dtype)
    x[3] = 0
    assert torch.equal(
        activation.quantize_activations(x, torch.tensor(37.1), group),
        quantize_activations(x, 37.1, group),
    )


@triton.jit
def round_all(x, levels, codes, scales, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    value = tl.load(x + at)
    tl.store(levels + at, rounding.round_to_e2m1(value))
    tl.store(codes + at, rounding.e2m1_code(rounding.round_to_e2m1(value)))
    tl.store(scales + at, rounding.round_to_e4m3(tl.minimum(tl.abs(value), 448.0)))


def test_roundings_are_those_of_the_definition_at_and_beside_every_tie() -> None:
    ties = torch.arange(0, 2048) / 512
    x = torch.cat(
        [
            ties,
            ties * 128,
            ties * 2**-7,
            torch.nextafter(ties, ties + 1),
            -torch.nextafter(ties, ties - 1),
            -ties * 4,
        ]
    )
    x = torch.nn.functional.pad(x, (0, 16384 - len(x)))
    levels, scales, codes = (
        torch.empty_like(x),
        torch.empty_like(x),
        torch.empty_like(x, dtype=torch.uint8),
    )
    round_all[(1,)](x, levels, codes, scales, COUNT=len(x))
    assert torch.equal(levels, round_to_e2m1(x))
    assert torch.equal(codes, encode(x))
    assert torch.equal(scales, round_to_e4m3(x.abs()))


@pytest.mark.parametrize("is_sparse", [True, False])
def test_adam_s_step_and_the_values_that_come_of_it_are_refine_s(is_sparse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    keep = (
        keep_top_pairs(torch.rand(2, 12, 32, generator=generator))
        if is_sparse
        else torch.ones(2, 12, 32, dtype=torch.bool)
    )
    mask = keep.repeat_interleave(2, 2)
    latent, first, second = (
        torch.randn(2, int(mask[0].sum()), generator=generator) for _ in range(3)
    )
    gradient, second = torch.randn(2, 12, 64, generator=generator), second.abs()
    unit, scale, rate = (
        torch.rand(2, 12, 4, generator=generator) + 0.1,
        torch.rand(2, 12, 4, generator=generator),
        torch.tensor([0.01, 0.1]),
    )
    wanted = [t.clone() for t in (latent, first, second)]
    refine.adam_(
        wanted[0], 0.5 * gradient[mask].view(2, -1), wanted[1], wanted[2], rate[:, None], 3
    )
    grid = torch.zeros(2, 12, 64)
    refine_step.adam_step_(
        (latent, first, second), gradient, grid, (unit, scale), keep, rate, refine.BETAS, 3, 0.5
    )
    for found, expected in zip((latent, first, second), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    whole = torch.zeros(2, 12, 64).masked_scatter_(mask, latent)
    torch.testing.assert_close(grid, refine.on_grid(whole, unit, scale), rtol=0, atol=0)


@pytest.mark.parametrize("num_inputs", [24, 64, 104])
def test_strips_are_the_diagonal_blocks(num_inputs: int) -> None:
    matrix = torch.randn(2, num_inputs, num_inputs, generator=torch.Generator().manual_seed(0))
    packed = strips.pack_strips(matrix, beyond=7.0)
    padded = torch.zeros(2, 128, 128)
    padded[:, :num_inputs, :num_inputs] = matrix
    for k in range(packed.shape[1]):
        expected = padded[:, 32 * k : 32 * k + 32, 32 * k : 32 * k + 32].clone()
        for j in range(max(0, num_inputs - 32 * k), 32):
            expected[:, j, j] = 7.0
        assert torch.equal(packed[:, k], expected)
