"""The whole job on a checkpoint of Kimi-K2.5's width: jobs/compress.py with Ray, as processes of
its own, and where its time goes.

    python bench/job.py --json job.json
        on a GPU: 48 experts, 2 mixtures, 64 sequences of 4096
    python bench/job.py --width small --device cpu
        the same stages on a CPU within a minute or two
    python bench/job.py --folder D --keep-source --tree OTHER
        another checkout's job on the same checkpoint
    python bench/job.py --kill worker --kill-in compress
        with a process killed, and the same command again
    python bench/job.py --limit 500
        ended after so many seconds, with a report of what there is

Settings are those of configs/kimi_k25_p48_nvfp4.yaml, with a random checkpoint
(bench/wide_checkpoint.py), the small model's texts, and a short evaluation; --set replaces any.
Stages' times come from spans (p48ray.trace), the rest from manifests and from samples taken outside
(bench/job_watch.py). `digest` is over all units' shards: equal digests, equal bytes. Exit code 0 if
the job's last one is 0.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.job_report import Interval, actual_figures, compare, describe_job, plan_figures
from bench.job_tables import print_facts
from bench.job_watch import Watch, workers
from bench.wide_checkpoint import TINY, WIDTHS, write_texts
from p48ray.config.load import load_config
from p48ray.trace import TRACE_VARIABLE

HERE = Path(__file__).resolve().parents[1]
CONFIG = Path("configs") / "kimi_k25_p48_nvfp4.yaml"
SIZES = {"kimi": (48, 2, 64, 4096), "small": (16, 2, 32, 256)}
"""experts, mixture layers, sequences, length"""
SMALL = (
    "calibration.compute_dtype=float32",
    "calibration.sequences_per_part=8",
    "compression.sweeps=2",
    "compression.refine_steps=4",
    "output.max_shard_size=1MB",
    "run.experts_per_unit=4",
)
UNDER_WAY = {
    "capture": "activations/*/part-*.json",
    "gradients": "gradients/*/part-*.json",
    "compress": "units/*/manifest.json",
}
TOP_K = 8
PAUSE_S = 0.02
# how long workers may take to end by themselves when their driver is gone; Ray's agents would take
# half a minute
ORPHANS_S = 5.0
LOG_LINES = 40


def make_source(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(checkpoint, texts), written unless they are there and --keep-source says to use them.
    Raises: SystemExit if others are there."""
    checkpoint, texts, mark = folder / "checkpoint", folder / "texts.jsonl", folder / "made.json"
    wanted = {
        name: getattr(args, name)
        for name in ("width", "experts", "mixture_layers", "sequences", "length")
    }
    if args.keep_source and mark.exists():
        found = json.loads(mark.read_text())
        if found != wanted:
            raise SystemExit(
                f"{folder}: expected a source of {wanted}, found one of {found}; name another"
                " folder or delete it"
            )
        return checkpoint, texts
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = [
        "--width",
        args.width,
        "--experts",
        str(args.experts),
        "--mixture-layers",
        str(args.mixture_layers),
    ]
    writer = [
        sys.executable,
        str(HERE / "bench" / "wide_checkpoint.py"),
        str(checkpoint),
        *sizes,
        "--device",
        args.device,
    ]
    subprocess.run(writer, check=True)  # a process of its own: its GPU memory goes with it
    write_texts(texts, args.sequences * args.length)
    mark.write_text(json.dumps(wanted))
    return checkpoint, texts


def job_settings(args: argparse.Namespace, checkpoint: Path, texts: Path) -> list[str]:
    """What is replaced of the configuration, --set last."""
    gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    held_out, length = TINY / "heldout.jsonl", min(args.length, 512)
    return [
        f"source.checkpoint={checkpoint}",
        "source.trust_remote_code=false",
        f"calibration.documents={texts}",
        f"calibration.num_sequences={args.sequences}",
        f"calibration.sequence_length={args.length}",
        *(SMALL if args.width == "small" else ()),
        (
            f"evaluation={{documents: {held_out}, num_sequences: 8, sequence_length: {length},"
            " sequences_per_part: 4}"
        ),
        # few layers: else all would be one segment, without a forward pass
        "run.boundary_every=2",
        f"run.num_workers={args.workers}",
        f"run.capture_workers={args.workers}",
        f"run.gpus_per_worker={min(1.0, gpus / args.workers):g}",
        f"run.threads_per_worker={max(1, min(8, (os.cpu_count() or 1) // args.workers))}",
        *args.set,
    ]


