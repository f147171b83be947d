"""The image's recipe: lint, and what it takes from this repository."""

import fnmatch
import re
import tomllib

from tests.conftest import REPO
from tests.infra.conftest import INFRA, lint

DOCKERFILE = (INFRA / "Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.M))


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} (.*)$", INSTRUCTIONS, flags=re.M)


def test_hadolint_finds_nothing() -> None:
    result = lint("hadolint", "--no-color", str(INFRA / "Dockerfile"))
    assert (result.returncode, result.stdout) == (0, "")


def test_hadolint_would_find_an_unpinned_base() -> None:
    unpinned = re.sub(r"^FROM .*$", "FROM ubuntu", DOCKERFILE, flags=re.M)
    assert "DL3006" in lint("hadolint", "--no-color", "-", text=unpinned).stdout


def test_base_is_pinned_to_a_cuda_release_and_the_missing_digest_is_admitted() -> None:
    assert [
        re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", base) is not None
        for base in instructions("FROM")
    ] == [True]
    assert "digest" in DOCKERFILE


def test_container_runs_as_a_user_with_a_number() -> None:
    assert instructions("USER")[-1] == "1000"
    assert re.search(r"useradd .*--uid 1000", INSTRUCTIONS)


def test_every_install_holds_to_the_constraints_and_pulls_no_dependency_past_them() -> None:
    installs = re.findall(r"pip install ([^&]*)", INSTRUCTIONS)
    assert len(installs) == 3
    for options in installs:
        assert "--constraint constraints.txt" in options or "--no-deps" in options, options


def test_layers_go_from_what_changes_least() -> None:
    """torch before the other dependencies, both before the code."""
    steps = re.findall(r"^(COPY|RUN) (.*)$", INSTRUCTIONS, flags=re.M)
    copies = [body.split()[1] for kind, body in steps if kind == "COPY"]
    assert copies == ["constraints.txt", "pyproject.toml", "."]
    order = [
        index
        for index, (_, body) in enumerate(steps)
        if "pip install" in body or body.endswith(" . ./")
    ]
    assert (
        "torch.txt" in steps[order[0]][1]
        and "dependencies.txt" in steps[order[1]][1]
        and "--no-deps" in steps[order[3]][1]
    )


def test_ray_of_the_image_is_pinned_and_its_helpers_are_there() -> None:
    constraints = (REPO / "constraints.txt").read_text()
    assert re.search(r"^ray==2\.60\.\d+$", constraints, flags=re.M) and re.search(
        r"^torch==", constraints, flags=re.M
    )
    packages = re.search(r"install -y --no-install-recommends (.*?)&&", INSTRUCTIONS)
    assert packages and {"wget", "procps", "rsync", "openssh-client", "ca-certificates"} <= set(
        packages[1].split()
    )
    assert "PATH=/opt/venv/bin:$PATH" in INSTRUCTIONS


def test_context_is_an_allow_list_that_has_what_the_build_and_the_job_need() -> None:
    lines = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    texts = {project["readme"], *project["license-files"]}
    code = {"p48ray", "jobs", "configs", "examples"}
    assert allowed == {"constraints.txt", "pyproject.toml"} | texts | code
    assert all((REPO / name).exists() for name in allowed)
    denied = [rule for rule in rules[1:] if not rule.startswith("!")]
    assert any(fnmatch.fnmatch("p48ray/numerics/__pycache__", rule) for rule in denied)
