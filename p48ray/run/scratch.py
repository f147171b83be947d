"""run.scratch: a folder for what streams leave, whose manifests stay in the run root.

    FOLDER/<digest of the units>-<digest of the run root's name>/
        scratch.json       which folder this is; a copy lies under scratch/ in the run root
        in-use             locked by every driver that works with it
        activations/ ...   blobs, by the keys that they would have in the run root

It may be a disk or the memory of one node, or a file system that nodes share: what a worker reads
in scratch.json says whether it sees the folder that the driver sees. What is lost of it counts as
missing, by its key (run.needs), and is made again where an open unit needs it. No setting of
numbers depends on it, so a run may go on with another folder, or with none.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple, Self

from p48ray.errors import ConfigError, P48Error
from p48ray.run import run_root
from p48ray.run.plan import RunPlan
from p48ray.run.records import Record, load_readable
from p48ray.store.base import Store
from p48ray.store.local import LocalStore
from p48ray.store.node_cache import IN_USE, is_held, join_folder, sweep
from p48ray.store.open import open_store
from p48ray.store.view import SplitStore

log = logging.getLogger(__name__)

RECORD = "scratch.json"
FOLDER_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}(\.\d+\.gone)?")
"""Of a run's folder; the ending is that of one that was being removed."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class ScratchRecord(Record):
    """A run's scratch folder. `id` is drawn when the folder is made, so that a folder of the same
    name on another node is another one."""

    schema_version: Literal[1] = 1
    id: str
    folder: str


def own_folder(plan: RunPlan, uri: str) -> Path | None:
    """Where a run's blobs lie; None without run.scratch. Of two run roots with one plan each has
    its own. Args: uri: of the run root."""
    if plan.config.run.scratch is None:
        return None
    root = hashlib.sha256(uri.encode()).hexdigest()
    folder = open_store(plan.config.run.scratch).uri
    return Path(folder) / f"{plan.units_digest[:16]}-{root[:8]}"


def with_scratch(plan: RunPlan, store: Store) -> Store:
    """A run root as the processes of its run see it: blobs go to run.scratch. Nothing is made."""
    folder = own_folder(plan, store.uri)
    return store if folder is None else SplitStore(store, LocalStore(folder), run_root.is_blob)


def read_record(folder: Path) -> ScratchRecord | None:
    """Which folder it is; None where there is none that can be read."""
    with suppress(P48Error):
        return ScratchRecord.load(LocalStore(folder), RECORD)
    return None


def make_record(folder: Path) -> ScratchRecord:
    """Which folder it is, drawn now if nobody did; the folder is made where it is not there.

    Raises: ConfigError where it can not be written.
    """
    drawn = ScratchRecord(id=uuid.uuid4().hex[:16], folder=str(folder))
    with named(folder):
        store = LocalStore(folder)
        if (found := read_record(folder)) is not None:
            return found
        if not store.put_if_absent(RECORD, drawn.to_json()) and read_record(folder) is None:
            store.put(RECORD, drawn.to_json())  # in the place of one that is cut
        return ScratchRecord.load(store, RECORD)


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """Raises: ConfigError that names the setting, for what the system or the store says."""
    try:
        yield
    except (P48Error, OSError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"run.scratch: {folder}: expected a folder to write to, found: {found}"
        ) from error


def note_scratch(plan: RunPlan, store: Store) -> None:
    """Leave word in the run root of where blobs lie, before there are any."""
    folder = own_folder(plan, store.uri)
    if folder is not None:
        record = make_record(folder)
        store.put_if_absent(run_root.scratch_record(record.id), record.to_json())


