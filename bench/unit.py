"""One work unit of Kimi-K2.5's width through the stage's own code, phase by phase: from a run root on this disk to a stored shard.

    python bench/unit.py --json unit.json                              on a GPU: 8 experts, 43,690 tokens each, the configuration for Kimi-K2.5
    python bench/unit.py --profile 25                                  the kernels that take most time, too
    python bench/unit.py --set compression.refine_steps=0              with other settings
    python bench/unit.py --experts 2 --tokens 1024 --parts 2 ...       something smaller; a CPU takes minutes an expert

The checkpoint is that of bench/capture.py (one layer, random INT4 experts), tokens are those of bench/solver.py: correlated, with outlier channels. Every
token goes to all experts of the unit, so that a unit sees as many slices of as many tokens as in a run, but reads parts that hold no other experts' tokens:
1/48 of a run's bytes.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.capture import peak_bytes, write_layer
from bench.solver import make_tokens
from p48ray import run_root
from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import open_checkpoint
from p48ray.config import load_config
from p48ray.manifest import UnitManifest
from p48ray.model.experts import RoutedInputs
from p48ray.plan import make_plan
from p48ray.stages.capture import finish_layer, write_activations
from p48ray.stages.compress import compress_unit
from p48ray.stages.context import StageContext
from p48ray.stages.gradients import write_gradients
from p48ray.stages.tasks import open_context
from p48ray.store.local import LocalStore

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "kimi_k25_p48_nvfp4.yaml"
AMAX_INTERMEDIATE = 8.0


def prepare_unit(args: argparse.Namespace, folder: Path) -> StageContext:
    """The checkpoint, the plan, and what capture and gradients would have left of its one layer."""
    source, root = folder / "source", folder / "run"
    source.mkdir()
    write_layer(source, args.experts)
    length = args.tokens // args.parts
    settings = [
        f"source.checkpoint={source}",
        f"calibration.num_sequences={args.parts}",
        f"calibration.sequence_length={length}",
        "calibration.sequences_per_part=1",
        f"run.experts_per_unit={args.experts}",
        f"run.gpus_per_worker={1.0 if args.device == 'cuda' else 0.0}",
        *args.set,
    ]
    config = load_config(CONFIG, tuple(settings), str(root))
    index = open_checkpoint(LocalStore(source))
    layout = describe_model(index)
    plan = make_plan(config, index, layout, "none", "none")
    context = open_context(plan, LocalStore(root))
    tokens = make_tokens(length * args.parts, layout.hidden_size, args.device)
    gradients = 1e-4 * make_tokens(length * args.parts, layout.hidden_size, args.device, seed=1)
    generator = torch.Generator(device=args.device).manual_seed(2)
    for part, x_TH, delta_TH in zip(plan.parts, tokens.split(length), gradients.split(length), strict=True):
        ids_TK = torch.arange(args.experts, device=args.device).expand(length, args.experts)
        router_TK = torch.rand(length, args.experts, generator=generator, device=args.device).softmax(1)
        amax = torch.tensor(AMAX_INTERMEDIATE)
        write_activations(context, 0, part, RoutedInputs(x_TH.cpu(), ids_TK.cpu(), router_TK.cpu(), amax), time.monotonic())
        write_gradients(context, 0, part, delta_TH.cpu(), time.monotonic())
    finish_layer(context, 0)
    return context


def compress_again(context: StageContext) -> UnitManifest:
    """The unit as if nobody had done it."""
    unit = context.plan.units[0]
    for key in [info.key for info in context.store.list(run_root.UNITS)]:
        context.store.delete(key)
    return compress_unit(context, unit)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    context = prepare_unit(args, folder)
    is_cuda = context.device.type == "cuda"
    if is_cuda:
        compress_again(context)  # compiles the kernels
        torch.cuda.reset_peak_memory_stats()
    found, seconds = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        found.append(compress_again(context))
        seconds.append(time.perf_counter() - start)
    best = min(range(args.repeats), key=seconds.__getitem__)
    per_expert = {phase: round(1000 * s / args.experts, 2) for phase, s in found[best].seconds.items()}
    peak = peak_bytes(context.device)
    if args.profile:
        profile(context, args.profile)
    errors = [record.relative_output_error for record in found[best].linears]
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "experts": args.experts,
        "tokens": args.tokens,
        "parts": args.parts,
        "settings": args.set,
        "unit_s": [round(s, 3) for s in seconds],
        "ms_an_expert": per_expert | {"all": round(1000 * seconds[best] / args.experts, 2)},
        "peak_bytes": peak,
        "sha256": sorted({m.sha256[:16] for m in found}),
        "mean_output_error": sum(errors) / len(errors),
    }


def profile(context: StageContext, rows: int) -> None:
    """Print the operators that take most device time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        compress_again(context)
    print(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=43_696, help="of each expert")
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="p48ray-bench-") as folder:
        facts = run(args, Path(folder))
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
