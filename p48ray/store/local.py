"""LocalStore: objects as files under a folder, on a local disk or a file system shared by all
nodes.

An object is written to a temporary file beside its place, checked for size, flushed to disk, and
renamed: a killed writer leaves at most a hidden temporary file, never a part of an object. The
first writer of `put_if_absent` is decided by `link`, which fails if the name is taken (NFS keeps
both promises too). Links to files are followed (the Hub's cache is made of them), links to folders
are not listed.
"""

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from p48ray import trace
from p48ray.errors import ObjectMissingError, P48Error, ShardCorruptError, TransientStoreError
from p48ray.store.base import (
    TEMP_PREFIX,
    Buffers,
    ByteRange,
    Hashing,
    ObjectInfo,
    Piece,
    Traffic,
    Written,
    check_key,
    check_prefix,
    check_range,
)

COPY_BYTES = 16 * 2**20
"""Bytes held in memory while a piece is copied through this process."""

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_RETRIABLE = frozenset({errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})
"""What a shared file system answers when a server restarts or a handle went stale; everything else
(full, forbidden) will not pass."""
_WRITE_RETRIABLE = _RETRIABLE | {errno.ENOENT}
"""While a file is written its folder is there, or was removed under it by somebody who empties a
disk; the next attempt makes it again."""


