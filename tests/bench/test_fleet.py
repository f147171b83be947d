"""The fleet simulation: the product's own driver, the same answer for the same seed, and no unit
lost whatever the losses."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench import fleet
from bench.simulated_ray import Fleet, SimulatedRay
from p48ray.checkpoint.layout import PROJECTIONS
from p48ray.config.load import load_config
from p48ray.run import run_root
from p48ray.run.checked import load_unit_manifests
from p48ray.run.manifest import UnitManifest
from p48ray.runner import dispatch, layer_units, overlap, pipeline, ray_runner
from p48ray.runner.worker_process import WorkerProcess
from p48ray.stages.prepare import Prepared, prepare
from tests.conftest import REPO

SMALL = (
    "evaluation=null",
    "calibration.sequences_per_part=48",
    "run.experts_per_unit=2",
    "compression.sweeps=12",
    "compression.refine_steps=600",
)
CALM = Fleet(gpus=4, gpus_per_node=2, start_s=5.0, boot_s=10.0, replace_s=10.0)
STORMY = replace(CALM, loss_rate=30.0, loss_per="node", detect_s=2.0)


@pytest.fixture(scope="module")
def planned() -> Iterator[Prepared]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        yield prepare(
            load_config(REPO / "configs" / "tiny.yaml", SMALL, "memory://fleet-test"), is_dry=True
        )


def simulated(
    planned: Prepared, chosen: Fleet, keep: str = "all"
) -> tuple[fleet.Outcome, SimulatedRay, Prepared]:
    mine = fleet.sized(planned, chosen, "fleet-test", keep)
    fleet.clear(mine.store)  # type: ignore[arg-type]
    return *fleet.simulate(mine, chosen, fleet.costs_of(mine, unit_seconds=60.0)), mine


def timeless(outcome: fleet.Outcome) -> fleet.Outcome:
    """Without the real clock's part."""
    return replace(outcome, driver_ms_per_unit=0.0)


def test_same_seed_same_outcome(planned: Prepared) -> None:
    first, again, other = (
        simulated(planned, f)[0] for f in (STORMY, STORMY, replace(STORMY, seed=1))
    )
    assert timeless(first) == timeless(again)
    assert first.hours != other.hours
    assert first.nodes_lost > 0


@pytest.mark.parametrize(
    "chosen", [CALM, STORMY, replace(STORMY, reads="own")], ids=["calm", "stormy", "own"]
)
@pytest.mark.parametrize("keep", ["all", "units"])
def test_every_unit_ends_with_one_manifest_and_its_shard(
    planned: Prepared, chosen: Fleet, keep: str
) -> None:
    outcome, _, mine = simulated(planned, chosen, keep)
    keys = {info.key for info in mine.store.list()}
    manifests = load_unit_manifests(mine.plan, mine.store)
    assert [m.unit for m in manifests] == [u.id for u in mine.plan.units]
    assert {len(m.linears) for m in manifests} == {
        mine.plan.config.run.experts_per_unit * len(PROJECTIONS)
    }
    expected = {run_root.unit_shard(m.unit, m.attempt) for m in manifests} | {
        run_root.unit_manifest(m.unit) for m in manifests
    }
    assert {k for k in keys if k.startswith(run_root.UNITS)} == expected
    assert any(k.endswith(".arrow") for k in keys) == (keep == "all")
    assert outcome.layers_joined >= len(mine.plan.layers)
    assert (outcome.units_repeated > 0) == (chosen.loss_rate > 0)


def test_time_and_money_add_up_when_nothing_is_lost(planned: Prepared) -> None:
    """One GPU: all work one after the other, little else, and every layer read once."""
    chosen = replace(CALM, gpus=1, gpus_per_node=1)
    mine = fleet.sized(planned, chosen, "fleet-test", "all")
    costs = fleet.costs_of(mine, unit_seconds=60.0)
    outcome = simulated(planned, chosen)[0]
    work = (
        sum(
            costs.unit_s(sum(r.tokens for r in m.linears) / len(PROJECTIONS))
            for m in load_unit_manifests(mine.plan, mine.store)
        )
        / 3600
    )
    assert outcome.hours == outcome.gpu_hours
    assert work < outcome.hours < 1.02 * work, "streams of this model take seconds"
    assert outcome.stream_hours < outcome.hours
    assert outcome.layer_loads == outcome.layers_joined == len(mine.plan.layers)
    assert simulated(planned, CALM)[0].hours < outcome.hours


