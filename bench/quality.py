"""Every solver on one model, with the same calibration and held-out text: perplexity, token accuracy, KL, errors, ratios to the one-shot baseline.

    python bench/quality.py --out runs/quality                                 all calibration sequences of configs/tiny.yaml's text that the lab used
    python bench/quality.py --out runs/quality --sequences 6 12 24 100 384     3, 6, 12, 50 and about 190 tokens per input of gate and up, on the small model
    python bench/quality.py --out runs/quality --solvers one_shot refined --seeds 0 1 2

Each row is a whole job under --out, so an interrupted table is resumed by the same command. Views of one checkpoint: W4A4 in groups of 16 (as served), in
groups of 32 (the sparse kernels'), and with original activations (as published tables have it).
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from p48ray.config import load_config
from p48ray.report.report import Report
from p48ray.runner.console import configure_logging
from p48ray.runner.pipeline import run_job
from p48ray.runner.ray_runner import RayRunner
from p48ray.stages.prepare import prepare

BASE = {"output_curvature": "false", "refine_steps": "0", "code_sweeps": "0"}
ONE_SHOT = {"solver": "sparsegpt_gptq", "router_weight_exponent": "0", "damp": "0.1"}
TWO_SIDED = {"output_curvature": "true"}
SOLVERS: dict[str, dict[str, str]] = {
    "one_shot": ONE_SHOT,
    "one_shot_a16": ONE_SHOT | {"activation_quantization": "false"},
    "dense_fp4": {"solver": "gptq", "sparsity": "none"},
    "rounded": {"solver": "round_to_nearest"},
    "descent": {},
    "two_sided": TWO_SIDED,
    "two_sided_codes": TWO_SIDED | {"code_sweeps": "2"},
    "refined": TWO_SIDED | {"sweeps": "12", "refine_steps": "600"},
}
VIEWS = {"W4A4/16": (), "W4A4/32": ("evaluation.activation_group=32",), "W4A16": ("evaluation.activations=original",)}


def run(config: Path, root: Path, settings: dict[str, str], sequences: int, seed: int, view: tuple[str, ...]) -> Report:
    """One job, or what is missing of it."""
    compression = ", ".join(f"{key}: {value}" for key, value in (BASE | settings).items())
    overrides = (f"compression={{{compression}}}", f"calibration.num_sequences={sequences}", f"calibration.seed={seed}", *view)
    prepared = prepare(load_config(config, overrides, str(root)))
    return run_job(prepared, lambda plan, uri: RayRunner(plan, uri, os.environ.get("RAY_ADDRESS")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, nargs="+", default=[384])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    args = parser.parse_args()
    configure_logging()
    rows = []
    for sequences in args.sequences:
        for seed in args.seeds:
            for solver in args.solvers:
                root = args.out / f"{sequences}-{seed}-{solver}"
                for view, overrides in VIEWS.items():
                    report = run(args.config, root, SOLVERS[solver], sequences, seed, overrides)
                    rows.append({"sequences": sequences, "seed": seed, "solver": solver, "view": view, **row(report)})
    machine = platform.processor() or platform.machine()
    (args.out / "quality.json").write_text(json.dumps({"machine": machine, "cores": os.cpu_count(), "rows": rows}, indent=1))
    print_table(rows, Console(width=150))


def row(report: Report) -> dict[str, object]:
    assert report.quality is not None
    return report.quality.model_dump() | {
        "worst_output_error": {name: errors.worst for name, errors in report.relative_output_error.items()},
        "unit_seconds": sum(report.unit_seconds.values()),
    }


def print_table(rows: list[dict], console: Console) -> None:
    """KL and perplexity per solver and view, with the ratio to the one-shot baseline of the same sequences, seed and view."""
    base = {(r["sequences"], r["seed"], r["view"]): r["kl"] for r in rows if r["solver"] == "one_shot"}
    table = Table(
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
        "unit seconds",
    )
    for r in rows:
        reference = base.get((r["sequences"], r["seed"], r["view"]))
        ratio = f"{r['kl'] / reference:.3f}" if reference else ""
        worst = [f"{value:.3f}" for value in r["worst_output_error"].values()]
        quality = [f"{r['compressed_perplexity']:.4f}", f"{r['compressed_accuracy']:.4f}", f"{r['kl']:.4f}", ratio]
        table.add_row(str(r["sequences"]), str(r["seed"]), r["solver"], r["view"], *quality, *worst, f"{r['unit_seconds']:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