def start_job(
    args: argparse.Namespace, root: Path, trace: Path, settings: list[str], log: Path
) -> subprocess.Popen[bytes]:
    """The job's command in the chosen checkout, as a process (and a session) of its own."""
    path = os.pathsep.join([str(args.tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {
        "PYTHONPATH": path,
        TRACE_VARIABLE: str(trace),
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | own
    command = [sys.executable, "jobs/compress.py", "--config", str(CONFIG), "--run-root", str(root)]
    command += [word for setting in settings for word in ("--set", setting)]
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=args.tree,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def strike(
    process: subprocess.Popen[bytes], root: Path, what: str, stage: str, deadline: float
) -> dict[str, Any] | None:
    """SIGKILL to the driver or to one busy worker, as soon as a stage has finished a first piece of
    its work.

    Args:
        deadline: Unix time.
    Returns: what was killed, or None if the job ended before, or the deadline came. A killed
        driver's other processes are gone then.
    """
    driver = psutil.Process(process.pid)
    while process.poll() is None and time.time() < deadline:
        time.sleep(PAUSE_S)
        victims = [driver] if what == "driver" else workers(driver, is_busy=True)[:1]
        if not victims or not any(root.glob(UNDER_WAY[stage])):
            continue
        family = driver.children(recursive=True)
        victims[0].kill()
        facts = {
            "what": what,
            "pid": victims[0].pid,
            "stage": stage,
            "units": len(list(root.glob(UNDER_WAY["compress"]))),
        }
        if what == "driver":
            process.wait()
            end_orphans(family)
        return facts
    return None


def wait_until(process: subprocess.Popen[bytes], deadline: float) -> int:
    """The job's exit code. deadline: Unix time after which it is killed with all that it started,
    so that there still is a report."""
    try:
        return process.wait(None if deadline == math.inf else max(0.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        code = process.wait()
        end_orphans(family)
        return code


def end_orphans(family: list[psutil.Process]) -> None:
    """Wait for what a killed driver had started; what is still there after ORPHANS_S is killed.
    Where nobody collects orphans they stay as zombies, which hold nothing."""
    deadline = time.monotonic() + ORPHANS_S
    while alive := [process for process in family if is_alive(process)]:
        if time.monotonic() > deadline:
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(10 * PAUSE_S)


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def run_job(
    args: argparse.Namespace, root: Path, trace: Path, settings: list[str], watch: Watch
) -> tuple[list[int], Any, Interval]:
    """(exit codes, what was killed, when it ran): once, or with --kill twice, the second time to
    its end."""
    log = root.parent / "job.log"
    start, codes, killed = time.time(), [], None
    deadline = start + args.limit if args.limit else math.inf
    for attempt in range(2 if args.kill else 1):
        if time.time() > deadline:
            break
        process = start_job(args, root, trace, settings, log)
        watch.follow(process.pid)
        if args.kill and attempt == 0:
            killed = strike(process, root, args.kill, args.kill_in, deadline)
        codes.append(wait_until(process, deadline))
    lasted = Interval(start, time.time())
    if codes[-1]:
        print(*log.read_text(errors="replace").splitlines()[-LOG_LINES:], sep="\n")
    return codes, killed, lasted


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Source, plan, run, and what is to be said of it. Leaves run root, trace and log in the
    folder."""
    checkpoint, texts = make_source(args, folder / "source")
    root, trace = folder / "run", folder / "trace"
    for old in (root, trace):
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir(parents=True)
    (folder / "job.log").unlink(missing_ok=True)
    settings = job_settings(args, checkpoint, texts)
    planned = plan_figures(load_config(args.tree / CONFIG, tuple(settings), str(root)))
    watch = Watch(root)
    watch.start()
    try:
        codes, killed, lasted = run_job(args, root, trace, settings, watch)
    finally:
        watch.stop()
    facts = describe_job(root, trace, watch, lasted, args.workers)
    facts["plan"] = compare(planned, actual_figures(facts, watch, list_units(root), checkpoint))
    return head(args, settings) | {"exit_codes": codes, "killed": killed} | facts


def list_units(root: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in root.glob(UNDER_WAY["compress"])]


def head(args: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """What was measured, and on what."""
    git = ["git", "-C", str(args.tree), "rev-parse", "--short", "HEAD"]
    commit = (
        subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        or "no commit"
    )
    is_cuda = args.device == "cuda"
    return {
        "tree": {"commit": commit, "is_this": args.tree == HERE},
        "sizes": {
            name: getattr(args, name)
            for name in ("width", "experts", "mixture_layers", "sequences", "length", "workers")
        },
        "settings": args.set,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "gpus": torch.cuda.device_count() if is_cuda else 0,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "all_settings": settings,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", choices=WIDTHS, default="kimi")
    parser.add_argument("--experts", type=int, help="default: 48, small 16")
    parser.add_argument("--mixture-layers", type=int, help="default: 2")
    parser.add_argument("--sequences", type=int, help="default: 64, small 32")
    parser.add_argument("--length", type=int, help="default: 4096, small 256")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tree", type=Path, default=HERE, help="checkout whose job is run")
    parser.add_argument(
        "--folder",
        type=Path,
        help="for source, run root, trace and log; default: one that goes afterwards",
    )
    parser.add_argument(
        "--keep-source",
        action="store_true",
        help="write the source only if it is not there, and leave it there",
    )
    parser.add_argument("--kill", choices=("worker", "driver"))
    parser.add_argument("--kill-in", choices=tuple(UNDER_WAY), default="compress")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="then the job is killed, and what there is is reported",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    for name, value in zip(
        ("experts", "mixture_layers", "sequences", "length"), SIZES[args.width], strict=True
    ):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.experts < TOP_K:
        parser.error(
            f"--experts: expected at least {TOP_K}, which a token is routed to, found"
            f" {args.experts}"
        )
    args.tree = args.tree.resolve()
    return args


def main() -> None:
    args = parse()
    place = (
        nullcontext(str(args.folder.resolve()))
        if args.folder
        else tempfile.TemporaryDirectory(prefix="p48ray-bench-")
    )
    with place as folder:
        facts = measure(args, Path(folder))
        if args.folder and not args.keep_source:
            shutil.rmtree(Path(folder) / "source")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1))
    print_facts(facts)
    if args.kill and not facts["killed"]:
        raise SystemExit(
            f"nothing was killed: the job ended before {args.kill_in} had left a first piece of"
            " work"
        )
    raise SystemExit(1 if facts["exit_codes"][-1] else 0)


if __name__ == "__main__":
    main()
