"""Code descent against trying everything, its laws, and what it makes of GPTQ's output."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from p48ray.numerics import code_descent as module
from p48ray.numerics import e2m1, nvfp4
from p48ray.numerics.block_descent import Descent, start_descent
from p48ray.numerics.code_descent import code_descent
from p48ray.numerics.curvature import damp
from p48ray.numerics.factor import inverse_factor
from p48ray.numerics.paired48 import find_illegal, keep_top_pairs, pairs_to_inputs
from p48ray.numerics.sparsegpt import quantize_columns
from tests.reference import code_descent as slow
from tests.reference.problems import correlated


class Start(NamedTuple):
    """The arguments of code_descent; scales as E4M3."""

    target: Tensor
    codes: Tensor
    scale: Tensor
    global_scale: Tensor
    keep: Tensor
    hessian: Tensor
    output_hessian: Tensor | None


def gptq_start(
    seed: int,
    span: int,
    *,
    with_g: bool = False,
    num_experts: int = 2,
    num_outputs: int = 16,
    num_inputs: int = 64,
    rel: float = 0.01,
) -> Start:
    """SparseGPT's mask and GPTQ's codes under the damped H."""
    target, hessian = correlated(seed, num_experts, num_outputs, num_inputs)
    global_scale = nvfp4.global_scale_from_amax(target.abs().amax((1, 2)))
    found = quantize_columns(
        target,
        inverse_factor(hessian, rel).upper_NII,
        global_scale,
        span=span,
        keep=None,
        sparsity=True,
    )
    output_hessian = (
        damp(correlated(seed + 500, num_experts, 1, num_outputs)[1], 0.05) if with_g else None
    )
    return Start(
        target,
        found.codes,
        found.scale,
        global_scale,
        found.keep,
        damp(hessian, rel),
        output_hessian,
    )


def rounded_start(
    seed: int, span: int, num_experts: int, num_outputs: int, num_inputs: int, rel: float
) -> Start:
    """Magnitude pruning and nearest codes."""
    target, hessian = correlated(seed, num_experts, num_outputs, num_inputs)
    keep = keep_top_pairs(target.square().unflatten(2, (-1, 2)).sum(-1))
    masked = target * pairs_to_inputs(keep)
    global_scale = nvfp4.global_scale_from_amax(target.abs().amax((1, 2)))
    scale = nvfp4.choose_scales(masked, global_scale, span, search=True)
    return Start(
        target,
        nvfp4.quantize(masked, scale, global_scale),
        scale,
        global_scale,
        keep,
        damp(hessian, rel),
        None,
    )


def losses(start: Start, values: Tensor) -> Tensor:
    """tr(G D H D^T) in float64, (N,)."""
    delta = start.target.double() - values.double()
    weighted = delta if start.output_hessian is None else start.output_hessian.double() @ delta
    return (weighted * (delta @ start.hessian.double())).sum((1, 2))


def values_of(start: Start, found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return nvfp4.dequantize(found[0], found[1], start.global_scale)


def start_values(start: Start) -> Tensor:
    return nvfp4.dequantize(start.codes, start.scale, start.global_scale)


each_form = pytest.mark.parametrize(
    ("span", "with_g"), [(16, False), (16, True), (32, False), (32, True)]
)


@pytest.mark.slow
@each_form
def test_no_sweep_raises_the_objective(span: int, with_g: bool) -> None:
    start = gptq_start(0, span, with_g=with_g)
    trace = [losses(start, start_values(start))]
    trace += [
        losses(start, values_of(start, code_descent(*start, span=span, sweeps=s))) for s in range(5)
    ]
    assert torch.equal(trace[0], trace[1])
    for before, after in itertools.pairwise(trace):
        assert (after <= before + 1e-6 * trace[0]).all()


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_no_row_group_raises_the_objective_however_the_rows_are_coupled(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = gptq_start(1, 32)._replace(
        output_hessian=torch.ones(2, 16, 16) + strength * torch.eye(16)
    )
    trace: list[Tensor] = []
    majorise = module.majorised_target

    def spy(target: Tensor, values: Tensor, output_hessian: Tensor, rows: Tensor) -> Tensor:
        trace.append(losses(start, values))
        return majorise(target, values, output_hessian, rows)

    monkeypatch.setattr(module, "majorised_target", spy)
    found = code_descent(*start, span=32, sweeps=3)
    trace.append(losses(start, values_of(start, found)))
    assert len(trace) == 3 * module.CODE_ROW_GROUPS + 1
    assert torch.equal(trace[0], losses(start, start_values(start)))
    for before, after in itertools.pairwise(trace):
        assert (after <= before + 1e-6 * trace[0]).all()
    assert (trace[-1] < 0.8 * trace[0]).all()


@pytest.mark.slow
@each_form
def test_improves_what_gptq_leaves_by_half(span: int, with_g: bool) -> None:
    start = gptq_start(2, span, with_g=with_g, num_outputs=64, num_inputs=128)
    before, after = (
        losses(start, start_values(start)),
        losses(start, values_of(start, code_descent(*start, span=span, sweeps=3))),
    )
    assert (after < 0.5 * before).all()


@pytest.mark.slow
@each_form
@pytest.mark.parametrize("num_inputs", [64, 160])
def test_results_are_on_the_grid(
    span: int, with_g: bool, num_inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160 inputs are more than one column_block, and the last one is not full."""
    start = gptq_start(3, span, with_g=with_g, num_inputs=num_inputs)
    states: list[Descent] = []

    def spy(*args: Tensor) -> Descent:
        states.append(start_descent(*args))
        return states[-1]

    monkeypatch.setattr(module, "start_descent", spy)
    codes, scale, keep = code_descent(*start, span=span, sweeps=2)
    assert codes.dtype == torch.uint8
    assert scale.dtype == torch.float8_e4m3fn
    assert (codes < 16).all()
    assert not (codes == 8).any()
    assert torch.equal(e2m1.encode(e2m1.decode(codes)), codes)
    assert torch.isfinite(scale.float()).all()
    assert (scale.float() >= 2.0**-9).all()
    if span == 32:
        assert torch.equal(scale.view(torch.uint8)[..., 0::2], scale.view(torch.uint8)[..., 1::2])
    assert (keep.unflatten(2, (-1, 4)).sum(-1) == 2).all()
    assert not codes[~pairs_to_inputs(keep)].any()
    assert not find_illegal(e2m1.pack(codes)).any()
    assert torch.equal(nvfp4.dequantize(codes, scale, start.global_scale), states[0].values_NOI), (
        "what it worked with is what the codes say"
    )
    for ours, before in ((codes, start.codes), (scale, start.scale)):
        assert not same(ours, before)
    assert not torch.equal(keep, start.keep)


