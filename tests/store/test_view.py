"""What only a view has: a store behind it, and things in it that the view must not see or touch."""

import uuid
from pathlib import Path

import pytest

from p48ray.errors import P48Error
from p48ray.store import ByteRange, LocalStore, MemoryStore, local
from p48ray.store.base import TEMP_PREFIX
from p48ray.store.view import (
    SplitStore,
    SubStore,
    lies_aside,
    local_path,
    name_of,
    resolved,
)
from tests.store.test_store_contract import Pieces


@pytest.fixture
def behind() -> MemoryStore:
    store = MemoryStore(uuid.uuid4().hex)
    for key in (
        "plan.json",
        "checkpoint/config.json",
        "checkpoint-old/config.json",
        "checkpoint/sub/x",
    ):
        store.put(key, key.encode())
    return store


def test_view_lists_what_lies_under_its_prefix_and_nothing_beside_it(behind: MemoryStore) -> None:
    view = SubStore(behind, "checkpoint/")
    assert [(info.key, info.size_bytes) for info in view.list()] == [
        ("config.json", 22),
        ("sub/x", 16),
    ]
    assert [info.key for info in view.list("s")] == ["sub/x"]
    assert view.head("plan.json") is None


def test_view_writes_and_deletes_under_its_prefix(behind: MemoryStore) -> None:
    view = SubStore(behind, "checkpoint/")
    view.put("a", b"1")
    view.put_if_absent("b", b"2")
    view.compose("c", [b"3", ByteRange(view, "a", 0, 1), ByteRange(behind, "plan.json", 0, 4)])
    view.delete("config.json")
    assert [behind.get(f"checkpoint/{key}") for key in "abc"] == [b"1", b"2", b"31plan"]
    assert behind.head("checkpoint/config.json") is None
    assert behind.get("checkpoint-old/config.json") == b"checkpoint-old/config.json"


@pytest.mark.parametrize("key", ["../plan.json", "..", "sub/../../plan.json", "/plan.json", ""])
def test_view_can_not_be_left(behind: MemoryStore, key: str) -> None:
    view = SubStore(behind, "checkpoint/")
    for operation in (
        view.get,
        view.head,
        view.delete,
        lambda k: view.put(k, b""),
        lambda k: list(view.list(k or "../")),
    ):
        with pytest.raises(P48Error, match="bad object key"):
            operation(key)
    assert behind.get("plan.json") == b"plan.json"


def test_view_of_a_view_is_a_deeper_folder(behind: MemoryStore) -> None:
    view = SubStore(SubStore(behind, "checkpoint/"), "sub/")
    assert view.get("x") == b"checkpoint/sub/x"
    assert view.uri == f"{behind.uri}/checkpoint/sub"
    assert SubStore(behind, "joined/").compose("y", [ByteRange(view, "x", 0, 10)]) == 10
    assert behind.get("joined/y") == b"checkpoint"


def test_ranges_of_a_view_are_copied_by_the_store_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel copies between files of local stores; through a view as well."""
    source, target = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "target")
    source.put("folder/a", b"0123456789")
    copied: list[str] = []
    real = local._copy_from_file

    def record(handle: int, piece: ByteRange, store: LocalStore) -> int:
        copied.append(piece.key)
        return real(handle, piece, store)

    monkeypatch.setattr(local, "_copy_from_file", record)
    view = SubStore(target, "out/")
    assert view.compose("b", [ByteRange(SubStore(source, "folder/"), "a", 2, 5)]) == 5
    assert (copied, target.get("out/b")) == (["folder/a"], b"23456")


def test_prefix_ends_in_a_slash(behind: MemoryStore) -> None:
    with pytest.raises(AssertionError, match="checkpoint"):
        SubStore(behind, "checkpoint")


def is_blob(key: str) -> bool:
    return key.endswith(".arrow")


def split(tmp_path: Path) -> tuple[LocalStore, LocalStore, SplitStore]:
    """A store, the one beside it, and the two as one."""
    kept, aside = LocalStore(tmp_path / "kept"), LocalStore(tmp_path / "aside")
    return kept, aside, SplitStore(kept, aside, is_blob)


def test_split_store_writes_what_is_picked_aside_and_nothing_else(tmp_path: Path) -> None:
    kept, aside, store = split(tmp_path)
    store.put("a/1.json", b"record")
    assert store.put_if_absent("a/1.arrow", b"blob")
    store.compose("a/2.arrow", [ByteRange(store, "a/1.arrow", 1, 3), b"!"])
    store.compose("b.json", [ByteRange(store, "a/1.json", 0, 3)])
    assert [info.key for info in kept.list()] == ["a/1.json", "b.json"]
    assert {info.key: aside.get(info.key) for info in aside.list()} == {
        "a/1.arrow": b"blob",
        "a/2.arrow": b"lob!",
    }
    assert [info.key for info in store.list("a/")] == ["a/1.arrow", "a/1.json", "a/2.arrow"]
    aside.put("not-a-blob", b"somebody's")
    assert "not-a-blob" not in {info.key for info in store.list()}
    assert store.head("not-a-blob") is None


def test_what_lies_in_the_store_from_before_is_read_listed_once_and_deleted_with_the_rest(
    tmp_path: Path,
) -> None:
    kept, aside, store = split(tmp_path)
    for key in ("1.arrow", "2.arrow"):
        kept.put(key, b"from before")
    assert not store.put_if_absent("1.arrow", b"another")
    assert not store.write_once("1.arrow", Pieces([b"another"])).is_ours
    assert list(aside.list()) == []
    aside.put("2.arrow", b"newer")
    assert [(info.key, info.size_bytes) for info in store.list()] == [
        ("1.arrow", 11),
        ("2.arrow", 5),
    ]
    assert (store.get("1.arrow"), store.get("2.arrow")) == (b"from before", b"newer")
    assert local_path(store, "1.arrow") == kept.path("1.arrow")
    assert local_path(store, "2.arrow") == aside.path("2.arrow")
    assert [lies_aside(store, key) for key in ("1.arrow", "2.arrow")] == [False, True]
    assert name_of(store, "2.arrow") == aside.path("2.arrow")
    for key in ("1.arrow", "2.arrow"):
        store.delete(key)
    assert [*kept.list(), *aside.list()] == []


def test_ranges_of_views_of_split_stores_reach_the_store_that_holds_them(tmp_path: Path) -> None:
    """So that a bucket still copies them on its own side."""
    kept, aside, store = split(tmp_path)
    store.put("units/shard", b"0123")
    store.put("units/1.arrow", b"4567")
    view = SubStore(store, "units/")
    assert resolved(ByteRange(view, "shard", 1, 2)) == ByteRange(kept, "units/shard", 1, 2)
    assert resolved(ByteRange(view, "1.arrow", 0, 1)) == ByteRange(aside, "units/1.arrow", 0, 1)
    assert resolved(b"bytes") == b"bytes"


def test_unfinished_files_are_swept_on_both_sides_of_a_split(tmp_path: Path) -> None:
    kept, aside, store = split(tmp_path)
    for behind in (kept, aside):
        behind.put("a/x", b"1")
        Path(behind.path("a/x")).with_name(f"{TEMP_PREFIX}1-2").write_bytes(b"half")
    assert store.sweep(-1.0) == 2
    assert len([*kept.list(), *aside.list()]) == 2
