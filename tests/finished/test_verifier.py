"""Verification by one process or several: one verdict, whatever happens to those who read."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from p48ray.errors import ConfigError, SourceError, StageFailedError, TransientStoreError
from p48ray.finished import verifier
from p48ray.finished.survey import ShardCheck
from p48ray.finished.verifier import verify_folder
from p48ray.finished.verify_checkpoint import FileFindings, check_shard
from p48ray.runner import ray_tasks
from p48ray.runner.cluster import Cluster
from p48ray.runner.progress import Amount, each_file
from p48ray.runner.ray_tasks import MAX_ATTEMPTS, RayTasks
from p48ray.store import LocalStore
from tests.jobs.command import narrow_model
from tests.stages.damage import Folder

pytestmark = pytest.mark.ray

EXPERT = "language_model.model.layers.1.mlp.experts.3.up_proj.weight_scale"
UNTOUCHED = "vision_tower.patch_embed.proj.weight"
LATE = "language_model.model.layers.4.mlp.experts.15.down_proj.weight_packed"
MARK = "P48RAY_TEST_MARK"


@pytest.fixture
def two(ray_session: None) -> RayTasks:
    return RayTasks(what="verify", num_workers=2, address=None)


def damaged(clean: Folder) -> Folder:
    """Faults in three shards."""
    return clean.with_bytes(EXPERT, 0, b"\x7f").flipped(LATE, 5, 0x10).flipped(UNTOUCHED, 100, 0x40)


FOLDERS: dict[str, tuple[Callable[[Folder], Folder], tuple[str, ...]]] = {
    "clean": (lambda clean: clean, ()),
    "damaged": (damaged, (EXPERT, "unit L004-E012-015", UNTOUCHED)),
    "incomplete": (
        lambda clean: clean.without_file(clean.shards[1]),
        ("model-00002-of-00006.safetensors",),
    ),
}


@pytest.mark.parametrize("has_source", [False, True], ids=["alone", "with source"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_verdict_is_the_same_whoever_reads(
    kind: str, has_source: bool, local_run: Path, tmp_path: Path, two: RayTasks
) -> None:
    source = LocalStore(narrow_model()) if has_source else None
    change, words = FOLDERS[kind]
    for name, data in change(Folder.read(local_run / "checkpoint")).files.items():
        (tmp_path / name).write_bytes(data)
    here, there = (verify_folder(LocalStore(tmp_path), source, tasks) for tasks in (None, two))
    assert here == there
    assert bool(here.problems) == bool(words)
    assert all(word in "\n".join(here.problems) for word in words)


def die_once(check: ShardCheck) -> FileFindings:
    """The first process that gets the third shard is killed over it."""
    mark = Path(os.environ[MARK])
    if "00003-of" in check.file and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return check_shard(check)


def always_away(check: ShardCheck) -> FileFindings:
    with open(os.environ[MARK], "a") as file:
        file.write(f"{check.file}\n")
    if "00003-of" in check.file:
        raise TransientStoreError("the store is away")
    return check_shard(check)


def refuse(check: ShardCheck) -> FileFindings:
    raise SourceError("the source is damaged")


@pytest.fixture
def mark(tmp_path: Path, two: RayTasks) -> Iterator[tuple[Path, RayTasks]]:
    """A file that the tasks' processes know of, and tasks that do."""
    path = tmp_path / "mark"
    yield path, RayTasks(what="verify", num_workers=2, address=None, settings={MARK: str(path)})


def test_shard_of_a_lost_worker_is_read_again(
    local_run: Path,
    mark: tuple[Path, RayTasks],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, tasks = mark
    checkpoint = LocalStore(local_run / "checkpoint")
    undisturbed = verify_folder(checkpoint, None, None)
    monkeypatch.setattr(verifier, "check_shard", die_once)
    caplog.set_level(logging.WARNING, "p48ray.progress")
    assert verify_folder(checkpoint, None, tasks) == undisturbed
    assert path.exists()
    assert [
        r.message
        for r in caplog.records
        if "00003-of-00006.safetensors: attempt 1 failed, it will be tried again" in r.message
    ]


def test_store_that_stays_away_ends_it_after_the_rest_was_read(
    local_run: Path, mark: tuple[Path, RayTasks], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tasks = mark
    monkeypatch.setattr(verifier, "check_shard", always_away)
    with pytest.raises(
        StageFailedError,
        match=r"verify: 1 of 6 shards failed.*\n.*00003-of-00006.*the store is away",
    ):
        verify_folder(LocalStore(local_run / "checkpoint"), None, tasks)
    read = path.read_text().split()
    assert len(set(read)) == 6 and sum("00003-of" in name for name in read) == MAX_ATTEMPTS


def test_users_mistake_is_not_tried_again(
    local_run: Path, two: RayTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "check_shard", refuse)
    with pytest.raises(SourceError, match="the source is damaged"):
        verify_folder(LocalStore(local_run / "checkpoint"), None, two)


def test_local_path_on_several_nodes_has_to_be_shared(
    local_run: Path, two: RayTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"Alive": True, "Resources": {"CPU": 1}}
    monkeypatch.setattr(ray_tasks.ray, "nodes", lambda: [node, node])
    checkpoint = LocalStore(local_run / "checkpoint")
    with pytest.raises(
        ConfigError, match=r"CHECKPOINT: .* is a local path and the cluster has 2 nodes"
    ):
        verify_folder(checkpoint, None, two)
    shared = RayTasks(what="verify", num_workers=2, address=None, is_shared=True)
    assert verify_folder(checkpoint, None, shared).problems == ()


def test_cluster_that_is_not_there_is_a_users_mistake() -> None:
    with pytest.raises(
        ConfigError,
        match=r"RAY_ADDRESS: expected host:port of a running Ray cluster, found '127\.0\.0\.1:9'",
    ):
        Cluster("127.0.0.1:9", 1).join()


def test_tasks_take_as_many_cpus_as_there_are_unless_told(
    ray_session: None, local_run: Path
) -> None:
    assert ray.cluster_resources()["CPU"] == 2
    every = RayTasks(what="verify", num_workers=None, address=None)
    assert verify_folder(LocalStore(local_run / "checkpoint"), None, every).problems == ()


def test_progress_counts_bytes_those_of_before_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "p48ray.progress")
    clock = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr("p48ray.runner.progress.time.monotonic", lambda: next(clock))
    sizes = {"a": 2_000_000, "b": 1_000_000}
    before = Amount(1, 1_000_000)
    assert list(each_file("verify", [("b", 1), ("a", 2)], sizes, before)) == [("b", 1), ("a", 2)]
    assert [r.message for r in caplog.records] == [
        "verify    2/3 shards  2.00 MB of 4.00 MB  50 %  500.00 KB/s  4 s left",
        "verify    3/3 shards  4.00 MB of 4.00 MB  100 %  750.00 KB/s  0 s left",
    ]
