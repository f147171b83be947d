"""What a plan says it will store is what a run stores, and every part of the work is in its hours."""

from pathlib import Path

import pytest

from p48ray.config import load_config
from p48ray.estimate import Estimate, estimate
from p48ray.stages.capture import capture_parts
from p48ray.stages.gradients import gradient_parts
from p48ray.stages.inputs import write_inputs
from p48ray.stages.prepare import Prepared, prepare
from tests.conftest import REPO

SMALL = ("calibration.num_sequences=6", "calibration.sequence_length=256", "calibration.sequences_per_part=6", "evaluation=null")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def planned(root: str, *overrides: str) -> Prepared:
    return prepare(load_config(REPO / "configs" / "tiny.yaml", (*SMALL, *overrides), root))


def estimated(prepared: Prepared) -> Estimate:
    return estimate(prepared.plan, prepared.source, prepared.layout, prepared.shards)


@pytest.mark.parametrize(("goes_back", "bits"), [(True, 16), (False, 16), (True, 8)])
def test_stored_bytes_of_the_streaming_stages_are_the_predicted_ones(tmp_path: Path, goes_back: bool, bits: int) -> None:
    """To 1 %: Arrow's framing and the manifests are not in the prediction."""
    prepared = planned(str(tmp_path), f"compression.output_curvature={str(goes_back).lower()}", f"calibration.stored_bits={bits}")
    write_inputs(prepared)
    capture_parts(prepared.context, [0])
    if goes_back:
        gradient_parts(prepared.context, [0])
    e = estimated(prepared)
    stored = {info.key: info.size_bytes for info in prepared.store.list()}
    for prefixes, expected in (
        (("activations/",), e.activation_bytes),
        (("residuals/",), e.residual_bytes),
        (("gradients/", "residual-gradients/"), e.gradient_bytes),
    ):
        assert sum(n for key, n in stored.items() if key.startswith(prefixes)) == pytest.approx(expected, rel=0.01, abs=100)
    assert e.peak_stored_bytes == e.activation_bytes + e.residual_bytes + e.gradient_bytes + e.unit_bytes + e.checkpoint_bytes


@pytest.mark.parametrize(
    "override",
    ["compression.sweeps=20", "compression.refine_steps=900", "compression.code_sweeps=4", "calibration.num_sequences=60"],
)
def test_more_work_means_more_hours(override: str) -> None:
    assert estimated(planned("memory://hours", override)).gpu_hours > estimated(planned("memory://hours")).gpu_hours


def test_the_way_back_reads_the_source_again_and_costs_hours() -> None:
    forth = estimated(planned("memory://hours", "compression.output_curvature=false"))
    back = estimated(planned("memory://hours"))
    assert back.stream_read_bytes == 2 * forth.stream_read_bytes
    assert back.stream_gpu_hours == pytest.approx(3 * forth.stream_gpu_hours)
    assert back.solver_gpu_hours > forth.solver_gpu_hours
    assert (forth.gradient_bytes, back.gradient_bytes > 0) == (0, True)


@pytest.mark.parametrize("goes_back", [True, False])
def test_pilot_costs_its_share_of_the_units_and_no_checkpoint(goes_back: bool) -> None:
    back = f"compression.output_curvature={str(goes_back).lower()}"
    whole, pilot = estimated(planned("memory://pilot", back)), estimated(planned("memory://pilot", back, "run.layers=[1,3]"))
    assert pilot.unit_bytes == whole.unit_bytes // 2
    assert pilot.activation_bytes == whole.activation_bytes // 2
    assert pilot.unit_read_bytes == whole.unit_read_bytes // 2
    assert pilot.solver_gpu_hours == pytest.approx(whole.solver_gpu_hours / 2)
    assert pilot.checkpoint_bytes == 0
    streamed = 1 if goes_back else 4 / 5
    assert pilot.stream_read_bytes == round(whole.stream_read_bytes * streamed)
    assert pilot.stream_gpu_hours == pytest.approx(whole.stream_gpu_hours * streamed)


@pytest.mark.parametrize("goes_back", [True, False])
def test_keeping_less_stores_less_at_the_peak(goes_back: bool) -> None:
    """The measured peaks are in tests/runner/test_keep.py."""
    settings = ("calibration.num_sequences=192", f"compression.output_curvature={str(goes_back).lower()}")
    peaks = [estimated(planned("memory://keep", *settings, f"run.keep={k}")).peak_stored_bytes for k in ("all", "units", "checkpoint")]
    assert peaks[0] > peaks[1] == peaks[2]


def test_fewer_boundaries_store_less_at_the_peak_and_cost_reads_and_hours() -> None:
    """Every second of five, of which the way back reads four: one layer more to read and to run. Where all is kept, nothing is run again."""
    overrides = ("calibration.num_sequences=384", "run.keep=units")
    every, second = (estimated(planned("memory://every", *overrides, f"run.boundary_every={n}")) for n in (1, 2))
    assert second.peak_stored_bytes < every.peak_stored_bytes
    assert second.stream_read_bytes == round(every.stream_read_bytes * (2 + 1 / 5) / 2)
    assert second.stream_gpu_hours == pytest.approx(every.stream_gpu_hours * (3 + 1 / 5) / 3)
    assert second.residual_bytes == every.residual_bytes * 6 // 5
    assert estimated(planned("memory://every", "run.boundary_every=2")) == estimated(planned("memory://every"))


def test_eight_bits_store_nine_sixteenths_of_activations_and_gradients() -> None:
    sixteen, eight = (estimated(planned("memory://bits", f"calibration.stored_bits={bits}")) for bits in (16, 8))
    values = 4 * 6 * 256 * 256 * 2  # layers, sequences, length, hidden size, bytes
    assert sixteen.activation_bytes - eight.activation_bytes == sixteen.gradient_bytes - eight.gradient_bytes == values * 7 // 16
    assert sixteen.unit_read_bytes > eight.unit_read_bytes and sixteen.residual_bytes == eight.residual_bytes


def test_more_workers_solve_more_layers_at_once() -> None:
    """A layer's tokens stay until its units are done, so that units of several layers come on top of all tokens."""
    overrides = ("calibration.num_sequences=3", "compression.output_curvature=false", "run.keep=units", "run.layers=[1,2,3]")
    one, two = (estimated(planned("memory://workers", *overrides, f"run.num_workers={n}")).peak_stored_bytes for n in (1, 2))
    assert two > one