class LocalStore:
    """Objects are files under `root`, which is created by the first write; until then the store
    reads as empty."""

    def __init__(self, root: str | Path) -> None:
        """Args: root: folder; a relative one is resolved now, against the current folder."""
        self.root = os.path.abspath(root)
        self.uri = self.root
        self.traffic = Traffic()

    def __reduce__(self) -> tuple[type["LocalStore"], tuple[str]]:
        """Counters belong to the process."""
        return (type(self), (self.root,))

    def __repr__(self) -> str:
        """As it is typed."""
        return f"LocalStore({self.root!r})"

    def path(self, key: str) -> str:
        """The file of an object, for readers that map files into memory. Raises: P48Error for a bad
        key."""
        return os.path.join(self.root, check_key(key))

    def get(self, key: str) -> bytes:
        """See Store.get."""
        path = self.path(key)
        with _errors_name(path), self._missing_is_named(key), open(path, "rb") as file:
            data = file.read()
        self.traffic.add(bytes_read=len(data), requests=1)
        return data

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """See Store.get_range."""
        path = self.path(key)
        with _errors_name(path), self._missing_is_named(key), open(path, "rb", buffering=0) as file:
            check_range(key, start, num_bytes, os.fstat(file.fileno()).st_size)
            data = _read_exactly(file.fileno(), key, start, num_bytes)
        self.traffic.add(bytes_read=num_bytes, requests=1)
        return data

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        """As `get_range`, filling `target` (writable bytes) instead of new memory."""
        path = self.path(key)
        with _errors_name(path), self._missing_is_named(key), open(path, "rb", buffering=0) as file:
            check_range(key, start, len(target), os.fstat(file.fileno()).st_size)
            done = 0
            while done < len(target):
                step = os.preadv(file.fileno(), [target[done:]], start + done)
                if not step:
                    raise _cut(key, start, len(target), done)
                done += step
        self.traffic.add(bytes_read=len(target), requests=1)

    def head(self, key: str) -> ObjectInfo | None:
        """See Store.head."""
        path = self.path(key)
        with _errors_name(path), suppress(*_ABSENT):
            if os.path.isfile(path):
                return ObjectInfo(key, os.stat(path).st_size)
        return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store.list. Only the folders that the prefix leaves open are walked."""
        folder = check_prefix(prefix).rpartition("/")[0]
        with _errors_name(os.path.join(self.root, prefix)):
            found = [info for info in self._walk(folder) if info.key.startswith(prefix)]
        return iter(sorted(found, key=lambda info: os.fsencode(info.key)))

    def put(self, key: str, data: bytes) -> None:
        """See Store.put."""
        self.compose(key, (data,))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See Store.put_if_absent."""
        path = self.path(key)
        if os.path.lexists(path):
            return False
        return self._write(path, (data,), _link)[1]

    def write_once(self, key: str, buffers: Buffers) -> Written:
        """See Store.write_once. Where there is an object already the bytes are hashed and nothing
        is written."""
        path, hashing = self.path(key), Hashing(buffers)
        if os.path.lexists(path):
            for _ in hashing:
                pass
            return hashing.written(is_ours=False)
        _, is_ours, inode = self._write(path, hashing, _link)
        return hashing.written(is_ours, inode)

    def compose(self, key: str, pieces: Iterable[Piece]) -> int:
        """See Store.compose. Pieces of other LocalStores are copied by the kernel, which shares
        blocks where the file system can."""
        return self._write(self.path(key), pieces, _replace)[0]

    def delete(self, key: str) -> None:
        """See Store.delete. Folders stay: removing an empty one would race with a writer who just
        made it."""
        path = self.path(key)
        with _errors_name(path), suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)

    def sweep(self, older_than_s: float, prefix: str = "") -> int:
        """See Store.sweep. The age of a file is that of its last write. A prefix inside a folder's
        name finds the folder's files only."""
        start = os.path.join(self.root, check_prefix(prefix))
        with _errors_name(self.root):
            found = [
                path for path in self._temp_files(os.path.dirname(start)) if path.startswith(start)
            ]
            return sum(_remove_if_older(path, older_than_s) for path in found)

    def _write(
        self, path: str, pieces: Iterable[Piece | memoryview], publish: Callable[[str, str], bool]
    ) -> tuple[int, bool, int]:
        """Writes the pieces to a temporary file and gives it its name. Returns: (size in bytes,
        whether `publish` took effect, inode)."""
        folder = os.path.dirname(path)
        temp = os.path.join(folder, f"{TEMP_PREFIX}{os.getpid()}-{uuid.uuid4().hex}")
        with _errors_name(path, _WRITE_RETRIABLE):
            self._make_folder(folder)
            try:
                with open(temp, "xb", buffering=0) as file:
                    size_bytes = sum(self._write_piece(file.fileno(), piece) for piece in pieces)
                    with trace.span("write", what=path):
                        os.fsync(file.fileno())
                    found = os.fstat(file.fileno())
                if found.st_size != size_bytes:
                    raise ShardCorruptError(
                        f"{path}: wrote {size_bytes} bytes, the file system holds {found.st_size};"
                        " nothing was replaced"
                    )
                is_published = publish(temp, path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temp)
            _sync_folder(folder)
        return size_bytes, is_published, found.st_ino

    def _write_piece(self, target: int, piece: Piece | memoryview) -> int:
        """Appends one piece to an open file. Returns its size. Raises: ShardCorruptError or
        ObjectMissingError if it is not all there."""
        if isinstance(piece, ByteRange) and isinstance(piece.store, LocalStore):
            return _copy_from_file(target, piece, piece.store)
        num_bytes = (
            _write_streamed(target, piece)
            if isinstance(piece, ByteRange)
            else _write_all(target, piece)
        )
        self.traffic.add(bytes_written=num_bytes, requests=1)
        return num_bytes

    def _make_folder(self, folder: str) -> None:
        """Creates a folder under the root, and makes the new names durable: a manifest must not
        vanish with its folder."""
        if os.path.isdir(folder):
            return
        os.makedirs(folder, exist_ok=True)
        while folder.startswith(self.root):
            folder = os.path.dirname(folder)
            _sync_folder(folder)
            if folder == os.path.dirname(folder):
                break

    def _walk(self, folder: str) -> Iterator[ObjectInfo]:
        """All objects under one folder of the store, in any order. A folder that is not there, or
        vanishes meanwhile, is empty."""
        try:
            entries = list(os.scandir(os.path.join(self.root, folder)))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith(TEMP_PREFIX):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(key)
            elif entry.is_file():
                with suppress(FileNotFoundError):
                    yield ObjectInfo(key, entry.stat().st_size)

    def _temp_files(self, folder: str) -> Iterator[str]:
        """Every unfinished file in a folder and below it."""
        with suppress(FileNotFoundError, NotADirectoryError):
            for entry in list(os.scandir(folder)):
                if entry.is_dir(follow_symlinks=False):
                    yield from self._temp_files(entry.path)
                elif entry.name.startswith(TEMP_PREFIX):
                    yield entry.path

    @contextmanager
    def _missing_is_named(self, key: str) -> Iterator[None]:
        try:
            yield
        except _ABSENT as error:
            raise ObjectMissingError(f"{key}: no such object in {self.uri}") from error


