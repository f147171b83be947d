"""What a plan says crosses the network, by where a run's folders are."""

from pathlib import Path

import pytest

from p48ray.config.load import load_config
from p48ray.estimate.nearness import are_streams_near, is_near
from p48ray.estimate.plan_cost import Estimate, estimate
from p48ray.report.plan_table import plan_rows
from p48ray.stages.prepare import Prepared, prepare
from tests.conftest import REPO

BUCKET = "s3://bucket/run"
STREAMS = "activations, gradients and boundaries"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def planned(root: str, *overrides: str) -> tuple[Prepared, Estimate]:
    words = ("evaluation=null", "run.num_workers=8", "run.keep=units", *overrides)
    prepared = prepare(load_config(REPO / "configs" / "tiny.yaml", words, root), is_dry=True)
    return prepared, estimate(prepared.plan, prepared.source, prepared.layout, prepared.shards)


def rows_of(prepared: Prepared, e: Estimate) -> dict[str, str]:
    return dict(plan_rows(prepared, e))


@pytest.mark.parametrize(
    ("root", "is_shared", "scratch", "expected"),
    [
        ("/run", False, None, (True, True)),
        ("/run", True, None, (False, False)),
        (BUCKET, False, None, (False, False)),
        (BUCKET, False, "/scratch", (False, True)),
        ("/run", True, "/scratch", (False, True)),
    ],
)
def test_streams_are_near_in_scratch_wherever_the_run_root_is(
    root: str, is_shared: bool, scratch: str | None, expected: tuple[bool, bool]
) -> None:
    run = load_config(REPO / "configs" / "tiny.yaml", (), root).run
    run = run.model_copy(update={"root_is_shared": is_shared, "scratch": scratch})
    assert (is_near(run.root, run.root_is_shared), are_streams_near(run)) == expected


def test_plan_with_scratch_and_a_bucket_says_that_no_stream_crosses_the_network(
    tmp_path: Path,
) -> None:
    prepared, e = planned(BUCKET, f"run.scratch={tmp_path / 'scratch'}")
    assert e.network_stream_bytes == 0
    assert e.network_output_bytes == e.unit_bytes + e.checkpoint_bytes
    assert e.peak_stored_bytes == e.unit_bytes + e.checkpoint_bytes
    rows = rows_of(prepared, e)
    assert STREAMS not in rows["over the network"]
    assert rows["over the network"].endswith("and small records")
    assert str(tmp_path / "scratch") in rows["in run.scratch"] and STREAMS in rows["in run.scratch"]
    assert "each its own tokens" in rows["read by units"]


def test_plan_with_a_bucket_alone_says_that_streams_cross_it_and_takes_longer(
    tmp_path: Path,
) -> None:
    prepared, e = planned(BUCKET)
    assert e.network_stream_bytes > e.activation_bytes + e.residual_bytes + e.gradient_bytes
    assert f"{STREAMS} " in rows_of(prepared, e)["over the network"]
    assert "in run.scratch" not in rows_of(prepared, e)
    assert e.peak_scratch_bytes == 0
    _, aside = planned(BUCKET, f"run.scratch={tmp_path / 'scratch'}")
    assert aside.unit_seconds < e.unit_seconds
    assert aside.peak_scratch_bytes + aside.peak_stored_bytes >= e.peak_stored_bytes


def test_plan_of_folders_says_that_nothing_crosses_it(tmp_path: Path) -> None:
    prepared, e = planned(str(tmp_path / "run"))
    assert rows_of(prepared, e)["over the network"] == "nothing"
    assert (e.network_source_bytes, e.network_stream_bytes, e.network_output_bytes) == (0, 0, 0)
