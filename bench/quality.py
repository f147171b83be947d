"""Every solver on one model, with the same calibration and held-out text: perplexity, token
accuracy, KL, errors, ratios to the one-shot baseline.

    python bench/quality.py --out runs/quality
        all calibration sequences of configs/tiny.yaml's text
    python bench/quality.py --out runs/quality --sequences 6 12 24 100 384
        3, 6, 12, 50 and about 190 tokens per input of gate and up, on the small model
    python bench/quality.py --out runs/quality --solvers one_shot default --seeds 0 1 2
    python bench/quality.py --out runs/quality --local --set run.gpus_per_worker=1
        in this process, on its GPU, without Ray

Each row is a whole job under --out, so an interrupted table is resumed by the same command. Views
of one checkpoint: W4A4 in groups of 16 (as served), in groups of 32 (the sparse kernels'), and with
original activations (W4A16, as published tables have it). The error ladder's first rung, sparsity
alone, has no checkpoint: its values are evaluated in memory.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p48ray.config import RunConfig
from p48ray.config.load import load_config
from p48ray.model.experts import ExpertWeights
from p48ray.numerics.solvers import sparse_values
from p48ray.report.report import Report
from p48ray.run.plan import WorkUnit, cut_parts
from p48ray.runner.console import configure_logging
from p48ray.runner.pipeline import run_job
from p48ray.stages.evaluate import (
    EvaluationResult,
    combine_parts,
    evaluate_part,
    evaluation_digest,
    held_out_sequences,
)
from p48ray.stages.prepare import prepare
from p48ray.stages.workplace import open_context
from p48ray.unit.compress import decode_originals, fetch_unit, solver_arguments
from p48ray.unit.context import StageContext
from p48ray.unit.moments import down_curvature, gate_up_curvature, output_side

PLAIN = {"output_curvature": "false", "refine_steps": "0", "sweeps": "6"}
ONE_SHOT = PLAIN | {"solver": "sparsegpt_gptq", "router_weight_exponent": "0", "damp": "0.1"}
TWO_SIDED = PLAIN | {"output_curvature": "true"}
ORIGINAL_ACTIVATIONS = {"activation_quantization": "false"}
SOLVERS: dict[str, dict[str, str]] = {
    "one_shot": ONE_SHOT,
    "one_shot_a16": ONE_SHOT | ORIGINAL_ACTIVATIONS,
    "dense_fp4": PLAIN | {"solver": "gptq", "sparsity": "none"},
    "rounded": PLAIN | {"solver": "round_to_nearest"},
    "descent": PLAIN,
    "two_sided": TWO_SIDED,
    "two_sided_codes": TWO_SIDED | {"code_sweeps": "2"},
    "default": {"output_curvature": "true", "sweeps": "12", "refine_steps": "300"},
    "refined_600": {"output_curvature": "true", "sweeps": "12", "refine_steps": "600"},
}
VIEWS = {
    "W4A4/16": (),
    "W4A4/32": ("evaluation.activation_group=32",),
    "W4A16": ("evaluation.activations=original",),
}
SPARSE_ONLY = "sparse only"  # view of the solvers in LADDER
LADDER = ("one_shot", "one_shot_a16", "two_sided")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, nargs="+", default=[384])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument(
        "--local", action="store_true", help="in this process instead of on Ray's workers"
    )
    args = parser.parse_args()
    configure_logging()
    rows = [
        row
        for n in args.sequences
        for seed in args.seeds
        for solver in args.solvers
        for row in measure(args, solver, n, seed)
    ]
    machine = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    (args.out / "quality.json").write_text(
        json.dumps({"machine": machine, "cores": os.cpu_count(), "rows": rows}, indent=1)
    )
    print_table(rows, Console(width=160))


def measure(
    args: argparse.Namespace, solver: str, sequences: int, seed: int
) -> list[dict[str, Any]]:
    """All views of one solver's checkpoint."""
    rows = []
    names = {"sequences": sequences, "seed": seed, "solver": solver}
    root = args.out / f"{sequences}-{seed}-{solver}"
    compression = [f"compression.{key}={value}" for key, value in SOLVERS[solver].items()]
    shared = (
        *compression,
        f"calibration.num_sequences={sequences}",
        f"calibration.seed={seed}",
        *args.overrides,
    )
    for view, overrides in VIEWS.items():
        start = time.monotonic()
        config = load_config(args.config, (*shared, *overrides), str(root))
        rows.append(names | {"view": view} | describe(run(config, args.local)))
        print(
            f"{sequences} {seed} {solver} {view}: KL {rows[-1]['kl']:.4f} in"
            f" {time.monotonic() - start:.0f} s",
            flush=True,
        )
    if solver in LADDER:
        config = load_config(args.config, (*shared, *VIEWS["W4A16"]), str(root))
        rows.append(
            names
            | {"view": SPARSE_ONLY}
            | sparsity_alone(config).model_dump()
            | {"worst_output_error": {}, "unit_seconds": 0.0}
        )
    return rows


