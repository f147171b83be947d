"""aws.yaml and gcp.yaml against Ray's own validation, against EC2's parameters, and against what
the job needs of a cluster."""

import copy
import re
from typing import Any

import botocore.session
import pytest
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import (
    _default_utilization_scorer,
    get_nodes_for,
)
from ray.autoscaler._private.util import prepare_config, validate_config

from p48ray.config.load import load_config
from tests.conftest import REPO
from tests.infra.conftest import load_yaml

pytestmark = pytest.mark.ray

CLUSTERS = ("aws.yaml", "gcp.yaml")
KIMI = load_config(REPO / "configs" / "kimi_k25_p48_nvfp4.yaml").run
# what Ray adds to a node_config before it calls RunInstances
LAUNCHER_KEYS = {"MinCount", "MaxCount"}


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    (document,) = load_yaml(request.param)
    return document


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: kind
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
    }


def is_spot(node_config: dict[str, Any]) -> bool:
    market = node_config.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or node_config.get("scheduling", {}).get("provisioningModel") == "SPOT"


def nodes_for(cluster: dict[str, Any], num_workers: int) -> dict[str, int]:
    """What Ray's autoscaler starts, beside a running head, for that many of the job's workers."""
    demand = {"CPU": KIMI.threads_per_worker, "GPU": KIMI.gpus_per_worker}
    head = cluster["head_node_type"]

    def score(resources: Any, demands: Any, node_type: str) -> Any:
        return _default_utilization_scorer(
            resources, demands, node_type, node_availability_summary=NodeAvailabilitySummary({})
        )

    added, unmet = get_nodes_for(
        cluster["available_node_types"],
        {head: 1},
        head,
        cluster["max_workers"],
        [demand] * num_workers,
        score,
    )
    assert not unmet
    return dict(added)


