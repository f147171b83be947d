"""A run with output.storage: sparse: its folder is what a conversion of the dense run's would be,
and everything that reads it reads it."""

import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from p48ray.errors import CorruptObjectError, PlanMismatchError
from p48ray.estimate.plan_cost import estimate
from p48ray.finished.converter import convert_folder
from p48ray.finished.verifier import verify_folder
from p48ray.report.plan_table import plan_rows
from p48ray.run import run_root
from p48ray.run.checkpoint_manifest import CheckpointManifest
from p48ray.run.manifest import ShardVerdict, UnitManifest
from p48ray.stages import reduce
from p48ray.stages.prepare import prepare
from p48ray.stages.reduce import stitch_shard
from p48ray.stages.verify import verify_and_record
from p48ray.store import LocalStore, MemoryStore
from p48ray.unit.context import StageContext
from tests.reference.sparse_storage import dense_checkpoint, read_file
from tests.stages.damage import INDEX, Folder
from tests.stages.small_run import SmallRun, configure, run_locally

pytestmark = pytest.mark.slow

MANIFEST, CARD = "p48ray.json", "README.md"
LINEAR = "language_model.model.layers.1.mlp.experts.3.up_proj"
SPARSE = "output.storage=sparse"


@pytest.fixture(scope="module")
def sparse_run(finished: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """The session's run once more, from its source, with sparse storage. Nobody changes it."""
    root = tmp_path_factory.mktemp("sparse") / "run"
    prepared = prepare(configure(finished.source, root, SPARSE))
    return SmallRun(
        root=root, source=finished.source, prepared=prepared, report=run_locally(prepared)
    )


@pytest.fixture
def root(sparse_run: SmallRun, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(sparse_run.root, tmp_path / "run"))


def again(run: SmallRun, root: Path, *overrides: str) -> None:
    run_locally(prepare(configure(run.source, root, SPARSE, *overrides)))


def converted(folder: Folder, to: str) -> Folder:
    target = MemoryStore(uuid.uuid4().hex)
    convert_folder(folder.store(), target, to, None)
    return Folder({info.key: target.get(info.key) for info in target.list()})


def of_plan(folder: Folder, ours: SmallRun, theirs: SmallRun) -> Folder:
    """The folder as the other run would have written it: the plans differ in output.storage, which
    manifest and card state."""
    digest, storage = ours.prepared.plan.digest, ours.prepared.plan.config.output.storage
    manifest = (
        CheckpointManifest.from_json(folder.files[MANIFEST], MANIFEST)
        .model_copy(update={"plan_digest": digest})
        .sealed()
    )
    card = folder.files[CARD].decode()
    for old, new in (
        (theirs.prepared.plan.digest, digest),
        (f"storage: {theirs.prepared.plan.config.output.storage}", f"storage: {storage}"),
    ):
        assert card.count(old) == 1
        card = card.replace(old, new)
    return folder.with_file(MANIFEST, manifest.to_json()).with_file(CARD, card.encode())


# The folder


def test_folder_is_byte_for_byte_what_a_conversion_of_the_dense_runs_is(
    finished: SmallRun, sparse_run: SmallRun
) -> None:
    stitched, dense = Folder.read(sparse_run.checkpoint), Folder.read(finished.checkpoint)
    assert stitched.changed_from(converted(dense, "sparse")) == [CARD, MANIFEST]
    assert stitched.changed_from(of_plan(converted(dense, "sparse"), sparse_run, finished)) == []


def test_converted_to_dense_storage_it_is_the_dense_runs_folder(
    finished: SmallRun, sparse_run: SmallRun
) -> None:
    dense = converted(Folder.read(sparse_run.checkpoint), "dense")
    assert dense.changed_from(of_plan(Folder.read(finished.checkpoint), sparse_run, finished)) == []
    assert b"## Sparse storage" not in dense.files[CARD]


def test_an_independent_reader_finds_the_units_bytes_in_it(sparse_run: SmallRun) -> None:
    found = dense_checkpoint(Folder.read(sparse_run.checkpoint).files)
    for unit in sparse_run.prepared.plan.units:
        manifest = UnitManifest.load(sparse_run.prepared.store, run_root.unit_manifest(unit.id))
        tensors = read_file(
            sparse_run.prepared.store.get(run_root.unit_shard(unit.id, manifest.attempt))
        )
        assert tensors == {name: found[name] for name in tensors}
        assert any(name.endswith(".weight_packed") for name in tensors)


# Whoever plans it, reads it or speaks of it


def test_plan_and_report_tell_the_bytes_that_are_written(
    finished: SmallRun, sparse_run: SmallRun
) -> None:
    folder = Folder.read(sparse_run.checkpoint)
    sizes = {
        name: len(data)
        for file in folder.shards
        for name, (_, _, data) in read_file(folder.files[file]).items()
    }
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    prepared, report = sparse_run.prepared, sparse_run.report
    e = estimate(prepared.plan, prepared.source, prepared.layout, prepared.shards)
    assert (report.checkpoint_bytes, report.expert_bytes, report.storage) == (
        sum(sizes.values()),
        experts,
        "sparse",
    )
    assert (e.checkpoint_bytes, e.checkpoint_bytes - e.untouched_bytes) == (
        sum(sizes.values()),
        experts,
    )
    assert "sparse storage" in dict(plan_rows(prepared, e))["output"]
    dense = estimate(
        finished.prepared.plan,
        finished.prepared.source,
        finished.prepared.layout,
        finished.prepared.shards,
    )
    assert e.unit_bytes == dense.unit_bytes == dense.checkpoint_bytes - dense.untouched_bytes
    assert 0.611 < experts / e.unit_bytes < 0.613
    assert f"The experts take {experts:,} bytes" in folder.files[CARD].decode()
    assert (
        "sparse, for the kernels of paired-4:8"
        in (sparse_run.root / "report" / "report.html").read_text()
    )


def test_evaluation_reads_the_same_weights_as_from_dense_storage(
    finished: SmallRun, sparse_run: SmallRun
) -> None:
    assert finished.report.quality is not None and finished.report.quality.kl > 0
    assert sparse_run.report.quality == finished.report.quality


@pytest.mark.parametrize("with_source", [True, False])
def test_verification_as_a_stranger_passes(sparse_run: SmallRun, with_source: bool) -> None:
    verdict = verify_folder(
        LocalStore(sparse_run.checkpoint), LocalStore(sparse_run.source) if with_source else None
    )
    assert (verdict.problems, verdict.compared_with_source, verdict.num_linears) == (
        (),
        with_source,
        192,
    )


@pytest.mark.parametrize(
    "suffix", ["weight_sparse_packed", "weight_sparse_mask", "weight_scale", "input_global_scale"]
)
def test_the_jobs_own_verification_finds_a_changed_bit(sparse_run: SmallRun, suffix: str) -> None:
    """Nobody but the units' manifests says what is right: the checkpoint has no manifest of its own
    yet."""
    folder = Folder.read(sparse_run.checkpoint).flipped(f"{LINEAR}.{suffix}", 0, 0x01)
    store = MemoryStore(uuid.uuid4().hex)
    for info in sparse_run.prepared.store.list("units/"):
        store.put(info.key, sparse_run.prepared.store.get(info.key))
    file = folder.file_of(f"{LINEAR}.{suffix}")
    store.put(run_root.checkpoint_file(file), folder.files[file])
    context = replace(sparse_run.context, store=store)
    (shard,) = [s for s in sparse_run.prepared.shards if s.name == file]
    verify_and_record(context, shard)
    problems = ShardVerdict.load(store, run_root.shard_verdict(file)).problems
    assert any("unit L001-E000-007: " in p for p in problems), problems


# Interrupted, damaged, changed


@pytest.fixture
def units_only(sparse_run: SmallRun) -> StageContext:
    """A run in memory that holds the sparse run's units and nothing else."""
    store = MemoryStore(uuid.uuid4().hex)
    for info in sparse_run.prepared.store.list("units/"):
        store.put(info.key, sparse_run.prepared.store.get(info.key))
    return replace(sparse_run.context, store=store)


def test_interrupted_stitch_goes_on_and_leaves_whole_shards_alone(
    sparse_run: SmallRun, root: Path
) -> None:
    first, second, *rest = sorted((root / "checkpoint").glob("*.safetensors"))
    (root / "checkpoint" / INDEX).unlink()
    first.unlink()
    # no store leaves such a one, but a copy of a run root may
    second.write_bytes(second.read_bytes()[:-1])
    untouched = {path: path.stat().st_mtime_ns for path in rest}
    again(sparse_run, root)
    assert Folder.read(root / "checkpoint").changed_from(Folder.read(sparse_run.checkpoint)) == []
    assert {path: path.stat().st_mtime_ns for path in rest} == untouched


def test_shard_of_another_storage_is_made_anew(
    finished: SmallRun, sparse_run: SmallRun, root: Path
) -> None:
    name, *_ = Folder.read(root / "checkpoint").shards
    shutil.copy(finished.checkpoint / name, root / "checkpoint" / name)
    again(sparse_run, root)
    assert Folder.read(root / "checkpoint").changed_from(Folder.read(sparse_run.checkpoint)) == []


# which then keep 3 pairs
@pytest.mark.parametrize("where", ["in the first scale", "in the last codes"])
@pytest.mark.parametrize("store_tells_digests", [True, False])
def test_unit_with_a_changed_bit_is_never_stitched(
    sparse_run: SmallRun,
    units_only: StageContext,
    monkeypatch: pytest.MonkeyPatch,
    store_tells_digests: bool,
    where: str,
) -> None:
    """Where a bucket does not tell digests, the bytes themselves do: they pass through the process
    that recodes them."""
    unit = sparse_run.prepared.plan.units[0]
    manifest_key = run_root.unit_manifest(unit.id)
    manifest = UnitManifest.load(units_only.store, manifest_key)
    key = run_root.unit_shard(unit.id, manifest.attempt)
    data = bytearray(units_only.store.get(key))
    data[manifest.data_offset if where == "in the first scale" else -1] ^= 0x10
    units_only.store.put(key, bytes(data))
    if not store_tells_digests:
        monkeypatch.setattr(reduce, "stored_sha256", lambda *_: None)
    words = (
        "expected .* bytes with SHA-256 .*, found"
        if store_tells_digests
        else rf"not the unit that {manifest_key} names: .*expected .* found"
    )
    with pytest.raises(CorruptObjectError, match=rf"{key}: {words}") as caught:
        stitch_shard(units_only, sparse_run.prepared.shards[0])
    assert caught.value.keys == (manifest_key, key)
    assert list(units_only.store.list("checkpoint/")) == []


def test_unit_that_is_damaged_when_it_is_stitched_is_made_anew_by_the_same_run(
    sparse_run: SmallRun, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(root / "checkpoint")
    shutil.rmtree(root / "verification")
    (shard,) = root.glob("units/L002-E000-007/*/shard.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x10
    shard.write_bytes(data)
    monkeypatch.setattr(reduce, "stored_sha256", lambda *_: None)
    again(sparse_run, root)
    assert Folder.read(root / "checkpoint").changed_from(Folder.read(sparse_run.checkpoint)) == []
    assert (
        not shard.exists() and len(list(root.glob("units/L002-E000-007/*/shard.safetensors"))) == 1
    )


def test_another_storage_is_another_plan_and_the_way_out_is_named(
    sparse_run: SmallRun, root: Path
) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(
        PlanMismatchError,
        match=(
            r"output\.storage: expected 'dense' \(this run\), found 'sparse'.*`p48ray convert`"
            r" makes the other storage"
        ),
    ):
        run_locally(prepare(configure(sparse_run.source, root)))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
