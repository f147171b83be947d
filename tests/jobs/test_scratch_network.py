"""With run.scratch and a bucket: what a whole job sends and fetches, counted between it and a real
server."""

import re
from collections import Counter
from pathlib import Path

import pytest

from p48ray.run import run_root
from p48ray.store import open_store
from tests.jobs.command import HELD_OUT, Outcome, arguments, invoke, narrow_model, snapshot
from tests.servers.fault_proxy import FaultProxy, fault_proxy
from tests.servers.s3 import BUCKET, Server

SETTINGS = {
    "compression.output_curvature": "true",
    "evaluation": HELD_OUT,
    "run.keep": "units",
    "run.boundary_every": "2",
}


def run(proxy: FaultProxy, name: str, **more: str) -> Outcome:
    places = {
        "source.checkpoint": f"s3://{BUCKET}/network-source",
        "source.endpoint_url": proxy.endpoint_url,
        "run.endpoint_url": proxy.endpoint_url,
    }
    settings = SETTINGS | places | {key.replace("__", "."): value for key, value in more.items()}
    return invoke(*arguments(f"s3://{BUCKET}/{name}", settings))


def kind_of(path: str, name: str) -> str:
    """What a request is about."""
    if path.startswith(f"/{BUCKET}/network-source/"):
        return "source"
    key = re.split(r"[? ]", path.removeprefix(f"/{BUCKET}/{name}/"))[0]
    if run_root.is_blob(key):
        return "streams"
    if key.endswith(".safetensors") or key.startswith("probe/"):
        return key.split("/")[0]  # units, checkpoint; what the bucket is tried out with, once
    return "records"


def counted(proxy: FaultProxy, name: str) -> Counter[str]:
    """Bytes of bodies, both ways, by kind; of requests without any, a 0."""
    found: Counter[str] = Counter()
    for request in proxy.requests:
        found[kind_of(request.path, name)] += request.num_body_bytes + request.num_reply_bytes
    return found


def test_nothing_but_source_shards_checkpoint_and_records_crosses_the_network(
    seaweedfs: Server, tmp_path: Path
) -> None:
    source = open_store(f"s3://{BUCKET}/network-source", seaweedfs.endpoint_url)
    for path in narrow_model().iterdir():
        if path.suffix != ".jsonl":
            source.put(path.name, path.read_bytes())
    found = {}
    for name, more in (("aside", {"run__scratch": str(tmp_path / "scratch")}), ("within", {})):
        with fault_proxy(seaweedfs.endpoint_url) as proxy:
            outcome = run(proxy, name, **more)
            assert outcome.code == 0, outcome
            found[name] = counted(proxy, name)
            methods = {
                request.method
                for request in proxy.requests
                if kind_of(request.path, name) == "streams"
            }
            assert methods == ({"HEAD", "DELETE"} if more else {"HEAD", "DELETE", "GET", "PUT"})
    aside, within = found["aside"], found["within"]
    assert aside["streams"] == 0
    assert within["streams"] > 2 * 500_000, "they are written, and read"
    for kind in ("source", "units", "checkpoint"):
        assert aside[kind] == pytest.approx(within[kind], rel=0.01), kind
    assert aside["records"] < 1.1 * within["records"]
    stores = [
        open_store(f"s3://{BUCKET}/{name}", seaweedfs.endpoint_url) for name in ("aside", "within")
    ]
    for info in stores[1].list(run_root.CHECKPOINT):
        if not info.key.endswith("README.md"):
            assert stores[0].get(info.key) == stores[1].get(info.key), info.key
    assert snapshot(tmp_path / "scratch").keys() <= {
        f"{folder.name}/{name}"
        for folder in (tmp_path / "scratch").iterdir()
        for name in ("scratch.json", "in-use")
    }, "run.keep deleted them there"
