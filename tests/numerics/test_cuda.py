"""What a GPU must share with a CPU: formats bit for bit, solvers in quality."""

import pytest
import torch
from torch import Tensor

from p48ray.numerics import nvfp4
from p48ray.numerics.activation import count_clipped, quantize_activations
from p48ray.numerics.asymmetric import compensated_target
from p48ray.numerics.curvature import SecondMoment
from p48ray.numerics.metrics import hessian_loss
from p48ray.numerics.solvers import SolverSettings, solve
from tests.reference.problems import correlated

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def wide_values(seed: int) -> Tensor:
    """Float32 of many sizes, (1, 256, 512)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 256, 512, generator=generator) * 10.0 ** torch.randint(-3, 3, (1, 256, 1), generator=generator)


@pytest.mark.parametrize("span", [16, 32])
def test_weight_codes_and_values_are_bit_for_bit_those_of_the_cpu(span: int) -> None:
    values = wide_values(0)
    divisor = nvfp4.global_scale_from_amax(values.abs().amax((1, 2)))
    assert torch.equal(nvfp4.global_scale_from_amax(values.cuda().abs().amax((1, 2))).cpu(), divisor)
    scale = nvfp4.choose_scales(values, divisor, span, search=False)
    on_gpu = nvfp4.choose_scales(values.cuda(), divisor.cuda(), span, search=False)
    assert torch.equal(on_gpu.cpu().view(torch.uint8), scale.view(torch.uint8))
    codes = nvfp4.quantize(values, scale, divisor)
    assert torch.equal(nvfp4.quantize(values.cuda(), on_gpu, divisor.cuda()).cpu(), codes)
    assert torch.equal(nvfp4.dequantize(codes.cuda(), on_gpu, divisor.cuda()).cpu(), nvfp4.dequantize(codes, scale, divisor))


@pytest.mark.parametrize("group", [16, 32])
def test_activations_are_bit_for_bit_those_of_the_cpu(group: int) -> None:
    x = wide_values(1)[0]
    assert torch.equal(quantize_activations(x.cuda(), 37.1, group).cpu(), quantize_activations(x, 37.1, group))
    assert count_clipped(x.cuda(), 37.1).item() == count_clipped(x, 37.1).item() > 0


@pytest.mark.parametrize("solver", ["sparsegpt_gptq", "block_descent"])
def test_solvers_reach_the_loss_of_the_cpu(solver: str) -> None:
    weight, hessian = correlated(2, 4, 256, 256)
    chosen = SolverSettings(solver=solver, sparsity="paired-4:8", scale_span=32, damp=0.01, sweeps=4)
    on_cpu = solve(weight, hessian, [20.0] * 4, chosen)
    on_gpu = solve(weight.cuda(), hessian.cuda(), [20.0] * 4, chosen)
    losses = [hessian_loss(weight - s.values_NOI.cpu(), hessian) for s in (on_cpu, on_gpu)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0)
    again = solve(weight.cuda(), hessian.cuda(), [20.0] * 4, chosen)
    assert torch.equal(again.packed_NOB, on_gpu.packed_NOB)


def test_moments_and_targets_agree_with_the_cpu() -> None:
    weight, _ = correlated(3, 1, 64, 128)
    x = torch.randn(6000, 128, generator=torch.Generator().manual_seed(3))
    y = x + 0.1 * x.flip(1)
    targets = []
    for device in ("cpu", "cuda"):
        gram, cross = SecondMoment.zeros(128, device), SecondMoment.zeros(128, device)
        gram.add_(x.to(device), None)
        cross.add_(x.to(device), None, y.to(device))
        targets.append(compensated_target(weight.to(device), gram.mean()[None], cross.mean()[None]).cpu())
    torch.testing.assert_close(targets[0], targets[1], rtol=1e-3, atol=1e-5)
