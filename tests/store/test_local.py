"""What only files have: temporary files, killed writers, full disks, links."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from p48ray.errors import P48Error, ShardCorruptError, TransientStoreError
from p48ray.store import ByteRange, LocalStore, MemoryStore, local
from p48ray.store.view import SubStore
from tests.store.test_store_contract import DATA, MIB, Pieces

WRITER = """
import sys
from p48ray.store import ByteRange, LocalStore
store = LocalStore(sys.argv[1])
for number in range(10**9):
    body = bytes([number % 251]) * 20_000_000
    store.put(f"put/{number % 3}", body)
    store.put_if_absent(f"absent/{number}", body)
    half = ByteRange(store, f"put/{number % 3}", 0, 10_000_000)
    store.compose(f"compose/{number % 3}", [half] * 2)
    store.delete(f"absent/{number - 2}") if number > 1 else None
    print(number, flush=True)
"""


def temp_files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.startswith(local.TEMP_PREFIX)]


@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.031, 0.057])
def test_killed_writer_leaves_no_partial_object(tmp_path: Path, delay_s: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = LocalStore(tmp_path)
    found = list(store.list())
    assert found
    for info in found:
        data = store.get(info.key)
        assert info.size_bytes == len(data) == 20_000_000, info.key
        assert data == data[:1] * len(data), info.key


def test_unfinished_files_are_never_listed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("units/a", b"1")
    (tmp_path / "units" / f"{local.TEMP_PREFIX}123-abc").write_bytes(b"half")
    assert [info.key for info in store.list()] == ["units/a"]
    assert [info.key for info in store.list("units/.p")] == []


def test_reading_creates_no_folder_and_writing_creates_the_root(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "a" / "b")
    assert list(store.list()) == []
    assert store.head("x") is None
    assert not (tmp_path / "a").exists()
    store.put("x", b"1")
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, P48Error), (errno.EDQUOT, P48Error), (errno.ESTALE, TransientStoreError)],
)
def test_failed_write_names_the_path_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[P48Error]
) -> None:
    store = LocalStore(tmp_path)
    store.put("folder/a", b"before")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local.os, "fsync", refuse)
    once = partial(store.write_once, "folder/b", Pieces([b"after"]))
    for write in (
        lambda: store.put("folder/a", b"after"),
        lambda: store.put_if_absent("folder/b", b"after"),
        once,
    ):
        with pytest.raises(P48Error, match=rf"folder/[ab].*{errno.errorcode[number]}") as caught:
            write()
        assert type(caught.value) is kind
    monkeypatch.undo()
    assert [info.key for info in store.list()] == ["folder/a"]
    assert store.get("folder/a") == b"before"
    assert temp_files(tmp_path) == []


@pytest.mark.parametrize("write", ["put", "put_if_absent", "compose", "write_once"])
@pytest.mark.parametrize("when", ["before its file", "before its name"])
def test_folder_removed_under_a_writer_is_made_again_by_the_next_attempt(
    write: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, body = LocalStore(tmp_path / "root"), (b"body",)
    attempt = {
        "put": lambda: store.put("folder/key", b"body"),
        "put_if_absent": lambda: store.put_if_absent("folder/key", b"body"),
        "compose": lambda: store.compose("folder/key", body),
        "write_once": lambda: store.write_once("folder/key", Pieces(body)),
    }[write]
    step = "_make_folder" if when == "before its file" else "_write_piece"
    real = getattr(LocalStore, step)

    def then_emptied(self: LocalStore, *args: object) -> object:
        made = real(self, *args)
        shutil.rmtree(tmp_path / "root")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, step, then_emptied)
        with pytest.raises(TransientStoreError, match=r"folder/key: No such file.*ENOENT"):
            attempt()
    attempt()
    assert store.get("folder/key") == b"body"
    assert [info.key for info in store.list()] == ["folder/key"]


def test_full_disk_in_the_middle_of_write_once_leaves_nothing_and_names_the_path(
    tmp_path: Path,
) -> None:
    """A real file system of 12 MiB, which is full in the second chunk."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "p48ray-tests", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    try:
        store = LocalStore(tmp_path / "root")
        with pytest.raises(
            P48Error, match=rf"{tmp_path}/root/folder/a: No space left on device \(ENOSPC\)"
        ) as caught:
            store.write_once("folder/a", Pieces([DATA[: 15 * MIB]]))
        assert type(caught.value) is P48Error
        assert (temp_files(tmp_path), list(store.list())) == ([], [])
        assert store.write_once("folder/a", Pieces([DATA[: 9 * MIB]])).is_ours
        assert store.get("folder/a") == DATA[: 9 * MIB]
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_object_that_would_need_another_object_as_folder_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"1")
    once = partial(store.write_once, "a/b", Pieces([b"2"]))
    for write in (
        lambda: store.put("a/b", b"2"),
        lambda: store.put_if_absent("a/b", b"2"),
        lambda: store.put_if_absent("a/b/c", b"2"),
        once,
    ):
        with pytest.raises(P48Error, match="a/b"):
            write()
    store.put("c/d", b"3")
    with pytest.raises(P48Error, match="c"):
        store.put("c", b"4")
    assert temp_files(tmp_path) == []


