"""What all tests share: where things are, what a test's marks follow from, which process runs it,
and a run that many tests look at."""

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.stages.small_run import SmallRun

# A shell has what it starts in the background ignore Ctrl-C, and every child inherits that: a test
# that sends it to a command would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[1]
TINY = REPO / "examples" / "tiny-kimi-k2.5"

NEEDS = {
    "ray_session": "ray", "site": "ray", "head": "ray", "seaweedfs": "server",
    "moto_server": "server", "moto": "server", "bucket": "server", "hub": "server",
    "chromium": "browser", "local_run": "slow", "finished_once": "slow",
}  # fmt: skip
"""Fixture, or a fixture's parameter -> the mark of every test that uses it."""

LONGEST_FIRST = (
    "tests/chaos",
    "ray_session",
    "tests/bench/test_job.py",
    "tests/bench/test_layer_memory.py",
    "tests/jobs/test_s3_job.py",
    "tests/jobs/test_ray_job.py",
    "tests/jobs/test_node_sharing.py",
    "tests/jobs/test_s3_commands.py",
    "tests/finished/test_publish_on_ray.py",
    "finished: SmallRun",
)
"""Groups that two processes begin with (docs/CONTRIBUTING.md), so that none of them is alone at the
end."""


@cache
def group_of(file: str) -> str:
    """Tests of one group run in one process, one after the other: those that share a cluster or the
    finished run, else those of a file.

    Args:
        file: path from the repository on.
    """
    if file.startswith("tests/chaos/"):
        return "tests/chaos"
    text = (REPO / file).read_text()
    return next(
        (shared for shared in ("ray_session", "finished: SmallRun") if shared in text), file
    )


@pytest.fixture(autouse=True)
def stock_logging() -> Iterator[None]:
    """Every test begins with the logger as Python has it, whatever those before it configured: a
    handler on a captured stream that is closed by now, and a level by which runs leave a log."""
    logger = logging.getLogger("p48ray")

    def reset() -> None:
        logger.handlers[:], logger.propagate = [], True
        logger.setLevel(logging.NOTSET)

    reset()
    yield
    reset()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by fixtures, and groups in the order in which they are begun; tests of a group as they
    were."""
    for item in items:
        # a fixture's parameter may say which server it takes
        chosen = getattr(item, "callspec", None)
        used = {
            *getattr(item, "fixturenames", ()),
            *(
                value
                for value in (chosen.params.values() if chosen else ())
                if isinstance(value, str)
            ),
        }
        for mark in sorted({NEEDS[name] for name in used if name in NEEDS}):
            item.add_marker(mark)
    places = {group: place for place, group in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(group_of(item.nodeid.split("::")[0]), len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Hands out groups. pytest-xdist's own marks for them are without effect under pytest 9.2
    (findings/)."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.split("::")[0])

    return ByGroup(config, log)


TIMES = re.compile(
    rb' "((seconds|write_seconds|finished_at)": [0-9.e+-]+|worker": "[0-9a-f]*"),?\n'
)


def timeless(data: bytes) -> bytes:
    """A manifest without when and by which process it was made; anything else as it is."""
    return TIMES.sub(b"", data) if data.startswith(b"{") else data


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads; tests that compare bytes must not depend on the
    machine's."""
    torch.set_num_threads(1)
    yield


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real power cut does to a disk no test can see, and a run waits for the disk two
    hundred times. Other processes do wait."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def only_what_is_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that starts Ray says so: `make test-fast` leaves such tests out."""
    # the serving clients' environment has none
    if request.node.get_closest_marker("ray") is None and find_spec("ray"):
        monkeypatch.setattr(
            "ray.init",
            lambda *_, **__: pytest.fail(f"{request.node.name} starts Ray without pytest.mark.ray"),
        )


@pytest.fixture
def module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers copies a checkpoint's code to before it imports it. The package that it
    makes of the folder is imported once a process, so that of an earlier test is forgotten."""
    folder = tmp_path / "modules"
    others = [p for p in sys.path if not Path(p, "transformers_modules").is_dir()]
    monkeypatch.setattr("sys.path", others)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "SmallRun":
    """The run that tests of many folders look at. Nobody changes it."""
    from tests.stages.small_run import finished_run  # which imports this module

    return finished_run(tmp_path_factory.getbasetemp() / "small-run")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two CPUs, which the runners find and leave running. Here, because a fixture
    that two conftests import is two fixtures."""
    import ray  # the serving clients' environment has none

    with pytest.MonkeyPatch.context() as patch:
        # Workers import the workers that tests define. A runtime environment would do too, and make
        # Ray drop the processes it has at hand.
        patch.setenv("PYTHONPATH", str(REPO), prepend=os.pathsep)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run root of the small job, done by LocalRunner. Not to be changed."""
    from tests.runner.conftest import run_to_end  # which imports this module

    return run_to_end(tmp_path_factory.mktemp("local") / "run", {}, on_ray=False)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> None:
    """Nothing in the tests may ask a Hub, or tell Ray's makers. Ray's workers are what is waited
    for, so they are as important as the rest."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
