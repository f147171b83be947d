"""run.scratch: whose folder it is, who sees it, and when it goes."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from p48ray.config.load import load_config
from p48ray.errors import ConfigError
from p48ray.run import run_root
from p48ray.run.plan import RunPlan
from p48ray.run.scratch import (
    ScratchUse,
    check_probe,
    known_scratch,
    note_scratch,
    other_runs,
    own_folder,
    with_scratch,
)
from p48ray.stages.prepare import prepare
from p48ray.store.local import LocalStore
from p48ray.store.open import open_store
from tests.jobs.command import CONFIG, small

BLOB = run_root.blob("activations", 1, 0)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture
def root(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def planned(scratch: Path | str | None, **settings: str) -> RunPlan:
    chosen = small() | {k.replace("__", "."): v for k, v in settings.items()}
    if scratch is not None:
        chosen["run.scratch"] = str(scratch)
    words = tuple(f"{key}={value}" for key, value in chosen.items())
    return prepare(load_config(CONFIG, words, "memory://scratch")).plan


@pytest.fixture
def plan(scratch: Path) -> RunPlan:
    return planned(scratch)


def folder_of(plan: RunPlan, root: LocalStore) -> Path:
    folder = own_folder(plan, root.uri)
    assert folder is not None
    return folder


def test_place_of_blobs_is_in_no_digest(plan: RunPlan) -> None:
    without = planned(None)
    assert (plan.digest, plan.units_digest) == (without.digest, without.units_digest)
    assert own_folder(without, "/run") is None


def test_folder_is_of_the_units_digest_and_the_run_root(scratch: Path, plan: RunPlan) -> None:
    own = own_folder(plan, "/run")
    assert own is not None and own.parent == scratch
    assert own.name.startswith(plan.units_digest[:16])
    assert own_folder(planned(scratch, run__layers="[1]"), "/run") == own, "of its pilot too"
    assert own_folder(planned(f"file://{scratch}"), "/run") == own
    others = [own_folder(planned(scratch, compression__sweeps="2"), "/run"), own_folder(plan, "/b")]
    assert len({own, *others}) == 3


def test_nothing_is_left_where_nothing_was_made(plan: RunPlan, root: LocalStore) -> None:
    with ScratchUse(plan, root):
        note_scratch(plan, root)
        assert len(list(root.list("scratch/"))) == 1
    assert not folder_of(plan, root).exists()
    assert list(root.list()) == []


def test_blobs_stay_and_so_does_the_word_of_them(plan: RunPlan, root: LocalStore) -> None:
    with ScratchUse(plan, root):
        note_scratch(plan, root)
        with_scratch(plan, root).put(BLOB, b"blob")
    assert (folder_of(plan, root) / BLOB).read_bytes() == b"blob"
    known = known_scratch(root)
    assert (known.folders, known.unseen) == ((folder_of(plan, root),), ())
    assert known.store.get(BLOB) == b"blob"


def test_folder_stays_while_another_driver_holds_it(plan: RunPlan, root: LocalStore) -> None:
    with ScratchUse(plan, root) as first:
        with ScratchUse(plan, root) as second:
            assert first.probe() == second.probe()
        assert folder_of(plan, root).exists()
    assert not folder_of(plan, root).exists()


def test_worker_that_sees_the_drivers_folder_passes(plan: RunPlan, root: LocalStore) -> None:
    with ScratchUse(plan, root) as use:
        check_probe(plan, root.uri, use.probe(), "here")
        shutil.rmtree(folder_of(plan, root))  # a disk is wiped while the job goes on
        check_probe(plan, root.uri, use.probe(), "here")
    check_probe(planned(None), root.uri, None, "here")


@pytest.mark.parametrize("there", ["nothing", "a folder of its own", "a record that is cut"])
def test_node_with_a_disk_of_its_own_is_named_with_the_folder(
    there: str, plan: RunPlan, root: LocalStore
) -> None:
    folder = folder_of(plan, root)
    with ScratchUse(plan, root) as use:
        probe = use.probe()
        shutil.rmtree(folder)
        if there == "a folder of its own":
            use.probe()
        elif there == "a record that is cut":
            folder.mkdir()
            (folder / "scratch.json").write_text('{"id": "')
        with pytest.raises(ConfigError) as caught:
            check_probe(plan, root.uri, probe, "node-7 (10.0.0.7)")
        assert "node-7 (10.0.0.7)" in str(caught.value)
        assert str(caught.value).startswith(f"run.scratch: {folder}: ")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that may not be written, not even by root, who alone can mount one."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "p48ray-scratch", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_read_only_folder_is_refused_by_its_key(
    read_only: Path, plan: RunPlan, root: LocalStore
) -> None:
    with pytest.raises(ConfigError, match=rf"^run\.scratch: {read_only}: .*may not be written"):
        planned(read_only)
    settings = plan.config.run.model_copy(update={"scratch": str(read_only)})
    later = plan.model_copy(update={"config": plan.config.model_copy(update={"run": settings})})
    with (
        pytest.raises(ConfigError, match=rf"^run\.scratch: {read_only}/.*Read-only file system"),
        ScratchUse(later, root),
    ):
        pytest.fail("it can not be used")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://bucket/scratch", "expected a folder, of a node or of a file system"),
        ("hf://owner/name", "expected a folder, of a node or of a file system"),
        (str(CONFIG), "found that .* is a file"),
    ],
)
def test_place_that_is_no_folder_is_refused_by_its_key(place: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^run\.scratch: .*{words}"):
        planned(place)


def test_scratch_lies_neither_in_the_run_root_nor_in_the_source(tmp_path: Path) -> None:
    source = small()["source.checkpoint"]
    for inside, key in ((tmp_path / "run" / "scratch", "run.root"), (source, "source.checkpoint")):
        words = [f"{k}={v}" for k, v in (small() | {"run.scratch": str(inside)}).items()]
        with pytest.raises(ConfigError, match=rf"^run\.scratch: .* apart from {key}"):
            prepare(load_config(CONFIG, tuple(words), str(tmp_path / "run")))


def test_folder_of_the_same_name_on_another_node_is_not_taken_for_the_runs(
    plan: RunPlan, root: LocalStore
) -> None:
    note_scratch(plan, root)
    folder = folder_of(plan, root)
    (folder / "activations").mkdir()
    (folder / "scratch.json").write_text(json.dumps({"id": "0" * 16, "folder": str(folder)}))
    known = known_scratch(root)
    assert (known.folders, known.unseen) == ((), (str(folder),))
    note_scratch(plan, root)
    known = known_scratch(root)
    assert (known.folders, known.unseen) == ((folder,), (str(folder),))


def test_what_other_runs_left_is_known_by_its_name_and_by_who_holds_it(
    scratch: Path, plan: RunPlan, root: LocalStore
) -> None:
    note_scratch(plan, root)
    held, left = (planned(scratch, compression__sweeps=n) for n in ("2", "3"))
    for other in (held, left):
        note_scratch(other, root)
        with_scratch(other, root).put(BLOB, b"12345")
    gone = scratch / f"{'a' * 16}-{'b' * 8}.4711.gone"
    strangers = scratch / "somebodys"
    for folder in (gone, strangers):
        folder.mkdir()
        (folder / "file").write_bytes(b"123")
    with ScratchUse(held, root):
        found = {other.folder: other for other in other_runs([folder_of(plan, root)])}
        assert {f: o.is_held for f, o in found.items()} == {
            folder_of(held, root): True,
            folder_of(left, root): False,
            gone: False,
        }
        assert found[gone].num_bytes == 3 and found[folder_of(left, root)].num_bytes > 5
        for other in found.values():
            other.remove()
    assert {p.name for p in scratch.iterdir()} == {
        "somebodys",
        folder_of(plan, root).name,
        folder_of(held, root).name,
    }


def test_store_that_is_no_folder_has_a_scratch_folder_too(plan: RunPlan, scratch: Path) -> None:
    store = open_store("memory://scratch-of-a-bucket")
    seen = with_scratch(plan, store)
    seen.put(BLOB, b"blob")
    seen.put(run_root.manifest_of(BLOB), b"{}")
    assert [info.key for info in store.list()] == [run_root.manifest_of(BLOB)]
    assert [path.name for path in scratch.rglob("*.arrow")] == ["part-0000.arrow"]
