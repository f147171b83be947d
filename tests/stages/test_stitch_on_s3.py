"""Stitching in a bucket: the server copies, and next to nothing passes through the process that stitches."""

import hashlib
import json
import uuid
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save

from p48ray import run_root
from p48ray.checkpoint.index import open_checkpoint
from p48ray.stages.context import StageContext
from p48ray.stages.inputs import open_run_root
from p48ray.stages.prepare import prepare
from p48ray.stages.reduce import stitch_shard
from p48ray.store import Store, open_store
from tests.conftest import TINY
from tests.stages.small_run import configure, run_locally
from tests.store.servers import BUCKET, Server

COPIES = 450  # of the vocabulary, so that embedding and head have 470 MB each
SMALL_SHARE = 0.01


def widened(store: Store) -> None:
    """The small model with a vocabulary COPIES times as large: real layers under an embedding and a head that are copied by parts."""
    index = json.loads((TINY / "model.safetensors.index.json").read_text())
    config = json.loads((TINY / "config.json").read_text())
    config["text_config"]["vocab_size"] *= COPIES
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(TINY / file)
        for name in [n for n in tensors if n.endswith(("embed_tokens.weight", "lm_head.weight"))]:
            wide = tensors.pop(name).repeat(COPIES, 1)
            own = f"model-{name.split('.')[-2]}.safetensors"
            store.put(own, save({name: wide}, metadata={"format": "pt"}))
            index["weight_map"][name] = own
        store.put(file, save(tensors, metadata={"format": "pt"}))
    store.put("model.safetensors.index.json", json.dumps(index).encode())
    store.put("config.json", json.dumps(config).encode())
    for path in TINY.glob("tokenizer*"):
        store.put(path.name, path.read_bytes())


def digests(store: Store) -> dict[str, str]:
    return {i.key: hashlib.sha256(store.get(i.key)).hexdigest() for i in store.list("checkpoint/") if i.key.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_of_950_mb_is_stitched_with_less_than_a_hundredth_of_it_passing_through(seaweedfs: Server) -> None:
    """Against the plain path: the same shards streamed through the process, as for a store that copies no ranges."""
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
    for info in list(store.list("checkpoint/")):
        store.delete(info.key)
    context = replace(prepared.context, store=store, source=open_checkpoint(open_store(source, endpoint)))
    before = traffic(context)
    size_bytes = sum(stitch_shard(context, shard).size_bytes for shard in prepared.shards)
    read, written = (after - earlier for after, earlier in zip(traffic(context), before, strict=True))
    assert size_bytes > 0.9e9
    assert read <= SMALL_SHARE * size_bytes
    assert written <= SMALL_SHARE * size_bytes
    copied = digests(store)
    for shard in prepared.shards:
        store.delete(run_root.checkpoint_file(shard.name))
    streaming = replace(context, store=open_store(root, endpoint, server_copy=False))
    for shard in prepared.shards:
        stitch_shard(streaming, shard)
    assert digests(store) == copied


def traffic(context: StageContext) -> tuple[int, int]:
    counts = (context.store.traffic, context.source.store.traffic)
    return sum(c.bytes_read for c in counts), sum(c.bytes_written for c in counts)