def run(config: RunConfig, is_local: bool) -> Report:
    """One job, or what is missing of it."""
    if is_local:
        from contextlib import nullcontext

        from p48ray.runner.local_runner import LocalRunner

        return run_job(prepare(config), lambda plan, uri: nullcontext(LocalRunner(plan, uri)))
    from p48ray.runner.ray_runner import RayRunner

    return run_job(
        prepare(config), lambda plan, uri: RayRunner(plan, uri, os.environ.get("RAY_ADDRESS"))
    )


def describe(report: Report) -> dict[str, Any]:
    assert report.quality is not None
    return report.quality.model_dump() | {
        "worst_output_error": {
            name: errors.worst for name, errors in report.relative_output_error.items()
        },
        "unit_seconds": sum(report.unit_seconds.values()),
    }


@torch.no_grad()
def sparsity_alone(config: RunConfig) -> EvaluationResult:
    """A finished run's solver once more on its captured tokens, stopped before quantization;
    original activations in the evaluation."""
    prepared = prepare(config)
    plan, settings = prepared.plan, prepared.plan.config.evaluation
    assert settings is not None
    context = open_context(plan, prepared.store)
    experts: dict[tuple[int, int], ExpertWeights] = {}
    for unit in plan.units:
        experts |= {
            (unit.layer, expert): w
            for expert, w in zip(unit.experts, sparse_unit(context, unit), strict=True)
        }
    ids_NS, documents_N = held_out_sequences(context, evaluation_digest(plan, settings))
    sums = []
    for part in cut_parts(settings.num_sequences, settings.sequences_per_part):
        rows = slice(part.first_sequence, part.first_sequence + part.num_sequences)
        sums.append(
            evaluate_part(
                context,
                lambda layer, expert: experts[layer, expert],
                ids_NS[rows],
                documents_N[rows],
                part,
            )
        )
    return combine_parts(sums)


def sparse_unit(context: StageContext, unit: WorkUnit) -> list[ExpertWeights]:
    """As unit.compress, gate and up first, then down on what they leave."""
    fetched = fetch_unit(context, unit)
    gate_up_NOI, down_NOI = decode_originals(context, unit, fetched)
    originals = split_weights(gate_up_NOI, down_NOI)
    tokens = fetched.tokens
    side = output_side(tokens, originals)
    sparse_NOI = sparse_values(
        *solver_arguments(context, gate_up_NOI, gate_up_curvature(tokens, side)[0])
    )
    intermediates = down_curvature(tokens, side, originals, sparse_NOI)[0]
    down_NHF = sparse_values(*solver_arguments(context, down_NOI, intermediates))
    return split_weights(sparse_NOI, down_NHF)


def split_weights(gate_up_NZH: Tensor, down_NHF: Tensor) -> list[ExpertWeights]:
    gates_and_ups = (w_ZH.chunk(2) for w_ZH in gate_up_NZH)
    return [
        ExpertWeights(gate, up, down)
        for (gate, up), down in zip(gates_and_ups, down_NHF, strict=True)
    ]


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """KL and perplexity per solver and view, with the ratio to the one-shot baseline (W4A4/16) of
    the same sequences and seed."""
    base = {
        (r["sequences"], r["seed"]): r["kl"]
        for r in rows
        if r["solver"] == "one_shot" and r["view"] == "W4A4/16"
    }
    columns = (
        "sequences",
        "seed",
        "solver",
        "view",
        "perplexity",
        "accuracy",
        "KL",
        "ratio",
        "worst gate",
        "worst up",
        "worst down",
        "unit s",
    )
    table = Table(*columns)
    for r in rows:
        reference = base.get((r["sequences"], r["seed"]))
        ratio = f"{r['kl'] / reference:.3f}" if reference else ""
        worst = [f"{value:.3f}" for value in r["worst_output_error"].values()] or ["", "", ""]
        quality = [
            f"{r['compressed_perplexity']:.4f}",
            f"{r['compressed_accuracy']:.4f}",
            f"{r['kl']:.4f}",
            ratio,
        ]
        table.add_row(
            str(r["sequences"]),
            str(r["seed"]),
            r["solver"],
            r["view"],
            *quality,
            *worst,
            f"{r['unit_seconds']:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
