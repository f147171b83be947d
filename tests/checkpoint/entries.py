"""Files as the index reads those of a folder, and as a unit's shard is written."""

from collections.abc import Mapping

from torch import Tensor

from p48ray.checkpoint.header import TensorEntry, parse_header, read_header_bytes
from p48ray.checkpoint.tensors import TensorFile
from p48ray.store import Store


def read_entries(store: Store, file: str) -> dict[str, TensorEntry]:
    raw, size_bytes = read_header_bytes(store, file)
    return parse_header(file, raw, size_bytes)


def serialize(tensors: Mapping[str, Tensor]) -> bytes:
    """A whole file, joined."""
    return b"".join(TensorFile(tensors))
