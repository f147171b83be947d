"""Which files were held against their digests already, so that a node hashes a file once, however
many of its workers map it.

A file is known by its device, inode, size, and times of last write and last change: whoever writes
to it, or puts another in its place, makes it a new one. Processes of a node tell each other by
empty files in a folder of the node, made under a lock, so that one hashes and the others wait.
Nothing here is state: a lost note costs one more reading.
"""

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckedFiles:
    """Notes of one node, or of this process alone.

    Args:
        folder: where processes of the node leave their notes (it is there); None: this process
            keeps its own.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.known: set[str] = set()
        self.lock = threading.Lock()

    def check_once(self, facts: os.stat_result, sha256: str, check: Callable[[], None]) -> None:
        """Run the check unless this file is known to have that digest. Raises: what the check
        raises; the next caller tries again."""
        name = note_name(facts, sha256)
        if name in self.known:
            return
        with self.locked(name):
            if not self.is_noted(name):
                check()
                self.note(name)

    def trust(self, path: str, inode: int, size_bytes: int, sha256: str) -> None:
        """Note a file that this process has just written, hashing what it wrote. One of another
        inode or size is another's by now.

        Args:
            path: where it was put.
            inode, size_bytes: of the file that was written.
            sha256: of what was written, in hexadecimal.
        """
        facts = os.stat(path)
        if (facts.st_ino, facts.st_size) == (inode, size_bytes):
            self.note(note_name(facts, sha256))

    def is_noted(self, name: str) -> bool:
        if (
            name not in self.known
            and self.folder is not None
            and (self.folder / f"{name}.checked").exists()
        ):
            self.known.add(name)
        return name in self.known

    def note(self, name: str) -> None:
        self.known.add(name)
        if self.folder is not None:
            (self.folder / f"{name}.checked").touch()

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One checker of a file at a time: among the node's processes, or this one's threads."""
        if self.folder is None:
            with self.lock:
                yield
            return
        descriptor = os.open(self.folder / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def note_name(facts: os.stat_result, sha256: str) -> str:
    """One name for a file as it is now and the digest that it was found to have."""
    text = (
        f"{facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
        f" {sha256}"
    )
    return hashlib.sha256(text.encode()).hexdigest()[:40]
