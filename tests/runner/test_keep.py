"""run.keep: what is deleted and when, that nothing is deleted which an open unit needs, and that
every way through a run ends in the same bytes.

Units are not solved anew here: one is done once all its layer's inputs were read and found to be
those of the session's run, whose shards then stand in.
"""

import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from p48ray.checkpoint.storage_stream import StoredUnit
from p48ray.config.load import load_config
from p48ray.errors import (
    ConfigError,
    CorruptObjectError,
    P48Error,
    ShardCorruptError,
    StageFailedError,
)
from p48ray.estimate.plan_cost import estimate
from p48ray.report.report import Report
from p48ray.report.status import read_status
from p48ray.run import arrow, run_root
from p48ray.run.manifest import ActivationPart, GradientPart, TokensManifest, UnitManifest
from p48ray.run.needs import Needs, Visit
from p48ray.run.output_layout import unit_bytes, unit_rows
from p48ray.run.plan import RunPlan, WorkUnit
from p48ray.run.scale_counts import ScaleCounts
from p48ray.runner import pipeline
from p48ray.runner.base import RedoError, TaskList, WorkSource, run_all
from p48ray.runner.local_runner import LocalRunner
from p48ray.runner.pipeline import run_job
from p48ray.stages import blobs, capture, gradients, reduce
from p48ray.stages.prepare import Prepared, prepare
from p48ray.stages.table import STAGES
from p48ray.stages.tasks import Task, TaskResult
from p48ray.store import LocalStore, MemoryStore
from p48ray.unit.compress import Clock, Solved, store_unit
from p48ray.unit.context import StageContext
from tests.conftest import REPO, TINY, timeless
from tests.jobs.command import CONFIG, attempts, small, snapshot
from tests.runner.conftest import ALL_STAGES

pytestmark = pytest.mark.slow

KEEPS = ["all", "units", "checkpoint"]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def prepared_run(root: Path, **settings: str) -> Prepared:
    chosen = (
        small() | ALL_STAGES | {key.replace("__", "."): value for key, value in settings.items()}
    )
    return prepare(
        load_config(CONFIG, tuple(f"{key}={value}" for key, value in chosen.items()), str(root))
    )


def run_locally(prepared: Prepared) -> Report:
    def local(plan: RunPlan, uri: str) -> nullcontext[LocalRunner]:
        return nullcontext(LocalRunner(plan, uri))

    return run_job(prepared, local)


def run(root: Path, keep: str) -> Report:
    return run_locally(prepared_run(root, run__keep=keep))


