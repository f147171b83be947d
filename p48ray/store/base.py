"""The storage protocol: ten operations over whole, immutable-looking objects.

Small on purpose. Everything the pipeline needs from storage is an atomic put, two conditional puts,
a ranged read, one listing and a concatenation, and S3 has each of them natively (`compose` as a
multipart upload whose parts are copied on the server, so the bytes of a 595 GB checkpoint never
cross the machine that stitches it). Keys and uris are text, not Path objects, because a bucket has
no folders. Readers never see a part of an object: it is absent, or whole.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from p48ray import trace
from p48ray.errors import ConfigError, P48Error, ShardCorruptError

TEMP_PREFIX = ".p48tmp-"
"""Start of the name of a file that is still being written. No key may use it, in any backend, so
that runs move between backends."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing or a head request says about one object."""

    key: str
    size_bytes: int
    sha256: str | None = None
    """Hexadecimal SHA-256 of the whole object, where the store keeps one and says it by `head`;
    None says nothing about the bytes."""


@dataclass(slots=True)
class Traffic:
    """What went through this process by one store object: an account, not state (it is not pickled
    and starts at zero).

    Bytes that the store copies on its own side are in none of the counters. Retried requests count
    each time.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    requests: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(
        self, *, bytes_read: int = 0, bytes_written: int = 0, requests: int = 0, retries: int = 0
    ) -> None:
        """Adds to the counters; from any thread.

        Args:
            bytes_read: that came from the store.
            bytes_written: that were sent to it.
            requests: that were made, retries too.
            retries: how many of these were another attempt.
        """
        with self._lock:
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written
            self.requests += requests
            self.retries += retries


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`num_bytes` bytes of the object `key` in `store`, from byte `start` on."""

    store: "Store"
    key: str
    start: int
    num_bytes: int


Piece: TypeAlias = bytes | ByteRange

CHUNK_BYTES = 8 * 2**20
"""Bytes that are hashed and written at a time: they are still in the processor's cache when they
are written."""


