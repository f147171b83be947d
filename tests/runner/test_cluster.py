"""Which Ray is joined."""

import pytest

from p48ray.errors import ConfigError
from p48ray.runner import cluster
from p48ray.runner.cluster import Cluster, check_shared


@pytest.mark.parametrize(("address", "asked"), [(None, "local"), ("", "local"), ("auto", "auto")])
def test_without_an_address_a_ray_of_this_machine_is_started(
    address: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty RAY_ADDRESS is none."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **settings: calls.append(settings))
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: calls.append({}))
    with Cluster(address, num_cpus=3) as joined:
        assert joined.is_own == (asked == "local")
    assert calls[0]["address"] == asked and calls[1:] == [{}]
    assert calls[0].get("num_cpus") == (3 if asked == "local" else None)


def test_a_ray_that_is_there_is_used_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: pytest.fail("it is the caller's"))
    with Cluster(None, num_cpus=3) as joined:
        assert not joined.is_own


def test_a_local_path_on_several_nodes_is_refused_by_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = {"Alive": True, "Resources": {"CPU": 1}}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node, node, {"Alive": False}])
    for place, is_shared in (("s3://bucket/run", False), ("/a/folder", True)):
        check_shared("run.root", place, is_shared, "share it")
    with pytest.raises(
        ConfigError,
        match=r"^run\.root: /a/folder is a local path.*2 nodes; use a bucket, or share it$",
    ):
        check_shared("run.root", "/a/folder", False, "share it")
