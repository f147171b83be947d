"""Texts that name stores."""

from pathlib import Path

import pytest

from p48ray.errors import ConfigError
from p48ray.store import LocalStore, MemoryStore, open_store


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_paths_and_file_uris_open_the_same_folder(tmp_path: Path, form: str) -> None:
    LocalStore(tmp_path).put("a", b"1")
    assert open_store(form.format(tmp_path)).get("a") == b"1"
    assert open_store(tmp_path).get("a") == b"1"


def test_file_uri_is_unquoted(tmp_path: Path) -> None:
    LocalStore(tmp_path / "a b").put("x", b"1")
    assert open_store(f"file://{tmp_path}/a%20b").get("x") == b"1"


def test_relative_and_home_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_store("runs/x").uri == str(tmp_path / "runs" / "x")
    assert open_store("~/x").uri == str(tmp_path / "home" / "x")


def test_memory_uri_names_one_store_per_name() -> None:
    open_store("memory://one-per-name").put("a", b"1")
    assert MemoryStore("one-per-name").get("a") == b"1"
    assert list(open_store("memory://another-name").list()) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://", "found no bucket's name"),
        ("s3:///key", "found no bucket's name"),
        ("s3://b_u:c/key", "found no bucket's name"),
        ("hf://name", "expected hf://owner/name"),
        ("hf://spaces/owner/name", "expected hf://owner/name"),
        ("hf://owner/name@", "expected hf://owner/name"),
        ("gs://bucket", "unknown scheme gs://; known are"),
        ("memory://", "found no name"),
        ("file://otherhost/path", "found host otherhost"),
        ("file://", "found no path"),
        ("", "empty"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_the_reason(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_store(uri)
