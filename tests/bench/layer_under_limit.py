"""A process of its own that takes tokens through a layer of Kimi-K2.5's width under a hard limit of
memory, up or back.

    python -m tests.bench.layer_under_limit FOLDER up|back --sequences 2 --length 128 [--limit
    BYTES] [--leaky]

The limit is RLIMIT_DATA: what the process may write to, beyond what it had once everything was
imported and before it opened the checkpoint. Mapped files do not count, so the packed layer comes
on top. Prints JSON with the peak, as a thread saw it every 2 ms. `--leaky` keeps every expert once
decoded.
"""

import argparse
import json
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from bench.capture import LayerBench
from p48ray.checkpoint.families import FAMILIES
from p48ray.model.architecture import architecture
from p48ray.model.experts import ExpertWeights

SAMPLE_S = 0.002


def writable_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(
        next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]
    )


@contextmanager
def watched() -> Iterator[Callable[[], int]]:
    """The most that writable_bytes has answered so far."""
    peak, done = writable_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, writable_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("direction", choices=("up", "back"))
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--leaky", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    architecture(FAMILIES["kimi_k25"])  # transformers' modules
    with watched() as peak:
        before = writable_bytes()
        if args.limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (before + args.limit, before + args.limit))
        bench = LayerBench(
            args.folder, torch.device("cpu"), torch.float32, args.parts, args.sequences, args.length
        )
        decode, met = bench.experts.weights, set[int]()
        decode = cache(decode) if args.leaky else decode

        def weights(expert: int) -> ExpertWeights:
            met.add(expert)
            return decode(expert)

        bench.experts.weights = weights
        results = bench.up() if args.direction == "up" else bench.back()
        finite = all(bool(torch.isfinite(x).all()) for x in results)
        sys.stdout.write(
            json.dumps(
                {"peak_bytes": peak() - before, "is_finite": finite, "experts_met": len(met)}
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
