"""The tensors of one decoder layer as stored, mapped rather than read where that is possible.

a folder of this machine      the source's own files are mapped
a bucket, with a node cache   the layer is fetched once for all processes of the node, the next
                              one while this one runs
a bucket, without             the layer is read into this process (Kimi-K2.5: 9.7 GB)
"""

import mmap
import threading
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from p48ray.checkpoint.header import TensorEntry, torch_dtype
from p48ray.checkpoint.index import CONFIG_FILE, CheckpointIndex
from p48ray.checkpoint.tensors import from_bytes, merge_ranges, read_tensors
from p48ray.store.base import ByteRange
from p48ray.store.node_cache import NodeCache, fetch
from p48ray.store.view import local_path

MAP_ALIGNMENT = 64


class LayerReader:
    """Reads layers of a checkpoint, one at a time. Tensors are read-only views; they stay valid for
    as long as they are held.

    Args:
        index: the checkpoint.
        layer_prefix: what stands before a layer's number in a tensor's name.
        cache: of this node, if there is one.
    """

    def __init__(self, index: CheckpointIndex, layer_prefix: str, cache: NodeCache | None) -> None:
        self.index, self.layer_prefix, self.cache = index, layer_prefix, cache
        self.maps: dict[str, memoryview] = {}
        self.held: tuple[int, Mapping[str, Tensor]] | None = None
        self.ahead: threading.Thread | None = None
        self.is_local = local_path(index.store, CONFIG_FILE) is not None

    def tensors(self, number: int) -> Mapping[str, Tensor]:
        """Every tensor of the layer by name, on the CPU. Raises: what Store.get_range raises."""
        if self.held is None or self.held[0] != number:
            self.held = None
            self.held = (number, self.read(number))
        return self.held[1]

    def read(self, number: int) -> dict[str, Tensor]:
        entries = self.entries(number)
        if self.is_local:
            return {e.name: view(self.mapped(e.file), e, e.start) for e in entries}
        data = self.fetched(number, entries)
        if data is None:
            return read_tensors(self.index.store, entries)
        _, places, _ = placed(self.index, entries)
        return {e.name: view(data, e, places[e.name]) for e in entries}

    def prefetch(self, number: int) -> None:
        """Begin to fetch a layer that will be asked for next. An error is not told here: whoever
        asks for the layer meets it again."""
        if self.cache is None or self.is_local:
            return

        def work() -> None:
            try:
                self.fetched(number, self.entries(number))
            except Exception:  # noqa: BLE001 (see above)
                return

        self.ahead = threading.Thread(target=work, daemon=True, name=f"prefetch-layer-{number}")
        self.ahead.start()

    def entries(self, number: int) -> list[TensorEntry]:
        prefix = f"{self.layer_prefix}{number}."
        return [e for name, e in self.index.tensors.items() if name.startswith(prefix)]

    def mapped(self, file: str) -> memoryview:
        if file not in self.maps:
            path = local_path(self.index.store, file)
            assert path is not None
            with open(path, "rb") as opened:
                self.maps[file] = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        return self.maps[file]

    def fetched(self, number: int, entries: list[TensorEntry]) -> memoryview | None:
        """The layer's file in the node's cache; None where there is none or it has no room."""
        if self.cache is None:
            return None
        copies, _, num_bytes = placed(self.index, entries)
        return self.cache.open(
            f"{self.index.fingerprint} layer {number}",
            num_bytes,
            lambda descriptor: fetch(copies, descriptor),
        )


def placed(
    index: CheckpointIndex, entries: list[TensorEntry]
) -> tuple[list[tuple[ByteRange, int]], dict[str, int], int]:
    """How a layer is copied: ranges of the source with their places, the place of every tensor, and
    the copy's size.

    Neighbours in a source file stay neighbours, with what lies between them, so that they travel in
    one request; alignment is as in the source.
    """
    copies: list[tuple[ByteRange, int]] = []
    places: dict[str, int] = {}
    end = 0
    for run in merge_ranges(entries):
        start = run[0].start
        num_bytes = max(e.start + e.num_bytes for e in run) - start
        place = -(-end // MAP_ALIGNMENT) * MAP_ALIGNMENT + start % MAP_ALIGNMENT
        copies.append((ByteRange(index.store, run[0].file, start, num_bytes), place))
        places |= {e.name: place + e.start - start for e in run}
        end = place + num_bytes
    return copies, places, end


def view(data: memoryview, entry: TensorEntry, start: int) -> Tensor:
    """A tensor on mapped bytes; a copy where they are not aligned for its type."""
    dtype = torch_dtype(entry.dtype)
    piece = data[start : start + entry.num_bytes]
    if start % dtype.itemsize or not entry.num_bytes:
        return from_bytes(piece, entry.dtype, entry.shape)
    with warnings.catch_warnings():
        # torch warns that the bytes are read-only; nobody writes to them
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(piece, dtype=torch.uint8).view(dtype).reshape(entry.shape)
