"""calibration.propagate: compressed: layer by layer, to the same bytes whoever does what and
whatever is lost on the way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p48ray.config.load import load_config
from p48ray.errors import CorruptObjectError
from p48ray.estimate.plan_cost import estimate
from p48ray.run import arrow, run_root
from p48ray.stages import workplace
from p48ray.stages.prepare import Prepared, prepare
from p48ray.stages.table import STAGES
from p48ray.stages.tasks import Task, TaskResult
from p48ray.unit.context import StageContext
from tests.conftest import REPO, TINY
from tests.jobs import command
from tests.jobs.command import CONFIG, ROUNDED, invoke, small, snapshot
from tests.runner.conftest import ALL_STAGES
from tests.runner.test_keep import one_blob_behind, peak_bytes
from tests.runner.test_ray_runner import KillingRunner, flip_a_bit, run_through_power_cuts

pytestmark = pytest.mark.slow

__all__ = ["one_blob_behind"]

IN_TURN = ALL_STAGES | {"calibration.propagate": "compressed"}
FORTH = ROUNDED | {"calibration.propagate": "compressed"}
SAME_BYTES = (
    "residuals",
    "compressed-residuals",
    "activations",
    "residual-gradients",
    "gradients",
    "checkpoint",
)
LAYERS = (1, 2, 3, 4)


def arguments(root: Path, settings: dict[str, str] | None = None) -> list[str]:
    return command.arguments(root, IN_TURN | (settings or {}))


@pytest.fixture(scope="session")
def turn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run with layer by layer, by LocalRunner. Not to be changed."""
    root = tmp_path_factory.mktemp("turn") / "run"
    outcome = invoke(*arguments(root))
    assert outcome.code == 0, outcome
    return root


def assert_same_bytes(left: Path, right: Path, folders: tuple[str, ...] = SAME_BYTES) -> None:
    for folder in folders:
        files = snapshot(left / folder)
        assert len(files) > 0, folder
        assert files == snapshot(right / folder), folder


def data_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """What blobs hold, by file: a blob itself names its plan."""
    files = sorted(folder.rglob("*.arrow"))
    columns = {
        str(file.relative_to(folder)): arrow.decode(file.read_bytes(), str(file)) for file in files
    }
    return {
        name: {key: value.view(torch.uint8).numpy().tobytes() for key, value in held.items()}
        for name, held in columns.items()
    }


def test_result_differs_from_the_one_whose_layers_see_the_source(
    turn_run: Path, local_run: Path
) -> None:
    """The first layer and all gradients are the same; every other layer sees something else."""
    for folder in ("residuals", "residual-gradients"):
        assert data_of(turn_run / folder) == data_of(local_run / folder) != {}
    for layer in LAYERS:
        ours, theirs = (
            data_of(root / run_root.gradient_folder(layer)) for root in (turn_run, local_run)
        )
        assert ours == theirs
        ours, theirs = (
            data_of(root / run_root.activation_folder(layer)) for root in (turn_run, local_run)
        )
        assert ours.keys() == theirs.keys() and len(ours) == 2
        assert (ours == theirs) == (layer == 1)
    assert snapshot(turn_run / "checkpoint") != snapshot(local_run / "checkpoint")