@contextmanager
def _errors_name(path: str, retriable: frozenset[int] = _RETRIABLE) -> Iterator[None]:
    """Turns errors of the operating system into ours, naming the path."""
    try:
        yield
    except OSError as error:
        kind = TransientStoreError if error.errno in retriable else P48Error
        raise kind(
            f"{path}: {error.strerror or error}"
            f" ({errno.errorcode.get(error.errno or 0, 'no errno')})"
        ) from error


def _remove_if_older(path: str, older_than_s: float) -> bool:
    """Removes a file. False if it is younger, or its writer just gave it its name or removed it."""
    with suppress(FileNotFoundError):
        if time.time() - os.stat(path, follow_symlinks=False).st_mtime > older_than_s:
            os.unlink(path)
            return True
    return False


def _replace(temp: str, path: str) -> bool:
    """Publishes by renaming over whatever is there."""
    os.replace(temp, path)
    return True


def _link(temp: str, path: str) -> bool:
    """Publishes only if the name is free: of several callers, in any process, the kernel lets one
    pass."""
    try:
        os.link(temp, path)
    except FileExistsError:
        return False
    return True


def _write_streamed(target: int, piece: ByteRange) -> int:
    """Appends a range of another kind of store, in bounded reads. Returns its size."""
    for start in range(piece.start, piece.start + piece.num_bytes, COPY_BYTES):
        num_bytes = min(COPY_BYTES, piece.start + piece.num_bytes - start)
        _write_all(target, piece.store.get_range(piece.key, start, num_bytes))
    return piece.num_bytes


def _copy_from_file(target: int, piece: ByteRange, store: LocalStore) -> int:
    """Appends a range of another file, inside the kernel where it can (Linux; not across some file
    systems), through memory otherwise."""
    path = store.path(piece.key)
    with (
        _errors_name(path),
        store._missing_is_named(piece.key),
        open(path, "rb", buffering=0) as source,
    ):
        check_range(piece.key, piece.start, piece.num_bytes, os.fstat(source.fileno()).st_size)
        copied = _copy_in_kernel(target, source.fileno(), piece.start, piece.num_bytes)
        while copied < piece.num_bytes:
            num_bytes = min(COPY_BYTES, piece.num_bytes - copied)
            copied += _write_all(
                target, _read_exactly(source.fileno(), piece.key, piece.start + copied, num_bytes)
            )
    return copied


def _copy_in_kernel(target: int, source: int, start: int, num_bytes: int) -> int:
    """Bytes copied before the kernel declined, which may be none. A full disk is no reason to try
    another way."""
    copied = 0
    while copied < num_bytes and hasattr(os, "copy_file_range"):
        try:
            step = os.copy_file_range(source, target, num_bytes - copied, start + copied)
        except OSError as error:
            if error.errno in (
                errno.EXDEV,
                errno.EINVAL,
                errno.ENOSYS,
                errno.EOPNOTSUPP,
                errno.EPERM,
                errno.EBADF,
            ):
                break
            raise
        if step == 0:
            break
        copied += step
    return copied


def _read_exactly(source: int, key: str, start: int, num_bytes: int) -> bytes:
    """One system call moves at most 2 GiB, and may move less. Raises: ShardCorruptError if the file
    was cut meanwhile."""
    parts: list[bytes] = []
    missing = num_bytes
    while missing:
        part = os.pread(source, missing, start + num_bytes - missing)
        if not part:
            raise _cut(key, start, num_bytes, num_bytes - missing)
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _cut(key: str, start: int, num_bytes: int, found: int) -> ShardCorruptError:
    return ShardCorruptError(
        f"{key}: asked for {num_bytes} bytes from byte {start} on, found {found}: cut while read"
    )


def _write_all(target: int, data: bytes | memoryview) -> int:
    """Appends all bytes; the system may take fewer than it was given."""
    rest = memoryview(data)
    with trace.span("write", len(data)):
        while rest:
            rest = rest[os.write(target, rest) :]
    return len(data)


def _sync_folder(folder: str) -> None:
    """Makes the names in a folder durable. Where one cannot be flushed, names are as durable as the
    file system makes them."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
