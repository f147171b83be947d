"""infra/mount_scratch.sh around pretended system commands: which disks it takes, and that it does
nothing twice."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.infra.conftest import lint

SCRIPT = REPO / "infra" / "mount_scratch.sh"
DISKS = {
    0: "/dev/nvme0n1 Amazon Elastic Block Store\n",
    1: "/dev/nvme0n1 Amazon Elastic Block Store\n/dev/nvme1n1 Amazon EC2 NVMe Instance Storage\n",
    3: "/dev/nvme0n1 Amazon Elastic Block Store\n"
    + "".join(f"/dev/nvme{n}n1 Amazon EC2 NVMe Instance Storage\n" for n in (1, 2, 3)),
}


def test_shellcheck_finds_nothing() -> None:
    result = lint("shellcheck", str(SCRIPT))
    assert result.returncode == 0, result.stdout


def run(tmp_path: Path, num_disks: int, is_mounted: bool) -> list[str]:
    """What it called that changes a disk, in order."""
    commands, log = tmp_path / "bin", tmp_path / "log"
    commands.mkdir(exist_ok=True)
    log.write_text("")
    bodies = {
        "lsblk": f"cat <<'END'\n{DISKS[num_disks]}END",
        "mountpoint": f"exit {0 if is_mounted else 1}",
    }
    for name in ("mdadm", "mkfs.xfs", "mount"):
        bodies[name] = f'echo {name} "$@" >> {log}'
    for name, body in bodies.items():
        path = commands / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    env = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SCRATCH": str(tmp_path / "scratch"),
    }
    subprocess.run(["bash", str(SCRIPT)], env=env, check=True, capture_output=True)
    return log.read_text().splitlines()


@pytest.mark.parametrize(
    ("num_disks", "expected"),
    [
        (0, []),
        (1, ["mkfs.xfs -q -f -K /dev/nvme1n1", "mount -o noatime /dev/nvme1n1 {folder}"]),
        (
            3,
            [
                "mdadm --create /dev/md/scratch --run --level=0 --raid-devices=3 /dev/nvme1n1"
                " /dev/nvme2n1 /dev/nvme3n1",
                "mkfs.xfs -q -f -K /dev/md/scratch",
                "mount -o noatime /dev/md/scratch {folder}",
            ],
        ),
    ],
)
def test_instance_disks_become_one_file_system_and_the_root_disk_is_left_alone(
    num_disks: int, expected: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "scratch"
    assert run(tmp_path, num_disks, is_mounted=False) == [
        line.format(folder=folder) for line in expected
    ]
    assert folder.stat().st_mode & 0o7777 == 0o1777


def test_what_is_mounted_is_left_alone(tmp_path: Path) -> None:
    assert run(tmp_path, 3, is_mounted=True) == []