@pytest.mark.slow
@pytest.mark.parametrize("span", [16, 32])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_agrees_with_trying_every_scale_and_every_code(span: int, sweeps: int) -> None:
    """The same codes, scales and masks as a float64 search that evaluates the whole loss of every
    candidate."""
    start = rounded_start(4, span, num_experts=1, num_outputs=4, num_inputs=32, rel=0.1)
    codes, scale, keep = code_descent(*start, span=span, sweeps=sweeps)
    for r in range(4):
        level, scales, kept = slow.descend_row(
            start.target[0, r],
            e2m1.decode(start.codes[0, r]),
            start.scale[0, r].float(),
            float(start.global_scale[0]),
            start.keep[0, r],
            start.hessian[0],
            span,
            sweeps,
        )
        assert torch.equal(e2m1.decode(codes[0, r]).double(), level)
        assert torch.equal(scale[0, r].double(), scales)
        assert torch.equal(keep[0, r], kept)


def small_problems(monkeypatch: pytest.MonkeyPatch) -> tuple[Start, Tensor]:
    """64 problems of one row and 8 inputs, two to an expert as uncoupled halves of a scale_group
    whose scale stays; and the least losses (N, 2)."""
    monkeypatch.setattr(module, "_rescale_span_", lambda *_: None)
    start = rounded_start(5, 16, num_experts=32, num_outputs=1, num_inputs=16, rel=0.05)
    hessian = start.hessian.clone()
    hessian[:, :8, 8:] = hessian[:, 8:, :8] = 0
    unit_N = start.scale[:, 0, 0].float() / start.global_scale
    halves = [slice(0, 8), slice(8, 16)]
    best = [slow.best_codes(start.target[:, 0, h], unit_N, hessian[:, h, h]) for h in halves]
    return start._replace(hessian=hessian), torch.stack(best, dim=1)


def half_losses(start: Start, values: Tensor) -> Tensor:
    """(N, 2)."""
    delta = (start.target - values).double()[:, 0]
    return ((delta[:, None] @ start.hessian.double())[:, 0] * delta).view(-1, 2, 8).sum(-1)


def test_one_pair_group_ends_near_the_best_of_all_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    start, best = small_problems(monkeypatch)
    first = half_losses(start, start_values(start))
    found = half_losses(start, values_of(start, code_descent(*start, span=16, sweeps=4)))
    assert (found >= best * (1 - 1e-5)).all(), "nothing is better than the best of all"
    ratio = found / best
    assert ratio.median() < 1.0001
    assert ratio.mean() < 1.01
    assert ratio.max() < 1.1
    assert (first / best).mean() > 1.5


