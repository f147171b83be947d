"""Stripped wheels: what the job needs stays, pip installs them, and RECORD is true."""

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.strip_wheel import is_kept, write_stripped
from tests.conftest import REPO


@pytest.mark.parametrize(
    ("wheel", "path", "expected"),
    [
        ("ray-2.whl", "ray/_raylet.so", True),
        ("ray-2.whl", "ray/dashboard/agent.py", True),
        ("ray-2.whl", "ray/dashboard/client/build/index.html", False),
        ("ray-2.whl", "ray/jars/ray_dist.jar", False),
        ("ray-2.whl", "ray/train/__init__.py", False),
        ("botocore-1.whl", "botocore/session.py", True),
        ("botocore-1.whl", "botocore/data/endpoints.json", True),
        ("botocore-1.whl", "botocore/data/s3/2006-03-01/service-2.json.gz", True),
        ("botocore-1.whl", "botocore/data/s3control/2018-08-20/service-2.json.gz", False),
        ("pydantic-2.whl", "pydantic/data/ec2.py", True),
    ],
)
def test_what_stays(wheel: str, path: str, expected: bool) -> None:
    assert is_kept(wheel, path) is expected


def test_what_is_left_is_a_wheel_that_pip_installs(tmp_path: Path) -> None:
    source, target = (
        tmp_path / "ray-1.0-py3-none-any.whl",
        tmp_path / "out" / "ray-1.0-py3-none-any.whl",
    )
    target.parent.mkdir()
    files = {
        "ray/__init__.py": b"x = 1\n",
        "ray/jars/a.jar": b"jar",
        "ray-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: ray\nVersion: 1.0\n",
        "ray-1.0.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        "ray-1.0.dist-info/RECORD": b"ray/jars/a.jar,,\n",
    }
    with zipfile.ZipFile(source, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    write_stripped(source, target)
    with zipfile.ZipFile(target) as wheel:
        record = [
            line.split(",") for line in wheel.read("ray-1.0.dist-info/RECORD").decode().splitlines()
        ]
        assert [r[0] for r in record] == wheel.namelist() == [n for n in files if "jars" not in n]
        for name, digest, size in record[:-1]:
            data = wheel.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={expected}", len(data))
    options = ["--quiet", "--no-index", "--no-deps", "--target", str(tmp_path / "deps")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(target)], check=True)
    assert (tmp_path / "deps" / "ray" / "__init__.py").read_bytes() == files["ray/__init__.py"]


def test_every_package_of_the_bundle_has_a_pin() -> None:
    script = (REPO / "bench" / "device_bundle.sh").read_text()
    listed = script.split("PACKAGES=(\n")[1].split("\n)")[0]
    packages = [name for line in listed.splitlines() for name in line.split("#")[0].split()]
    pins = {
        line.split("==")[0]
        for line in (REPO / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert "ray" in packages
    assert set(packages) <= pins
