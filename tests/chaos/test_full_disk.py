"""The disk is full: a real, small file system. The run ends and says so, leaves nothing half
written, and goes on once there is room."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from p48ray.run import run_root
from p48ray.stages.blobs import WRITERS
from p48ray.store.base import TEMP_PREFIX
from tests.chaos.checks import BLOBS, assert_blobs_are_whole, assert_same_end, blob_names
from tests.chaos.harness import DELETING, NUM_UNITS, PIECES, Hit, Scene, launch_slow

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FULL_IN = {"capture": 0.3, "gradients": 0.48, "compress": 0.71, "reduce": 0.86}
"""Stage -> size of the disk, as a share of what the whole run takes."""
FULL_BEHIND = 0.26  # in the second segment, with boundaries of the first deleted
ROOM = 4.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, to be made larger by `resize`. Only root can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "p48ray-chaos", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size_bytes: float) -> None:
    subprocess.run(["mount", "-o", f"remount,size={int(size_bytes)}", str(folder)], check=True)


@pytest.mark.chaos_long
@pytest.mark.parametrize("stage", FULL_IN)
def test_full_disk_ends_the_run_and_room_lets_it_go_on(
    stage: str,
    scene: Scene,
    small_disk: Path,
    undisturbed: dict[str, str],
    disk_bytes: int,
    tmp_path: Path,
) -> None:
    resize(small_disk, FULL_IN[stage] * disk_bytes)
    scene.root = str(small_disk / "run")
    driver = scene.submit()
    code = scene.finish()
    done = scene.manifests()
    scene.hits.append(Hit("full disk", stage, done, in_flight=NUM_UNITS - len(done), killed=0))
    assert code == 1, (driver.out, driver.err)
    assert "No space left on device" in driver.err
    assert f"{scene.root}/" in driver.err
    assert "Traceback" not in driver.err
    assert 0 < PIECES[stage].count(scene.listing()) < PIECES[stage].total
    assert run_root.REPORT not in scene.listing()
    assert not list(small_disk.rglob(f"{TEMP_PREFIX}*"))
    scene.site.mend()
    resize(small_disk, ROOM * disk_bytes)
    scene.submit()
    assert_same_end(scene, undisturbed, tmp_path)


def test_disk_full_while_many_blobs_are_on_their_way(
    scene: Scene, small_disk: Path, undisturbed: dict[str, str], disk_bytes: int, tmp_path: Path
) -> None:
    resize(small_disk, FULL_BEHIND * disk_bytes)
    log, start = tmp_path / "log", scene.start
    scene.root, scene.settings, scene.start = (
        str(small_disk / "run"),
        DELETING,
        launch_slow(0.4, log),
    )
    driver = scene.submit()
    assert scene.finish() == 1, (driver.out, driver.err)
    said = [json.loads(line) for line in log.read_text().splitlines()]
    failed, deleted = [s for s in said if "failed" in s], [s for s in said if "deleted" in s]
    assert max(s["behind"] for s in failed) >= WRITERS, (
        "too few blobs were on their way when the disk was full"
    )
    assert "No space left on device" in driver.err and "Traceback" not in driver.err
    assert any(
        s["failed"].split(": ")[0] in driver.err and f"{scene.root}/" in s["failed"] for s in failed
    ), driver.err
    assert not list(small_disk.rglob(f"{TEMP_PREFIX}*"))
    # What a reader would take is whole, and what a resume needs is there.
    keys = scene.listing()
    assert 0 < PIECES["capture"].count(keys) < PIECES["capture"].total
    for kind, record in BLOBS.items():
        manifests, data = blob_names(keys, kind)
        assert manifests <= data, kind
        assert_blobs_are_whole(scene.store, manifests, record)
    assert deleted, "nothing was deleted before the disk was full"
    assert all(s["is_replaced"] for s in deleted), deleted
    # of the layers that were complete by then
    tried = len(list(Path(scene.root, "units").glob("*/*/")))
    done = scene.manifests(keys)
    hit = Hit("full disk behind", "capture", done, in_flight=tried - len(done), killed=0)
    scene.hits.append(hit)
    scene.site.mend()
    resize(small_disk, ROOM * disk_bytes)
    scene.start = start
    scene.submit()
    assert_same_end(scene, undisturbed, tmp_path)
