"""infra/README.md: complete, and true where it can be checked."""

import re

import pytest

from tests.conftest import REPO
from tests.infra.conftest import INFRA, PLACEHOLDER

README = (INFRA / "README.md").read_text()
FILES = sorted(path.name for path in INFRA.iterdir() if path.is_file() and path.name != "README.md")


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_presented_and_its_placeholders_explained(name: str) -> None:
    assert f"]({name})" in README
    rows = {
        found
        for line in README.splitlines()
        if line.startswith("| `")
        for found in PLACEHOLDER.findall(line.split("|")[1])
    }
    assert set(PLACEHOLDER.findall((INFRA / name).read_text())) <= rows


def test_no_explained_placeholder_is_gone() -> None:
    used = {found for name in FILES for found in PLACEHOLDER.findall((INFRA / name).read_text())}
    assert set(PLACEHOLDER.findall(README)) == used


def test_links_and_configurations_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (INFRA / link).exists(), link
    for config in re.findall(r"--config (\S+)", README):
        assert (REPO / config).is_file(), config


def test_what_was_not_run_is_said_for_every_file() -> None:
    section = README.split("## What was not run")[1].split("\n## ")[0]
    assert "Nothing here was run on a cloud" in section
    assert all(f"`{name}`" in section for name in FILES if name != "Dockerfile.dockerignore")


def test_days_of_the_lifecycle_are_those_of_the_file() -> None:
    rules = (INFRA / "lifecycle.json").read_text()
    (abort,) = re.findall(r'"DaysAfterInitiation": (\d+)', rules)
    (expire,) = set(re.findall(r'"Days": (\d+)', rules))
    section = README.split("**Lifecycle.**")[1].split("\n\n**")[0]
    assert (
        f"after {abort} days" in section
        and f"after {expire}," in section
        and f"within {expire} days" in section
    )