class Buffers(Protocol):
    """The bytes of one object, in order, without ever lying in memory as a whole.

    Every pass yields them anew (a write that failed may be tried again), and a buffer is valid
    until the next one is asked for.
    """

    size_bytes: int

    def __iter__(self) -> Iterator[memoryview]: ...


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_once` wrote, or would have written: size and hexadecimal SHA-256 of the caller's
    bytes.

    is_ours: whether they are what is there. inode: of the file that this call made, where the store
    is a file system.
    """

    size_bytes: int
    sha256: str
    is_ours: bool
    inode: int | None = field(default=None, compare=False)


@runtime_checkable
class Store(Protocol):
    """A place for objects. Implementations are picklable and safe to use from several threads and
    processes at once.

    A key and a longer key that has it as a folder ("a" and "a/b") must not both be used: file
    systems refuse it.
    """

    uri: str
    """Opens the same store again through `open_store` (given the same endpoint, where there is
    one)."""

    @property
    def traffic(self) -> Traffic:
        """Counters of this store object in this process."""

    def get(self, key: str) -> bytes:
        """The whole object. Raises: ObjectMissingError."""

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """Exactly `num_bytes` bytes from `start` on. Raises: ObjectMissingError; ShardCorruptError
        if the object ends before that."""

    def head(self, key: str) -> ObjectInfo | None:
        """Size of the object, None if there is none."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix` (text, not a folder: "units/L0" finds
        "units/L01/x"), sorted by key in UTF-8."""

    def put(self, key: str, data: bytes) -> None:
        """Creates or replaces the object, atomically and durably."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Creates the object if there is none, atomically. True if this call wrote it; of several
        writers exactly one gets True."""

    def write_once(self, key: str, buffers: Buffers) -> Written:
        """As `put_if_absent`, in one pass over the bytes: they are hashed while they are written,
        and never joined.

        Raises: what `buffers` raises; the object is then not there.
        """

    def compose(self, key: str, pieces: Iterable[Piece]) -> int:
        """Creates or replaces the object with all pieces in order; atomic, in bounded memory.
        Returns its size in bytes.

        Pieces may come from other stores. Raises: ObjectMissingError or ShardCorruptError for a
        piece that is not there in full; the object at `key` is then as it was before.
        """

    def delete(self, key: str) -> None:
        """Removes the object; an absent one is fine."""

    def sweep(self, older_than_s: float, prefix: str = "") -> int:
        """Removes what killed writers of keys under `prefix` left behind: unfinished files and
        uploads, never an object.

        Args:
            older_than_s: only what was begun longer ago than this, by the store's clock, because a
                live writer's work looks the same.
        Returns: how many were removed.
        """


def _flaw(key: str) -> str | None:
    parts = key.split("/")
    if not key:
        return "it is empty"
    if key.startswith("/"):
        return "it is absolute"
    if "" in parts:
        return "it has an empty part (double or trailing slash)"
    if "." in parts or ".." in parts:
        return 'it has a "." or ".." part'
    if "\\" in key or "\0" in key:
        return "it holds a backslash or a NUL"
    if any(part.startswith(TEMP_PREFIX) for part in parts):
        return (
            f"names that start with {TEMP_PREFIX} are kept for files that are still being written"
        )
    return None


def check_path(place: str, path: str) -> str:
    """Returns the path below a bucket or repository that a user's place names. Raises: ConfigError
    unless keys can begin with it."""
    if path and (reason := _flaw(path)):
        raise ConfigError(
            f"{place}: expected a path without empty parts, '.', '..' and backslashes, found"
            f" {path!r}: {reason}"
        )
    return path


def check_key(key: str) -> str:
    """Returns the key. Raises: P48Error unless it is a relative posix path without empty, "." or
    ".." parts, backslashes or NUL."""
    if (reason := _flaw(key)) is None:
        return key
    raise P48Error(
        f"bad object key {key!r}: {reason}; expected a relative path such as"
        " 'units/L007-E048-055/manifest.json'"
    )


def check_prefix(prefix: str) -> str:
    """Returns the prefix. Raises: P48Error unless some legal key can start with it."""
    if prefix:
        check_key(prefix + "x" if prefix.endswith("/") else prefix)
    return prefix


def check_range(key: str, start: int, num_bytes: int, size_bytes: int) -> None:
    """Lets a range pass that lies inside its object.

    Args:
        key: of the object, for messages.
        start: the first byte.
        num_bytes: from there on.
        size_bytes: of the whole object.
    Raises: ShardCorruptError, naming key, asked and found, where it does not; P48Error for negative
        numbers.
    """
    if start < 0 or num_bytes < 0:
        raise P48Error(
            f"bad range of {key}: start {start} and length {num_bytes} must not be negative"
        )
    if start + num_bytes > size_bytes:
        raise ShardCorruptError(
            f"{key}: asked for {num_bytes} bytes from byte {start} on (up to {start + num_bytes}),"
            f" found {size_bytes} bytes in the object"
        )


class Hashing:
    """Buffers cut into chunks of at most CHUNK_BYTES, each added to a SHA-256 as it is handed
    out."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers, self.digest, self.size_bytes = buffers, hashlib.sha256(), 0

    def __iter__(self) -> Iterator[memoryview]:
        """Raises: ShardCorruptError if the buffers hold more or less than they announced."""
        for buffer in self.buffers:
            whole = buffer.cast("B") if buffer.nbytes else memoryview(b"")
            for start in range(0, len(whole), CHUNK_BYTES):
                chunk = whole[start : start + CHUNK_BYTES]
                with trace.span("hash", len(chunk)):
                    self.digest.update(chunk)
                self.size_bytes += len(chunk)
                yield chunk
        if self.size_bytes != self.buffers.size_bytes:
            raise ShardCorruptError(
                f"expected {self.buffers.size_bytes} bytes to write, found {self.size_bytes}"
            )

    def written(self, is_ours: bool, inode: int | None = None) -> Written:
        """Once all was handed out."""
        return Written(self.size_bytes, self.digest.hexdigest(), is_ours, inode)
