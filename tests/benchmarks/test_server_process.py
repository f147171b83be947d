"""Server processes, here and as Ray actors: they come up, say why they do not, and leave nothing
behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from p48ray.benchmarks import ray_server, server_process
from p48ray.benchmarks.ray_server import RayServer
from p48ray.benchmarks.server_process import ServerProcess, served_models, server_version
from p48ray.config.benchmarks import ServerSettings
from p48ray.errors import ConfigError, StageFailedError
from tests.conftest import REPO

COMMAND = [sys.executable, "-m", "tests.benchmarks.small_server", "a/model"]
NO_GPUS = ServerSettings(gpus=0, start_timeout_s=60)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def child(tmp_path: Path) -> Path:
    return tmp_path / "child"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Servers are modules of the tests. They are looked at often, and the stubborn are not given
    long."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("P48RAY_GRACE_S", "1")
    monkeypatch.setattr(ray_server, "HEALTH_POLL_S", 0.1)
    yield


def test_server_comes_up_says_what_it_serves_and_ends_with_its_children(child: Path) -> None:
    server = ServerProcess([*COMMAND, "--child", str(child)])
    try:
        wait_for(lambda: server.state().is_healthy)
        (model,) = served_models(server.url)
        assert (model.id, model.root, model.max_length) == ("a/model", "a/model", 4096)
        assert server_version(server.url, model) == "small 1.5"
        assert server.state().code is None and server.last_lines() == "looking for a GPU"
    finally:
        server.end()
    wait_for(lambda: is_gone(int(child.read_text())))
    assert server.process.poll() is not None
    assert not server.state().is_healthy


def test_server_that_ignores_the_request_is_killed(
    child: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_process, "END_TIMEOUT_S", 0.5)
    server = ServerProcess([*COMMAND, "--stubborn", "--child", str(child)])
    try:
        wait_for(lambda: server.state().is_healthy)
    finally:
        server.end()
    assert server.process.poll() == -signal.SIGKILL
    wait_for(lambda: is_gone(int(child.read_text())))


@pytest.mark.parametrize("flags", [[], ["--stubborn"]], ids=["willing", "stubborn"])
def test_server_ends_with_its_children_when_whoever_started_it_is_killed(
    child: Path, flags: list[str]
) -> None:
    """Its front alone would leave the processes that hold the GPUs."""
    command = [*COMMAND, "--child", str(child), *flags]
    code = (
        "import time; from p48ray.benchmarks.server_process import ServerProcess; "
        f"s = ServerProcess({command!r}); print(s.process.pid, flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPO
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    wait_for(lambda: child.is_file() and child.read_text() != "")
    assert not is_gone(pid) and not is_gone(int(child.read_text()))
    starter.kill()
    starter.wait()
    wait_for(lambda: is_gone(pid) and is_gone(int(child.read_text())))


def test_server_ends_with_its_children_when_what_was_started_first_is_killed(child: Path) -> None:
    """As Ray does with the processes of a worker that is lost."""
    server = ServerProcess([*COMMAND, "--stubborn", "--child", str(child)])
    wait_for(lambda: server.state().is_healthy)
    front = psutil.Process(int(child.read_text())).ppid()
    server.process.kill()
    wait_for(lambda: is_gone(front) and is_gone(int(child.read_text())))


def test_children_of_a_server_that_ended_by_itself_are_ended(child: Path) -> None:
    server = ServerProcess([*COMMAND, "--fail", "--child", str(child)])
    wait_for(lambda: server.state().code is not None)
    assert server.state().code == 3 and server.last_lines().endswith("there is no GPU")
    assert is_gone(int(child.read_text()))


def test_command_that_is_not_there_is_a_mistake_of_the_configuration() -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"benchmarks.server.command: 'no-such-server' can not be started: no such program on "
        ),
    ):
        ServerProcess(["no-such-server", "serve"])


def test_place_without_a_server_is_named() -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"http://127.0.0.1:9/v1/models: expected the list of models of an OpenAI-compatible"
            r" server"
        ),
    ):
        served_models("http://127.0.0.1:9")


@pytest.mark.ray
def test_actor_gives_the_url_of_a_healthy_server_and_ends_it(
    ray_session: None, child: Path
) -> None:
    with RayServer([*COMMAND, "--child", str(child)], NO_GPUS, None) as url:
        assert [m.id for m in served_models(url)] == ["a/model"]
        pid = int(child.read_text())
        assert not is_gone(pid)
    assert is_gone(pid)
    with pytest.raises(ConfigError):
        served_models(url)


@pytest.mark.ray
def test_actor_of_a_cluster_listens_on_its_nodes_address(ray_session: None) -> None:
    with RayServer(COMMAND, NO_GPUS, "host:6379") as url:
        assert url.startswith(f"http://{ray.util.get_node_ip_address()}:")
        assert [m.id for m in served_models(url)] == ["a/model"]


@pytest.mark.ray
def test_actor_ends_its_server_when_what_it_was_for_fails(ray_session: None, child: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        RayServer([*COMMAND, "--child", str(child)], NO_GPUS, None),
    ):
        raise ZeroDivisionError
    assert is_gone(int(child.read_text()))


@pytest.mark.ray
def test_server_that_ends_is_reported_with_its_last_lines(ray_session: None, child: Path) -> None:
    with (
        pytest.raises(StageFailedError, match="ended with code 3 before it answered") as caught,
        RayServer([*COMMAND, "--fail", "--child", str(child)], NO_GPUS, None),
    ):
        pytest.fail("it never came up")
    assert str(caught.value).splitlines()[1:] == ["looking for a GPU", "there is no GPU"]
    wait_for(lambda: is_gone(int(child.read_text())))


@pytest.mark.ray
def test_server_that_never_answers_is_given_up_and_ended(ray_session: None, child: Path) -> None:
    settings = ServerSettings(gpus=0, start_timeout_s=3)
    with (
        pytest.raises(
            StageFailedError,
            match=(
                r"not healthy within benchmarks.server.start_timeout_s = 3; its last"
                r" lines:\nlooking for a GPU"
            ),
        ),
        RayServer([*COMMAND, "--never-healthy", "--child", str(child)], settings, None),
    ):
        pytest.fail("it never came up")
    wait_for(lambda: is_gone(int(child.read_text())))


@pytest.mark.ray
def test_actors_mistakes_of_the_configuration_stay_what_they_are(ray_session: None) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"benchmarks.server.command: 'no-such-server' can not be started"
        ),
        RayServer(["no-such-server"], NO_GPUS, None),
    ):
        pytest.fail("it never came up")


@pytest.mark.ray
def test_gpus_that_this_machine_has_not_are_a_mistake(ray_session: None) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"benchmarks.server.gpus: expected 64 GPUs on this machine"
        ),
        RayServer(COMMAND, ServerSettings(gpus=64), None),
    ):
        pytest.fail("it never came up")
