"""How far a run has come, read from run roots that are empty, half done, failed and finished."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from p48ray.errors import ConfigError, PlanMismatchError
from p48ray.report.status import RunStatus, print_status, read_status
from p48ray.run import run_root
from p48ray.run.manifest import Failure
from p48ray.stages.prepare import prepare
from p48ray.store import LocalStore, MemoryStore
from tests.report.test_work import felt, part, unit
from tests.stages.small_run import SmallRun, configure, run_locally


def counts(status: RunStatus) -> dict[str, tuple[int, int]]:
    return {stage.stage: (stage.done, stage.total) for stage in status.stages}


def printed(status: RunStatus) -> str:
    out = io.StringIO()
    print_status(status, Console(file=out, width=120))
    return out.getvalue()


@pytest.fixture
def root(finished: SmallRun, tmp_path: Path) -> Path:
    """A copy of the finished run, to take things from."""
    shutil.copytree(finished.root, tmp_path / "run", ignore=shutil.ignore_patterns("residuals"))
    return tmp_path / "run"


def test_place_without_a_plan_is_refused_by_name(tmp_path: Path) -> None:
    for store in (
        LocalStore(tmp_path),
        LocalStore(tmp_path / "nowhere"),
        MemoryStore("nothing-here"),
    ):
        with pytest.raises(
            ConfigError, match=rf"{store.uri}: expected a run root with plan\.json, found none"
        ):
            read_status(store)


def test_plan_that_is_no_plan_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(
        PlanMismatchError, match=r"plan\.json: not a RunPlan: numerics_version.*delete this object"
    ):
        read_status(LocalStore(tmp_path))


def test_run_that_has_only_its_plan_has_done_nothing(finished: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((finished.root / "plan.json").read_bytes())
    status = read_status(LocalStore(tmp_path))
    assert counts(status) == {
        "scan": (0, 3),
        "capture": (0, 12),
        "compress": (0, 8),
        "reduce": (0, 0),
        "verify": (0, 0),
        "evaluate": (0, 2),
    }
    assert status.layers == ((1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0))
    assert (status.is_complete, status.failures) == (False, ())
    assert status.stored_bytes == (tmp_path / "plan.json").stat().st_size


def test_finished_run_is_complete_and_counts_every_byte(finished: SmallRun) -> None:
    status = read_status(LocalStore(finished.root))
    assert counts(status) == {
        "scan": (3, 3),
        "capture": (12, 12),
        "compress": (8, 8),
        "reduce": (6, 6),
        "verify": (6, 6),
        "evaluate": (2, 2),
    }
    assert status.layers == tuple((layer, 3, 2) for layer in (1, 2, 3, 4))
    assert (status.is_complete, status.failures) == (True, ())
    assert (status.name, status.plan_digest) == (
        finished.prepared.plan.config.name,
        finished.prepared.plan.digest,
    )
    assert status.stored_bytes == sum(
        path.stat().st_size for path in finished.root.rglob("*") if path.is_file()
    )


def test_half_done_run_shows_what_each_layer_has(root: Path) -> None:
    """A unit without a manifest is not done, whatever shards its attempts left; a part without one
    neither."""
    for path in (
        "activations/layer-003/part-0001.json",
        "activations/layer-004/part-0000.json",
        "units/L002-E008-015/manifest.json",
    ):
        (root / path).unlink()
    for folder in ("checkpoint", "verification", "evaluation", "report"):
        shutil.rmtree(root / folder)
    status = read_status(LocalStore(root))
    assert counts(status) == {
        "scan": (3, 3),
        "capture": (10, 12),
        "compress": (7, 8),
        "reduce": (0, 0),
        "verify": (0, 0),
        "evaluate": (0, 2),
    }
    assert status.layers == ((1, 3, 2), (2, 3, 1), (3, 2, 2), (4, 2, 2))
    assert not status.is_complete


def test_run_that_uses_gradients_counts_their_parts(finished: SmallRun, tmp_path: Path) -> None:
    plan = prepare(configure(finished.source, tmp_path, "compression.output_curvature=true")).plan
    (tmp_path / "plan.json").write_bytes(plan.to_json())
    store = LocalStore(tmp_path)
    assert list(counts(read_status(store)))[:4] == ["scan", "capture", "gradients", "compress"]
    assert counts(read_status(store))["gradients"] == (0, 12)
    for layer, number in ((4, 0), (4, 1), (3, 0)):
        store.put(run_root.gradient_manifest(layer, number), felt(layer, number, 0.0).to_json())
    assert counts(read_status(store))["gradients"] == (3, 12)
    assert "gradients" not in counts(read_status(LocalStore(finished.root)))


def test_run_whose_shards_are_partly_stitched_knows_how_many_there_will_be(root: Path) -> None:
    for number in (1, 4):
        (root / "checkpoint" / f"model-{number:05d}-of-00006.safetensors").unlink()
    for path in sorted((root / "verification").iterdir())[1:]:
        path.unlink()
    status = counts(read_status(LocalStore(root)))
    assert (status["reduce"], status["verify"]) == ((4, 6), (1, 6))


def test_failed_attempts_are_listed_with_their_errors(root: Path) -> None:
    failure = Failure(
        stage="compress",
        task="L001-E000-007",
        attempt="abc",
        error="NumericsError: [boom] it broke",
        traceback="...",
        input="...",
        is_transient=False,
    )
    (root / "failures" / "compress" / "L001-E000-007").mkdir(parents=True)
    (root / "failures" / "compress" / "L001-E000-007" / "abc.json").write_bytes(failure.to_json())
    status = read_status(LocalStore(root))
    assert status.failures == ("compress/L001-E000-007/abc.json: NumericsError: [boom] it broke",)
    assert (
        "failed attempt: compress/L001-E000-007/abc.json: NumericsError: [boom] it broke"
        in printed(status)
    )


def test_run_without_evaluation_expects_none(finished: SmallRun, tmp_path: Path) -> None:
    plan = prepare(configure(finished.source, tmp_path, "evaluation=null")).plan
    (tmp_path / "plan.json").write_bytes(plan.to_json())
    assert list(counts(read_status(LocalStore(tmp_path)))) == [
        "scan",
        "capture",
        "compress",
        "reduce",
        "verify",
    ]


def test_layers_in_turn_have_the_stage_that_the_log_names(
    finished: SmallRun, tmp_path: Path
) -> None:
    plan = prepare(configure(finished.source, tmp_path, "calibration.propagate=compressed")).plan
    (tmp_path / "plan.json").write_bytes(plan.to_json())
    assert list(counts(read_status(LocalStore(tmp_path))))[:2] == ["scan", "propagate"]


@pytest.mark.slow
def test_second_evaluation_under_other_settings_is_not_added_to_the_first(
    finished: SmallRun, root: Path
) -> None:
    run_locally(prepare(configure(finished.source, root, "evaluation.seed=9")))
    assert len(list((root / "evaluation").iterdir())) == 2
    done, total = counts(read_status(LocalStore(root)))["evaluate"]
    assert (done, total) == (2, 2)


def test_printed_status_says_counts_and_what_is_not_known_yet(
    finished: SmallRun, tmp_path: Path
) -> None:
    assert f"plan {finished.prepared.plan.digest[:12]}  complete" in printed(
        read_status(LocalStore(finished.root))
    )
    (tmp_path / "plan.json").write_bytes((finished.root / "plan.json").read_bytes())
    text = printed(read_status(LocalStore(tmp_path)))
    assert "not complete" in text and "not known yet" in text


# Rate, time left, money.


def half_done(finished: SmallRun, name: str, *overrides: str) -> MemoryStore:
    """Captured in full, 4 of 8 units, of 840 seconds, by a worker each."""
    store = MemoryStore(name)
    plan = prepare(configure(finished.source, "/nowhere", *overrides)).plan
    store.put(run_root.PLAN, plan.to_json())
    for n in plan.layers:
        for p in plan.parts:
            store.put(
                run_root.activation_manifest(n, p.part),
                part(n, p.part, 10.0 * n + p.part, 30.0).to_json(),
            )
    for n, u in enumerate(plan.units[:4]):
        store.put(
            run_root.unit_manifest(u.id),
            unit(u.id, 1000.0 + 30 * n, {"fetch": 60.0, "solve": 780.0})
            .model_copy(update={"worker": f"{n}"})
            .to_json(),
        )
    return store


def test_status_tells_rate_and_time_left_of_the_stage_under_way(finished: SmallRun) -> None:
    status = read_status(half_done(finished, "status-rate"))
    capture, compress = status.work
    assert (capture.done, capture.total, capture.seconds_left) == (12, 12, 0.0)
    assert (compress.per_minute, compress.seconds_left) == (0.26, 930.0)
    text = printed(status)
    assert "compress: 0.26 a minute since the first, 15 min 30 s left at that rate" in text
    assert "last piece of work finished " in text
    assert "capture: " not in text


def test_status_tells_no_rate_before_the_first_piece_of_work(finished: SmallRun) -> None:
    store = half_done(finished, "status-no-unit")
    for u in finished.prepared.plan.units[:4]:
        store.delete(run_root.unit_manifest(u.id))
    status = read_status(store)
    work = status.work[-1]
    assert (work.done, work.per_minute, work.seconds_left) == (0, None, None)
    assert "at that rate" not in printed(status)


# Complete or not: by the counts.


def test_run_that_misses_something_is_not_complete_whatever_report_it_has(root: Path) -> None:
    (root / "units" / "L002-E008-015" / "manifest.json").unlink()
    status = read_status(LocalStore(root))
    assert status.has_report and not status.is_complete
    assert "not complete" in printed(status)


def test_run_that_misses_nothing_is_complete_though_its_report_is_not_written(root: Path) -> None:
    shutil.rmtree(root / "report")
    status = read_status(LocalStore(root))
    assert status.is_complete and not status.has_report
    assert "not complete" not in printed(status)
    assert "the job has not written its report yet" in printed(status)


def test_checkpoint_without_an_index_is_not_complete_though_every_shard_was_looked_at(
    root: Path,
) -> None:
    """Verification found faults: it has a verdict on every shard, and the job ended with an
    error."""
    (root / "checkpoint" / "model.safetensors.index.json").unlink()
    status = read_status(LocalStore(root))
    assert all(stage.is_complete for stage in status.stages) and not status.is_complete
    assert "checkpoint/ has no index: verification has not ended, or has found" in printed(status)


def test_evaluation_that_is_not_asked_for_any_more_is_not_shown_as_unfinished(
    root: Path, finished: SmallRun
) -> None:
    """The plan keeps the evaluation of the first command; the last one had none."""
    shutil.rmtree(root / "evaluation")
    assert counts(read_status(LocalStore(root)))["evaluate"] == (0, 2), "the report has a quality"
    report = finished.report.model_copy(update={"quality": None})
    (root / "report" / "report.json").write_bytes(report.to_json())
    status = read_status(LocalStore(root))
    assert "evaluate" not in counts(status) and status.is_complete
    (root / "evaluation" / "abc").mkdir(parents=True)
    (root / "evaluation" / "abc" / "part-0000.json").write_bytes(b"{}")
    status = read_status(LocalStore(root))
    assert counts(status)["evaluate"] == (1, 2) and not status.is_complete


def test_greedy_agreement_is_counted_and_where_it_is_no_longer_asked_for_not_shown(
    root: Path, finished: SmallRun
) -> None:
    own = "evaluation.greedy={prompts: 3, prompt_tokens: 9, tokens: 9, prompts_per_part: 2}"
    plan = prepare(configure(finished.source, root, own)).plan
    (root / "plan.json").write_bytes(plan.to_json())
    status = read_status(LocalStore(root))
    assert "greedy" not in counts(status) and status.is_complete, "the report has none"
    folder = root / "greedy" / "abc"
    folder.mkdir(parents=True)
    (folder / "part-0001.json").write_bytes(b"{}")
    (root / "greedy" / "continuations").mkdir()
    for name in ("d", "e"):  # which are no parts
        (root / "greedy" / "continuations" / f"{name}.json").write_bytes(b"{}")
    status = read_status(LocalStore(root))
    assert counts(status)["greedy"] == (1, 2) and not status.is_complete
    shutil.rmtree(root / "report")
    shutil.rmtree(root / "greedy")
    status = read_status(LocalStore(root))
    assert counts(status)["greedy"] == (0, 2) and not status.is_complete


def test_pilot_is_complete_without_a_checkpoint(finished: SmallRun, root: Path) -> None:
    pilot = configure(finished.source, "/nowhere", "run.layers=[1,2]", "evaluation=null")
    (root / "plan.json").write_bytes(prepare(pilot).plan.to_json())
    for folder in ("checkpoint", "verification", "evaluation"):
        shutil.rmtree(root / folder)
    status = read_status(LocalStore(root))
    assert counts(status) == {"scan": (3, 3), "capture": (6, 6), "compress": (4, 4)}
    assert status.is_complete


def test_baseline_that_is_asked_for_counts_by_its_stages(finished: SmallRun, root: Path) -> None:
    plan = prepare(configure(finished.source, "/nowhere", "evaluation.baseline=true")).plan
    (root / "plan.json").write_bytes(plan.to_json())
    status = read_status(LocalStore(root))
    assert counts(status)["baseline"] == (0, 0) and not status.is_complete
    shutil.copytree(finished.root, root / "baseline", ignore=shutil.ignore_patterns("residuals"))
    status = read_status(LocalStore(root))
    assert counts(status)["baseline"] == (6, 6) and status.is_complete
    (root / "baseline" / "checkpoint" / "model-00001-of-00006.safetensors").unlink()
    status = read_status(LocalStore(root))
    assert counts(status)["baseline"] == (5, 6) and not status.is_complete


# What is spent.


@pytest.mark.parametrize(
    ("overrides", "gpu_hours", "cost", "words"),
    [
        ((), 0.0, None, "finished work: 1 h 02 min of workers' time (waiting"),
        (
            ("run.gpus_per_worker=0.5",),
            0.5167,
            None,
            "1 h 02 min of workers' time, 0.5 GPU-hours (waiting",
        ),
        (
            ("run.gpus_per_worker=2", "run.gpu_hour_price=3.5"),
            2.0667,
            7.2333,
            "1 h 02 min of workers' time, 2.1 GPU-hours, 7.23 spent on them",
        ),
    ],
)
def test_status_tells_what_finished_work_took_and_cost(
    overrides: tuple[str, ...], gpu_hours: float, cost: float | None, words: str, finished: SmallRun
) -> None:
    """12 parts of 30 seconds and 4 units of 14 minutes."""
    status = read_status(half_done(finished, f"status-cost-{len(overrides)}", *overrides))
    assert status.gpu_hours == pytest.approx(gpu_hours, abs=1e-4)
    assert status.cost == (None if cost is None else pytest.approx(cost, abs=1e-4))
    assert words in printed(status).replace("\n", " ")


def test_failures_of_every_stage_are_listed_with_their_reasons(finished: SmallRun) -> None:
    store = half_done(finished, "status-failures")
    for stage, task, error in (
        ("capture", "parts-0000-and-2-more", "SourceError: cut"),
        ("compress", "L001-E000-007", "KeyError: 'x'"),
    ):
        failure = Failure(
            stage=stage,
            task=task,
            attempt="abc",
            error=error,
            traceback="...",
            input="...",
            is_transient=False,
        )
        store.put(run_root.failure(stage, task, "abc"), failure.to_json())
    status = read_status(store)
    assert status.failures == (
        "capture/parts-0000-and-2-more/abc.json: SourceError: cut",
        "compress/L001-E000-007/abc.json: KeyError: 'x'",
    )
    for failure_line in status.failures:
        assert f"failed attempt: {failure_line}" in printed(status)


def test_held_out_texts_are_not_needed(finished: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder or machine too: the run root alone is read."""
    monkeypatch.setattr(
        "p48ray.stages.evaluate.digest_documents",
        lambda *_: pytest.fail("the texts were asked for"),
    )
    done, total = counts(read_status(finished.prepared.store))["evaluate"]
    assert done == total > 0
