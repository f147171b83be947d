"""Time the solvers on experts of Kimi-K2.5's shapes, phase by phase, beside llmcompressor's GPTQ in
the same run; and compare output errors with float64.

    python bench/solver.py --device cuda --experts 1 8 --json solver.json
        43,690 tokens, gate+up 4096 x 7168 and down 7168 x 2048
    python bench/solver.py --hidden 512 --intermediate 256 --tokens 4000
        a small shape for a laptop
    python bench/solver.py --device cuda --experts 8 --growth 1000 5000 43690 200000

Tokens are synthetic: correlated channels and a few outlier channels, as hidden states have;
gradients likewise. The experts of a batch have weights of their own and share tokens, which changes
no time. Needs torch and jaxtyping only, so that it runs where Ray does not; llmcompressor where it
can be imported.

What counts as an expert's solver time: from activations on the device to packed codes of gate, up
and down: quantize activations, curvature, factor, loop, descent. Expert forwards and gradients are
listed apart.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p48ray.model.experts import ExpertWeights, intermediate
from p48ray.numerics import nvfp4
from p48ray.numerics.activation import input_global_scale, quantize_activations
from p48ray.numerics.block_descent import block_descent
from p48ray.numerics.curvature import SecondMoment, damp
from p48ray.numerics.factor import inverse_factor
from p48ray.numerics.output_gradients import expert_gradients
from p48ray.numerics.products import tensor_float_32
from p48ray.numerics.solution import SolverSettings
from p48ray.numerics.solver_inputs import damped_output_hessian
from p48ray.numerics.solvers import solve
from p48ray.numerics.sparsegpt import quantize_columns
from p48ray.numerics.two_sided import two_sided_descent

FLOOR_MS = 12.8  # DESIGN 8: one-shot, by arithmetic, on an H100
NUM_EXPERTS = 23_040  # Kimi-K2.5
SWEEPS = 6
# name -> (solver, two-sided, sweeps)
SOLVERS = {
    "sparsegpt_gptq": ("sparsegpt_gptq", False, 0),
    "block_descent": ("block_descent", False, SWEEPS),
    "two-sided block_descent": ("block_descent", True, SWEEPS),
}


class Linear(NamedTuple):
    """A linear of a batch of experts: weights (N, O, I), inputs (T, I) and gradients at the outputs
    (T, O)."""

    weight_NOI: Tensor
    x_TI: Tensor
    gradient_TO: Tensor


def make_tokens(num_tokens: int, hidden: int, device: str, seed: int = 0) -> Tensor:
    """(T, H): a decaying spectrum in a random basis, and one channel in 128 twenty times as
    large."""
    generator = torch.Generator(device=device).manual_seed(seed)
    rank = max(1, hidden // 4)
    basis = torch.randn(rank, hidden, generator=generator, device=device) / rank**0.5
    strength = torch.logspace(0, -2, rank, device=device) * 4
    x = (torch.randn(num_tokens, rank, generator=generator, device=device) * strength) @ basis
    x += 0.3 * torch.randn(num_tokens, hidden, generator=generator, device=device)
    x[:, ::128] *= 20
    return x


def timed(action: Callable[[], Any], device: str, repeats: int) -> tuple[Any, float]:
    """(last result, median milliseconds): CUDA events after one run to warm up, or the clock on a
    CPU."""
    result, milliseconds = None, []
    for k in range(repeats + (device == "cuda")):
        del result
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            result = action()
            last.record()
            last.synchronize()
            if k:
                milliseconds.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            result = action()
            milliseconds.append(1000 * (time.perf_counter() - start))
    return result, sorted(milliseconds)[len(milliseconds) // 2]


def moment(x: Tensor, x_scale: float = 1.0) -> Tensor:
    sums = SecondMoment.zeros(x.shape[1], x.device)
    sums.add_(x, None, x_scale=x_scale)
    return sums.mean()


def moment_in_float64(x: Tensor) -> Tensor:
    """On the same device, in pieces."""
    sums = SecondMoment.zeros(x.shape[1], x.device, torch.float64)
    for part in x.split(8192):
        sums.add_(part, None)
    return sums.mean()


def output_error(w: Tensor, q: Tensor, hessian64: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) in float64."""
    w64, d64 = w.double(), w.double() - q.double()
    return float(((d64 @ hessian64) * d64).sum() / ((w64 @ hessian64) * w64).sum())