def test_a_run_that_stopped_is_resumed_where_it_was(planned: Prepared) -> None:
    mine = simulated(planned, CALM)[2]
    gone = mine.plan.units[:3]
    for unit in gone:
        mine.store.delete(run_root.unit_manifest(unit.id))
    outcome, sim = fleet.simulate(mine, CALM, fleet.costs_of(mine))
    assert set(sim.tally.attempts) == {u.id for u in gone}
    assert outcome.stream_hours == 0
    assert isinstance(
        UnitManifest.load(mine.store, run_root.unit_manifest(gone[0].id)), UnitManifest
    )


def test_driver_is_the_product(planned: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Job, RayRunner, Dispatcher and run_all are those of p48ray, and each is really used."""
    used = set()

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: object, **kwargs: object) -> object:
            used.add(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in [
        (pipeline.Job, "stream_and_compress"),
        (ray_runner.RayRunner, "handle_loss"),
        (dispatch.Dispatcher, "take"),
        (dispatch.Dispatcher, "forget"),
        (pipeline, "run_all"),
        (overlap, "read_needs"),
        (layer_units, "delete_layer_data"),
        (layer_units, "write_layer_scales"),
    ]:
        watch(owner, name)
    simulated(planned, STORMY, "units")
    assert used == {
        "stream_and_compress",
        "handle_loss",
        "take",
        "forget",
        "run_all",
        "read_needs",
        "delete_layer_data",
        "write_layer_scales",
    }
    assert (fleet.Job, fleet.RayRunner) == (pipeline.Job, ray_runner.RayRunner)


def test_measures_and_markdown(
    planned: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's own path, on the small plan."""
    args = fleet.parse(
        [
            "--out",
            str(tmp_path),
            "--gpus",
            "2",
            "--gpus-per-node",
            "2",
            "--loss-rates",
            "0",
            "--own-gpus",
        ]
    )
    fleet.run(args, planned, Console(width=200))
    assert "units done twice: 0" in (tmp_path / "fleet.md").read_text()
    assert (tmp_path / "fleet.json").stat().st_size > 0
    assert "GPU-hours" in capsys.readouterr().out


def test_scratch_takes_what_streams_leave_off_the_link(planned: Prepared) -> None:
    """One node of four GPUs; the link is made slow, so that what crosses it shows."""
    calm = replace(CALM, gpus_per_node=4, bandwidth=1e5)
    store, slow, fast = (
        simulated(planned, replace(calm, scratch=rate))[0] for rate in (None, 1e5, 1e8)
    )
    mine = fleet.sized(planned, calm, "fleet-test", "all")
    costs = fleet.costs_of(mine)
    units = costs.unit_bytes * len(mine.plan.units)
    assert slow.bytes_written == fast.bytes_written == units < store.bytes_written
    assert fast.bytes_read == slow.bytes_read < store.bytes_read
    assert fast.stream_hours < slow.stream_hours
    assert fast.hours < min(slow.hours, store.hours)
    assert fast.layer_loads == len(mine.plan.layers)


@pytest.mark.parametrize("wrong", [{"gpus": 8}, {"loss_rate": 0.1}])
def test_scratch_of_a_node_that_is_lost_or_of_several_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"one node that is not lost: found [12] nodes, 0"):
        replace(CALM, gpus_per_node=4, scratch=1e9, **wrong)


def test_the_idle_worker_is_called_as_the_real_one() -> None:
    """But for what Ray adds to the methods of a class that was an actor in this process."""
    for name in ("start", "execute", "close"):
        ours, real = (
            [p for p in inspect.signature(getattr(kind, name)).parameters if p[:5] != "_ray_"]
            for kind in (fleet.IdleWorker, WorkerProcess)
        )
        assert ours == real, name
