"""run.scratch: what is lost of it is made again, to the same bytes, and nothing that is kept is
lost with it.

Units stand in for themselves as in test_keep: one is done once all its layer's inputs were read and
found to be those of the session's run.
"""

import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from p48ray.errors import P48Error, StageFailedError
from p48ray.estimate.plan_cost import estimate
from p48ray.run import run_root
from p48ray.run.scratch import own_folder
from p48ray.stages.prepare import Prepared
from p48ray.store.base import TEMP_PREFIX
from tests.conftest import REPO
from tests.jobs.command import attempts, snapshot
from tests.runner.test_keep import (
    PowerCutError,
    Watched,
    prepared_run,
    replay,
    run_locally,
)

pytestmark = pytest.mark.slow

NARROW_FRAMING = 1.08  # Arrow's headers are no small share of a narrow model's blobs


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@pytest.fixture(autouse=True)
def replayed(local_run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units as they are done, with the shards of the session's run."""
    return replay(local_run, monkeypatch)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def prepared_in(root: Path, disk: Path | None, keep: str = "units", **settings: str) -> Prepared:
    scratch = {} if disk is None else {"run__scratch": str(disk)}
    return prepared_run(root, run__keep=keep, **scratch, **settings)


def folder_of(prepared: Prepared) -> Path:
    folder = own_folder(prepared.plan, prepared.store.uri)
    assert folder is not None
    return folder


def blobs_in(folder: Path) -> set[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*.arrow"))
    return {key for key in found if run_root.is_blob(key)}


def assert_same_end(root: Path, local_run: Path) -> None:
    """The checkpoint's bytes, and records that are those of a run without scratch."""
    assert snapshot(root / "checkpoint") == snapshot(local_run / "checkpoint")
    for record in ("scales.json",):
        for path in (local_run / "activations").rglob(record):
            assert (root / path.relative_to(local_run)).read_bytes() == path.read_bytes(), path


def wipe(disk: Path) -> None:
    """All that is there, as when a disk is made anew; a writer may put a file beside it."""
    for path in list(disk.glob("*")):
        shutil.rmtree(path, ignore_errors=True)


class Counted:
    """Changes of run root and scratch together; `strike` is called once, after the n-th."""

    def __init__(self, prepared: Prepared, patch: pytest.MonkeyPatch, n: int) -> None:
        self.left, self.lock = n, threading.RLock()
        folder = own_folder(prepared.plan, prepared.store.uri)
        places = [Path(prepared.store.uri), *([folder] if folder else [])]
        self.watched = [Watched(place, patch, self.after) for place in places]

    def after(self, what: str, key: str) -> None:
        with self.lock:
            if not key.startswith(run_root.LOGS):
                self.left -= 1
                if not self.left:
                    self.strike()

    def strike(self) -> None:
        raise NotImplementedError


class Cut(Counted):
    def strike(self) -> None:
        """The power goes."""
        for watched in self.watched:
            watched.is_dark = True
        raise PowerCutError


class Wiped(Counted):
    def strike(self) -> None:
        """The disk is emptied under a run that goes on."""
        for path in list(Path(self.watched[1].root).parent.glob("*")):
            shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("keep", ["all", "units", "checkpoint"])
def test_run_with_scratch_leaves_what_one_without_it_leaves_and_blobs_apart(
    keep: str, root: Path, disk: Path, tmp_path: Path, local_run: Path
) -> None:
    without = tmp_path / "without"
    run_locally(prepared_in(without, None, keep))
    prepared = prepared_in(root, disk, keep)
    run_locally(prepared)
    assert_same_end(root, local_run)
    assert blobs_in(root) == set()
    assert blobs_in(folder_of(prepared)) == blobs_in(without)
    manifests = [path.relative_to(without) for path in without.rglob("part-*.json")]
    assert manifests and all((root / path).exists() for path in manifests)


@pytest.mark.parametrize(("keep", "least"), [("all", 0.9), ("units", 0.5)])
def test_scratch_holds_no_more_than_estimated(
    keep: str, least: float, root: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that come one after the other hold less than all at once."""
    prepared = prepared_in(root, disk, keep, run__num_workers="1")
    folder, most = folder_of(prepared), 0

    def measure(what: str, key: str) -> None:
        nonlocal most
        held = 0
        for path in folder.rglob("*.arrow"):
            with suppress(FileNotFoundError):
                held += path.stat().st_size
        most = max(most, held)

    Watched(folder, monkeypatch, measure)
    run_locally(prepared)
    e = estimate(prepared.plan, prepared.source, prepared.layout, prepared.shards)
    assert e.peak_stored_bytes == e.unit_bytes + e.checkpoint_bytes
    assert least <= most / e.peak_scratch_bytes <= NARROW_FRAMING


def test_run_cut_after_every_thirtieth_change_without_its_scratch_ends_in_the_same_bytes(
    root: Path, disk: Path, local_run: Path, replayed: list[str]
) -> None:
    """What was on the disk is gone each time. Units that were done stay done."""
    prepared, cuts, done = prepared_in(root, disk), 0, dict[str, bytes]()
    while cuts < 60:
        with pytest.MonkeyPatch.context() as patch, suppress(PowerCutError):
            Cut(prepared, patch, 30 + 7 * cuts)
            run_locally(prepared)
            break
        wipe(disk)
        assert not done.items() - attempts(root).items(), "a unit that was done is lost"
        done, cuts = attempts(root), cuts + 1
    assert cuts >= 4
    assert_same_end(root, local_run)
    assert blobs_in(root) == set()
    assert not done.items() - attempts(root).items()


@pytest.mark.parametrize("n", [20, 45, 70, 95, 120, 150, 170, 190])
def test_disk_emptied_under_a_run_that_goes_on_changes_no_byte(
    n: int, root: Path, disk: Path, local_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepared_in(root, disk)
    counted = Wiped(prepared, monkeypatch, n)
    run_locally(prepared)
    assert counted.left <= 0, "the run was shorter"
    assert_same_end(root, local_run)


class WipedBehindStreams(Wiped):
    """After so many manifests of parts."""

    def after(self, what: str, key: str) -> None:
        with self.lock:
            folders = (run_root.ACTIVATIONS, run_root.GRADIENTS)
            if key.startswith(folders) and key.endswith(".json") and "/part-" in key:
                self.left -= 1
                if not self.left:
                    self.strike()


def test_disk_emptied_between_streams_and_units_changes_no_byte(
    root: Path,
    disk: Path,
    local_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All layers are one segment, so that nobody looks for complete ones before it is too late."""
    prepared = prepared_in(root, disk, run__boundary_every="5")
    plan = prepared.plan
    counted = WipedBehindStreams(prepared, monkeypatch, 2 * len(plan.parts) * len(plan.layers) - 1)
    run_locally(prepared)
    assert counted.left <= 0
    assert "blobs that open layers' units read are gone" in caplog.text
    assert_same_end(root, local_run)


@pytest.mark.parametrize("seed", range(6))
def test_any_part_of_the_scratch_may_be_gone_beside_any_units(
    seed: int, root: Path, disk: Path, local_run: Path, replayed: list[str]
) -> None:
    rng = random.Random(seed)
    prepared = prepared_in(root, disk, keep="all", run__boundary_every=rng.choice(["1", "2"]))
    run_locally(prepared)
    units = sorted(attempts(root))
    lost = set(rng.sample(units, rng.randint(1, len(units))))
    for unit in lost:
        (root / run_root.unit_manifest(unit)).unlink()
    share = rng.random()
    for key in sorted(blobs_in(folder_of(prepared))):
        if rng.random() < share:
            (folder_of(prepared) / key).unlink()
    for name in ("checkpoint", "verification"):
        shutil.rmtree(root / name)
    before, _ = attempts(root), replayed.clear()
    run_locally(prepared)
    assert set(replayed) == lost and len(replayed) == len(lost)
    assert_same_end(root, local_run)
    assert not before.items() - attempts(root).items()


def test_of_layers_that_are_done_nothing_is_missed(
    root: Path, disk: Path, replayed: list[str]
) -> None:
    prepared = prepared_in(root, disk, keep="all")
    run_locally(prepared)
    wipe(disk)
    replayed.clear()
    run_locally(prepared)
    assert (replayed, blobs_in(disk)) == ([], set())


@pytest.mark.parametrize("n", [60, 110, 160])
def test_run_goes_on_with_another_scratch_or_none_and_with_what_lies_in_the_run_root(
    n: int, root: Path, tmp_path: Path, local_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run left in the run root is read there, and goes with what lies aside."""
    for disk in (tmp_path / "one", tmp_path / "two", None, tmp_path / "one"):
        prepared = prepared_in(root, disk)
        with pytest.MonkeyPatch.context() as patch, suppress(PowerCutError):
            Cut(prepared, patch, n)
            run_locally(prepared)
    run_locally(prepared_in(root, tmp_path / "one"))
    assert_same_end(root, local_run)
    assert blobs_in(root) == set(), "nothing of a run without scratch stays in the run root"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 KB. Only root can mount one."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "p48ray-scratch", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize("size_kb", [128, 400, 700])
def test_full_scratch_ends_the_run_with_its_name_and_room_lets_it_go_on(
    size_kb: int, small_disk: Path, root: Path, local_run: Path, tmp_path: Path
) -> None:
    """On another device than the run root, which has room all the time."""
    remount(small_disk, f"size={size_kb}k")
    prepared = prepared_in(root, small_disk, keep="all")
    with pytest.raises(StageFailedError) as caught:
        run_locally(prepared)
    assert "No space left on device" in str(caught.value)
    assert f"{folder_of(prepared)}/" in str(caught.value)
    assert not list(small_disk.rglob(f"{TEMP_PREFIX}*"))
    before = attempts(root)
    remount(small_disk, "size=64m")
    run_locally(prepared)
    assert_same_end(root, local_run)
    assert not before.items() - attempts(root).items()
    assert small_disk.stat().st_dev != root.stat().st_dev


def test_scratch_that_can_not_be_written_any_more_ends_the_run_and_loses_nothing(
    small_disk: Path, root: Path, local_run: Path
) -> None:
    """As a disk with an error, which the system mounts read-only."""
    remount(small_disk, "size=64m")
    prepared = prepared_in(root, small_disk, keep="all")
    with pytest.MonkeyPatch.context() as patch, suppress(PowerCutError):
        Cut(prepared, patch, 30)
        run_locally(prepared)
    remount(small_disk, "ro")
    with pytest.raises(P48Error, match=r"run\.scratch: .*(Read-only|may not be written)"):
        run_locally(prepared_in(root, small_disk, keep="all"))
    with pytest.raises(P48Error, match="Read-only file system"):
        run_locally(prepared)  # as one that was prepared before it was
    remount(small_disk, "rw")
    run_locally(prepared)
    assert_same_end(root, local_run)


def test_two_drivers_of_one_run_root_share_its_scratch(
    root: Path, disk: Path, local_run: Path
) -> None:
    errors: list[BaseException] = []

    def drive() -> None:
        try:
            run_locally(prepared_in(root, disk))
        except BaseException as error:  # noqa: BLE001 (told below)
            errors.append(error)

    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert not errors, errors
    assert_same_end(root, local_run)


def test_two_run_roots_of_one_plan_do_not_meet_in_one_scratch(
    root: Path, disk: Path, tmp_path: Path, local_run: Path
) -> None:
    """The one deletes what it has done with; the other still needs its own."""
    other = tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch, suppress(PowerCutError):
        Cut(prepared_in(other, disk), patch, 120)
        run_locally(prepared_in(other, disk))
    held = blobs_in(folder_of(prepared_in(other, disk)))
    run_locally(prepared_in(root, disk))
    assert held and blobs_in(folder_of(prepared_in(other, disk))) == held
    assert_same_end(root, local_run)
