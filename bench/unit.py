"""Work units of Kimi-K2.5's width through the stage's own code, phase by phase: from a run root on
this disk to stored shards.

    python bench/unit.py --json unit.json
        on a GPU: units of 8 experts, 43,690 tokens each, the configuration for Kimi-K2.5
    python bench/unit.py --profile 25
        the kernels that take most time, too
    python bench/unit.py --set compression.refine_steps=0
        with other settings
    python bench/unit.py --experts 2 --tokens 1024 --parts 2 ...
        something smaller; a CPU takes minutes an expert

The checkpoint is that of bench/capture.py (one layer, random INT4 experts), tokens are those of
bench/solver.py: correlated, with outlier channels. Every token goes to all experts of one unit, so
that a unit sees as many slices of as many tokens as in a run, but reads parts that hold tokens of
--units units and not of 48. The range of intermediates, which capture would have seen, is assumed
(AMAX_INTERMEDIATE) and cuts some off: errors here compare runs of this script and tell nothing of
quality. Units run one by one first, then as a worker runs them: the next is fetched while one is
computed (run.prefetch_units).
"""

import argparse
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.capture import tell, write_layer
from bench.solver import make_tokens
from p48ray.checkpoint.families import describe_model
from p48ray.checkpoint.index import open_checkpoint
from p48ray.config.load import load_config
from p48ray.model.experts import RoutedInputs
from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.run.plan import SequencePart, make_plan
from p48ray.run.scales import write_layer_scales
from p48ray.stages.blobs import BlobWriter
from p48ray.stages.capture import write_activations
from p48ray.stages.gradients import write_gradients
from p48ray.stages.workplace import open_context
from p48ray.store.local import LocalStore
from p48ray.unit.compress import compress_unit
from p48ray.unit.context import StageContext

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "kimi_k25_p48_nvfp4.yaml"
AMAX_INTERMEDIATE = 8.0


def prepare_units(args: argparse.Namespace, folder: Path) -> StageContext:
    """The checkpoint, the plan, and what capture and gradients would have left of its one layer."""
    source, root = folder / "source", folder / "run"
    source.mkdir()
    num_experts = args.units * args.experts
    write_layer(source, num_experts)
    length = args.units * args.tokens // args.parts
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
    generator = torch.Generator(device=args.device).manual_seed(2)
    first_T1 = (torch.arange(length, device=args.device) % args.units * args.experts)[:, None]
    ids_TK = first_T1 + torch.arange(args.experts, device=args.device)
    with BlobWriter(context) as writer:
        for part in plan.parts:
            write_part(context, writer, part, ids_TK, generator)
    write_layer_scales(context.plan, context.store, 0)
    return context


def write_part(
    context: StageContext,
    writer: BlobWriter,
    part: SequencePart,
    ids_TK: Tensor,
    generator: torch.Generator,
) -> None:
    """What capture and gradients would have left of one part; everything from the device, as they
    do."""
    length, device = len(ids_TK), ids_TK.device
    x_TH = make_tokens(length, context.layout.hidden_size, str(device), seed=2 * part.part)
    delta_TH = 1e-4 * make_tokens(
        length, context.layout.hidden_size, str(device), seed=2 * part.part + 1
    )
    router_TK = torch.rand(ids_TK.shape, generator=generator, device=device).softmax(1)
    seen = RoutedInputs(
        x_TH,
        ids_TK,
        router_TK,
        torch.full((context.layout.num_experts,), AMAX_INTERMEDIATE, device=device),
        torch.full((1,), AMAX_INTERMEDIATE, device=device),
    )
    write_activations(context, writer, 0, part, seen, time.monotonic())
    write_gradients(context, writer, 0, part, delta_TH, time.monotonic())


def compress_all(context: StageContext, at_once: int) -> tuple[list[UnitManifest], float]:
    """All units as if nobody had done them, and the seconds that they took."""
    for key in [info.key for info in context.store.list(run_root.UNITS)]:
        context.store.delete(key)
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        manifests = list(pool.map(partial(compress_unit, context), context.plan.units))
    return manifests, time.perf_counter() - start


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    context = prepare_units(args, folder)
    is_cuda = context.device.type == "cuda"
    if is_cuda:
        compress_unit(context, context.plan.units[0])  # compiles the kernels
    alone, alone_s = compress_all(context, 1)
    together, together_s = compress_all(context, 1 + context.plan.config.run.prefetch_units)
    if args.profile:
        profile(context, args.profile)
    errors = [record.relative_output_error for manifest in alone for record in manifest.linears]
    experts = args.units * args.experts
    return {
        "device": (
            torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine()
        ),
        "torch": torch.__version__,
        "units": args.units,
        "experts": args.experts,
        "tokens": args.tokens,
        "parts": args.parts,
        "settings": args.set,
        "ms_an_expert": phases(alone, args.experts) | {"all": round(1000 * alone_s / experts, 1)},
        "ms_an_expert_ahead": (
            phases(together, args.experts) | {"all": round(1000 * together_s / experts, 1)}
        ),
        "peak_gpu_bytes": alone[-1].peak_gpu_bytes,
        "peak_gpu_bytes_ahead": {
            phase: max(m.peak_gpu_bytes[phase] for m in together)
            for phase in together[0].peak_gpu_bytes
        },
        "same_bytes": [m.sha256 for m in alone] == [m.sha256 for m in together],
        "mean_output_error": sum(errors) / len(errors),
    }


def phases(manifests: list[UnitManifest], experts: int) -> dict[str, float]:
    """Milliseconds an expert by phase: of the unit that took least in all."""
    best = min(manifests, key=lambda manifest: sum(manifest.seconds.values()))
    return {phase: round(1000 * s / experts, 1) for phase, s in best.seconds.items()}


def profile(context: StageContext, rows: int) -> None:
    """Print the operators that take most device time."""
    from torch.profiler import ProfilerActivity, profile

    context.store.delete(run_root.unit_manifest(context.plan.units[0].id))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        compress_unit(context, context.plan.units[0])
    print(
        recorded.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=70
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=43_696, help="of each expert")
    parser.add_argument("--parts", type=int, default=16)
    parser.add_argument("--units", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tell(run, args)


if __name__ == "__main__":
    main()