def test_ray_accepts_the_file_with_its_defaults_filled_in(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == cluster["available_node_types"].keys()
    assert [
        prepared[key]
        for key in ("setup_commands", "worker_setup_commands", "initialization_commands")
    ] == [[], [], ["cloud-init status --wait"] if cluster["provider"]["type"] == "aws" else []]
    assert prepared["file_mounts"] == {} and prepared["cluster_synced_files"] == []


def test_workers_of_aws_mount_their_nvme_disks_before_the_container_sees_them() -> None:
    (aws,) = load_yaml("aws.yaml")
    script = (REPO / "infra" / "mount_scratch.sh").read_text()
    for name, kind in workers(aws).items():
        assert kind["node_config"]["UserData"] == script, name
    assert "UserData" not in aws["available_node_types"]["head"]["node_config"]
    assert aws["docker"]["worker_run_options"] == ["-v /mnt/scratch:/mnt/scratch"]
    assert aws["initialization_commands"] == ["cloud-init status --wait"]


def test_ray_refuses_the_file_with_a_misspelt_key(cluster: dict[str, Any]) -> None:
    cluster["idle_timeout_minute"] = cluster.pop("idle_timeout_minutes")
    with pytest.raises(ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config(cluster))


def test_head_is_on_demand_without_gpu_and_takes_no_workers(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert not is_spot(head["node_config"])
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0


def test_every_worker_type_is_spot_bounded_and_has_a_bounded_disk(cluster: dict[str, Any]) -> None:
    for name, kind in workers(cluster).items():
        assert is_spot(kind["node_config"]), name
        assert 0 == kind["min_workers"] < kind["max_workers"] <= cluster["max_workers"], name
        assert kind["resources"]["GPU"] in (1, 8), name
    sizes = re.findall(r"'(?:VolumeSize|diskSizeGb)': (\d+)", str(cluster["available_node_types"]))
    assert len(sizes) == len(cluster["available_node_types"]) and all(
        50 <= int(size) <= 1000 for size in sizes
    )


def test_all_nodes_are_in_one_zone_of_the_region(cluster: dict[str, Any]) -> None:
    provider = cluster["provider"]
    assert re.fullmatch(re.escape(provider["region"]) + r"-?[a-f]", provider["availability_zone"])


def test_capture_workers_get_two_whole_nodes(cluster: dict[str, Any]) -> None:
    assert nodes_for(cluster, KIMI.stream_workers) == {"gpu8.spot": 2}


def test_all_workers_of_the_kimi_configuration_fit(cluster: dict[str, Any]) -> None:
    added = nodes_for(cluster, KIMI.num_workers)
    assert (
        sum(
            count * cluster["available_node_types"][name]["resources"]["GPU"]
            for name, count in added.items()
        )
        == KIMI.num_workers
    )


def test_every_worker_type_holds_as_many_workers_as_it_has_gpus(cluster: dict[str, Any]) -> None:
    for name, kind in workers(cluster).items():
        assert (
            kind["resources"]["CPU"]
            >= kind["resources"]["GPU"] / KIMI.gpus_per_worker * KIMI.threads_per_worker
        ), name


def test_workers_have_one_device_model() -> None:
    """Bytes are the same on one device model only (DESIGN 5.2): a cluster must not mix cards."""
    families = {
        name: {
            kind["node_config"]
            .get("InstanceType", kind["node_config"].get("machineType"))
            .split(sep)[0]
            for kind in kinds
        }
        for name, sep in (("aws.yaml", "."), ("gcp.yaml", "-"))
        for kinds in [workers(load_yaml(name)[0]).values()]
    }
    assert families == {"aws.yaml": {"p5"}, "gcp.yaml": {"a3"}}


def test_no_key_or_token_is_written_down(cluster: dict[str, Any]) -> None:
    assert cluster["auth"].keys() == {"ssh_user"}
    assert not re.search(
        r"AKIA|SECRET_ACCESS_KEY|SESSION_TOKEN|RAY_AUTH_TOKEN|PRIVATE KEY|gcp_credentials",
        str(cluster),
    )


def test_machines_get_their_rights_from_the_cloud() -> None:
    aws, gcp = load_yaml("aws.yaml")[0], load_yaml("gcp.yaml")[0]
    profiles = {
        name: kind["node_config"]["IamInstanceProfile"]["Arn"]
        for name, kind in aws["available_node_types"].items()
    }
    assert profiles["head"].endswith(":instance-profile/p48ray-head")
    assert all(
        arn.endswith(":instance-profile/p48ray-worker")
        for name, arn in profiles.items()
        if name != "head"
    )
    for name, kind in workers(gcp).items():
        (account,) = kind["node_config"]["serviceAccounts"]
        assert account["email"].startswith("p48ray-worker@"), name


def test_web_identity_file_is_renewed_on_every_google_node() -> None:
    (gcp,) = load_yaml("gcp.yaml")
    options = " ".join(gcp["docker"]["run_options"])
    assert "AWS_ROLE_ARN=" in options and "AWS_WEB_IDENTITY_TOKEN_FILE=" in options
    for commands in (gcp["head_start_ray_commands"], gcp["worker_start_ray_commands"]):
        (renewal,) = [command for command in commands if "AWS_WEB_IDENTITY_TOKEN_FILE" in command]
        pause = re.search(r"sleep (\d+)", renewal)
        assert pause and int(pause[1]) < 3600 and renewal.endswith("&")


def test_dashboard_without_a_token_listens_on_the_head_alone(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=disabled" in cluster["docker"]["run_options"]
    (start,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert (
        "--dashboard-host=127.0.0.1" in start
        and "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    )


def test_aws_nodes_are_parameters_that_ec2_knows() -> None:
    (aws,) = load_yaml("aws.yaml")
    shape = (
        botocore.session.get_session()
        .get_service_model("ec2")
        .operation_model("RunInstances")
        .input_shape
    )
    for name, kind in aws["available_node_types"].items():
        parameters = kind["node_config"] | dict.fromkeys(LAUNCHER_KEYS, 1)
        assert not ParamValidator().validate(parameters, shape).has_errors(), name
    misspelt = {"InstanceMarketOption": {}} | dict.fromkeys(LAUNCHER_KEYS, 1)
    assert ParamValidator().validate(misspelt, shape).has_errors()
