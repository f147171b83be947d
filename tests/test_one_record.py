"""A solver is one record, a stage is one: what is registered here goes through everything that the
program does with one."""

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from p48ray.errors import ConfigError
from p48ray.estimate.duration import loop_seconds, product_seconds
from p48ray.estimate.plan_cost import estimate
from p48ray.numerics.solvers import SOLVERS
from p48ray.report.plan_table import time_words
from p48ray.report.status import read_status
from p48ray.run.output_layout import OutputShard
from p48ray.stages.prepare import prepare
from p48ray.stages.table import STAGES, Stage, has_checkpoint
from p48ray.stages.tasks import Task
from p48ray.store.local import LocalStore
from p48ray.unit.context import StageContext
from tests.conftest import TINY
from tests.stages.small_run import SmallRun, configure, run_locally

NAME, LABEL = "throwaway", "a solver of a test"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SOLVERS, NAME, replace(SOLVERS["block_descent"], name=NAME, label=LABEL))
    return f"compression.solver={NAME}"


def unit_digests(root: Path) -> dict[str, str]:
    shards = root.glob("units/*/*/shard.safetensors")
    return {s.parent.parent.name: hashlib.sha256(s.read_bytes()).hexdigest() for s in shards}


def test_unknown_solver_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"compression\.solver: expected 'block_descent' or [^,]*, found 'throwaway'$",
    ):
        configure(TINY, tmp_path / "run", f"compression.solver={NAME}")


def test_a_registered_solver_has_the_defaults_and_the_costs_of_its_record(
    registered: str, tmp_path: Path
) -> None:
    """Costs: of a plan with gradients and refinement, which the configuration refuses where the
    record does not allow them."""
    own = (
        "compression.output_curvature=true",
        "compression.refine_steps=7",
        "compression.sweeps=3",
    )
    mine, known = (
        prepare(configure(TINY, tmp_path / "run", f"compression.solver={name}", *own))
        for name in (NAME, "block_descent")
    )
    for cost in (loop_seconds, product_seconds):
        assert cost(mine.plan, mine.layout) == cost(known.plan, known.layout) > 0
    plain = replace(SOLVERS[NAME], uses_model_loss=False, descends=False, column_passes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOLVERS, NAME, plain)
        with pytest.raises(ConfigError, match="needs solver 'block_descent', found 'throwaway'"):
            configure(TINY, tmp_path / "run", registered, "compression.output_curvature=true")
        cheap = prepare(configure(TINY, tmp_path / "run", registered))
        assert loop_seconds(cheap.plan, cheap.layout) < loop_seconds(known.plan, known.layout)


@pytest.mark.slow
def test_a_registered_solver_runs_as_what_it_is(
    registered: str, finished: SmallRun, tmp_path: Path
) -> None:
    """The same numbers under another name: units are byte for byte those of the finished run."""
    root = tmp_path / "run"
    report = run_locally(prepare(configure(finished.source, root, registered)))
    assert unit_digests(root) == unit_digests(finished.root)
    assert [step.step for step in report.ladder][-1] == NAME
    assert LABEL in (root / "report" / "report.html").read_text()
    assert f"`{NAME}`, 1 sweeps" in (root / "checkpoint" / "README.md").read_text()
    assert all(stage.done == stage.total for stage in read_status(finished.prepared.store).stages)
    assert json.loads((root / "plan.json").read_text())["config"]["compression"]["solver"] == NAME


def sign(context: StageContext, shard: str) -> None:
    """The body of the stage below: the size of a finished shard, beside it."""
    held = context.store.head(f"checkpoint/{shard}")
    context.store.put(f"signed/{shard}.txt", f"{held.size_bytes if held else 0}".encode())


def shards_to_sign(context: StageContext, shards: tuple[OutputShard, ...]) -> list[Task]:
    held = {info.key for info in context.store.list("signed/")}
    return [
        Task(stage="sign", id=s.name, item=s.name)
        for s in shards
        if f"signed/{s.name}.txt" not in held
    ]


SIGN = Stage(
    name="sign",
    noun="signatures",
    body=sign,
    prefix="signed/",
    markers=lambda plan, shards: [f"signed/{name}.txt" for name in shards],
    is_used=has_checkpoint,
    work=shards_to_sign,
    cost=("signing", "verify_seconds"),
)


@pytest.mark.slow
def test_a_registered_stage_is_run_resumed_counted_and_told(
    finished: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(STAGES, SIGN.name, SIGN)
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    prepared = prepare(configure(finished.source, root))
    names = [shard.name for shard in prepared.shards]
    store = LocalStore(root)
    before = {s.stage: (s.done, s.total) for s in read_status(store).stages}
    assert before["sign"] == (0, len(names))
    caplog.set_level(logging.INFO, "p48ray.progress")
    report = run_locally(prepared)
    for name in names:
        assert (
            store.get(f"signed/{name}.txt")
            == str((root / "checkpoint" / name).stat().st_size).encode()
        )
    assert {s.stage: (s.done, s.total) for s in read_status(store).stages}["sign"] == (
        len(names),
        len(names),
    )
    assert report.stage_seconds["sign"] >= 0
    assert "sign" in (root / "report" / "report.html").read_text()
    assert f"{len(names)} signatures" in caplog.text
    estimated = replace(
        estimate(prepared.plan, prepared.source, prepared.layout, prepared.shards),
        verify_seconds=120.0,
    )
    assert "signing 2 min 00 s" in time_words(estimated)
    (root / "signed" / f"{names[1]}.txt").unlink()
    with monkeypatch.context() as patch:  # one is missing, and one is made
        signed: list[str] = []
        patch.setitem(
            STAGES,
            SIGN.name,
            replace(SIGN, body=lambda context, shard: (signed.append(shard), sign(context, shard))),
        )
        run_locally(prepare(configure(finished.source, root)))
        assert signed == [names[1]]


def test_stages_that_go_on_beside_each_other_stand_together() -> None:
    """Those are one step of the job: apart, that step would be taken twice."""
    places = [place for place, stage in enumerate(STAGES.values()) if stage.work is None]
    assert places == list(range(places[0], places[0] + 4))
