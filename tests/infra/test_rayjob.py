"""kuberay-rayjob.yaml: the fields that KubeRay's operator checks, and that what it runs exists in
this repository."""

import shlex
from typing import Any

import pytest
import ray
import typer
import typer.main

from jobs import compress
from p48ray.config.load import load_config
from tests.conftest import REPO
from tests.infra.conftest import load_yaml

pytestmark = pytest.mark.ray


@pytest.fixture
def documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in load_yaml("kuberay-rayjob.yaml")}


@pytest.fixture
def spec(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return documents["RayJob"]["spec"]


@pytest.fixture
def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}


def pods(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group -> pod spec, the head's under `head`."""
    cluster = spec["rayClusterSpec"]
    found = {"head": cluster["headGroupSpec"]["template"]["spec"]}
    return found | {
        group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]
    }


def flags_of_the_job() -> set[str]:
    app = typer.Typer()
    app.command()(compress.main)
    return {option for parameter in typer.main.get_command(app).params for option in parameter.opts}


def parse_entrypoint(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """(flag, value) pairs after `python jobs/compress.py`."""
    program, script, *arguments = shlex.split(spec["entrypoint"])
    assert (program, script) == ("python", "jobs/compress.py") and (REPO / script).is_file()
    return list(zip(arguments[::2], arguments[1::2], strict=True))


def test_job_and_its_service_account_are_what_the_operator_and_the_pods_name(
    documents: dict[str, dict[str, Any]],
) -> None:
    assert documents["RayJob"]["apiVersion"] == "ray.io/v1"
    assert documents["ServiceAccount"]["apiVersion"] == "v1"
    name = documents["ServiceAccount"]["metadata"]["name"]
    assert {pod["serviceAccountName"] for pod in pods(documents["RayJob"]["spec"]).values()} == {
        name
    }


def test_entrypoint_has_flags_that_the_job_has_and_a_file_that_exists(spec: dict[str, Any]) -> None:
    pairs = parse_entrypoint(spec)
    assert {flag for flag, _ in pairs} <= flags_of_the_job()
    values = dict(pairs)
    assert values["--run-root"].startswith("s3://")
    config = load_config(
        REPO / values["--config"],
        tuple(value for flag, value in pairs if flag == "--set"),
        values["--run-root"],
    )
    assert config.run.root == values["--run-root"] and config.source.checkpoint.startswith("s3://")


def test_entrypoint_needs_no_quoting(spec: dict[str, Any]) -> None:
    """The operator pastes it into a shell command of its own."""
    assert shlex.join(shlex.split(spec["entrypoint"])) == spec["entrypoint"]


def test_lost_head_is_submitted_again_and_the_cluster_goes_when_the_job_ends(
    spec: dict[str, Any],
) -> None:
    assert spec["submissionMode"] == "SidecarMode" and spec["backoffLimit"] > 0
    # refused in this mode
    assert not spec.keys() & {
        "submitterPodTemplate",
        "submitterConfig",
        "clusterSelector",
        "deletionStrategy",
    }
    assert spec["shutdownAfterJobFinishes"] is True and 0 < spec["ttlSecondsAfterFinished"] <= 3600
    assert spec["activeDeadlineSeconds"] > 0
    assert "restartPolicy" not in pods(spec)["head"]  # the operator sets Never and refuses another


def test_ray_version_is_the_installed_one_and_access_needs_a_token(spec: dict[str, Any]) -> None:
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_every_container_has_equal_requests_and_limits_and_the_project_as_its_folder(
    spec: dict[str, Any],
) -> None:
    images = set()
    for name, pod in pods(spec).items():
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"], name
        assert container["resources"]["limits"].keys() >= {
            "cpu",
            "memory",
            "ephemeral-storage",
        }, name
        assert container["workingDir"] == "/opt/p48ray", name
        images.add(container["image"])
    assert len(images) == 1
    assert "WORKDIR /opt/p48ray" in (REPO / "infra" / "Dockerfile").read_text()


def test_head_is_on_demand_and_workers_are_spot_in_its_zone(
    spec: dict[str, Any], groups: dict[str, dict[str, Any]]
) -> None:
    head = pods(spec)["head"]
    assert head["nodeSelector"]["eks.amazonaws.com/capacityType"] == "ON_DEMAND"
    assert "nvidia.com/gpu" not in str(head["containers"])
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for name in groups:
        pod = pods(spec)[name]
        assert pod["nodeSelector"]["eks.amazonaws.com/capacityType"] == "SPOT", name
        assert any(
            t["key"] == "nvidia.com/gpu" and t["effect"] == "NoSchedule" for t in pod["tolerations"]
        ), name
    assert (
        len({pod["nodeSelector"]["topology.kubernetes.io/zone"] for pod in pods(spec).values()})
        == 1
    )


def test_worker_groups_scale_from_none_and_hold_the_configured_workers(
    spec: dict[str, Any], groups: dict[str, dict[str, Any]]
) -> None:
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    run = load_config(REPO / dict(parse_entrypoint(spec))["--config"]).run
    total = 0
    for name, group in groups.items():
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = int(limits["nvidia.com/gpu"])
        assert group["minReplicas"] == 0 < group["maxReplicas"], name
        assert int(limits["cpu"]) >= gpus / run.gpus_per_worker * run.threads_per_worker, name
        total += gpus * group["maxReplicas"]
    assert total >= run.num_workers
    assert "8" in {
        g["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for g in groups.values()
    }
