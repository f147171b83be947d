"""What several processes of one node read, fetched once: files in a folder of the node, made by
whichever process comes first and mapped by all.

Eight workers of a node walk through the same 9.5 GB of a layer, and compress units from the same 60
GB of its tokens. A file lock decides who fetches; the others wait for it and map the finished file,
so its pages are in memory once. A process that is killed takes nothing along: its lock goes with
it, and whoever comes next fetches anew. Nothing here is state: a node that is lost loses a copy.

The folder also holds the notes of store.checked_files: which files of the node were hashed. So a
node has one even where nothing is cached.

Files go least recently used first when the next one would not fit. One that is still mapped keeps
its bytes until the last reader lets go (POSIX unlink).
"""

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from p48ray.store.base import ByteRange

log = logging.getLogger(__name__)

FOLDER_PREFIX = "p48ray-node-"
FETCH_BYTES = 16 * 2**20
FETCH_THREADS = 16
"""A bucket gives one connection about 100 MB/s."""
FREE_SHARE = 0.5
"""Of the disk's free space, that a cache without a limit of its own takes at most."""
REMOVE_TIMEOUT_S = 2.0
REMOVE_PAUSE_S = 0.02

IN_USE, _GONE = "in-use", ".gone"


class NodeCache:
    """Files shared by the processes of a node.

    Args:
        folder: on a disk of the node; made if it is not there.
        limit_bytes: of all files together; None: half of what the disk has free.
    """

    def __init__(self, folder: str | Path, limit_bytes: int | None = None) -> None:
        self.folder = Path(folder)
        self.alive = join_folder(self.folder)
        self.limit_bytes = (
            limit_bytes
            if limit_bytes is not None
            else int(FREE_SHARE * (shutil.disk_usage(folder).free + self.held_bytes()))
        )

    def open(self, name: str, num_bytes: int, fill: Callable[[int], None]) -> memoryview | None:
        """The file of that name, mapped read-only; made by `fill`, which gets a file descriptor to
        write `num_bytes` bytes to, if no process has made it yet.

        Returns: None where it has no room; the caller then reads for itself.
        Raises: whatever `fill` raises; the next caller tries again.
        """
        path = self.path(name)
        if (found := map_file(path, num_bytes)) is not None:
            return found
        with self.locked(path.with_suffix(".lock")):
            if (found := map_file(path, num_bytes)) is not None:  # made while this process waited
                return found
            unfinished = path.with_suffix(".unfinished")
            try:
                with self.locked(self.folder / "room.lock"):
                    if not self.make_room(num_bytes):
                        return None
                    reserve_file(unfinished, num_bytes)
                descriptor = os.open(unfinished, os.O_RDWR)
                try:
                    fill(descriptor)
                finally:
                    os.close(descriptor)
                os.replace(unfinished, path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
            return map_file(path, num_bytes)

    def path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}.data"

    def held_bytes(self) -> int:
        return sum(size for _, size, _ in self.files())

    def files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path), least recently used first. Unfinished files count with the bytes
        they will have."""
        found = []
        for path in (*self.folder.glob("*.data"), *self.folder.glob("*.unfinished")):
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        return sorted(found)

    def make_room(self, num_bytes: int) -> bool:
        """Remove files until as many bytes fit. Returns whether they do."""
        files = self.files()
        held = sum(size for _, size, _ in files)
        if num_bytes > self.limit_bytes:
            return False
        for _, size, path in files:
            if (
                held + num_bytes <= self.limit_bytes
                and shutil.disk_usage(self.folder).free > num_bytes
            ):
                break
            if path.suffix == ".data":
                path.unlink(missing_ok=True)
                held -= size
        return (
            held + num_bytes <= self.limit_bytes and shutil.disk_usage(self.folder).free > num_bytes
        )

    @contextlib.contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        """An exclusive lock between processes (and between threads: every call opens the file
        anew)."""
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of the folder; the last process removes it.

        The own lock goes first: of two processes that close at the same time, each would see the
        other's. One that was killed a moment ago holds its lock until the system has ended it.
        """
        os.close(self.alive)
        deadline = time.monotonic() + REMOVE_TIMEOUT_S
        while not sweep(self.folder) and time.monotonic() < deadline:
            time.sleep(REMOVE_PAUSE_S)


