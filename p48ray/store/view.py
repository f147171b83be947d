"""Stores made of stores: a folder of one (the checkpoint inside a run root), and one whose objects
of some names lie in another (a run root's streams in a scratch folder)."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from heapq import merge

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
        return self.store.compose(self.full(key), map(resolved, pieces))

    def delete(self, key: str) -> None:
        self.store.delete(self.full(key))

    def sweep(self, older_than_s: float, prefix: str = "") -> int:
        return self.store.sweep(older_than_s, self.prefix + check_prefix(prefix))


class SplitStore:
    """Objects whose keys `is_aside` picks are written to the store `aside`, all others to `store`.

    One that lies in `store` all the same, from a time without this split, is read and listed from
    there: of two under one key the one aside counts. A deletion is of both.

    Args:
        store: gives its name to the whole.
        aside: with the same keys; what else lies there is not seen.
        is_aside: a module's function of a key, so that the store can be pickled.
    """

    def __init__(self, store: Store, aside: Store, is_aside: Callable[[str], bool]) -> None:
        self.store, self.aside, self.is_aside = store, aside, is_aside
        self.uri = store.uri

    @property
    def traffic(self) -> Traffic:
        """That of `store`."""
        return self.store.traffic

    def holder(self, key: str) -> Store:
        """The store in which an object lies, or would be looked for."""
        is_there = self.is_aside(key) and self.aside.head(key) is not None
        return self.aside if is_there else self.store

    def get(self, key: str) -> bytes:
        return self.holder(key).get(key)

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        return self.holder(key).get_range(key, start, num_bytes)

    def head(self, key: str) -> ObjectInfo | None:
        return self.holder(key).head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = (info for info in self.aside.list(prefix) if self.is_aside(info.key))
        last = None
        for info in merge(found, self.store.list(prefix), key=lambda info: os.fsencode(info.key)):
            if info.key != last:  # of equal keys merge gives those of its first argument first
                yield info
            last = info.key

    def put(self, key: str, data: bytes) -> None:
        self.place(key).put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self.place(key) is self.aside and self.store.head(key) is not None:
            return False
        return self.place(key).put_if_absent(key, data)

    def write_once(self, key: str, buffers: Buffers) -> Written:
        """See Store.write_once. Beside an object in `store`, nothing is written aside."""
        place = self.place(key)
        if place is self.aside and self.store.head(key) is not None:
            place = self.store
        return place.write_once(key, buffers)

    def compose(self, key: str, pieces: Iterable[Piece]) -> int:
        return self.place(key).compose(key, map(resolved, pieces))

    def delete(self, key: str) -> None:
        if self.is_aside(key):
            self.aside.delete(key)
        self.store.delete(key)

    def sweep(self, older_than_s: float, prefix: str = "") -> int:
        return self.store.sweep(older_than_s, prefix) + self.aside.sweep(older_than_s, prefix)

    def place(self, key: str) -> Store:
        """The store that an object is written to."""
        return self.aside if self.is_aside(check_key(key)) else self.store


def located(store: Store, key: str) -> tuple[Store, str]:
    """The store behind all views in which an object lies, and its key there."""
    while isinstance(store, SubStore | SplitStore):
        if isinstance(store, SubStore):
            key, store = store.full(key), store.store
        else:
            store = store.holder(key)
    return store, key


def lies_aside(store: Store, key: str) -> bool:
    """Whether an object of a SplitStore lies aside."""
    return isinstance(store, SplitStore) and store.holder(key) is store.aside


def name_of(store: Store, key: str) -> str:
    """Where an object lies, for messages."""
    behind, name = located(store, key)
    return f"{behind.uri}/{name}"


def resolved(piece: Piece) -> Piece:
    """A range of a view as a range of the store behind it, which that store may copy faster."""
    if not isinstance(piece, ByteRange):
        return piece
    store, key = located(piece.store, piece.key)
    return replace(piece, store=store, key=key)


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
    store, key = located(store, key)
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
    store, key = located(store, key)
    return store.path(key) if isinstance(store, LocalStore) else None
