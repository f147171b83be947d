"""What a run launches on a GPU, by the run's own functions, one expert: `python -m
tests.kernels.real_calls HIDDEN INTERMEDIATE`. Prints seconds."""

import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from p48ray.model.experts import ExpertWeights, RoutedCall, RoutedExperts
from p48ray.numerics.activation import quantize_activations
from p48ray.numerics.int4 import decode_int4
from p48ray.numerics.refine import InputScales, refine
from p48ray.numerics.refine_tokens import ExpertTokens
from p48ray.numerics.solution import Solution, SolverSettings
from p48ray.numerics.solvers import solve
from p48ray.numerics.token_rows import TokenRows


def moment(values_TI: Tensor) -> Tensor:
    """(1, I, I), well conditioned."""
    return (
        values_TI.mT @ values_TI / len(values_TI)
        + 0.1 * torch.eye(values_TI.shape[1], device=values_TI.device)
    )[None]


def solve_expert(hidden: int, intermediate: int) -> None:
    """One-shot, two-sided block descent and refinement."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    x_TH, h_TF = (
        torch.randn(1000, hidden, device=device),
        torch.randn(1000, intermediate, device=device),
    )
    weights = (
        torch.randn(1, 2 * intermediate, hidden, device=device) / 50,
        torch.randn(1, hidden, intermediate, device=device) / 50,
    )
    inputs, outputs = (
        (moment(x_TH), moment(h_TF)),
        (moment(torch.randn(1000, 2 * intermediate, device=device)), moment(x_TH)),
    )
    found: list[Solution] = []
    for solver in ("sparsegpt_gptq", "block_descent"):
        chosen = SolverSettings(
            solver=solver, sparsity="paired-4:8", scale_span=32, damp=0.05, sweeps=3
        )
        found = [
            solve(w, h, [1.0], chosen, output_hessian=g)
            for w, h, g in zip(weights, inputs, outputs, strict=True)
        ]
    quantized = [solution.as_quantized() for solution in found]
    tokens = [ExpertTokens(rows=TokenRows(x_TH), weight_T=torch.ones(len(x_TH), device=device))]
    refine(
        tokens,
        *weights,
        *quantized,
        outputs[1],
        InputScales(gate_up=300.0, down=300.0, group=32),
        3,
    )
    for group in (16, 32):
        quantize_activations(x_TH[:77], 300.0, group)


def stream(hidden: int, intermediate: int) -> None:
    """A mixture of four experts, up and back, and the decoding of INT4."""
    half, device = torch.bfloat16, torch.device("cuda")
    packed_OW = torch.randint(
        -(2**31), 2**31 - 1, (intermediate, hidden // 8), dtype=torch.int32, device=device
    )
    gate_FH = decode_int4(packed_OW, torch.rand(intermediate, hidden // 32, device=device).to(half))
    down_HF = torch.randn(hidden, intermediate, device=device).to(half)
    mixture = RoutedExperts(4, lambda _: ExpertWeights(gate_FH, gate_FH, down_HF))
    for dtype in (torch.float32, half):
        ids_TK = torch.rand(301, 4, device=device).argsort(1)[:, :2]
        call = RoutedCall(
            torch.randn(301, hidden, device=device).to(half),
            ids_TK,
            F.softmax(torch.randn(301, 2, device=device), 1).to(dtype),
        )
        outputs = mixture.outputs([call])
        mixture.gradients([call], outputs)


if __name__ == "__main__":
    shape = (int(sys.argv[1]), int(sys.argv[2]))
    torch.zeros(1, device="cuda")
    for work in (solve_expert, stream, solve_expert):
        start = time.monotonic()
        work(*shape)
        torch.cuda.synchronize()
        print(f"{work.__name__} of {shape}: {time.monotonic() - start:.2f} s")
