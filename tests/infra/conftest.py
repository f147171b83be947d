"""The files of infra/, as text and as data."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPO

INFRA = REPO / "infra"
PLACEHOLDER = re.compile(r"REPLACE(?:-[A-Z0-9]+)+")


def load_yaml(name: str) -> list[dict[str, Any]]:
    """The documents of one file."""
    return list(yaml.safe_load_all((INFRA / name).read_text()))


def tool(name: str) -> str:
    """A linter that pip installed beside this Python, or anywhere on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name}: not installed; it is in the dev extra")
    return found


def lint(name: str, *args: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool(name), *args], input=text, capture_output=True, text=True, timeout=60, check=False
    )