def test_short_write_is_noticed_before_anything_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"before")
    real_fstat = os.fstat
    monkeypatch.setattr(
        local.os,
        "fstat",
        lambda handle: os.stat_result((*real_fstat(handle)[:6], 3, *real_fstat(handle)[7:])),
    )
    with pytest.raises(ShardCorruptError, match="wrote 5 bytes, the file system holds 3"):
        store.put("a", b"after")
    monkeypatch.undo()
    assert store.get("a") == b"before"
    assert temp_files(tmp_path) == []


def test_compose_copies_through_memory_where_the_kernel_declines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "target")
    source.put("a", bytes(range(256)) * 10)
    calls: list[int] = []

    def decline(source_handle: int, target_handle: int, count: int, offset: int) -> int:
        calls.append(offset)
        # part of the range, then a refusal: the rest must continue where the kernel stopped
        if len(calls) == 1:
            return real_copy(source_handle, target_handle, 100, offset)
        raise OSError(errno.EXDEV, "other file system")

    real_copy = os.copy_file_range
    monkeypatch.setattr(local.os, "copy_file_range", decline)
    monkeypatch.setattr(local, "COPY_BYTES", 77)
    assert target.compose("b", [b"x", ByteRange(source, "a", 5, 2000), b"y"]) == 2002
    assert target.get("b") == b"x" + (bytes(range(256)) * 10)[5:2005] + b"y"
    assert calls == [5, 105]


def test_compose_streams_other_stores_in_bounded_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = MemoryStore("bounded-reads"), LocalStore(tmp_path)
    source.put("a", bytes(range(250)))
    sizes: list[int] = []
    real_get_range = MemoryStore.get_range

    def record(store: MemoryStore, key: str, start: int, num_bytes: int) -> bytes:
        sizes.append(num_bytes)
        return real_get_range(store, key, start, num_bytes)

    monkeypatch.setattr(MemoryStore, "get_range", record)
    monkeypatch.setattr(local, "COPY_BYTES", 100)
    assert target.compose("b", [ByteRange(source, "a", 0, 250)]) == 250
    assert sizes == [100, 100, 50]
    assert target.get("b") == bytes(range(250))


def test_linked_files_are_read_and_listed_as_objects(tmp_path: Path) -> None:
    """The Hub's cache is a folder of links into another folder."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "123").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/123")
    (tmp_path / "snapshot" / "loop").symlink_to(".")
    store = LocalStore(tmp_path / "snapshot")
    assert [(info.key, info.size_bytes) for info in store.list()] == [("model.safetensors", 7)]
    assert store.get_range("model.safetensors", 2, 3) == b"igh"


def test_sweep_removes_old_temporary_files_under_its_prefix_and_nothing_else(
    tmp_path: Path,
) -> None:
    store = LocalStore(tmp_path)
    for key in ("units/a", "units/deep/b", "other/c"):
        store.put(key, b"1")
    old, deep, young, beside = (
        tmp_path / folder / f"{local.TEMP_PREFIX}{name}"
        for folder, name in [("units", "1"), ("units/deep", "2"), ("units", "3"), ("other", "4")]
    )
    for path in (old, deep, young, beside):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - (10 if path is young else 7200),) * 2)
    os.utime(tmp_path / "units" / "a", (0, 0))
    assert SubStore(store, "units/").sweep(3600.0) == 2
    assert set(temp_files(tmp_path)) == {beside, young}
    assert store.sweep(3600.0) == 1
    assert temp_files(tmp_path) == [young]
    assert [info.key for info in store.list()] == ["other/c", "units/a", "units/deep/b"]
    assert LocalStore(tmp_path / "never-written").sweep(0.0) == 0
