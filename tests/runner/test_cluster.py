"""Which Ray is joined."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p48ray.errors import ConfigError, StageFailedError
from p48ray.runner import cluster
from p48ray.runner.cluster import MAX_SOCKET_BYTES, SOCKET_IN_FOLDER, Cluster, check_shared
from tests.conftest import REPO


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


LONG = "/somewhere/" + "x" * 86
MOST = MAX_SOCKET_BYTES - len(SOCKET_IN_FOLDER)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"TMPDIR": "/" + "x" * (MOST - 1)}, {}),
        ({"TMPDIR": "/" + "x" * MOST}, {"_temp_dir": "/tmp/ray"}),
        ({"TMPDIR": "/" + "ü" * 20}, {"_temp_dir": "/tmp/ray"}),
        ({"TMPDIR": ""}, {"_temp_dir": "/tmp/ray"}),
        ({"TMPDIR": LONG, "RAY_TMPDIR": "/short"}, {}),
        ({"TMPDIR": "/short", "RAY_TMPDIR": LONG}, {"_temp_dir": "/tmp/ray"}),
    ],
)
def test_folder_without_room_for_a_sockets_path_gives_way_to_a_short_one(
    environment: dict[str, str], expected: dict[str, str]
) -> None:
    assert cluster.session_folder(environment) == expected


def test_long_folder_is_refused_by_its_variable_where_there_is_no_short_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "SHORT_FOLDER", str(tmp_path / "not there"))
    words = rf"^TMPDIR: expected .* at most {MOST} bytes.*, found 97 bytes.*set RAY_TMPDIR"
    with pytest.raises(ConfigError, match=words):
        cluster.session_folder({"TMPDIR": LONG})


def test_ray_that_does_not_start_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", fail)
    expected = r"^Ray can not be started on this machine: The current node timed out .*startup\.$"
    with pytest.raises(StageFailedError, match=expected), Cluster(None, num_cpus=1):
        pytest.fail("it never came up")


IN_A_RAY_OF_ITS_OWN = """
import logging, os, ray
from p48ray.runner.cluster import Cluster, what_there_is
logging.basicConfig(level=logging.INFO)
with Cluster(None, num_cpus=3, num_gpus=2):
    def process() -> int:
        return os.getpid()
    print("task", ray.get(ray.remote(process).remote()) != os.getpid(), what_there_is())
"""


@pytest.mark.ray
@pytest.mark.slow
def test_ray_of_this_machine_starts_with_a_long_tmpdir_and_says_nothing_of_its_token(
    tmp_path: Path,
) -> None:
    """Ray itself ends with a traceback there, and tells whoever starts it that it has a token."""
    folder = tmp_path / ("x" * max(1, 97 - len(f"{tmp_path}/")))
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_TMPDIR")}
    found = subprocess.run(
        [sys.executable, "-c", IN_A_RAY_OF_ITS_OWN],
        env=environment | {"TMPDIR": str(folder)},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    assert "task True the cluster has 3 CPU and 2 GPU, of which " in found.stdout
    assert f"TMPDIR: expected an absolute path of at most {MOST} bytes" in found.stderr
    assert "oken authentication" not in found.stderr + found.stdout


def test_notice_that_no_token_is_checked_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(cluster.TOKEN_LOGGER)
    with cluster.without_token_notice():
        logger.warning("Token authentication is enabled for this Ray cluster.")
        logger.warning("Token authentication is disabled for this Ray cluster.")
    logger.warning("Token authentication is enabled again")
    shown = [message for message in caplog.messages if message.startswith("Token")]
    assert [message.split()[3] for message in shown] == ["disabled", "enabled"]
