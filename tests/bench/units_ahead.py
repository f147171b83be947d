"""Units a minute of one worker, with and without reading ahead, in turn, on one run root.

    python -m tests.bench.units_ahead FOLDER [--latency-ms 100 | --local] [--repeats 3] [--set
    KEY=VALUE ...]

Source and run root lie on a SeaweedFS server of this machine behind a proxy that answers every
request late; with --local in folders. Two layers of the small model are captured once; then their
units are done again and again by Ray workers, of which one is up when the clock starts. Prints a
line of JSON a repeat.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from p48ray.config.load import load_config
from p48ray.run import run_root
from p48ray.run.manifest import LayerScales, UnitManifest
from p48ray.run.plan import RunPlan
from p48ray.runner.base import TaskList
from p48ray.runner.local_runner import LocalRunner
from p48ray.runner.pipeline import run_job
from p48ray.runner.ray_runner import RayRunner
from p48ray.stages.prepare import Prepared, prepare
from p48ray.stages.tasks import Task
from p48ray.store import open_store
from p48ray.store.base import Store
from tests.conftest import REPO, TINY
from tests.servers import fault_proxy
from tests.servers.s3 import BUCKET, SeaweedFS, aws_environment, shared_server

SETTINGS = {
    "calibration.documents": f"{TINY}/calibration.jsonl",
    "calibration.num_sequences": "96",
    "calibration.sequences_per_part": "8",
    "evaluation": "null",
    "run.layers": "[1, 4]",
    "run.num_workers": "1",
}


@contextmanager
def late_server(latency_ms: float) -> Iterator[tuple[str, str]]:
    """Endpoints of a server: its own, and one that is late."""
    os.environ |= aws_environment()
    server = shared_server(SeaweedFS)
    fault_proxy.LATENCY_S = latency_ms / 1000
    always = fault_proxy.Rule(fault_proxy.Fault.LATENCY, times=10**9)
    with fault_proxy.fault_proxy(server.endpoint_url, always) as proxy:
        yield server.endpoint_url, proxy.endpoint_url


def captured(settings: dict[str, str], root: str) -> Prepared:
    """A pilot that is done, units and all."""
    prepared = prepare(
        load_config(
            REPO / "configs" / "tiny.yaml", tuple(f"{k}={v}" for k, v in settings.items()), root
        )
    )
    run_job(prepared, lambda plan, uri: nullcontext(LocalRunner(plan, uri)))
    return prepared


def changed(plan: RunPlan, ahead: int, endpoint_url: str | None) -> RunPlan:
    config = plan.config
    run = config.run.model_copy(update={"prefetch_units": ahead, "endpoint_url": endpoint_url})
    source = config.source.model_copy(update={"endpoint_url": endpoint_url})
    return plan.model_copy(
        update={"config": config.model_copy(update={"run": run, "source": source})}
    )


def tasks_of(plan: RunPlan, store: Store) -> list[Task]:
    loads = {
        layer: LayerScales.load(store, run_root.layer_scales(layer)).tokens_per_expert
        for layer in plan.layers
    }
    return [
        Task(
            stage="compress",
            id=u.id,
            item=u,
            layer=u.layer,
            load=sum(loads[u.layer][e] for e in u.experts),
        )
        for u in plan.units
    ]


def measure(plan: RunPlan, store: Store) -> dict[str, float]:
    """Seconds of all units, and what their manifests say."""
    tasks = tasks_of(plan, store)
    with RayRunner(plan, store.uri, None) as runner:
        assert all(r.is_done for r in runner.run(TaskList(tasks[:1])))  # a worker is up
        for info in list(store.list(run_root.UNITS)):
            store.delete(info.key)
        start = time.perf_counter()
        assert all(r.is_done for r in runner.run(TaskList(tasks)))
        wall = time.perf_counter() - start
    seconds = [UnitManifest.load(store, run_root.unit_manifest(u.id)).seconds for u in plan.units]
    phases = {
        phase: round(sum(s.get(phase, 0.0) for s in seconds) / len(seconds), 3)
        for phase in seconds[0]
    }
    return {"units_a_minute": round(60 * len(tasks) / wall, 2), "wall_s": round(wall, 2)} | phases


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=100.0)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    settings = SETTINGS | dict(item.split("=", 1) for item in args.set)
    places: contextmanager[tuple[str, str]] = (
        nullcontext((None, None)) if args.local else late_server(args.latency_ms)
    )
    with places as (direct, late):
        root = str(args.folder / "run") if args.local else f"s3://{BUCKET}/units-ahead"
        if direct is not None:
            source = open_store(f"s3://{BUCKET}/units-ahead-source", direct)
            for path in TINY.iterdir():
                source.put(path.name, path.read_bytes())
            settings |= {
                "source.checkpoint": source.uri,
                "source.endpoint_url": direct,
                "run.endpoint_url": direct,
            }
        prepared = captured(settings, root)
        for repeat in range(args.repeats):
            for ahead in (0, 1) if repeat % 2 == 0 else (1, 0):
                facts = measure(changed(prepared.plan, ahead, late), prepared.store)
                sys.stdout.write(
                    json.dumps({"repeat": repeat, "prefetch_units": ahead} | facts) + "\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
