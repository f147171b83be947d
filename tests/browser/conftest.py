"""One Chromium and the finished run's page for all tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from p48ray.report.html import report_html
from p48ray.run import run_root
from p48ray.run.manifest import UnitManifest
from p48ray.store import LocalStore
from tests.browser.chromium import Chromium, find_chromium
from tests.stages.small_run import SmallRun


@pytest.fixture(scope="session")
def units(finished: SmallRun) -> list[UnitManifest]:
    return [
        UnitManifest.load(finished.prepared.store, run_root.unit_manifest(u.id))
        for u in finished.prepared.plan.units
    ]


@pytest.fixture(scope="session")
def page_url(
    finished: SmallRun, units: list[UnitManifest], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The page with all it can show: a baseline's quality, and masks beside another
    checkpoint's."""
    report = finished.report.model_copy(update={"baseline": finished.report.quality})
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(
        report_html(finished.context, report, units, LocalStore(finished.root)), encoding="utf-8"
    )
    return path.as_uri()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    binary = find_chromium()
    if binary is None:
        pytest.skip("no chromium on PATH that starts: make chromium")
    profile: Path = tmp_path_factory.mktemp("chromium")
    with Chromium(binary, profile) as browser:
        yield browser