@pytest.fixture
def replayed(local_run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return replay(local_run, monkeypatch)


def replay(known_run: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Units as they are done from now on, with the shards of a known run."""
    known, done = LocalStore(known_run), []

    def compress(context: StageContext, unit: WorkUnit) -> UnitManifest:
        done.append(unit.id)
        check_inputs(context, known, unit.layer)
        manifest = UnitManifest.load(known, run_root.unit_manifest(unit.id))
        shard = known.get(run_root.unit_shard(unit.id, manifest.attempt))
        held = load(shard)
        solved = Solved(
            {name: held[name] for name, _, _ in unit_rows(context.layout, unit)},
            context.layer_scales(unit.layer),
            manifest.linears,
            manifest.ladder,
            (0.0, 0.0),
            manifest.weight_scales,
        )
        return store_unit(context, unit, solved, Clock(context.device, {"solve": 1.0}))

    patch.setitem(STAGES, "compress", replace(STAGES["compress"], body=compress))
    return done


def check_inputs(context: StageContext, known: LocalStore, layer: int) -> None:
    """A unit reads its layer's scales and every part, checked against their manifests, which have
    to be those of the session's run."""
    list(context.activation_parts(layer))
    scales = context.layer_scales(layer).to_json()
    if scales != known.get(run_root.layer_scales(layer)):
        raise P48Error(f"layer {layer}: other scales")
    for part in context.plan.parts:
        for kind, name in (
            (ActivationPart, run_root.activation_manifest),
            (GradientPart, run_root.gradient_manifest),
        ):
            key = name(layer, part.part)
            if kind.load(context.store, key).sha256 != kind.load(known, key).sha256:
                raise P48Error(f"{key}: other bytes")


class PowerCutError(BaseException):
    """Not an Exception: nothing may catch it, as nothing catches a power cut."""


class Watched:
    """Changes of a run root from now on; deletions one at a time, of nothing they are none. `after`
    is called with "write" or "delete" and the key once it happened, `before` with the key of what
    is about to be deleted.

    After a power cut nothing changes any more, whatever threads are still at it.
    """

    def __init__(
        self,
        root: Path,
        patch: pytest.MonkeyPatch,
        after: Callable[[str, str], None] = lambda what, key: None,
        before: Callable[[str], None] = lambda key: None,
    ) -> None:
        self.root, self.after, self.before, self.is_dark, self.lock = (
            str(root),
            after,
            before,
            False,
            threading.RLock(),
        )
        for name in ("put", "put_if_absent", "write_once", "compose", "delete"):
            self.wrap(name, getattr(LocalStore, name), patch)

    def wrap(self, name: str, real: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
        def method(store: LocalStore, key: str, *rest: Any) -> Any:
            return (
                self.change(name, real, store, key, *rest)
                if store.root == self.root
                else real(store, key, *rest)
            )

        patch.setattr(LocalStore, name, method)

    def change(
        self, name: str, real: Callable[..., Any], store: LocalStore, key: str, *rest: Any
    ) -> Any:
        with self.lock:
            if self.is_dark:
                raise PowerCutError
            if name == "delete" and store.head(key) is not None:
                self.before(key)
                real(store, key)
                self.after("delete", key)
        if name == "delete":
            return None
        result = real(store, key, *rest)
        self.after("write", key)
        return result

    def cut(self) -> None:
        self.is_dark = True
        raise PowerCutError


def files_of(root: Path) -> set[str]:
    files = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return {name for name in files if not name.startswith(run_root.LOGS)}


# What is left.


@dataclass(frozen=True)
class KeptRun:
    """A finished run, and what was deleted on the way: (key, what the run root held just
    before)."""

    root: Path
    prepared: Prepared
    replayed: list[str]
    deletions: list[tuple[str, set[str]]]


@cache
def kept_run(keep: str, root: Path, known_run: Path) -> KeptRun:
    deletions: list[tuple[str, set[str]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        replayed = replay(known_run, patch)
        prepared = prepared_run(root, run__keep=keep)
        Watched(root, patch, before=lambda key: deletions.append((key, files_of(root))))
        run_locally(prepared)
    return KeptRun(root, prepared, replayed, deletions)


@pytest.fixture
def kept(
    request: pytest.FixtureRequest, local_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> KeptRun:
    """Not to be changed."""
    return kept_run(
        request.param, tmp_path_factory.getbasetemp() / f"kept-{request.param}", local_run
    )


DELETING = pytest.mark.parametrize("kept", ["units", "checkpoint"], indirect=True)


def expected_files(prepared: Prepared, keep: str, root: Path) -> set[str]:
    """As the docstring of run.cleanup says, by the names of run_root; the checkpoint's own files
    apart."""
    plan = prepared.plan
    parts = [(n, p.part) for n in plan.layers for p in plan.parts]
    names = {
        run_root.PLAN,
        run_root.TOKENS,
        run_root.manifest_of(run_root.TOKENS),
        run_root.REPORT,
        run_root.REPORT_PAGE,
        *(run_root.layer_scales(n) for n in plan.layers),
        *(run_root.scan_manifest(file) for file in plan.source.scanned),
    }
    names |= {run_root.activation_manifest(*p) for p in parts} | {
        run_root.gradient_manifest(*p) for p in parts
    }
    names |= {run_root.unit_manifest(u.id) for u in plan.units} | {
        run_root.shard_verdict(s.name) for s in prepared.shards
    }
    if keep == "all":
        names |= {run_root.activation_part(*p) for p in parts} | {
            run_root.gradient_part(*p) for p in parts
        }
        boundaries = {
            run_root.blob("residuals", b, p.part) for b in (1, 2, 3, 4) for p in plan.parts
        }
        boundaries |= {
            run_root.blob("residual-gradients", b, p.part) for b in (2, 3, 4) for p in plan.parts
        }
        names |= boundaries | {run_root.manifest_of(key) for key in boundaries}
    if keep != "checkpoint":
        manifests = [
            UnitManifest.load(LocalStore(root), run_root.unit_manifest(u.id)) for u in plan.units
        ]
        names |= {run_root.unit_shard(m.unit, m.attempt) for m in manifests}
    return names


def assert_kept(prepared: Prepared, keep: str, root: Path) -> None:
    beside = {name for name in files_of(root) if not name.startswith(("checkpoint/", "failures/"))}
    assert beside == expected_files(prepared, keep, root)


def test_run_that_keeps_all_leaves_every_object_of_its_stages(local_run: Path) -> None:
    assert_kept(prepared_run(local_run), "all", local_run)


@DELETING
def test_run_leaves_exactly_what_it_is_told_to_keep_beside_the_same_checkpoint(
    kept: KeptRun, local_run: Path
) -> None:
    assert_kept(kept.prepared, kept.prepared.plan.config.run.keep, kept.root)
    assert snapshot(kept.root / "checkpoint") == snapshot(local_run / "checkpoint") != {}
    assert sorted(kept.replayed) == [u.id for u in kept.prepared.plan.units]


@DELETING
def test_status_counts_everything_as_done_though_the_data_is_gone(
    kept: KeptRun, local_run: Path
) -> None:
    status, whole = read_status(LocalStore(kept.root)), read_status(LocalStore(local_run))
    assert (status.stages, status.layers, status.is_complete, status.failures) == (
        whole.stages,
        whole.layers,
        True,
        (),
    )
    assert all(stage.done == stage.total for stage in status.stages)
    assert all(w.done == w.total and w.seconds_left == 0 for w in status.work)
    assert status.stored_bytes < whole.stored_bytes


# What is deleted, and when.


def remaining_work(plan: RunPlan, keys: set[str]) -> list[tuple[range, list[Visit]]]:
    needs = Needs(plan, frozenset(keys))
    return [(needs.forward_layers(p.part), needs.visits(p.part)) for p in plan.parts]


@DELETING
def test_nothing_is_deleted_that_a_resume_would_have_to_make_again(kept: KeptRun) -> None:
    """No deletion adds a layer to what is still to be run, and unit shards stay until the whole
    checkpoint has its verdicts."""
    assert (
        len(kept.deletions) == {"units": 44, "checkpoint": 60}[kept.prepared.plan.config.run.keep]
    )
    for key, held in kept.deletions:
        is_boundary = key.startswith((run_root.RESIDUALS, run_root.RESIDUAL_GRADIENTS))
        assert is_boundary or key.endswith((".arrow", ".safetensors")), "a record of what was done"
        assert remaining_work(kept.prepared.plan, held) == remaining_work(
            kept.prepared.plan, held - {key}
        ), key
        if key.startswith(run_root.UNITS):
            assert {run_root.shard_verdict(s.name) for s in kept.prepared.shards} <= held
            assert "checkpoint/model.safetensors.index.json" in held


@DELETING
def test_layers_data_goes_before_the_next_layers_last_unit_is_done(kept: KeptRun) -> None:
    """One layer after the other on one worker, from the top: while data of layer n is deleted, no
    unit of a lower layer is done yet."""
    seen = [
        (key, held)
        for key, held in kept.deletions
        if key.startswith((run_root.ACTIVATIONS, run_root.GRADIENTS))
    ]
    assert len(seen) == 16
    for key, held in seen:
        layer = int(key.split("/")[1].removeprefix("layer-"))
        done = {
            int(name[7:10])
            for name in held
            if name.startswith("units/") and name.endswith("manifest.json")
        }
        assert min(done) == layer


@pytest.fixture
def one_blob_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob is written once the one before it is durable and what that replaced is gone. By
    default the small model's all lie behind at once."""
    monkeypatch.setattr(blobs, "WRITERS", 1)
    monkeypatch.setattr(blobs, "BEHIND_BYTES", 1)


@pytest.mark.usefixtures("one_blob_behind", "replayed")
@pytest.mark.parametrize("keep", ["units", "checkpoint"])
def test_way_back_holds_two_boundaries_of_a_part_s_gradients_at_most(
    keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, most = tmp_path / "run", 0

    def count(what: str, key: str) -> None:
        nonlocal most
        for part in (0, 1):
            stored = (run_root.blob("residual-gradients", n, part) for n in (2, 3, 4))
            most = max(most, len(files_of(root).intersection(stored)))

    prepared = prepared_run(root, run__keep=keep)
    Watched(root, monkeypatch, count)
    run_locally(prepared)
    assert most == 2


# Power cuts.


def run_through_cuts(prepared: Prepared, is_cut: Callable[[str, str], bool]) -> int:
    """Runs again and again until it ends. Returns how often the power went. A run's own log is no
    change: how much of it there is follows from the logger's level."""
    watched: list[Watched] = []

    def after(what: str, key: str) -> None:
        if not key.startswith(run_root.LOGS) and is_cut(what, key):
            watched[-1].cut()

    while len(watched) < 200:
        with pytest.MonkeyPatch.context() as patch, suppress(PowerCutError):
            watched.append(Watched(Path(prepared.plan.config.run.root), patch, after))
            run_locally(prepared)
            return len(watched) - 1
    raise AssertionError("the run does not get ahead")


def test_run_cut_after_every_third_deletion_ends_in_the_same_bytes(
    local_run: Path, replayed: list[str], tmp_path: Path
) -> None:
    count = 0

    def is_cut(what: str, key: str) -> bool:
        nonlocal count
        count += what == "delete"
        return what == "delete" and count % 3 == 1

    root = tmp_path / "run"
    prepared = prepared_run(root, run__keep="checkpoint")
    assert run_through_cuts(prepared, is_cut) == 20
    assert snapshot(root / "checkpoint") == snapshot(local_run / "checkpoint")
    assert_kept(prepared, "checkpoint", root)
    assert sorted(replayed) == [u.id for u in prepared.plan.units], "no unit is done twice"


def test_run_cut_after_every_twenty_first_change_ends_in_the_same_bytes(
    local_run: Path, replayed: list[str], tmp_path: Path
) -> None:
    count = 0

    def is_cut(what: str, key: str) -> bool:
        nonlocal count
        count += 1
        return count % 21 == 0

    root = tmp_path / "run"
    prepared = prepared_run(root, run__keep="checkpoint")
    assert run_through_cuts(prepared, is_cut) >= 9
    assert snapshot(root / "checkpoint") == snapshot(local_run / "checkpoint")
    assert_kept(prepared, "checkpoint", root)


# Boundaries that are run again.


def boundaries_written(prepared: Prepared) -> tuple[list[str], int]:
    """Boundaries of the residual stream that a run stores, in order, and the most that are there at
    once."""
    root, written, most = Path(prepared.plan.config.run.root), [], 0

    def after(what: str, key: str) -> None:
        nonlocal most
        if is_boundary(key) and what == "write":
            written.append(key)
            most = max(most, sum(map(is_boundary, files_of(root))))

    def is_boundary(key: str) -> bool:
        return key.startswith(run_root.RESIDUALS) and key.endswith(".arrow")

    with pytest.MonkeyPatch.context() as patch:
        Watched(root, patch, after)
        run_locally(prepared)
    return written, most


@pytest.mark.usefixtures("one_blob_behind")
@pytest.mark.parametrize("every", [1, 2, 3, 4, 60])
def test_boundaries_between_segments_alone_are_stored_and_each_once(
    every: int, local_run: Path, replayed: list[str], tmp_path: Path
) -> None:
    """Of two parts; the layers between are run again to the same bytes."""
    root = tmp_path / "run"
    prepared = prepared_run(root, run__keep="units", run__boundary_every=str(every))
    written, held = boundaries_written(prepared)
    stored = [n for n in (1, 2, 3, 4) if n % every == 0]
    assert sorted(written) == sorted(
        run_root.blob("residuals", n, p) for n in stored for p in (0, 1)
    )
    assert held == len(written), "the backward pass begins when all are there"
    assert_kept(prepared, "units", root)
    assert snapshot(root / "checkpoint") == snapshot(local_run / "checkpoint")
    for folder in ("activations", "gradients"):
        assert snapshot_of_manifests(root, folder) == snapshot_of_manifests(local_run, folder)


def test_run_with_few_boundaries_cut_after_every_twenty_first_change_ends_in_the_same_bytes(
    local_run: Path, replayed: list[str], tmp_path: Path
) -> None:
    count = 0

    def is_cut(what: str, key: str) -> bool:
        nonlocal count
        count += 1
        return count % 21 == 0

    prepared = prepared_run(tmp_path / "run", run__keep="checkpoint", run__boundary_every="2")
    assert run_through_cuts(prepared, is_cut) >= 9
    assert snapshot(tmp_path / "run" / "checkpoint") == snapshot(local_run / "checkpoint")
    assert_kept(prepared, "checkpoint", tmp_path / "run")


def test_corrupt_boundary_that_others_are_run_again_from_is_made_anew(
    local_run: Path, replayed: list[str], tmp_path: Path
) -> None:
    """The run deletes it and goes up from further below."""
    root, damaged = tmp_path / "run", []

    def after(what: str, key: str) -> None:
        if what == "write" and key == run_root.blob("residual-gradients", 4, 0) and not damaged:
            damaged.append(root / run_root.blob("residuals", 2, 0))
            damaged[0].write_bytes(damaged[0].read_bytes()[:-8] + bytes(8))

    prepared = prepared_run(root, run__keep="units", run__boundary_every="2")
    with pytest.MonkeyPatch.context() as patch:
        Watched(root, patch, after)
        run_locally(prepared)
    assert damaged
    assert_kept(prepared, "units", root)
    assert snapshot(root / "checkpoint") == snapshot(local_run / "checkpoint")


# Changed minds, and lost units.


@pytest.fixture
def finished(local_run: Path, tmp_path: Path) -> Path:
    """A copy of the session's run, which kept all."""
    shutil.copytree(local_run, tmp_path / "run")
    return tmp_path / "run"


def test_what_is_kept_may_change_on_resume_and_nothing_is_done_again(
    finished: Path, replayed: list[str]
) -> None:
    before, checkpoint = attempts(finished), snapshot(finished / "checkpoint")
    for keep, left in (
        ("units", "units"),
        ("all", "units"),
        ("checkpoint", "checkpoint"),
        ("all", "checkpoint"),
    ):
        run(finished, keep)
        assert_kept(prepared_run(finished), left, finished)
    assert (replayed, attempts(finished), snapshot(finished / "checkpoint")) == (
        [],
        before,
        checkpoint,
    )


def times_of(root: Path, folder: str) -> dict[str, bytes]:
    """Manifests of a folder, with what the clock wrote."""
    return {
        name: (root / name).read_bytes()
        for name in files_of(root)
        if name.startswith(folder) and "/part-" in name and name.endswith(".json")
    }


def test_unit_lost_after_its_layers_data_was_deleted_is_done_again_to_the_same_bytes(
    finished: Path, local_run: Path, replayed: list[str]
) -> None:
    run(finished, "units")
    (finished / "units/L002-E004-007/manifest.json").unlink()
    for folder in ("checkpoint", "verification"):
        shutil.rmtree(finished / folder)
    before = {folder: times_of(finished, folder) for folder in ("activations", "gradients")}
    units = attempts(finished)
    run(finished, "units")
    assert replayed == ["L002-E004-007"]
    assert {
        unit for unit, manifest in attempts(finished).items() if manifest != units.get(unit)
    } == {"L002-E004-007"}
    for folder, manifests in before.items():
        changed = {
            name for name, data in times_of(finished, folder).items() if data != manifests[name]
        }
        assert changed == {f"{folder}/layer-002/part-000{part}.json" for part in (0, 1)}, (
            "only the layer that was open"
        )
        assert snapshot_of_manifests(finished, folder) == snapshot_of_manifests(local_run, folder)
    assert_kept(prepared_run(finished), "units", finished)
    assert snapshot(finished / "checkpoint") == snapshot(local_run / "checkpoint")


def snapshot_of_manifests(root: Path, folder: str) -> dict[str, bytes]:
    return {name: timeless(data) for name, data in times_of(root, folder).items()}


def test_checkpoint_file_lost_after_the_units_were_deleted_is_made_again_from_their_layers(
    finished: Path, local_run: Path, replayed: list[str]
) -> None:
    """What a person is told to do about a damaged file: delete it and run again."""
    run(finished, "checkpoint")
    lost = (
        finished
        / "checkpoint"
        / next(
            s.name
            for s in prepared_run(finished).shards
            if any(isinstance(x, WorkUnit) for x in s.segments)
        )
    )
    lost.unlink()
    (finished / "verification" / lost.with_suffix(".json").name).unlink()
    run(finished, "checkpoint")
    assert 0 < len(replayed) < 16
    assert snapshot(finished / "checkpoint") == snapshot(local_run / "checkpoint")
    assert_kept(prepared_run(finished), "checkpoint", finished)


def test_checkpoint_file_cut_short_after_the_units_were_deleted_is_made_again(
    finished: Path, local_run: Path, replayed: list[str]
) -> None:
    """A file of another size is nobody's finished work, though its name is there."""
    run(finished, "checkpoint")
    name = next(
        s.name
        for s in prepared_run(finished).shards
        if any(isinstance(x, WorkUnit) for x in s.segments)
    )
    cut_short = finished / "checkpoint" / name
    cut_short.write_bytes(cut_short.read_bytes()[:-100])
    run(finished, "checkpoint")
    assert 0 < len(replayed) < 16
    assert snapshot(finished / "checkpoint") == snapshot(local_run / "checkpoint")


@pytest.mark.parametrize("layer", [1, 3])
def test_records_of_a_finished_layer_that_are_gone_are_not_missed(
    layer: int, finished: Path, local_run: Path, replayed: list[str]
) -> None:
    """Another driver finished the layer's last unit after this one had deleted a corrupt part with
    its manifest, and died."""
    for key in (
        run_root.activation_part(layer, 0),
        run_root.activation_manifest(layer, 0),
        run_root.gradient_manifest(layer, 1),
    ):
        (finished / key).unlink()
    shutil.rmtree(finished / "checkpoint")
    run(finished, "all")
    assert replayed == []
    assert snapshot(finished / "checkpoint") == snapshot(local_run / "checkpoint")


def test_attempts_that_lost_are_collected_whatever_is_kept(
    finished: Path, replayed: list[str]
) -> None:
    lost = finished / "units" / "L001-E000-003" / "0123456789ab" / "shard.safetensors"
    lost.parent.mkdir()
    lost.write_bytes(b"the shard of a worker that was killed before its manifest")
    run(finished, "all")
    assert replayed == []
    assert_kept(prepared_run(finished), "all", finished)


# Two drivers on one run root.


class Scripted:
    """A runner whose tasks end as they are told to."""

    def __init__(self, *results: TaskResult) -> None:
        self.results = results

    def run(self, source: WorkSource) -> Iterator[TaskResult]:
        source.next(False)
        return iter(self.results)


class Listed(TaskList):
    """Notes what is done."""

    def __init__(self, *tasks: Task) -> None:
        super().__init__(tasks)
        self.finished: list[Task] = []

    def done(self, task: Task) -> None:
        self.finished.append(task)


def failed(
    unit: str, kind: type[Exception] = ShardCorruptError, redo: tuple[str, ...] = ()
) -> TaskResult:
    task = Task(stage="compress", id=unit, item=None, marker=run_root.unit_manifest(unit))
    return TaskResult(task=task, error_type=kind.__name__, error="what it read is gone", redo=redo)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(uuid.uuid4().hex)


@pytest.mark.parametrize("kind", [ShardCorruptError, ConfigError, KeyError])
def test_task_that_failed_after_another_driver_did_it_is_done(
    kind: type[Exception], store: MemoryStore
) -> None:
    result = failed("L001", kind, redo=("activations/x.arrow",))
    source = Listed(result.task)
    store.put("units/L001/manifest.json", b"{}")
    store.put("activations/x.arrow", b"of another")
    run_all(Scripted(result), source, store)
    assert source.finished == [result.task]
    assert store.head("activations/x.arrow") is not None, "nothing is to be made anew"


def test_task_that_failed_and_nobody_did_is_not_done(store: MemoryStore) -> None:
    results = [failed("L001"), failed("L002"), TaskResult(task=failed("L003").task)]
    source = Listed(*(r.task for r in results))
    store.put("units/L001/manifest.json", b"{}")
    with pytest.raises(
        StageFailedError,
        match=r"compress: 1 of 3 tasks failed(?s:.*)L002: ShardCorruptError: what it read is gone",
    ):
        run_all(Scripted(*results), source, store)
    assert [task.id for task in source.finished] == ["L001", "L003"]


def test_task_without_a_marker_is_done_by_nobody_else(store: MemoryStore) -> None:
    task = Task(stage="capture", id="parts-0000", item=[0])
    with pytest.raises(StageFailedError, match="capture: 1 of 1 tasks failed"):
        run_all(
            Scripted(TaskResult(task=task, error_type="P48Error", error="no")), Listed(task), store
        )


def test_corrupt_objects_are_deleted_and_only_if_they_are_all_that_failed_the_stages_run_again(
    store: MemoryStore,
) -> None:
    for key in ("a.arrow", "b.arrow"):
        store.put(key, b"damaged")
    corrupt = failed("L001", CorruptObjectError, redo=("a.arrow", "b.arrow"))
    with pytest.raises(RedoError):
        run_all(Scripted(corrupt), Listed(corrupt.task), store)
    assert list(store.list()) == []
    with pytest.raises(StageFailedError):
        run_all(Scripted(corrupt, failed("L002")), Listed(corrupt.task), store)


def overtake(
    patch: pytest.MonkeyPatch, root: Path, keep: str, when: Callable[[str, str], bool]
) -> list[Report]:
    """A second driver does the whole run as soon as the first one's changes look like this; the
    first then goes on."""
    reports: list[Report] = []
    is_away = False

    def after(what: str, key: str) -> None:
        nonlocal is_away
        if not is_away and when(what, key):
            is_away = True
            reports.append(run(root, keep))

    Watched(root, patch, after)
    return reports


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("capture", run_root.activation_part(2, 0)),
        ("gradients", run_root.blob("residual-gradients", 4, 0)),
        ("compress", "units/L002"),
        ("reduce", "checkpoint/model-00002-of-00006.safetensors"),
    ],
)
def test_driver_that_another_overtook_and_cleaned_up_after_ends_well(
    stage: str,
    key: str,
    local_run: Path,
    replayed: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "run"
    reports = overtake(
        monkeypatch, root, "checkpoint", lambda what, name: what == "write" and name.startswith(key)
    )
    run(root, "checkpoint")
    assert len(reports) == 1
    assert snapshot(root / "checkpoint") == snapshot(local_run / "checkpoint")
    assert_kept(prepared_run(root), "checkpoint", root)


def test_driver_overtaken_while_it_stitches_leaves_finished_units_done(
    finished: Path, local_run: Path, replayed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranges vanish between the look whether the shard is there and the copy."""
    real, reports = reduce.find_unit, []

    def find_unit(context: StageContext, unit: WorkUnit) -> StoredUnit:
        if not reports:
            monkeypatch.setattr(reduce, "find_unit", real)
            reports.append(run(finished, "checkpoint"))
        return real(context, unit)

    for folder in ("checkpoint", "verification"):
        shutil.rmtree(finished / folder)
    monkeypatch.setattr(reduce, "find_unit", find_unit)
    run(finished, "checkpoint")
    assert (len(reports), replayed) == (1, [])
    assert snapshot(finished / "checkpoint") == snapshot(local_run / "checkpoint")


@pytest.mark.parametrize("stage", ["capture", "gradients"])
def test_driver_that_lags_behind_leaves_manifests_of_parts_that_are_there(
    stage: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its listing is from before another driver stored the parts; a unit of the other's reads their
    manifests at any moment."""
    context = prepared_run(finished).context
    deleted: list[str] = []
    for module in (capture, gradients):
        monkeypatch.setattr(module, "read_needs", lambda plan, store: Needs(plan, frozenset()))
    Watched(finished, monkeypatch, before=deleted.append)
    STAGES[stage].body(context, [0] if stage == "capture" else (4, [0]))
    assert deleted == []


# How much is stored at most.


def solve_nothing(context: StageContext, unit: WorkUnit) -> UnitManifest:
    """A shard of the right size after its inputs were read."""
    list(context.activation_parts(unit.layer))
    tensors = {"all": torch.zeros(unit_bytes(context.layout, unit), dtype=torch.uint8)}
    solved = Solved(tensors, context.layer_scales(unit.layer), (), (), (0.0, 0.0), ScaleCounts())
    return store_unit(context, unit, solved, Clock(context.device))


def peak_bytes(prepared: Prepared) -> int:
    """The most that data objects take at a time, looked at after every change. Records are not
    counted, as in the estimate."""
    root, held, most = Path(prepared.plan.config.run.root), {}, 0

    def after(what: str, key: str) -> None:
        nonlocal most
        if what == "delete":
            held.pop(key, None)
        elif key.endswith((".arrow", ".safetensors")) and key != run_root.TOKENS:
            held[key] = os.path.getsize(root / key)
        most = max(most, sum(held.values()))

    with pytest.MonkeyPatch.context() as patch:
        Watched(root, patch, after)
        run_locally(prepared)
    return most


def estimated_peak(prepared: Prepared) -> int:
    return estimate(
        prepared.plan, prepared.source, prepared.layout, prepared.shards
    ).peak_stored_bytes


ONE_PART = {
    "calibration__num_sequences": "8",
    "calibration__sequence_length": "128",
    "calibration__sequences_per_part": "8",
}
ONE_PART |= {"run__num_workers": "1"}  # as many as LocalRunner has
PARTS = ONE_PART | {"calibration__sequences_per_part": "2", "run__num_workers": "2"}
FEW_TOKENS = ONE_PART | {"calibration__num_sequences": "2"}
FORTH, BACK = {"compression__output_curvature": "false"}, {"compression__output_curvature": "true"}
SPARSE = BACK | {"run__boundary_every": "2"}
PILOT = {
    "source__checkpoint": str(TINY),
    "run__layers": "[1,2,3]",
    "compression__refine_steps": "0",
    "evaluation": "null",
}
FRAMING = 1.02  # Arrow's and safetensors' headers


@pytest.mark.usefixtures("one_blob_behind")
@pytest.mark.parametrize(
    "way", [FORTH, BACK, SPARSE], ids=["forth", "and back", "every second boundary"]
)
@pytest.mark.parametrize(
    ("keep", "tokens"),
    [("all", ONE_PART), ("units", ONE_PART), ("units", PARTS), ("units", FEW_TOKENS)],
    ids=["all", "units", "units, many parts", "units, few tokens"],
)
def test_pilot_stores_no_more_than_estimated_and_not_much_less(
    keep: str,
    way: dict[str, str],
    tokens: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pilot has no checkpoint, so that the streams are what counts. Parts that come one after the
    other hold less than all at once."""
    monkeypatch.setitem(STAGES, "compress", replace(STAGES["compress"], body=solve_nothing))
    monkeypatch.setattr(pipeline, "build_report", lambda *_: Report.model_construct())
    monkeypatch.setattr(pipeline, "report_html", lambda *_: "")
    prepared = prepared_run(tmp_path / "run", run__keep=keep, **PILOT, **way, **tokens)
    calibration = prepared.plan.config.calibration
    ids_NS = torch.randint(
        2048, (calibration.num_sequences, calibration.sequence_length), dtype=torch.int32
    )
    data = arrow.encode(
        {"token_ids": ids_NS}, {"kind": "tokens", "owner": prepared.plan.units_digest}
    ).to_bytes()
    prepared.store.put(run_root.TOKENS, data)
    record = TokensManifest(
        owner=prepared.plan.units_digest,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    prepared.store.put(run_root.manifest_of(run_root.TOKENS), record.to_json())
    share = peak_bytes(prepared) / estimated_peak(prepared)
    assert share <= FRAMING
    assert share >= (0.9 if tokens is not PARTS or keep == "all" else 0.7)


@pytest.mark.parametrize("keep", ["units", "checkpoint"])
def test_whole_run_stores_no_more_than_estimated_and_not_much_less(
    keep: str, tmp_path: Path
) -> None:
    """Here units beside the checkpoint are the most. Of the sample: headers are no small share of a
    narrow model's files."""
    sample = {"source__checkpoint": str(TINY), "output__max_shard_size": "2MB"}
    prepared = prepared_run(tmp_path / "run", run__keep=keep, **sample)
    assert 0.9 <= peak_bytes(prepared) / estimated_peak(prepared) <= FRAMING
