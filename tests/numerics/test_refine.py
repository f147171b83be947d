"""Refinement: better on tokens it has not seen, or as it began; masks and scales untouched."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p48ray.numerics import e2m1, nvfp4
from p48ray.numerics.activation import input_global_scale, quantize_activations
from p48ray.numerics.refine import (
    ExpertLoss,
    InputScales,
    QuantizedLinear,
    Refined,
    on_grid,
    refine,
)
from p48ray.numerics.refine_tokens import MIN_TOKENS, Batch, ExpertTokens
from p48ray.numerics.solution import SolverSettings
from p48ray.numerics.solvers import solve
from p48ray.numerics.token_rows import TokenRows

HIDDEN, SIZE, EXPERTS = 64, 32, 2
SETTINGS = SolverSettings(
    solver="sparsegpt_gptq", sparsity="paired-4:8", scale_span=32, damp=0.1, sweeps=0
)


class Case:
    """Two experts with one-shot codes, correlated tokens, and a metric that is not the identity."""

    def __init__(self, num_tokens: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        mixing_HH = normal(HIDDEN, HIDDEN) / HIDDEN**0.5
        self.x = [normal(num_tokens, HIDDEN) @ mixing_HH for _ in range(EXPERTS)]
        self.gate_up, self.down = (
            normal(EXPERTS, 2 * SIZE, HIDDEN) / 8,
            normal(EXPERTS, HIDDEN, SIZE) / 6,
        )
        factor_NHH = normal(EXPERTS, HIDDEN, HIDDEN) / HIDDEN**0.5
        self.metric = factor_NHH @ factor_NHH.mT + 0.05 * torch.eye(HIDDEN)
        self.scale = input_global_scale(max(float(x.abs().max()) for x in self.x))
        self.quantized = [quantize_activations(x, self.scale) for x in self.x]
        h = [self.intermediate(x, w) for x, w in zip(self.x, self.gate_up, strict=True)]
        self.down_scale = input_global_scale(1.25 * max(float(v.abs().max()) for v in h))
        many = [float(num_tokens)] * EXPERTS
        inputs_NHH = torch.stack(
            [q.T @ q / max(1, len(q)) for q in self.quantized]
        ) + 1e-3 * torch.eye(HIDDEN)
        inner_NFF = torch.stack([v.T @ v / max(1, len(v)) for v in h]) + 1e-3 * torch.eye(SIZE)
        self.starts = [
            solve(self.gate_up, inputs_NHH, many, SETTINGS),
            solve(self.down, inner_NFF, many, SETTINGS),
        ]

    @staticmethod
    def intermediate(x_TH: Tensor, gate_up_ZH: Tensor) -> Tensor:
        gate, up = (x_TH @ gate_up_ZH.T).chunk(2, -1)
        return F.silu(gate) * up

    def tokens(self) -> list[ExpertTokens]:
        return [ExpertTokens(rows=TokenRows(x), weight_T=torch.ones(len(x))) for x in self.x]

    def refined(self, steps: int) -> Refined:
        linears = [s.as_quantized() for s in self.starts]
        return refine(
            self.tokens(), self.gate_up, self.down, *linears, self.metric, self.scales(), steps
        )

    def scales(self) -> InputScales:
        return InputScales(gate_up=self.scale, down=self.down_scale, group=16)

    def loss(
        self, expert: int, rows: slice, gate_up: QuantizedLinear, down: QuantizedLinear
    ) -> float:
        """The relative error in the metric, written out for one expert in float64."""
        x, q = self.x[expert][rows], self.quantized[expert][rows]
        w = [
            nvfp4.dequantize(v.codes_NOI, v.scale_NOG, v.global_scale_N)[expert]
            for v in (gate_up, down)
        ]
        h = quantize_activations(self.intermediate(q, w[0]), self.down_scale)
        wanted = (self.intermediate(x, self.gate_up[expert]) @ self.down[expert].T).double()
        error, metric = (h @ w[1].T).double() - wanted, self.metric[expert].double()
        return float(((error @ metric) * error).sum() / ((wanted @ metric) * wanted).sum())


def test_held_out_loss_is_the_written_out_one_and_falls_by_a_tenth() -> None:
    case = Case(4096)
    refined = case.refined(150)
    for n in range(EXPERTS):
        starts = [s.as_quantized() for s in case.starts]
        assert refined.loss_before[n] == pytest.approx(
            case.loss(n, slice(None, None, 8), *starts), rel=1e-4
        )
        assert refined.loss_after[n] == pytest.approx(
            case.loss(n, slice(None, None, 8), refined.gate_up, refined.down), rel=1e-4
        )
        assert refined.loss_after[n] < 0.9 * refined.loss_before[n]


@pytest.mark.parametrize("is_quantized", [True, False])
def test_gradients_are_autograd_s_of_the_loss_with_roundings_passed_through(
    is_quantized: bool,
) -> None:
    case = Case(64)
    scales = case.scales() if is_quantized else InputScales(gate_up=None, down=None, group=16)
    batch = Batch(
        torch.stack(case.x).double(),
        torch.rand(EXPERTS, 64, generator=torch.Generator().manual_seed(1)).double(),
    )
    linears = [s.as_quantized() for s in case.starts]
    values = [
        nvfp4.dequantize(q.codes_NOI, q.scale_NOG, q.global_scale_N).double().requires_grad_()
        for q in linears
    ]
    x_NTH = torch.stack(case.quantized).double() if is_quantized else batch.x_NTH
    gate_NTF, up_NTF = (x_NTH @ values[0].mT).chunk(2, -1)
    h_NTF = F.silu(gate_NTF) * up_NTF
    if is_quantized:
        h_NTF = h_NTF + (
            quantize_activations(h_NTF.detach().flatten(0, 1), case.down_scale).view_as(h_NTF)
            - h_NTF.detach()
        )
    gate_NTF, up_NTF = (batch.x_NTH @ case.gate_up.double().mT).chunk(2, -1)
    wanted_NTH = (F.silu(gate_NTF) * up_NTF) @ case.down.double().mT
    error_NTH = h_NTF @ values[1].mT - wanted_NTH
    metric = case.metric.double()
    loss_N, scale_N = (
        ((v @ metric) * v * batch.weight_NT[..., None]).sum((1, 2)) for v in (error_NTH, wanted_NTH)
    )
    expected = torch.autograd.grad((loss_N / scale_N).sum(), values)

    divisors = [q.global_scale_N.double() for q in linears]
    problem = ExpertLoss((case.gate_up.double(), case.down.double()), metric, divisors, scales)
    grids = [(v.detach() * d[:, None, None]) for v, d in zip(values, divisors, strict=True)]
    torch.testing.assert_close(
        problem.loss(batch, grids), (loss_N / scale_N).detach(), rtol=1e-5, atol=0
    )
    for found, wanted, unit in zip(
        problem.gradients(batch, grids), expected, (scales.gate_up, scales.down), strict=True
    ):
        assert (found / (unit or 1.0) - wanted).norm() < 1e-5 * wanted.norm()


def test_operands_on_the_grid_are_exact_in_bf16() -> None:
    case = Case(256)
    for start in case.starts:
        q = start.as_quantized()
        unit = nvfp4.effective_scale(q.scale_NOG, q.global_scale_N)
        grid = on_grid(start.values_NOI, unit, q.scale_NOG.float())
        assert torch.equal(grid.bfloat16().float(), grid)
        torch.testing.assert_close(
            grid / q.global_scale_N[:, None, None], start.values_NOI, rtol=1e-6, atol=0
        )
    inputs = ExpertLoss(
        (case.gate_up, case.down), case.metric, [torch.ones(EXPERTS)] * 2, case.scales()
    ).quantized(case.x[0][None], case.scale)
    assert (inputs.bfloat16().float() - inputs).abs().max() < 1e-6 * inputs.abs().max()


def test_masks_and_scales_stay_and_codes_are_legal() -> None:
    case = Case(1024)
    refined = case.refined(40)
    for start, end in zip(case.starts, (refined.gate_up, refined.down), strict=True):
        assert torch.equal(end.keep_NOP, start.keep_NOP)
        assert torch.equal(end.scale_NOG.view(torch.uint8), start.scale_NOG.view(torch.uint8))
        assert torch.equal(end.global_scale_N, start.global_scale_N1[:, 0])
        assert not bool((end.codes_NOI == 8).any())
        assert not bool(end.codes_NOI[~end.keep_NOP.repeat_interleave(2, 2)].any())
        assert not torch.equal(e2m1.pack(end.codes_NOI), start.packed_NOB), (
            "the case should change some codes"
        )


@pytest.mark.parametrize("num_tokens", [0, 3, MIN_TOKENS - 1])
def test_expert_with_few_tokens_keeps_its_codes(num_tokens: int) -> None:
    case = Case(1024)
    case.x[1], case.quantized[1] = case.x[1][:num_tokens], case.quantized[1][:num_tokens]
    refined = case.refined(40)
    assert torch.equal(e2m1.pack(refined.gate_up.codes_NOI)[1], case.starts[0].packed_NOB[1])
    assert torch.equal(e2m1.pack(refined.down.codes_NOI)[1], case.starts[1].packed_NOB[1])
    assert not torch.equal(e2m1.pack(refined.down.codes_NOI)[0], case.starts[1].packed_NOB[0])


def test_steps_that_only_do_harm_leave_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p48ray.numerics.refine.LEARNING_RATE_REL", 10.0)
    case = Case(1024)
    refined = case.refined(20)
    assert refined.loss_after == refined.loss_before
    assert torch.equal(e2m1.pack(refined.gate_up.codes_NOI), case.starts[0].packed_NOB)


def test_refinement_repeats_bit_for_bit_and_leaves_its_inputs() -> None:
    case = Case(1024)
    before = [t.clone() for t in (case.gate_up, case.down, case.metric, *case.x)]
    first, second = case.refined(30), case.refined(30)
    assert torch.equal(first.gate_up.codes_NOI, second.gate_up.codes_NOI)
    assert first.loss_after == second.loss_after
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (case.gate_up, case.down, case.metric, *case.x), strict=True)
    )


def test_runs_where_gradients_are_off() -> None:
    with torch.no_grad():
        refined = Case(1024).refined(10)
    assert not refined.gate_up.codes_NOI.requires_grad