@pytest.mark.ray
def test_two_workers_one_of_them_killed_give_the_same_bytes(
    ray_session: None, turn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p48ray.runner.ray_runner.RayRunner", KillingRunner)
    monkeypatch.setattr(KillingRunner, "killed", 0)
    outcome = invoke(*arguments(tmp_path / "run", {"run.num_workers": "2"}), on_ray=True)
    assert outcome.code == 0, outcome
    assert KillingRunner.killed == 1
    assert_same_bytes(turn_run, tmp_path / "run")


def test_tasks_come_layer_by_layer_after_the_sources_own_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ran = workplace.Workplace.execute, []

    def execute(self: workplace.Workplace, task: Task) -> TaskResult:
        ran.append((task.stage, task.item[0] if task.stage == "propagate" else task.layer))
        return real(self, task)

    monkeypatch.setattr(workplace.Workplace, "execute", execute)
    assert invoke(*arguments(tmp_path / "run", {})).code == 0
    ways = [("capture", None)] * 2 + [("gradients", None)] * 2 * 4
    turns = [step for n in LAYERS for step in [("propagate", n)] * 2 + [("compress", n)] * 4]
    assert [step for step in ran if step[0] not in ("scan", "reduce", "verify")] == ways + turns


def test_run_cut_after_every_twelfth_write_ends_in_the_same_bytes(
    turn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_through_power_cuts(arguments(tmp_path / "run"), monkeypatch)
    assert_same_bytes(turn_run, tmp_path / "run")


def test_checkpoint_alone_is_kept_to_the_same_bytes_and_no_stream_is_left(
    turn_run: Path, tmp_path: Path
) -> None:
    outcome = invoke(*arguments(tmp_path / "run", {"run.keep": "checkpoint"}))
    assert outcome.code == 0, outcome
    assert snapshot(tmp_path / "run" / "checkpoint") == snapshot(turn_run / "checkpoint")
    assert [path.name for path in (tmp_path / "run").rglob("part-*.arrow")] == []


def test_unit_lost_after_the_streams_were_deleted_is_done_again_from_the_shards_below(
    turn_run: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    assert invoke(*arguments(root, {"run.keep": "units"})).code == 0
    assert snapshot(root / "checkpoint") == snapshot(turn_run / "checkpoint")
    assert [path.name for path in root.rglob("part-*.arrow")] == []
    (root / "units/L003-E004-007/manifest.json").unlink()
    (root / "checkpoint/model.safetensors.index.json").unlink()
    outcome = invoke(*arguments(root, {"run.keep": "units"}))
    assert outcome.code == 0, outcome
    assert "16 units, 15 already done" in outcome.out
    assert snapshot(root / "checkpoint") == snapshot(turn_run / "checkpoint")
    assert [path.name for path in root.rglob("part-*.arrow")] == []


@pytest.mark.parametrize("keep", ["all", "units"])
def test_shard_that_the_stream_finds_corrupt_is_made_anew_by_the_same_run(
    keep: str, turn_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, found = STAGES["propagate"].body, []

    def stream(context: StageContext, item: tuple[int, list[int]]) -> object:
        if item[0] == 3 and not found:
            (shard,) = (tmp_path / "run").glob("units/L002-E008-011/*/shard.safetensors")
            flip_a_bit(shard)
        try:
            return real(context, item)
        except CorruptObjectError as error:
            found.append(error)
            raise

    monkeypatch.setitem(STAGES, "propagate", replace(STAGES["propagate"], body=stream))
    outcome = invoke(*arguments(tmp_path / "run", {"run.keep": keep}))
    assert outcome.code == 0, outcome
    assert len(found) == 2, "both slices met it"
    assert "made anew next" in outcome.out
    assert snapshot(tmp_path / "run" / "checkpoint") == snapshot(turn_run / "checkpoint")


def prepared_run(root: Path, settings: dict[str, str]) -> Prepared:
    chosen = small() | settings
    return prepare(
        load_config(CONFIG, tuple(f"{key}={value}" for key, value in chosen.items()), str(root))
    )


@pytest.mark.usefixtures("one_blob_behind")
@pytest.mark.parametrize(
    ("keep", "way"), [("units", IN_TURN), ("all", FORTH)], ids=["units, and back", "all, forth"]
)
def test_pilot_stores_no_more_than_estimated_and_not_much_less(
    keep: str, way: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    tokens = {
        "calibration.num_sequences": "4",
        "calibration.sequence_length": "256",
        "calibration.sequences_per_part": "4",
    }
    quick = {
        "source.checkpoint": str(TINY),
        "run.layers": "[1,2,3]",
        "run.keep": keep,
        "run.num_workers": "1",
        "compression.sweeps": "0",
        "compression.refine_steps": "0",
    }
    prepared = prepared_run(tmp_path / "run", way | tokens | quick)
    stored = peak_bytes(prepared)
    expected = estimate(
        prepared.plan, prepared.source, prepared.layout, prepared.shards
    ).peak_stored_bytes
    assert 0.85 <= stored / expected <= 1.03


def test_estimate_counts_the_second_way_through_every_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPO)
    dense, turn = (
        estimate(p.plan, p.source, p.layout, p.shards)
        for p in (
            prepared_run(Path("/nowhere"), ALL_STAGES | {"calibration.propagate": how})
            for how in ("dense", "compressed")
        )
    )
    # four layers up, four again and three back; four up, one again, three back and five twice
    assert turn.stream_gpu_hours == pytest.approx(dense.stream_gpu_hours * 21 / 14)
    assert turn.stream_read_bytes == dense.stream_read_bytes + dense.source_bytes + dense.unit_bytes
    assert turn.residual_bytes == pytest.approx(dense.residual_bytes * 8 / 4)
    assert (turn.solver_gpu_hours, turn.gradient_bytes) == (
        dense.solver_gpu_hours,
        dense.gradient_bytes,
    )
