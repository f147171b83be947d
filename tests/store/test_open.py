"""Texts that name stores."""

from pathlib import Path

import pytest

from p48ray.errors import ConfigError
from p48ray.store import SCHEMES, HubStore, LocalStore, MemoryStore, S3Store, Scheme, open_store
from p48ray.store.open import UNKNOWN, is_within, mirror_source, scheme_of, writable_examples
from p48ray.store.view import SubStore


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_paths_and_file_uris_open_the_same_folder(tmp_path: Path, form: str) -> None:
    LocalStore(tmp_path).put("a", b"1")
    assert open_store(form.format(tmp_path)).get("a") == b"1"
    assert open_store(tmp_path).get("a") == b"1"


def test_file_uri_is_unquoted(tmp_path: Path) -> None:
    LocalStore(tmp_path / "a b").put("x", b"1")
    assert open_store(f"file://{tmp_path}/a%20b").get("x") == b"1"


def test_relative_and_home_paths_become_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("runs/x", ""),
        ("~/x", ""),
        ("/a/b:c", ""),
        ("a/s3://b", ""),
        ("FILE:///a", "file"),
        ("memory://a", "memory"),
        ("S3://bucket/a", "s3"),
        ("hf://owner/name@v1", "hf"),
        ("gs://bucket", "?"),
    ],
)
def test_scheme_is_told_from_the_text(place: str, name: str) -> None:
    assert scheme_of(place).name == name


@pytest.mark.parametrize(
    "place",
    ["/tmp/x", "file:///tmp/x", "memory://x", "s3://bucket/x", "hf://owner/name"],
)
def test_store_and_a_folder_of_it_have_the_scheme_of_its_class(place: str) -> None:
    classes = {"": LocalStore, "memory": MemoryStore, "s3": S3Store, "hf": HubStore}
    store = open_store(place)
    found = scheme_of(store.uri)
    assert type(store) is classes[found.name]
    assert scheme_of(SubStore(store, "checkpoint/").uri) is found


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ("s3://bucket/a", "s3://bucket/a/", True),
        ("s3://bucket/a/b", "s3://bucket/a", True),
        ("s3://bucket/a", "s3://bucket", True),
        ("s3://bucket/ab", "s3://bucket/a", False),
        ("s3://bucket/a", "s3://bucket/a/b", False),
        ("s3://bucket2/a", "s3://bucket/a", False),
        ("/bucket/a", "s3://bucket", False),
        ("memory://x", "memory://x", True),
        ("/there/is/none/a", "file:///there/is/none", True),
        ("/there/is/none-b", "/there/is/none", False),
    ],
)
def test_places_within_each_other(inner: str, outer: str, expected: bool) -> None:
    assert is_within(open_store(inner), open_store(outer)) is expected


def test_bucket_of_another_server_is_another_place() -> None:
    here, there = (open_store("s3://bucket/a", f"http://{host}") for host in ("here", "there"))
    assert is_within(here, here) and not is_within(here, there)


def test_folder_reached_by_a_link_is_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    link, real = (LocalStore(tmp_path / name) for name in ("link", "real"))
    assert is_within(link, real) and is_within(real, link)
    assert is_within(LocalStore(tmp_path / "link" / "deeper" / "run"), real)
    assert not is_within(LocalStore(tmp_path), real)


def those_that(fact: str) -> set[str]:
    return {name for name, scheme in SCHEMES.items() if getattr(scheme, fact)}


def test_facts_of_every_kind_of_store() -> None:
    """Callers decide by these: whoever changes one changes what a run does there."""
    assert those_that("is_path") == {""}
    assert those_that("is_local") == {"", "file"}
    assert those_that("is_writable") == {"", "file", "s3"}
    assert those_that("must_be_probed") == {"s3"}
    assert those_that("keeps_sha256") == {"s3", "hf"}
    assert those_that("lists_digests") == {"hf"}
    assert those_that("served") == {"", "file", "hf"}
    assert those_that("revisions") == those_that("mirror") == {"hf"}
    assert not UNKNOWN.is_writable and not UNKNOWN.is_local


def test_a_server_takes_a_folder_by_its_path_however_it_is_written(tmp_path: Path) -> None:
    for place in (str(tmp_path), f"file://{tmp_path}"):
        served = scheme_of(place).served
        assert served and served(place) == (str(tmp_path.resolve()), None)


def test_messages_name_every_kind_that_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert writable_examples() == "a local folder or s3://bucket/prefix"
    name, example = "tape", "tape://reel"
    kind = Scheme(name=name, noun="a tape", example=example, open=lambda *_: MemoryStore("tape"))
    monkeypatch.setitem(SCHEMES, "tape", kind)
    assert writable_examples() == "a local folder, s3://bucket/prefix or tape://reel"
    known = "known are a plain path, file://, memory://, s3://, hf:// and tape://"
    with pytest.raises(ConfigError, match=known):
        open_store("gs://bucket")


def test_only_a_whole_model_is_mirrored() -> None:
    source = mirror_source("hf://owner/name@v1")
    assert source is not None and source.uri == "hf://owner/name@v1"
    assert mirror_source("/tmp/model") is None and mirror_source("s3://bucket/model") is None
    for place in ("hf://datasets/owner/name", "hf://owner/name/folder"):
        with pytest.raises(ConfigError, match="the whole repository of a model"):
            mirror_source(place)


def test_places_of_texts_are_a_store_and_what_lies_in_it() -> None:
    assert scheme_of("s3://b/a/x.jsonl").split("s3://b/a/x.jsonl") == ("s3://b", "a/x.jsonl")
    assert scheme_of("s3://b").split("s3://b") == ("s3://b", "")
    place = "hf://datasets/o/n@v1/a/x.jsonl"
    assert scheme_of(place).split(place) == ("hf://datasets/o/n@v1", "a/x.jsonl")
    with pytest.raises(ConfigError, match="found a model's repository"):
        scheme_of("hf://o/n").split("hf://o/n/x.jsonl")
