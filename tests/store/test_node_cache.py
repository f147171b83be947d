"""What the processes of a node share: fetched once, waited for, made anew after a death, dropped
when there is no room, gone at the end."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from p48ray.errors import ShardCorruptError
from p48ray.store import ByteRange, MemoryStore
from p48ray.store import node_cache as module
from p48ray.store.node_cache import NodeCache, fetch, node_folder, sweep_unused

SPAWN = multiprocessing.get_context("spawn")


def filler(data: bytes, calls: list[str] | None = None, name: str = "") -> Callable[[int], None]:
    def fill(descriptor: int) -> None:
        if calls is not None:
            calls.append(name)
        os.pwrite(descriptor, data, 0)

    return fill


def refuse(descriptor: int) -> None:
    raise AssertionError("nothing should be fetched")


def test_file_is_made_once_and_mapped_by_everybody(tmp_path: Path) -> None:
    calls: list[str] = []
    first, second = NodeCache(tmp_path / "c", 1000), NodeCache(tmp_path / "c", 1000)
    assert bytes(first.open("a", 5, filler(b"hello", calls)) or b"") == b"hello"
    assert bytes(second.open("a", 5, refuse) or b"") == b"hello"
    assert bytes(first.open("b", 3, filler(b"two", calls)) or b"") == b"two"
    assert len(calls) == 2


def test_mapped_bytes_can_not_be_written(tmp_path: Path) -> None:
    found = NodeCache(tmp_path / "c", 1000).open("a", 5, filler(b"hello"))
    assert found is not None and found.readonly


def test_empty_file(tmp_path: Path) -> None:
    found = NodeCache(tmp_path / "c", 1000).open("a", 0, lambda descriptor: None)
    assert found is not None and len(found) == 0


def test_threads_that_want_the_same_file_wait_for_the_one_that_fetches(tmp_path: Path) -> None:
    cache, calls, found = NodeCache(tmp_path / "c", 1000), [], []

    def fill(descriptor: int) -> None:
        calls.append(1)
        time.sleep(0.1)
        os.pwrite(descriptor, b"hello", 0)

    threads = [
        threading.Thread(target=lambda: found.append(bytes(cache.open("a", 5, fill) or b"")))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"hello"] * 6 and len(calls) == 1


def test_failed_fetch_is_told_leaves_nothing_and_is_tried_again_by_the_next(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "c", 1000)

    def fail(descriptor: int) -> None:
        os.pwrite(descriptor, b"he", 0)
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        cache.open("a", 5, fail)
    assert cache.files() == []
    assert bytes(cache.open("a", 5, filler(b"hello")) or b"") == b"hello"


def half_a_fetch(folder: str, is_inside: Event) -> None:
    def fill(descriptor: int) -> None:
        os.pwrite(descriptor, b"he", 0)
        is_inside.set()
        time.sleep(60)

    NodeCache(folder, 1000).open("a", 5, fill)


def test_killed_fetcher_lets_go_and_its_half_is_never_seen(tmp_path: Path) -> None:
    is_inside = SPAWN.Event()
    process = SPAWN.Process(target=half_a_fetch, args=(str(tmp_path / "c"), is_inside))
    process.start()
    assert is_inside.wait(60)
    found: list[bytes] = []
    waiting = threading.Thread(
        target=lambda: found.append(
            bytes(NodeCache(tmp_path / "c", 1000).open("a", 5, filler(b"hello")) or b"")
        )
    )
    waiting.start()
    time.sleep(0.2)
    assert not found, "waits while the other process lives"
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    waiting.join(30)
    process.join()
    assert found == [b"hello"]


def test_least_recently_used_files_make_room_and_stay_readable_where_they_are_mapped(
    tmp_path: Path,
) -> None:
    cache = NodeCache(tmp_path / "c", 10)
    a = cache.open("a", 4, filler(b"aaaa"))
    cache.open("b", 4, filler(b"bbbb"))
    for name, age in (("a", 50), ("b", 100)):
        os.utime(cache.path(name), (time.time() - age,) * 2)
    assert cache.open("a", 4, refuse) is not None, "and is the last used from here on"
    cache.open("c", 4, filler(b"cccc"))
    assert cache.open("a", 4, refuse) and cache.open("c", 4, refuse)
    again: list[str] = []
    cache.open("b", 4, filler(b"bbbb", again))
    assert again, "b was dropped"
    assert a is not None and bytes(a) == b"aaaa"


def test_file_larger_than_the_limit_is_not_kept_and_drops_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "c", 10)
    cache.open("a", 4, filler(b"aaaa"))
    assert cache.open("big", 11, refuse) is None
    assert cache.open("a", 4, refuse) is not None


def test_full_disk_means_no_room_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = NodeCache(tmp_path / "c", 1000)
    cache.open("a", 4, filler(b"aaaa"))
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage._replace(free=3))
    assert cache.open("b", 4, refuse) is None


def test_limit_is_half_of_what_the_disk_has_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert NodeCache(tmp_path / "c").limit_bytes == 500


def test_last_one_out_removes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMOVE_TIMEOUT_S", 0.1)
    first, second = NodeCache(tmp_path / "c", 10), NodeCache(tmp_path / "c", 10)
    first.open("a", 4, filler(b"aaaa"))
    first.close()
    assert (tmp_path / "c").is_dir()
    second.close()
    assert not (tmp_path / "c").exists()


def test_two_that_leave_at_once_leave_nothing(tmp_path: Path) -> None:
    for _ in range(200):
        caches = [NodeCache(tmp_path / "c", 10) for _ in range(3)]
        threads = [threading.Thread(target=cache.close) for cache in caches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not (tmp_path / "c").exists()


def test_last_one_out_waits_for_a_process_that_is_being_killed(tmp_path: Path) -> None:
    dying, last = NodeCache(tmp_path / "c", 10), NodeCache(tmp_path / "c", 10)
    leaving = threading.Thread(target=last.close)
    leaving.start()
    leaving.join(0.1)
    assert leaving.is_alive() and (tmp_path / "c").exists()
    os.close(dying.alive)  # as the end of its process would
    leaving.join()
    assert not (tmp_path / "c").exists()


def test_folder_that_somebody_joined_anew_is_not_removed_by_who_opened_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the mark and locking it, the folder is removed and made again."""
    real, lock = module.fcntl.flock, list[Any]()

    def flock(descriptor: int, how: int) -> None:
        if how & module.fcntl.LOCK_EX and not lock:
            lock.append(descriptor)
            module.shutil.rmtree(tmp_path / "c")
            lock.append(NodeCache(tmp_path / "c", 10))
        real(descriptor, how)

    os.close(NodeCache(tmp_path / "c", 10).alive)  # nobody holds the old one's mark
    monkeypatch.setattr(module.fcntl, "flock", flock)
    assert not module.sweep(tmp_path / "c")
    assert (tmp_path / "c").exists()
    lock[1].open("a", 1, filler(b"a"))


