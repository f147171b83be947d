"""A layer of the source as views: of its own files, of the node's copy, or read; always the stored
bytes."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from p48ray.checkpoint.index import CheckpointIndex, open_checkpoint
from p48ray.checkpoint.layer_reader import MAP_ALIGNMENT, LayerReader, placed
from p48ray.checkpoint.layout import ModelLayout
from p48ray.checkpoint.tensors import read_tensors
from p48ray.errors import ObjectMissingError
from p48ray.store import LocalStore, MemoryStore, Store
from p48ray.store.node_cache import NodeCache
from tests.checkpoint.entries import serialize
from tests.conftest import TINY


@pytest.fixture(scope="module")
def remote() -> CheckpointIndex:
    """The small model in a store whose files can not be mapped."""
    store = MemoryStore("layer-reader")
    for path in TINY.iterdir():
        if path.suffix in (".json", ".safetensors"):
            store.put(path.name, path.read_bytes())
    return open_checkpoint(store)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[NodeCache]:
    cache = NodeCache(tmp_path / "cache", 10**9)
    yield cache
    cache.close()


def check(reader: LayerReader, index: CheckpointIndex, layout: ModelLayout, number: int) -> None:
    prefix = f"{layout.layer_prefix}{number}."
    expected = read_tensors(
        index.store, [e for n, e in index.tensors.items() if n.startswith(prefix)]
    )
    found = reader.tensors(number)
    assert set(found) == set(expected) and len(found) > 10
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_every_layer_of_a_local_source_is_mapped(
    tiny: CheckpointIndex, layout: ModelLayout
) -> None:
    reader = LayerReader(open_checkpoint(LocalStore(TINY)), layout.layer_prefix, None)
    before = reader.index.store.traffic.bytes_read
    for number in range(layout.num_layers):
        check(reader, tiny, layout, number)
    assert reader.index.store.traffic.bytes_read == before, "nothing is read through the store"


def test_every_layer_of_a_remote_source_is_fetched_once_for_all(
    remote: CheckpointIndex, layout: ModelLayout, cache: NodeCache, tiny: CheckpointIndex
) -> None:
    readers = [LayerReader(remote, layout.layer_prefix, cache) for _ in range(3)]
    for number in range(layout.num_layers):
        before = remote.store.traffic.bytes_read
        for reader in readers:
            check(reader, tiny, layout, number)
        copies, _, size = placed(remote, readers[0].entries(number))
        assert (
            remote.store.traffic.bytes_read - before == sum(c.num_bytes for c, _ in copies) <= size
        )


def test_without_a_cache_or_without_room_a_remote_layer_is_read(
    remote: CheckpointIndex, layout: ModelLayout, tmp_path: Path, tiny: CheckpointIndex
) -> None:
    for cache in (None, NodeCache(tmp_path / "small", 1000)):
        check(LayerReader(remote, layout.layer_prefix, cache), tiny, layout, 1)


def test_prefetched_layer_is_not_fetched_again(
    remote: CheckpointIndex, layout: ModelLayout, cache: NodeCache
) -> None:
    reader = LayerReader(remote, layout.layer_prefix, cache)
    reader.prefetch(2)
    assert reader.ahead is not None
    reader.ahead.join(30)
    before = remote.store.traffic.requests
    assert len(reader.tensors(2)) > 10
    assert remote.store.traffic.requests == before


def test_one_layer_is_held(remote: CheckpointIndex, layout: ModelLayout) -> None:
    reader = LayerReader(remote, layout.layer_prefix, None)
    first = reader.tensors(1)
    assert reader.tensors(1) is first
    reader.tensors(2)
    assert reader.held is not None and reader.held[0] == 2


class Broken(MemoryStore):
    """Has lost what it listed."""

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        raise ObjectMissingError(f"{key}: gone")


def test_error_of_a_prefetch_is_met_by_whoever_asks_for_the_layer(
    remote: CheckpointIndex, layout: ModelLayout, cache: NodeCache, caplog: pytest.LogCaptureFixture
) -> None:
    store: Store = Broken("broken")
    reader = LayerReader(
        replace(remote, store=store, fingerprint="another"), layout.layer_prefix, cache
    )
    with caplog.at_level(logging.WARNING):
        reader.prefetch(1)
        assert reader.ahead is not None
        reader.ahead.join(30)
    with pytest.raises(ObjectMissingError, match="gone"):
        reader.tensors(1)


@pytest.mark.parametrize("is_local", [True, False])
def test_tensor_that_is_not_aligned_for_its_type_is_copied(is_local: bool, tmp_path: Path) -> None:
    """The format does not promise alignment: a byte before a float moves it to an odd place."""
    tensors = {
        "m.layers.0.a": torch.tensor([7], dtype=torch.uint8),
        "m.layers.0.b": torch.arange(5, dtype=torch.float32),
    }
    files = {
        "config.json": b"{}",
        "model.safetensors": serialize(tensors | {"m.layers.0.empty": torch.empty(0, 3)}),
    }
    store: Store = LocalStore(tmp_path) if is_local else MemoryStore("unaligned")
    for name, data in files.items():
        store.put(name, data)
    index = open_checkpoint(store)
    assert index.tensors["m.layers.0.b"].start % 4
    cache = None if is_local else NodeCache(tmp_path / "cache", 10**6)
    found = LayerReader(index, "m.layers.", cache).tensors(0)
    assert torch.equal(found["m.layers.0.b"], tensors["m.layers.0.b"]) and found[
        "m.layers.0.empty"
    ].shape == (0, 3)


def test_places_keep_the_alignment_of_the_source_and_do_not_overlap(
    remote: CheckpointIndex, layout: ModelLayout
) -> None:
    entries = LayerReader(remote, layout.layer_prefix, None).entries(3)
    _, places, size = placed(remote, entries)
    spans = sorted((places[e.name], places[e.name] + e.num_bytes) for e in entries)
    assert all(places[e.name] % MAP_ALIGNMENT == e.start % MAP_ALIGNMENT for e in entries)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)) and spans[-1][1] == size