def test_no_single_code_can_be_bettered_where_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    start, _ = small_problems(monkeypatch)
    codes, scale, keep = code_descent(*start, span=16, sweeps=12)
    reached = half_losses(start, nvfp4.dequantize(codes, scale, start.global_scale))
    is_kept = pairs_to_inputs(keep)
    for i, code in itertools.product(range(16), [c for c in range(16) if c != 8]):
        other = codes.clone()
        other[:, :, i] = torch.where(is_kept[:, :, i], code, codes[:, :, i])
        assert (
            half_losses(start, nvfp4.dequantize(other, scale, start.global_scale))
            >= reached * (1 - 1e-5)
        ).all()


def test_no_other_scale_is_better_than_the_one_taken() -> None:
    """With codes that cannot move (white inputs, target on the grid of another scale), one sweep
    finds that scale."""
    start = rounded_start(6, 32, num_experts=2, num_outputs=8, num_inputs=64, rel=0.0)
    white = torch.eye(64).repeat(2, 1, 1)
    doubled = (2 * start.scale.float()).to(torch.float8_e4m3fn)
    halved = (start.scale.float() / 2).to(torch.float8_e4m3fn)
    target = start_values(start)
    for wrong in (doubled, halved):
        codes, scale, _ = code_descent(
            *start._replace(target=target, scale=wrong, hessian=white), span=32, sweeps=1
        )
        assert torch.equal(nvfp4.dequantize(codes, scale, start.global_scale), target)


def test_a_result_on_target_stays() -> None:
    start = gptq_start(7, 32)
    start = start._replace(target=start_values(start))
    codes, scale, keep = code_descent(*start, span=32, sweeps=2)
    assert torch.equal(codes, start.codes)
    assert torch.equal(scale.float(), start.scale.float())
    assert torch.equal(keep, start.keep)


@pytest.mark.parametrize("with_g", [False, True])
def test_rows_of_zeros_stay_zeros_without_nan(with_g: bool) -> None:
    start = gptq_start(8, 32, with_g=with_g)
    start.target[:, ::2] = 0
    zeroed = start.codes.clone()
    zeroed[:, ::2] = 0
    start = start._replace(codes=zeroed)
    codes, scale, _ = code_descent(*start, span=32, sweeps=2)
    assert torch.isfinite(nvfp4.dequantize(codes, scale, start.global_scale)).all()
    if not with_g:
        assert not codes[:, ::2].any()


def test_a_target_of_zeros_with_zero_codes_changes_nothing() -> None:
    start = gptq_start(9, 16)
    start = start._replace(
        target=torch.zeros_like(start.target), codes=torch.zeros_like(start.codes)
    )
    codes, scale, keep = code_descent(*start, span=16, sweeps=2)
    assert not codes.any()
    assert torch.equal(scale.float(), start.scale.float())
    assert torch.equal(keep, start.keep)


@pytest.mark.slow
@pytest.mark.parametrize("power", [-40, 40])
def test_the_size_of_the_curvature_changes_nothing(power: int) -> None:
    start = gptq_start(10, 32, with_g=True)
    assert start.output_hessian is not None
    plain = code_descent(*start, span=32, sweeps=2)
    for other in (
        start._replace(hessian=start.hessian * 2.0**power),
        start._replace(output_hessian=start.output_hessian * 2.0**power),
    ):
        assert all(
            same(a, b) for a, b in zip(plain, code_descent(*other, span=32, sweeps=2), strict=True)
        )


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.slow
@each_form
def test_batched_equals_single_bitwise_and_a_second_run_too(span: int, with_g: bool) -> None:
    start = gptq_start(11, span, with_g=with_g, num_experts=3)
    batched = code_descent(*start, span=span, sweeps=2)
    assert all(
        same(a, b) for a, b in zip(batched, code_descent(*start, span=span, sweeps=2), strict=True)
    )
    for k in range(3):
        part = Start(*(None if t is None else t[k : k + 1] for t in start))  # type: ignore[arg-type]
        single = code_descent(*part, span=span, sweeps=2)
        assert all(same(a[0], b[k]) for a, b in zip(single, batched, strict=True))


@each_form
def test_inputs_are_unchanged_and_no_sweeps_return_the_start_as_new_tensors(
    span: int, with_g: bool
) -> None:
    start = gptq_start(12, span, with_g=with_g)
    before = [None if t is None else t.clone() for t in start]
    code_descent(*start, span=span, sweeps=2)
    assert all(
        a is None or (b is not None and same(a, b)) for a, b in zip(before, start, strict=True)
    )
    found = code_descent(*start, span=span, sweeps=0)
    for ours, theirs in zip(found, (start.codes, start.scale, start.keep), strict=True):
        assert same(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