def test_folder_that_goes_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pathlib's mkdir sees that something is there, then that it is no folder."""
    real, tries = Path.mkdir, []

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        tries.append(path)
        if len(tries) == 1:
            raise FileExistsError(17, "File exists", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    NodeCache(tmp_path / "c", 10).open("a", 1, filler(b"a"))
    assert len(tries) == 2


def test_file_in_the_folders_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(FileExistsError):
        NodeCache(tmp_path / "c", 10)


def test_half_of_a_removal_is_swept(tmp_path: Path) -> None:
    gone = Path(f"{node_folder(str(tmp_path), 'n')}.7.gone")
    gone.mkdir()
    (gone / "a").write_bytes(b"a")
    assert sweep_unused(str(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_what_the_dead_left_and_nothing_that_is_in_use(tmp_path: Path) -> None:
    living = NodeCache(node_folder(str(tmp_path), "living"), 10)
    dead = NodeCache(node_folder(str(tmp_path), "dead"), 10)
    os.close(dead.alive)  # as the end of its process would
    (tmp_path / "something-else").mkdir()
    (tmp_path / "p48ray-node-of-a-stranger").mkdir()  # without the mark of a cache
    assert sweep_unused(str(tmp_path)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "p48ray-node-living",
        "p48ray-node-of-a-stranger",
        "something-else",
    ]
    living.open("a", 1, filler(b"a"))


def join_and_leave(folder: str, times: int) -> None:
    module.REMOVE_TIMEOUT_S = 0.01  # the others come back at once
    for _ in range(times):
        cache = NodeCache(folder, 1000)
        found = cache.open("a", 5, filler(b"hello"))
        assert found is not None and bytes(found) == b"hello"
        cache.close()


@pytest.mark.slow
def test_folder_that_comes_and_goes_is_always_whole_for_those_inside(tmp_path: Path) -> None:
    """Four processes join, read and leave, each leaving perhaps as the last."""
    processes = [
        SPAWN.Process(target=join_and_leave, args=(str(tmp_path / "c"), 60)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0] * 4
    NodeCache(tmp_path / "c").close()
    assert not (tmp_path / "c").exists()


def test_ranges_are_fetched_to_their_places_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FETCH_BYTES", 7)
    store = MemoryStore("node-cache-fetch")
    data = bytes(range(256))
    store.put("x", data)
    ranges = [
        (ByteRange(store, "x", 10, 100), 3),
        (ByteRange(store, "x", 200, 5), 110),
        (ByteRange(store, "x", 0, 0), 0),
    ]
    found = NodeCache(tmp_path / "c", 1000).open(
        "a", 120, lambda descriptor: fetch(ranges, descriptor)
    )
    assert found is not None
    assert bytes(found[3:103]) == data[10:110] and bytes(found[110:115]) == data[200:205]
    assert bytes(found[:3]) + bytes(found[115:]) == bytes(8)


def test_range_beyond_the_object_is_an_error(tmp_path: Path) -> None:
    store = MemoryStore("node-cache-short")
    store.put("x", b"abc")
    cache = NodeCache(tmp_path / "c", 1000)
    with pytest.raises(ShardCorruptError):
        cache.open("a", 5, lambda descriptor: fetch([(ByteRange(store, "x", 0, 5), 0)], descriptor))
    with pytest.raises(AssertionError, match="nothing should be fetched"):
        cache.open("a", 5, refuse)
