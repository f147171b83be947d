"""MemoryStore: objects in a dictionary of this process, for tests and dry runs. `memory://name`
names the same store everywhere in it."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from p48ray.errors import ObjectMissingError
from p48ray.store.base import (
    Buffers,
    Hashing,
    ObjectInfo,
    Piece,
    Traffic,
    Written,
    check_key,
    check_prefix,
    check_range,
)


@dataclass(slots=True)
class _Objects:
    """The contents of one named store. The lock guards check-then-write and listing."""

    by_key: dict[str, bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_REGISTRY: dict[str, _Objects] = {}
_REGISTRY_LOCK = threading.Lock()


class MemoryStore:
    """Objects under one name, shared by all instances of that name in this process.

    Pickling carries the name only: in another process the store of that name is another one.
    """

    def __init__(self, name: str) -> None:
        """Args: name: any text; the store is created empty at first use."""
        self.name = name
        self.uri = f"memory://{name}"
        self.traffic = Traffic()
        with _REGISTRY_LOCK:
            self._objects = _REGISTRY.setdefault(name, _Objects())

    def __reduce__(self) -> tuple[type["MemoryStore"], tuple[str]]:
        """A lock cannot be pickled, and the contents belong to the process."""
        return (MemoryStore, (self.name,))

    def __repr__(self) -> str:
        """As it is typed."""
        return f"MemoryStore({self.name!r})"

    def get(self, key: str) -> bytes:
        """See Store.get."""
        data = self._held(key)
        self.traffic.add(bytes_read=len(data), requests=1)
        return data

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """See Store.get_range."""
        data = self._held(key)
        check_range(key, start, num_bytes, len(data))
        self.traffic.add(bytes_read=num_bytes, requests=1)
        return data[start : start + num_bytes]

    def head(self, key: str) -> ObjectInfo | None:
        """See Store.head."""
        data = self._objects.by_key.get(check_key(key))
        return None if data is None else ObjectInfo(key, len(data))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store.list. The listing is of the moment of the call."""
        check_prefix(prefix)
        with self._objects.lock:
            found = [
                ObjectInfo(key, len(data))
                for key, data in self._objects.by_key.items()
                if key.startswith(prefix)
            ]
        return iter(sorted(found, key=lambda info: info.key.encode()))

    def put(self, key: str, data: bytes) -> None:
        """See Store.put."""
        check_key(key)
        self.traffic.add(bytes_written=len(data), requests=1)
        with self._objects.lock:
            self._objects.by_key[key] = bytes(data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See Store.put_if_absent."""
        check_key(key)
        with self._objects.lock:
            if key in self._objects.by_key:
                return False
            self._objects.by_key[key] = bytes(data)
        self.traffic.add(bytes_written=len(data), requests=1)
        return True

    def write_once(self, key: str, buffers: Buffers) -> Written:
        """See Store.write_once."""
        hashing = Hashing(buffers)
        data = b"".join(bytes(chunk) for chunk in hashing)
        return hashing.written(is_ours=self.put_if_absent(key, data))

    def compose(self, key: str, pieces: Iterable[Piece]) -> int:
        """See Store.compose."""
        check_key(key)
        data = b"".join(
            (
                piece
                if isinstance(piece, bytes)
                else piece.store.get_range(piece.key, piece.start, piece.num_bytes)
            )
            for piece in pieces
        )
        self.put(key, data)
        return len(data)

    def delete(self, key: str) -> None:
        """See Store.delete."""
        with self._objects.lock:
            self._objects.by_key.pop(check_key(key), None)

    def sweep(self, older_than_s: float, prefix: str = "") -> int:
        """See Store.sweep. Nothing is ever left here."""
        return 0

    def _held(self, key: str) -> bytes:
        try:
            return self._objects.by_key[check_key(key)]
        except KeyError:
            raise ObjectMissingError(f"{key}: no such object in {self.uri}") from None