class ScratchUse(AbstractContextManager["ScratchUse"]):
    """A driver's hold on its run's folder; does nothing without run.scratch.

    At the end a folder without blobs goes, with its record, unless another driver holds it.
    """

    def __init__(self, plan: RunPlan, store: Store) -> None:
        self.store, self.folder = store, own_folder(plan, store.uri)
        self.lock: int | None = None

    def __enter__(self) -> Self:
        """Raises: ConfigError for a folder that can not be written."""
        if self.folder is None:
            return self
        with named(self.folder):
            try:
                self.lock = join_folder(self.folder)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                log.warning(
                    "run.scratch: %s: its file system has no locks: `p48ray clean --scratch` can"
                    " not see that a run holds it",
                    self.folder,
                )
        self.probe()
        return self

    def probe(self) -> str | None:
        """What a worker has to read in the folder (check_probe), written again where it is gone."""
        return None if self.folder is None else make_record(self.folder).id

    def __exit__(self, *_: object) -> None:
        if self.folder is None or self.lock is None:
            return
        os.close(self.lock)
        record = read_record(self.folder)
        # whoever can not remove it leaves it to `p48ray clean`
        with suppress(P48Error, OSError):
            keys = [info.key for info in LocalStore(self.folder).list()]
            has_blobs = any(map(run_root.is_blob, keys))
            if not has_blobs and sweep(self.folder) and record is not None:
                self.store.delete(run_root.scratch_record(record.id))


def check_probe(plan: RunPlan, uri: str, probe: str | None, node: str) -> None:
    """Whether this node sees the folder that the driver sees, and may write there.

    Args:
        plan, uri: of the run and its run root.
        probe: what the driver read in the folder (ScratchUse.probe).
        node: this one, for the message.
    Raises: ConfigError naming node and folder.
    """
    folder = own_folder(plan, uri)
    if folder is None or probe is None:
        return
    record = read_record(folder)
    if record is None or record.id != probe:
        found = "none that can be read" if record is None else "another folder's"
    elif not os.access(folder, os.W_OK | os.X_OK):
        found = "that it may not be written there"
    else:
        return
    raise ConfigError(
        f"run.scratch: {folder}: expected node {node} to find the {RECORD} that the driver wrote,"
        f" found {found}; a node's own disk serves a job of one node, the driver's own: name a"
        " folder that all nodes share, or null"
    )


class KnownScratch(NamedTuple):
    """A run root with those of its scratch folders that this machine sees, and the others."""

    store: Store
    folders: tuple[Path, ...]
    unseen: tuple[str, ...]

    @property
    def is_used(self) -> bool:
        return bool(self.folders or self.unseen)


def known_scratch(store: Store) -> KnownScratch:
    """For commands that look on from anywhere, whatever run.scratch was when the run began.

    Args: store: the run root.
    """
    keys = [info.key for info in store.list(run_root.SCRATCH)]
    folders, unseen = [], []
    for record in load_readable(ScratchRecord, store, keys).values():
        folder = Path(record.folder)
        if read_record(folder) == record:
            folders.append(folder)
            store = SplitStore(store, LocalStore(folder), run_root.is_blob)
        else:
            unseen.append(record.folder)
    return KnownScratch(store, tuple(folders), tuple(unseen))


class OtherRun(NamedTuple):
    """What a run of another plan, or of another run root, has in the same scratch folder."""

    folder: Path
    num_bytes: int
    is_held: bool  # by a driver

    def remove(self) -> None:
        """Raises: P48Error where it can not be removed."""
        try:
            if (self.folder / IN_USE).exists() and not self.folder.name.endswith(".gone"):
                sweep(self.folder)
            else:
                shutil.rmtree(self.folder)
        except OSError as error:
            raise P48Error(f"{self.folder}: can not be removed: {error.strerror}") from error


def other_runs(folders: Iterable[Path]) -> list[OtherRun]:
    """Beside a run's own folders, by name.

    Args: folders: the run's own, as this machine sees them.
    """
    own = set(folders)
    beside = {path for folder in own for path in folder.parent.iterdir()}
    return [
        OtherRun(path, sum(info.size_bytes for info in LocalStore(path).list()), is_held(path))
        for path in sorted(beside - own)
        if FOLDER_NAME.fullmatch(path.name) and path.is_dir()
    ]


def describe_others(others: Iterable[OtherRun], is_deleted: bool) -> Iterator[str]:
    """In lines, for a terminal. Args: is_deleted: what no driver holds goes now."""
    for other in others:
        state = "deleted" if is_deleted else "may go, with --scratch"
        state = "held by a driver" if other.is_held else state
        yield f"{other.folder}: of another run, {other.num_bytes:,} bytes: {state}"
