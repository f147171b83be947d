"""What only a view has: a store behind it, and things in it that the view must not see or touch."""

import uuid
from pathlib import Path

import pytest

from p48ray.errors import P48Error
from p48ray.store import ByteRange, LocalStore, MemoryStore, local
from p48ray.store.view import SubStore


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