def join_folder(folder: Path) -> int:
    """Make the folder, if it is not there, and hold its `in-use` file under a shared lock. Returns
    the descriptor."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except FileExistsError:  # mkdir found it, and then no folder: somebody removes it just now
            if os.path.lexists(folder) and not folder.is_dir():
                raise
            continue
        with contextlib.suppress(FileNotFoundError):  # removed at this moment
            descriptor = os.open(folder / IN_USE, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(folder / IN_USE)):
                    return descriptor
            os.close(descriptor)


def node_folder(base: str | None, node: str) -> Path:
    """Where the cache of a node lies: under `base`, or the system's folder for temporary files."""
    return Path(base or tempfile.gettempdir()) / f"{FOLDER_PREFIX}{node}"


def sweep_unused(base: str | None) -> int:
    """Remove caches that killed processes left on this node. Returns how many."""
    folders = Path(base or tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*")
    removed = 0
    for folder in folders:
        if folder.name.endswith(_GONE):  # whoever removed it was killed
            shutil.rmtree(folder, ignore_errors=True)
        elif (folder / IN_USE).exists():
            removed += sweep(folder)
    return removed


def sweep(folder: Path) -> bool:
    """Remove a folder unless a process holds its `in-use` file under a shared lock.

    Returns: whether nobody uses it any more, which also holds where another process was quicker.
    """
    try:
        descriptor = os.open(folder / IN_USE, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:  # of another user
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder / IN_USE)):
            return False  # the one that was opened is gone, and somebody has joined anew
        # aside first: whoever joins while files go finds no half of a folder
        gone = folder.with_name(f"{folder.name}.{os.getpid()}{_GONE}")
        os.rename(folder, gone)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    finally:
        os.close(descriptor)
    shutil.rmtree(gone, ignore_errors=True)
    return True


def is_held(folder: Path) -> bool:
    """Whether a process has joined a folder and not left it, as far as locks tell."""
    try:
        descriptor = os.open(folder / IN_USE, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:  # of another user
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def reserve_file(path: Path, num_bytes: int) -> None:
    """An empty file of its final size, its blocks taken now: a full disk says so here, and not as a
    bus error in a mapping."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o600)
    try:
        if num_bytes:
            os.posix_fallocate(descriptor, 0, num_bytes)
    finally:
        os.close(descriptor)


def map_file(path: Path, num_bytes: int) -> memoryview | None:
    """The file mapped read-only, marked as used; None if it is not there."""
    try:
        with open(path, "rb") as file:
            os.utime(path, (time.time(), time.time()))
            if os.fstat(file.fileno()).st_size != num_bytes:
                raise ValueError(
                    f"{path}: expected {num_bytes} bytes, found {os.fstat(file.fileno()).st_size}"
                )
            return memoryview(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if num_bytes else b""
            )
    except FileNotFoundError:
        return None


def fetch(ranges: Iterable[tuple[ByteRange, int]], descriptor: int) -> None:
    """Copy ranges of a store to their places (byte offsets) in a file, several at once, FETCH_BYTES
    each at most in memory.

    Raises: what Store.get_range raises.
    """
    pieces = [
        (
            whole.store,
            whole.key,
            whole.start + first,
            min(FETCH_BYTES, whole.num_bytes - first),
            place + first,
        )
        for whole, place in ranges
        for first in range(0, whole.num_bytes, FETCH_BYTES)
    ]

    def copy(piece: tuple[object, str, int, int, int]) -> None:
        store, key, start, num_bytes, place = piece
        write_all(descriptor, store.get_range(key, start, num_bytes), place)  # type: ignore[attr-defined]

    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        for _ in pool.map(copy, pieces):
            pass


def write_all(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written
