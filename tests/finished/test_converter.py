"""Conversion by one process or several: the same folder, whatever happens to those who write."""

import logging
import os
import signal
from pathlib import Path

import pytest

from p48ray.errors import SourceError, StageFailedError, TransientStoreError
from p48ray.finished import converter
from p48ray.finished.convert import NOTE_FILE, ShardConversion, convert_shard
from p48ray.finished.converter import convert_folder
from p48ray.runner.ray_tasks import RayTasks
from p48ray.store import LocalStore
from tests.jobs.command import arguments, invoke
from tests.runner.conftest import ALL_STAGES
from tests.stages.damage import INDEX, Folder

pytestmark = pytest.mark.ray

MARK = "P48RAY_TEST_MARK"


@pytest.fixture
def mark(tmp_path: Path, ray_session: None) -> tuple[Path, RayTasks]:
    """A file that the tasks' processes know of, and tasks that do."""
    path = tmp_path / "mark"
    return path, RayTasks(what="convert", num_workers=2, address=None, settings={MARK: str(path)})


def die_once(shard: ShardConversion) -> int:
    """The first process that gets the third shard is killed over it."""
    path = Path(os.environ[MARK])
    if "00003-of" in shard.file and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return convert_shard(shard)


def away_until_marked(shard: ShardConversion) -> int:
    if "00003-of" in shard.file and not Path(os.environ[MARK]).exists():
        raise TransientStoreError("the store is away")
    return convert_shard(shard)


def test_workers_write_what_one_process_writes_though_one_is_killed(
    local_run: Path,
    mark: tuple[Path, RayTasks],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, tasks = mark
    checkpoint = LocalStore(local_run / "checkpoint")
    convert_folder(checkpoint, LocalStore(tmp_path / "one"), "sparse", None)
    monkeypatch.setattr(converter, "convert_shard", die_once)
    caplog.set_level(logging.WARNING, "p48ray.progress")
    convert_folder(checkpoint, LocalStore(tmp_path / "many"), "sparse", tasks)
    assert path.exists()
    assert [
        r.message
        for r in caplog.records
        if "00003-of-00006.safetensors: attempt 1 failed, it will be tried again" in r.message
    ]
    one = Folder.read(tmp_path / "one")
    assert Folder.read(tmp_path / "many").changed_from(one) == []
    convert_folder(LocalStore(tmp_path / "many"), LocalStore(tmp_path / "back"), "dense", tasks)
    assert Folder.read(tmp_path / "back").changed_from(Folder.read(local_run / "checkpoint")) == []


def test_workers_write_modelopts_layout_and_come_back(
    local_run: Path, mark: tuple[Path, RayTasks], tmp_path: Path
) -> None:
    checkpoint, (_, tasks) = LocalStore(local_run / "checkpoint"), mark
    convert_folder(checkpoint, LocalStore(tmp_path / "one"), "modelopt", None)
    convert_folder(checkpoint, LocalStore(tmp_path / "many"), "modelopt", tasks)
    one = Folder.read(tmp_path / "one")
    assert Folder.read(tmp_path / "many").changed_from(one) == []
    convert_folder(LocalStore(tmp_path / "many"), LocalStore(tmp_path / "back"), "dense", tasks)
    assert Folder.read(tmp_path / "back").changed_from(Folder.read(local_run / "checkpoint")) == []


def test_ray_workers_stitch_with_sparse_storage_what_a_conversion_writes(
    ray_session: None, local_run: Path, tmp_path: Path
) -> None:
    """Manifest and card apart: their plans' digests differ."""
    outcome = invoke(
        *arguments(tmp_path / "run", ALL_STAGES | {"output.storage": "sparse"}), on_ray=True
    )
    assert outcome.code == 0, outcome
    convert_folder(
        LocalStore(local_run / "checkpoint"), LocalStore(tmp_path / "converted"), "sparse", None
    )
    assert Folder.read(tmp_path / "run" / "checkpoint").changed_from(
        Folder.read(tmp_path / "converted")
    ) == ["README.md", "p48ray.json"]


def test_store_that_stays_away_ends_it_without_an_index_and_the_same_call_goes_on(
    local_run: Path, mark: tuple[Path, RayTasks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tasks = mark
    monkeypatch.setattr(converter, "convert_shard", away_until_marked)
    checkpoint, target = LocalStore(local_run / "checkpoint"), LocalStore(tmp_path / "out")
    with pytest.raises(
        StageFailedError,
        match=r"convert: 1 of 6 shards failed.*run the same command again.*\n.*00003-of-00006",
    ):
        convert_folder(checkpoint, target, "sparse", tasks)
    held = {info.key for info in target.list()}
    assert (
        NOTE_FILE in held
        and INDEX not in held
        and len([k for k in held if k.endswith(".safetensors")]) == 5
    )
    path.touch()
    finished = {
        f: (tmp_path / "out" / f).stat().st_mtime_ns for f in held if f.endswith(".safetensors")
    }
    convert_folder(checkpoint, target, "sparse", tasks)
    assert {f: (tmp_path / "out" / f).stat().st_mtime_ns for f in finished} == finished
    assert (tmp_path / "out" / INDEX).exists() and not (tmp_path / "out" / NOTE_FILE).exists()


def test_tensor_that_sparse_storage_can_not_hold_ends_it_by_its_name(
    local_run: Path, mark: tuple[Path, RayTasks], tmp_path: Path
) -> None:
    name = "language_model.model.layers.2.mlp.experts.1.gate_proj.weight_packed"
    (tmp_path / "bad").mkdir()
    for file, data in (
        Folder.read(local_run / "checkpoint").with_bytes(name, 0, b"\x11\x12\x13\x00").files.items()
    ):
        (tmp_path / "bad" / file).write_bytes(data)
    with pytest.raises(SourceError, match=name):
        convert_folder(
            LocalStore(tmp_path / "bad"), LocalStore(tmp_path / "out"), "sparse", mark[1]
        )
