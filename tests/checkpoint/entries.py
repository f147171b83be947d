"""The tensors of one file, read as the index reads those of every file."""

from p48ray.checkpoint.header import TensorEntry, parse_header, read_header_bytes
from p48ray.store import Store


def read_entries(store: Store, file: str) -> dict[str, TensorEntry]:
    raw, size_bytes = read_header_bytes(store, file)
    return parse_header(file, raw, size_bytes)