def batched(matrix: Tensor, num_experts: int) -> Tensor:
    return matrix.expand(num_experts, *matrix.shape).contiguous()


def time_linear(
    name: str, linear: Linear, device: str, repeats: int, against_cpu: bool
) -> dict[str, Any]:
    """Milliseconds an expert of every phase and of every solver as a whole, output errors, peak
    bytes."""
    w, x = linear.weight_NOI, linear.x_TI
    n, per = len(w), [len(x) / x.shape[1]] * len(w)
    scale = input_global_scale(float(x.abs().amax()))
    ms: dict[str, float] = {}
    quantized, ms["quantize"] = timed(lambda: quantize_activations(x, scale), device, repeats)
    hessian, ms["curvature"] = timed(lambda: moment(quantized, scale), device, repeats)
    hessian64 = moment_in_float64(quantized)
    gram_error = float((hessian.double() - hessian64).norm() / hessian64.norm())
    output_hessian, ms["G"] = timed(lambda: moment(linear.gradient_TO), device, repeats)
    h, g = batched(hessian, n), batched(output_hessian, n)
    factor, factor_ms = timed(lambda: inverse_factor(h, 0.1), device, repeats)
    ms["factor"] = factor_ms / n
    divisor = nvfp4.global_scale_from_amax(w.abs().amax((1, 2)))
    codes, loop_ms = timed(
        lambda: quantize_columns(w, factor.upper_NII, divisor, span=32, keep=None, sparsity=True),
        device,
        repeats,
    )
    ms["loop"] = loop_ms / n
    start, damped = nvfp4.dequantize(codes.codes, codes.scale, divisor), damp(h, 0.1)
    keep = codes.keep
    _, one_sided_ms = timed(lambda: block_descent(w, start, keep, damped, SWEEPS), device, repeats)
    damped_g = damped_output_hessian(g, per, w.shape[2], None)
    _, two_sided_ms = timed(
        lambda: two_sided_descent(w, start, keep, damped, damped_g, SWEEPS), device, repeats
    )
    ms[f"descent, {SWEEPS} sweeps"], ms[f"two-sided, {SWEEPS} sweeps"] = (
        one_sided_ms / n,
        two_sided_ms / n,
    )
    solvers = {}
    for label, (solver, is_two_sided, sweeps) in SOLVERS.items():
        settings = SolverSettings(
            solver=solver, sparsity="paired-4:8", scale_span=32, damp=0.1, sweeps=sweeps
        )

        def work(
            w: Tensor,
            h: Tensor,
            g: Tensor,
            settings: SolverSettings = settings,
            both: bool = is_two_sided,
        ) -> Any:
            return solve(w, h, per, settings, output_hessian=g if both else None)

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        solution, whole_ms = timed(partial(work, w, h, g), device, repeats)
        row = {
            "solve_ms": whole_ms / n,
            "output_error": output_error(w[0], solution.values_NOI[0], hessian64),
            "outcome": solution.outcome[0],
            "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }
        if against_cpu and not is_two_sided:
            w1, h1 = w[:1].cpu(), hessian64.float().cpu()[None]
            reference, cpu_ms = timed(partial(solve, w1, h1, per[:1], settings), "cpu", 1)
            row["cpu_solve_ms"] = cpu_ms
            row["cpu_output_error"] = output_error(
                w[0], reference.values_NOI[0].to(w.device), hessian64
            )
            row["codes_that_differ"] = float(
                (reference.packed_NOB[0] != solution.packed_NOB[0].cpu()).float().mean()
            )
        solvers[label] = row
        del solution
    result = {"linear": name, "hessian_relative_error": gram_error, "ms": ms, "solvers": solvers}
    print(json.dumps(result), flush=True)
    return result


def time_forwards(
    x: Tensor, gate_up: Tensor, down: Tensor, device: str, repeats: int
) -> dict[str, float]:
    """What surrounds the solver for one expert: the intermediate, and the gradients at all
    outputs."""
    gate, up = gate_up.chunk(2)
    weights = ExpertWeights(gate, up, down)
    delta, router = x.flip(0), torch.ones(len(x), device=x.device)
    with tensor_float_32():
        _, forward = timed(lambda: intermediate(x, weights), device, repeats)
        _, backward = timed(lambda: expert_gradients(x, delta, router, *weights), device, repeats)
    return {"intermediate": forward, "gradients": backward}


def time_peer(gate_up: Linear, down: Linear, device: str, repeats: int) -> dict[str, Any]:
    """llmcompressor's GPTQ to NVFP4, without sparsity: a Hessian for each of gate, up and down;
    gate and up of the batch together. Milliseconds an expert."""
    try:
        from compressed_tensors.quantization.quant_scheme import NVFP4
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
        from llmcompressor.modifiers.gptq.helpers import accumulate_hessian
        from llmcompressor.version import version
    except ImportError as error:
        return {"missing": str(error)}
    totals = {"curvature": 0.0, "factor and loop": 0.0}
    errors = {}
    for name, linear, times in (("gate_up", gate_up, 2), ("down", down, 1)):
        n, size = len(linear.weight_NOI), linear.x_TI.shape[1]
        module = torch.nn.Linear(size, 8, bias=False, device=device)

        def gram(
            x: Tensor = linear.x_TI, module: torch.nn.Linear = module, size: int = size
        ) -> Tensor:
            count = torch.zeros((), device=x.device)
            return accumulate_hessian(x, module, torch.zeros(size, size, device=x.device), count)[
                0
            ] / len(x)

        hessian, gram_ms = timed(gram, device, repeats)
        w = linear.weight_NOI.unflatten(1, (times, -1)).flatten(0, 1)
        divisor = nvfp4.global_scale_from_amax(w.abs().amax((1, 2)))
        scale = nvfp4.choose_scales(w, divisor, 16, search=False).float()

        def run(
            w: Tensor = w, h: Tensor = hessian, s: Tensor = scale, d: Tensor = divisor
        ) -> Tensor:
            zero_points, arguments = torch.zeros_like(s), NVFP4["weights"]
            return quantize_weight(
                w.clone(), batched(h, len(w)), s, zero_points, d[:, None], arguments
            )[0]

        values, loop_ms = timed(run, device, repeats)
        totals["curvature"] += times * gram_ms
        totals["factor and loop"] += loop_ms / n
        errors[name] = output_error(w[0], values[0], hessian.double())
    return {
        "version": version,
        "ms": totals,
        "total_ms": sum(totals.values()),
        "output_error": errors,
    }


def total_ms(linears: list[dict[str, Any]], solver: str) -> float:
    """An expert from activations on the device to packed codes."""
    phases = ("quantize", "curvature", "G") if SOLVERS[solver][1] else ("quantize", "curvature")
    return sum(r["solvers"][solver]["solve_ms"] + sum(r["ms"][p] for p in phases) for r in linears)


def run_batch(num_tokens: int, num_experts: int, args: argparse.Namespace) -> dict[str, Any]:
    """All of one size of batch."""
    device, hidden, size = args.device, args.hidden, args.intermediate
    x = make_tokens(num_tokens, hidden, device)
    generator = torch.Generator(device=device).manual_seed(1)
    gate_up = (
        torch.randn(num_experts, 2 * size, hidden, generator=generator, device=device) / hidden**0.5
    )
    down = torch.randn(num_experts, hidden, size, generator=generator, device=device) / size**0.5
    gate, up = (x @ gate_up[0].T).chunk(2, -1)
    outer = Linear(gate_up, x, make_tokens(num_tokens, 2 * size, device, 2))
    rows = [time_linear("gate_up", outer, device, args.repeats, args.against_cpu)]
    inner = Linear(down, F.silu(gate) * up, make_tokens(num_tokens, hidden, device, 3))
    del gate, up
    rows.append(time_linear("down", inner, device, args.repeats, args.against_cpu))
    outer, inner = replace_gradients(outer), replace_gradients(inner)
    return {
        "tokens": num_tokens,
        "experts": num_experts,
        "linears": rows,
        "forwards_ms": time_forwards(x, gate_up[0], down[0], device, args.repeats),
        "total_ms": {solver: total_ms(rows, solver) for solver in SOLVERS},
        "peer": time_peer(outer, inner, device, args.repeats),
    }


def replace_gradients(linear: Linear) -> Linear:
    """Without the gradients, which the peer does not use."""
    return linear._replace(gradient_TO=linear.x_TI[:0])


def print_table(machine: str, batch: dict[str, Any]) -> None:
    print(
        f"\n{machine}, {batch['tokens']} tokens an expert, {batch['experts']} experts at a time;"
        " milliseconds an expert"
    )
    print("| phase | gate+up | down |\n|---|---|---|")
    gate_up, down = batch["linears"]
    for phase in gate_up["ms"]:
        print(f"| {phase} | {gate_up['ms'][phase]:.2f} | {down['ms'][phase]:.2f} |")
    for solver in SOLVERS:
        print(
            f"| solve, {solver} | {gate_up['solvers'][solver]['solve_ms']:.1f} |"
            f" {down['solvers'][solver]['solve_ms']:.1f} |"
        )
    print(
        f"| expert forward, gradients (whole expert) | {batch['forwards_ms']['intermediate']:.1f} |"
        f" {batch['forwards_ms']['gradients']:.1f} |"
    )
    peer = batch["peer"].get("total_ms")
    print(
        "| solver | total, ms | x floor | peer / ours | Kimi-K2.5, GPU-hours | peak GB | error"
        " gate+up | error down |\n|---|---|---|---|---|---|---|---|"
    )
    for solver, total in batch["total_ms"].items():
        ratio = f"{peer / total:.1f}" if peer else "-"
        peak = max(r["solvers"][solver]["peak_bytes"] or 0 for r in batch["linears"]) / 1e9
        errors = " | ".join(f"{r['solvers'][solver]['output_error']:.5f}" for r in batch["linears"])
        print(
            f"| {solver} | {total:.1f} | {total / FLOOR_MS:.1f} | {ratio} |"
            f" {total * NUM_EXPERTS / 3.6e6:.2f} | {peak:.1f} | {errors} |"
        )
    print(f"peer: {json.dumps(batch['peer'])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=43690)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument(
        "--experts",
        type=int,
        nargs="+",
        default=[1],
        help="experts solved at a time; one table for each number",
    )
    parser.add_argument(
        "--growth",
        type=int,
        nargs="*",
        default=[],
        help="tokens an expert: a total for each number, at the last --experts",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--against-cpu", action="store_true", help="solve one expert on the CPU too and compare"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    batches = []
    for tokens, experts in [(args.tokens, n) for n in args.experts] + [
        (t, args.experts[-1]) for t in args.growth
    ]:
        batches.append(run_batch(tokens, experts, args))
        print_table(machine, batches[-1])
    report = {
        "machine": machine,
        "torch": torch.__version__,
        "hidden": args.hidden,
        "intermediate": args.intermediate,
        "batches": batches,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
