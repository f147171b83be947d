"""Stitching in a bucket: the server copies, and next to nothing passes through the process that
stitches."""

import hashlib
import json
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from p48ray.checkpoint.index import open_checkpoint
from p48ray.run import run_root
from p48ray.run.output_layout import plan_output, unit_bytes
from p48ray.run.plan import WorkUnit
from p48ray.stages.inputs import open_run_root
from p48ray.stages.prepare import prepare
from p48ray.stages.reduce import stitch_shard
from p48ray.store import Store, open_store
from p48ray.store.s3 import multipart
from p48ray.unit.context import StageContext
from tests.conftest import TINY
from tests.jobs.command import narrow_model
from tests.servers.s3 import BUCKET, Server
from tests.stages.small_run import configure, run_locally

COPIES = 300  # of the vocabulary, so that embedding and head have 79 MB each
COPY_PART_BYTES = 32 * 2**20  # instead of 256: what one request copies
EDGES_BYTES = 2 * multipart.MIN_PART_BYTES
"""A request that copies takes no fewer bytes than that: what lies around a large tensor passes
through, however large the tensor is."""


def widened(store: Store) -> None:
    """The narrow model with a vocabulary COPIES times as large: real layers under an embedding and
    a head that are copied by parts."""
    narrow = narrow_model()
    index = json.loads((narrow / "model.safetensors.index.json").read_text())
    config = json.loads((narrow / "config.json").read_text())
    config["text_config"]["vocab_size"] *= COPIES
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(narrow / file)
        for name in [n for n in tensors if n.endswith(("embed_tokens.weight", "lm_head.weight"))]:
            wide = tensors.pop(name).repeat(COPIES, 1)
            own = f"model-{name.split('.')[-2]}.safetensors"
            store.put(own, save({name: wide}, metadata={"format": "pt"}))
            index["weight_map"][name] = own
        store.put(file, save(tensors, metadata={"format": "pt"}))
    store.put("model.safetensors.index.json", json.dumps(index).encode())
    store.put("config.json", json.dumps(config).encode())
    for path in narrow.glob("tokenizer*"):
        store.put(path.name, path.read_bytes())


def digests(store: Store) -> dict[str, str]:
    return {
        i.key: hashlib.sha256(store.get(i.key)).hexdigest()
        for i in store.list("checkpoint/")
        if i.key.endswith(".safetensors")
    }


@pytest.mark.slow
def test_a_checkpoint_of_large_tensors_is_stitched_with_little_of_it_passing_through(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain path: the same shards streamed through the process, as for a store that
    copies no ranges."""
    monkeypatch.setattr(multipart, "COPY_PART_BYTES", COPY_PART_BYTES)
    name = uuid.uuid4().hex
    source, root = f"s3://{BUCKET}/{name}/source", f"s3://{BUCKET}/{name}/run"
    widened(open_store(source, seaweedfs.endpoint_url))
    endpoint = seaweedfs.endpoint_url
    overrides = (
        f"source.endpoint_url={endpoint}",
        f"run.endpoint_url={endpoint}",
        "compression.solver=round_to_nearest",
        "evaluation=null",
    )
    config = configure(source, root, *overrides, "output.max_shard_size=2GB")
    run_locally(prepare(config))
    prepared = prepare(config)
    store = open_run_root(prepared.plan, root)
    context = replace(
        prepared.context, store=store, source=open_checkpoint(open_store(source, endpoint))
    )
    streaming = replace(context, store=open_store(root, endpoint, server_copy=False))
    sparse = plan_output(
        prepared.plan.units,
        prepared.plan.config.output.max_shard_size,
        prepared.source,
        prepared.layout,
        "sparse",
    )
    found = {}
    for storage, shards in (("dense", prepared.shards), ("sparse", sparse)):
        clear(store)
        before = traffic(context)
        size_bytes = sum(stitch_shard(context, shard).size_bytes for shard in shards)
        read, written = (
            after - earlier for after, earlier in zip(traffic(context), before, strict=True)
        )
        assert size_bytes > 15 * EDGES_BYTES
        assert read <= EDGES_BYTES  # units in sparse storage too: a small model's
        assert written <= EDGES_BYTES
        found[storage] = digests(store)
        clear(store)
        for shard in shards:
            stitch_shard(streaming, shard)
        assert digests(store) == found[storage]
    assert found["dense"] != found["sparse"]


@pytest.mark.parametrize("server_copy", [True, False])
def test_a_run_with_sparse_storage_leaves_the_bytes_of_a_local_one(
    seaweedfs: Server, tmp_path: Path, server_copy: bool
) -> None:
    """Of experts their dense bytes pass through the process and no others; stitched again without
    the server's copies they are the same."""
    root, endpoint = f"s3://{BUCKET}/{uuid.uuid4().hex}/run", seaweedfs.endpoint_url
    overrides = ("compression.solver=round_to_nearest", "evaluation=null", "output.storage=sparse")
    run_locally(prepare(configure(TINY, tmp_path / "run", *overrides)))
    local = {
        f"checkpoint/{path.name}": path.read_bytes()
        for path in (tmp_path / "run" / "checkpoint").iterdir()
    }
    prepared = prepare(configure(TINY, root, *overrides, f"run.endpoint_url={endpoint}"))
    run_locally(prepared)
    store = open_run_root(prepared.plan, root)
    assert {info.key: store.get(info.key) for info in store.list("checkpoint/")} == local
    for shard in prepared.shards[1:]:
        store.delete(run_root.checkpoint_file(shard.name))
    again = (
        open_store(root, endpoint) if server_copy else open_store(root, endpoint, server_copy=False)
    )
    context = replace(prepared.context, store=again)
    for shard in prepared.shards:
        stitch_shard(context, shard)
    experts = sum(
        unit_bytes(prepared.layout, s, "sparse")
        for shard in prepared.shards[1:]
        for s in shard.segments
        if isinstance(s, WorkUnit)
    )
    stitched = sum(
        len(local[run_root.checkpoint_file(shard.name)]) for shard in prepared.shards[1:]
    )
    assert experts < again.traffic.bytes_written <= stitched
    assert {info.key: store.get(info.key) for info in store.list("checkpoint/")} == local


def clear(store: Store) -> None:
    for info in list(store.list("checkpoint/")):
        store.delete(info.key)


def traffic(context: StageContext) -> tuple[int, int]:
    counts = (context.store.traffic, context.source.store.traffic)
    return sum(c.bytes_read for c in counts), sum(c.bytes_written for c in counts)
