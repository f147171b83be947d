"""run.layers: a pilot of some layers, which ends with an estimate for all of them and no
checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from p48ray.cli import app
from p48ray.report.status import read_status
from p48ray.store import LocalStore
from tests.jobs.command import HELD_OUT, ROUNDED, Outcome, arguments, attempts, invoke

pytestmark = pytest.mark.slow

PILOT = ROUNDED | {"run.layers": "[3, 1]", "run.keep": "units", "evaluation": HELD_OUT}


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    root = tmp_path_factory.mktemp("pilot") / "run"
    return root, invoke(*arguments(root, PILOT | {"run.gpu_hour_price": "2"}))


def test_pilot_ends_well_without_a_checkpoint(pilot: tuple[Path, Outcome]) -> None:
    root, outcome = pilot
    assert outcome.code == 0, outcome
    assert {path.name for path in root.iterdir()} == {
        "plan.json",
        "scan",
        "calibration",
        "evaluation",
        "residuals",
        "activations",
        "units",
        "report",
        "logs",
    }
    assert {unit[:4] for unit in attempts(root)} == {"L001", "L003"}
    assert len(attempts(root)) == 8


def test_pilot_streams_no_layer_above_its_last(pilot: tuple[Path, Outcome]) -> None:
    root, outcome = pilot
    assert "capture   4 activation parts" in outcome.out
    assert {path.name for path in (root / "activations").iterdir()} == {"layer-001", "layer-003"}
    assert not (root / "residuals" / "layer-004").exists()


def test_report_and_print_say_what_all_layers_would_take(pilot: tuple[Path, Outcome]) -> None:
    root, outcome = pilot
    report = json.loads((root / "report" / "report.json").read_text())
    found = report["pilot"]
    spent = [json.loads(data)["seconds"] for data in attempts(root).values()]
    parts = [
        json.loads(path.read_text())["seconds"]
        for path in (root / "activations").glob("*/part-*.json")
    ]
    worked_s = sum(sum(seconds.values()) for seconds in spent) + sum(parts)
    assert (found["layers"], found["of_layers"]) == (2, 4)
    assert found["worker_hours"] == pytest.approx(2 * worked_s / 3600, abs=0.11 * 2 / 3600)
    assert found["wall_hours"] == pytest.approx(found["worker_hours"] / 2)
    assert (report["quality"], report["checkpoint_bytes"]) == (None, 0)
    assert found["kl"] == pytest.approx(2 * found["pilot_kl"])
    assert "KL from the source " in outcome.out
    assert "pilot of 2 layers, no checkpoint; all 4 would take " in outcome.out
    assert "checkpoint: " not in outcome.out


def test_plan_of_a_pilot_says_what_it_is(pilot: tuple[Path, Outcome]) -> None:
    _, outcome = pilot
    assert "96 (2 layers of 4 x 16 experts x 3" in outcome.out
    assert "none: a pilot of some layers (run.layers)" in outcome.out


def test_units_of_a_pilot_are_those_of_the_whole_run(
    pilot: tuple[Path, Outcome], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    assert invoke(*arguments(whole, ROUNDED)).code == 0
    all_units, some = attempts(whole), attempts(pilot[0])
    assert set(some) == {unit for unit in all_units if unit[:4] in ("L001", "L003")}
    assert digests(some) == {
        unit: digest for unit, digest in digests(all_units).items() if unit in some
    }
    assert len(set(digests(some).values())) == len(some)


def digests(manifests: dict[str, bytes]) -> dict[str, str]:
    return {unit: json.loads(data)["sha256"] for unit, data in manifests.items()}


def test_status_of_a_finished_pilot_shows_its_layers_and_nothing_missing(
    pilot: tuple[Path, Outcome],
) -> None:
    root, _ = pilot
    status = read_status(LocalStore(root))
    assert status.is_complete
    assert status.layers == ((1, 2, 4), (3, 2, 4))
    assert {
        s.stage: (s.done, s.total) for s in status.stages if s.stage in ("capture", "compress")
    } == {
        "capture": (4, 4),
        "compress": (8, 8),
    }
    assert [(w.stage, w.done, w.total) for w in status.work] == [
        ("capture", 4, 4),
        ("compress", 8, 8),
    ]
    shown = CliRunner().invoke(app, ["status", str(root)])
    assert shown.exit_code == 0
    for words in ("complete", "capture", "compress", "of workers' time"):
        assert words in shown.stdout


def test_status_of_a_finished_pilot_waits_for_no_stage(pilot: tuple[Path, Outcome]) -> None:
    """A pilot has no checkpoint to stitch, verify or evaluate."""
    root, _ = pilot
    assert all(stage.done == stage.total for stage in read_status(LocalStore(root)).stages)
    shown = CliRunner().invoke(app, ["status", str(root)]).stdout
    assert "not known yet" not in shown
    assert "pilot" in shown


def test_pilot_that_is_run_again_does_nothing_and_ends_well(pilot: tuple[Path, Outcome]) -> None:
    root, _ = pilot
    before = attempts(root)
    outcome = invoke(*arguments(root, PILOT))
    assert outcome.code == 0, outcome
    assert attempts(root) == before


def test_full_run_goes_on_with_its_pilots_units(
    pilot: tuple[Path, Outcome], tmp_path: Path
) -> None:
    """One run root: pilot, another pilot, all layers. What was made is not made again, and the
    checkpoint is that of a run without a pilot."""
    root, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(pilot[0], root)
    settings = {k: v for k, v in PILOT.items() if k != "run.layers"}
    before = attempts(root)
    assert invoke(*arguments(root, settings | {"run.layers": "[2, 3]"})).code == 0
    both = attempts(root)
    assert {unit: both[unit] for unit in before} == before
    outcome = invoke(*arguments(root, settings))
    assert outcome.code == 0, outcome
    assert "goes on with the units of the plan that was there" in outcome.out
    after = attempts(root)
    assert {unit: after[unit] for unit in both} == both
    assert len(after) == 16
    assert invoke(*arguments(whole, settings)).code == 0
    forecast = json.loads((pilot[0] / "report" / "report.json").read_text())["pilot"]["kl"]
    measured = json.loads((root / "report" / "report.json").read_text())["quality"]["kl"]
    assert measured / 2 < forecast < 2 * measured
    for path in (whole / "checkpoint").iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (root / "checkpoint" / path.name).read_bytes(), path.name


def test_finished_checkpoint_is_not_given_up_for_a_pilot(tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert invoke(*arguments(root, ROUNDED)).code == 0
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    outcome = invoke(*arguments(root, ROUNDED | {"run.layers": "[1]"}))
    assert outcome.code == 2, outcome
    for words in (
        "this run root belongs to another plan: run.layers: expected [1] (this run), found None",
        "its checkpoint is finished",
        "delete checkpoint/",
    ):
        assert words in outcome.err
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("[0]", "run.layers: expected some of the layers with experts (1 to 4), found [0]"),
        (
            "[1, 5, 9]",
            "run.layers: expected some of the layers with experts (1 to 4), found [5, 9]",
        ),
        ("[-1]", "found [-1]"),
        ("[]", "run.layers: expected some of the layers with experts (1 to 4), found none"),
        ("[one]", "run.layers.0: "),
        ("3", "run.layers: "),
    ],
)
def test_layers_that_hold_no_experts_are_a_users_mistake(
    layers: str, words: str, tmp_path: Path
) -> None:
    outcome = invoke(*arguments(tmp_path / "run", ROUNDED | {"run.layers": layers}))
    assert outcome.code == 2, outcome
    assert words in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_layers_named_twice_and_in_any_order_are_each_done_once(tmp_path: Path) -> None:
    outcome = invoke(
        *arguments(tmp_path / "run", ROUNDED | {"run.layers": "[3, 1, 3]"}), "--dry-run"
    )
    assert outcome.code == 0, outcome
    assert "96 (2 layers of 4 x 16 experts x 3" in outcome.out
