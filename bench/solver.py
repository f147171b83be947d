"""Time the solvers on one expert of Kimi-K2.5's shapes, and compare what a device computes with float64 and with the CPU.

    python bench/solver.py --device cuda --json solver.json            43,690 tokens, gate+up 4096 x 7168 and down 7168 x 2048
    python bench/solver.py --hidden 512 --intermediate 256 --tokens 4000      a small shape for a laptop

Tokens are synthetic: correlated channels and a few outlier channels, as hidden states have. Needs torch and jaxtyping only, so that it runs where Ray does not.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p48ray.numerics.activation import input_global_scale, quantize_activations
from p48ray.numerics.curvature import SecondMoment
from p48ray.numerics.solvers import Solution, SolverSettings, solve

SOLVERS = {"round_to_nearest": 0, "sparsegpt_gptq": 0, "block_descent": 6}  # name -> sweeps


def make_tokens(num_tokens: int, hidden: int, device: str) -> Tensor:
    """(T, H): a decaying spectrum in a random basis, and one channel in 128 twenty times as large."""
    generator = torch.Generator(device=device).manual_seed(0)
    rank = hidden // 4
    basis = torch.randn(rank, hidden, generator=generator, device=device) / rank**0.5
    strength = torch.logspace(0, -2, rank, device=device) * 4
    x = (torch.randn(num_tokens, rank, generator=generator, device=device) * strength) @ basis
    x += 0.3 * torch.randn(num_tokens, hidden, generator=generator, device=device)
    x[:, ::128] *= 20
    return x


def timed(action: Callable[[], Any], device: str, repeats: int) -> tuple[Any, float]:
    """(last result, median seconds)."""
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = action()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return result, sorted(seconds)[len(seconds) // 2]


def moment(x: Tensor, dtype: torch.dtype = torch.float32) -> SecondMoment:
    sums = SecondMoment.zeros(x.shape[1], x.device, dtype)
    sums.add_(x, None)
    return sums


def output_error(w: Tensor, q: Tensor, hessian64: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) in float64 on the CPU."""
    w64 = w.double().cpu()
    d64 = w64 - q.double().cpu()
    return float(((d64 @ hessian64) * d64).sum() / ((w64 @ hessian64) * w64).sum())


def run_linear(name: str, weight: Tensor, x: Tensor, device: str, repeats: int, on_cpu: bool) -> list[dict[str, Any]]:
    """All solvers on one linear: seconds, and the output error under the float64 Hessian of the same quantized inputs."""
    scale = input_global_scale(float(x.abs().amax()))
    quantized, quantize_s = timed(lambda: quantize_activations(x, scale), device, repeats)
    sums, moment_s = timed(lambda: moment(quantized), device, repeats)
    hessian64 = moment(quantized.cpu(), torch.float64).mean()
    hessian_error = float((sums.mean().double().cpu() - hessian64).norm() / hessian64.norm())
    rows = []
    for solver, sweeps in SOLVERS.items():
        settings = SolverSettings(solver=solver, sparsity="paired-4:8", scale_span=32, damp=None, sweeps=sweeps)
        tokens_per_input = [len(x) / x.shape[1]]

        def work(w: Tensor, h: Tensor, settings: SolverSettings = settings, per: list[float] = tokens_per_input) -> Solution:
            return solve(w[None], h[None], per, settings)

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        solution, seconds = timed(lambda: work(weight, sums.mean()), device, repeats)
        row = {
            "linear": name,
            "solver": solver,
            "solve_s": seconds,
            "quantize_s": quantize_s,
            "moment_s": moment_s,
            "hessian_relative_error": hessian_error,
            "output_error": output_error(weight, solution.values_NOI[0], hessian64),
            "outcome": solution.outcome[0],
            "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }
        if on_cpu:
            reference, row["cpu_solve_s"] = timed(lambda: work(weight.cpu(), hessian64.float()), "cpu", 1)
            row["cpu_output_error"] = output_error(weight, reference.values_NOI[0], hessian64)
            row["codes_that_differ"] = float((reference.packed_NOB != solution.packed_NOB.cpu()).float().mean())
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=43690)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--against-cpu", action="store_true", help="solve on the CPU too and compare")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    x = make_tokens(args.tokens, args.hidden, args.device)
    generator = torch.Generator(device=args.device).manual_seed(1)
    gate_up = torch.randn(2 * args.intermediate, args.hidden, generator=generator, device=args.device) / args.hidden**0.5
    down = torch.randn(args.hidden, args.intermediate, generator=generator, device=args.device) / args.intermediate**0.5
    gate, up = (x @ gate_up.T).chunk(2, -1)
    h = F.silu(gate) * up
    rows = run_linear("gate_up", gate_up, x, args.device, args.repeats, args.against_cpu)
    rows += run_linear("down", down, h, args.device, args.repeats, args.against_cpu)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    report = {"machine": machine, "torch": torch.__version__, "tokens": args.tokens, "hidden": args.hidden, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    for solver in SOLVERS:
        own = [r for r in rows if r["solver"] == solver]
        total = sum(r["quantize_s"] + r["moment_s"] + r["solve_s"] for r in own)
        print(f"{machine}: {solver}: {total:.3f} s an expert (quantize, moments, solve; expert forwards apart)")


if __name__ == "__main__":
    main()
