"""A folder of a store, as a store of its own: the checkpoint inside a run root."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from p48ray import trace
from p48ray.store.base import (
    CHUNK_BYTES,
    Buffers,
    ByteRange,
    ObjectInfo,
    Piece,
    Store,
    Traffic,
    Written,
    check_key,
    check_prefix,
)
from p48ray.store.local import LocalStore


class SubStore:
    """Everything under `prefix` (ending in a slash), with keys relative to it."""

    def __init__(self, store: Store, prefix: str) -> None:
        assert prefix.endswith("/"), prefix
        self.store, self.prefix = store, prefix
        self.uri = f"{store.uri}/{prefix}".rstrip("/")

    @property
    def traffic(self) -> Traffic:
        """That of the store behind."""
        return self.store.traffic

    def full(self, key: str) -> str:
        """The key in the store behind. Raises: P48Error for a bad key, as given."""
        return self.prefix + check_key(key)

    def get(self, key: str) -> bytes:
        return self.store.get(self.full(key))

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        return self.store.get_range(self.full(key), start, num_bytes)

    def head(self, key: str) -> ObjectInfo | None:
        held = self.store.head(self.full(key))
        return None if held is None else replace(held, key=key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in self.store.list(self.prefix + check_prefix(prefix)):
            yield replace(info, key=info.key.removeprefix(self.prefix))

    def put(self, key: str, data: bytes) -> None:
        self.store.put(self.full(key), data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self.store.put_if_absent(self.full(key), data)

    def write_once(self, key: str, buffers: Buffers) -> Written:
        return self.store.write_once(self.full(key), buffers)

    def compose(self, key: str, pieces: Iterable[Piece]) -> int:
        return self.store.compose(self.full(key), (self.resolved(piece) for piece in pieces))

    def delete(self, key: str) -> None:
        self.store.delete(self.full(key))

    def sweep(self, older_than_s: float, prefix: str = "") -> int:
        return self.store.sweep(older_than_s, self.prefix + check_prefix(prefix))

    @staticmethod
    def resolved(piece: Piece) -> Piece:
        """A range of a view as a range of the store behind it, which that store may copy faster."""
        while isinstance(piece, ByteRange) and isinstance(piece.store, SubStore):
            view = piece.store
            piece = ByteRange(
                store=view.store,
                key=view.full(piece.key),
                start=piece.start,
                num_bytes=piece.num_bytes,
            )
        return piece


def read_into(store: Store, key: str, start: int, target: memoryview) -> None:
    """As Store.get_range, into memory that is there; straight from the file where the object lies
    in a folder.

    Args:
        store: any, a view too.
        key: of the object in that store.
        start: the first byte.
        target: writable bytes, all to be filled.
    Raises: as Store.get_range.
    """
    while isinstance(store, SubStore):
        key, store = store.full(key), store.store
    if isinstance(store, LocalStore):
        store.read_into(key, start, target)
    else:
        target[:] = store.get_range(key, start, len(target))


def sha256_of(store: Store, key: str, size_bytes: int) -> str:
    """SHA-256 of an object's bytes, read through in pieces.

    Args:
        store: any.
        key: of the object in that store.
        size_bytes: of the object, as the store says.
    Raises: as Store.get_range.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK_BYTES, size_bytes)))
    for start in range(0, size_bytes, CHUNK_BYTES):
        data = buffer[: size_bytes - start]
        with trace.span("read", len(data)):
            read_into(store, key, start, data)
        with trace.span("hash", len(data)):
            digest.update(data)
    return digest.hexdigest()


def local_path(store: Store, key: str) -> str | None:
    """The file behind an object, for readers that map files into memory; None where it lies in no
    folder of this machine."""
    while isinstance(store, SubStore):
        key, store = store.full(key), store.store
    return store.path(key) if isinstance(store, LocalStore) else None
