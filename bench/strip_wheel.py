"""Wheels without what the job never uses, so that they can travel with the tree to a machine
without a network.

    python bench/strip_wheel.py IN_FOLDER OUT_FOLDER

Of ray go its libraries (RLlib, Data, Serve, Tune, Train, LLM), Java, the dashboard's page, and the
symbols of its programs where binutils' `strip` is installed. The dashboard's Python stays: a raylet
starts its agent whether there is a page or not. Of botocore stay the services that boto3 asks for
with S3 and its sessions. Other wheels are compressed anew and no more. What is left is a wheel:
RECORD names the files that are in it, by their digests.
"""

import base64
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARIES = ("rllib", "data", "serve", "tune", "train", "llm", "jars", "dashboard/client")
SERVICES = ("s3", "sts", "sso", "sso-oidc", "signin")
ELF = b"\x7fELF"


def is_kept(wheel: str, path: str) -> bool:
    """Whether a file of a wheel stays. wheel: its file name; path: of the file, inside it."""
    if wheel.startswith("ray-"):
        return (
            not path.startswith(tuple(f"ray/{name}/" for name in LIBRARIES))
            and "/tests/" not in path
        )
    if wheel.startswith("botocore-") and path.startswith("botocore/data/"):
        folder, _, rest = path.removeprefix("botocore/data/").partition("/")
        # without a rest: endpoints, partitions, retries and defaults
        return not rest or folder in SERVICES
    return True


def without_symbols(data: bytes) -> bytes:
    """A program or library without what only debuggers and linkers read. Raises: CalledProcessError
    of `strip`."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        stripped = f"{file.name}.stripped"
        try:
            subprocess.run(["strip", "--strip-unneeded", "-o", stripped, file.name], check=True)
            return Path(stripped).read_bytes()
        finally:
            Path(stripped).unlink(missing_ok=True)


def record_line(path: str, data: bytes) -> str:
    """What RECORD says of a file: path, SHA-256 in URL-safe base64 without padding, size in
    bytes."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(data)}\n"


def write_stripped(source: Path, target: Path) -> None:
    """Write a wheel with what stays of another. Raises: OSError, zipfile.BadZipFile,
    CalledProcessError."""
    is_binary_cut = source.name.startswith("ray-") and shutil.which("strip") is not None
    record, lines = None, []
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        for info in old.infolist():
            if info.filename.endswith(".dist-info/RECORD"):
                record = info
            elif not info.is_dir() and is_kept(source.name, info.filename):
                data = old.read(info)
                if is_binary_cut and data.startswith(ELF):
                    data = without_symbols(data)
                new.writestr(info, data, zipfile.ZIP_DEFLATED, compresslevel=9)
                lines.append(record_line(info.filename, data))
        if record is None:
            raise zipfile.BadZipFile(f"{source}: expected a wheel with a RECORD, found none")
        new.writestr(
            record,
            "".join([*lines, f"{record.filename},,\n"]),
            zipfile.ZIP_DEFLATED,
            compresslevel=9,
        )


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(source.glob("*.whl")):
        write_stripped(wheel, target / wheel.name)
        before, after = wheel.stat().st_size, (target / wheel.name).stat().st_size
        print(f"{before / 1e6:8.2f} -> {after / 1e6:6.2f} MB  {wheel.name}")


if __name__ == "__main__":
    main()
