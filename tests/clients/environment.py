"""The serving clients' environment: made once for a set of pins and a Python, kept between
checkouts, named by the digest of both.

    python3 tests/clients/environment.py          makes it where it is missing, prints its folder
    python3 tests/clients/environment.py --list   what there is

It lies in $XDG_CACHE_HOME/p48ray (~/.cache/p48ray), 2.4 GB each. One that nobody has used for
thirty days is deleted when another is made. With the standard library alone, because it runs before
anything is installed.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PINS = Path(__file__).resolve().parents[2] / "constraints-clients.txt"
READY = ".ready"  # written last: what lacks it was never finished
UNUSED_S = 30 * 24 * 3600.0


def cache() -> Path:
    """Where environments are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p48ray"


def digest(pins: bytes) -> str:
    """Of the pins, and of the Python that an environment is bound to."""
    return hashlib.sha256(
        b"\0".join([pins, sys.version.encode(), os.path.realpath(sys.executable).encode()])
    ).hexdigest()[:16]


def build(folder: Path, pins: Path) -> None:
    """A virtual environment with what is pinned; --no-deps, because all is."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, stdout=sys.stderr)
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--requirement",
        pins,
    ]
    subprocess.run(pip, check=True, stdout=sys.stderr)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time; another waits here. The kernel lets go of the lock of one that
    dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environment(pins: Path, make: Callable[[Path, Path], None] = build) -> Path:
    """The folder of the environment with these pins, made if it is not there or was never finished.

    Raises: subprocess.CalledProcessError if pip can not install what is pinned; what it left is
        made anew the next time.
    """
    kept = cache()
    folder = kept / f"clients-{digest(pins.read_bytes())}"
    with alone(kept):
        if not (folder / READY).exists():
            print(f"making {folder}: some minutes, 2.4 GB", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
            make(folder, pins)
            forget(kept, folder)
        (folder / READY).touch()  # its time is that of the last use
    return folder


def forget(kept: Path, used: Path) -> None:
    """Delete what was not used for long."""
    for other in kept.glob("clients-*"):
        marker = other / READY
        last_s = (marker if marker.exists() else other).stat().st_mtime
        if other != used and time.time() - last_s > UNUSED_S:
            print(
                f"deleting {other}, unused for {(time.time() - last_s) / 86400:.0f} days",
                file=sys.stderr,
            )
            shutil.rmtree(other, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print what is kept, and make nothing")
    if parser.parse_args().list:
        print(*sorted(cache().glob("clients-*")), sep="\n")
    else:
        print(environment(PINS))


if __name__ == "__main__":
    main()
