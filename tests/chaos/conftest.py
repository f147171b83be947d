"""The cluster, an undisturbed run to compare with, and the counts at the end."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.chaos.checks import (
    assert_whole,
    checkpoint_bytes,
    problems_of,
    units_finished,
    units_repeated,
)
from tests.chaos.harness import QUICK_HEALTH_CHECK, Scene, Site, thaw
from tests.servers.s3 import SeaweedFS, aws_identity

__all__ = ["aws_identity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one scenario came to."""

    name: str
    faults: int
    survived: int
    repeated: int


@dataclass(slots=True)
class Ledger:
    """What all scenarios came to."""

    rows: list[Row] = field(default_factory=list)


LEDGER = pytest.StashKey[Ledger]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos-seeds",
        type=int,
        default=0,
        help="Run every scenario of tests/chaos with this many seeds; 0: the short form.",
    )

    parser.addoption(
        "--chaos-first", type=int, default=0, help="The first of these seeds; the others follow."
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEDGER] = Ledger()


def num_seeds(config: pytest.Config) -> int:
    """0 where this folder's option came too late to be known."""
    return int(config.getoption("--chaos-seeds", 0))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        first = int(metafunc.config.getoption("--chaos-first", 0))
        count = max(1, num_seeds(metafunc.config))
        metafunc.parametrize("seed", range(first, first + count))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The short form leaves out what is marked chaos_long."""
    if not num_seeds(config):
        long = [item for item in items if item.get_closest_marker("chaos_long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash[LEDGER].rows
    if not rows:
        return
    terminalreporter.section("chaos")
    for row in sorted(rows, key=lambda row: row.name):
        terminalreporter.line(
            f"{row.name:60s} faults {row.faults:3d}  survived {row.survived:3d}  units repeated"
            f" {row.repeated:3d}"
        )
    total = [sum(getattr(row, name) for row in rows) for name in ("faults", "survived", "repeated")]
    terminalreporter.line(
        f"{f'{len(rows)} scenarios':60s} faults {total[0]:3d}  survived {total[1]:3d}  units"
        f" repeated {total[2]:3d}"
    )


@pytest.fixture(scope="package")
def site(aws_identity: None) -> Iterator[Site]:
    """One cluster for all scenarios. The bucket's credentials reach the workers through its
    nodes."""
    site = Site(QUICK_HEALTH_CHECK)
    yield site
    site.close()


@pytest.fixture(scope="package")
def undisturbed_run(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A run that nothing happens to."""
    scene = Scene(site, str(tmp_path_factory.mktemp("undisturbed") / "run"), random.Random(0))
    scene.submit()
    assert scene.finish() == 0, (scene.driver.out, scene.driver.err)
    assert_whole(scene)
    assert set(units_finished(scene.logs).values()) == {1}
    assert problems_of(scene.store, tmp_path_factory.mktemp("verified")) == ""
    return scene


@pytest.fixture(scope="package")
def undisturbed(undisturbed_run: Scene) -> dict[str, str]:
    """Its checkpoint: file -> SHA-256."""
    return checkpoint_bytes(undisturbed_run.store)


@pytest.fixture(scope="package")
def disk_bytes(undisturbed_run: Scene) -> int:
    """What it takes of a disk, in whole blocks."""
    return sum(path.stat().st_blocks * 512 for path in Path(undisturbed_run.root).rglob("*"))


@pytest.fixture(scope="package")
def server(aws_identity: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """An object store of this folder's own, because it is going to be killed."""
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def scene(
    request: pytest.FixtureRequest,
    site: Site,
    undisturbed: dict[str, str],
    seed: int,
    tmp_path: Path,
) -> Iterator[Scene]:
    """A fresh run root on the mended cluster; what is still running at the end is ended, and the
    counts are entered."""
    site.mend()
    name = request.node.name
    scene = Scene(site, str(tmp_path / "run"), random.Random(f"{name}"))
    yield scene
    for driver in scene.drivers:
        if driver.is_running:
            driver.kill()
    thaw(scene)
    is_passed = request.node.stash.get(PASSED, False)
    faults = len(scene.hits)
    row = Row(name=name, faults=faults, survived=faults * is_passed, repeated=units_repeated(scene))
    request.config.stash[LEDGER].rows.append(row)


PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report
