"""Two nodes with two workers each and a bucket: what is read of it, byte by byte, against who
worked on what."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from p48ray.store import open_store
from tests.conftest import REPO
from tests.jobs.command import arguments, narrow_model
from tests.servers.fault_proxy import fault_proxy
from tests.servers.s3 import BUCKET, Server, aws_environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_NODES, WORKERS_PER_NODE = 2, 2
SETTINGS = {
    "compression.output_curvature": "true",
    "calibration.num_sequences": "8",
    "calibration.sequences_per_part": "1",
    "run.experts_per_unit": "2",
    "run.num_workers": str(NUM_NODES * WORKERS_PER_NODE),
    "run.capture_workers": "3",
}
UNITS_PER_LAYER = 8


def test_a_node_reads_a_layer_once_however_many_units_of_it_it_solves(
    seaweedfs: Server, tmp_path: Path
) -> None:
    room = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args=room | {"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(NUM_NODES):
            cluster.add_node(num_cpus=WORKERS_PER_NODE, **room)
        source = open_store(f"s3://{BUCKET}/shared-source", seaweedfs.endpoint_url)
        for path in narrow_model().iterdir():
            if path.suffix != ".jsonl":
                source.put(path.name, path.read_bytes())
        with fault_proxy(seaweedfs.endpoint_url) as proxy:
            places = {
                "source.checkpoint": source.uri,
                "source.endpoint_url": proxy.endpoint_url,
                "run.endpoint_url": proxy.endpoint_url,
            }
            settings = SETTINGS | places | {"run.node_cache": str(tmp_path / "cache")}
            (tmp_path / "cache").mkdir()
            command = [
                sys.executable,
                "-m",
                "tests.jobs.recording_compress",
                str(tmp_path / "tasks.jsonl"),
            ]
            ended = subprocess.run(
                [*command, *arguments(f"s3://{BUCKET}/shared", settings)],
                cwd=REPO,
                env=os.environ
                | aws_environment()
                | {
                    "RAY_ADDRESS": str(cluster.address),
                    "PYTHONPATH": str(REPO),
                },
                capture_output=True,
                text=True,
                timeout=280,
                check=False,
            )
            assert ended.returncode == 0, ended.stdout + ended.stderr
            requests = proxy.seen("GET", r"/(activations|gradients)/layer-.*arrow")
    finally:
        cluster.shutdown()
    tasks = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    nodes: dict[int, set[str]] = defaultdict(set)
    for task in tasks:
        if task["stage"] == "compress":
            nodes[task["layer"]].add(task["node"])
    store = open_store(f"s3://{BUCKET}/shared", seaweedfs.endpoint_url)
    read: dict[int, int] = defaultdict(int)
    for request in requests:
        found = re.search(r"layer-(\d+)", request.path)
        assert found
        read[int(found[1])] += request.num_reply_bytes
    for layer in (1, 2, 3, 4):
        kinds = ("activations", "gradients")
        stored = sum(
            i.size_bytes
            for kind in kinds
            for i in store.list(f"{kind}/layer-{layer:03d}/")
            if i.key.endswith(".arrow")
        )
        assert read[layer] == len(nodes[layer]) * stored, (
            f"layer {layer} of {stored} bytes by {len(nodes[layer])} nodes"
        )
    assert sum(len(n) for n in nodes.values()) < 4 * UNITS_PER_LAYER / 2, (
        "and layers keep to few nodes"
    )
    assert list((tmp_path / "cache").iterdir()) == [], (
        "the last worker of a node took its cache along"
    )
