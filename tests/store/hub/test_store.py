"""HubStore against a server that speaks the Hub's API: what is read, what is asked again, and
what is refused with which words."""

import os
import pickle
import subprocess
import sys

import pytest

from p48ray.checkpoint.index import open_checkpoint
from p48ray.errors import (
    ConfigError,
    ObjectMissingError,
    ShardCorruptError,
    TransientStoreError,
)
from p48ray.store import HubStore, LocalStore, Store, open_store, retry
from p48ray.store.hub import store as hub_store
from p48ray.store.hub.place import HubPlace, parse_place
from tests.conftest import REPO
from tests.jobs.command import narrow_model
from tests.servers.hub import EDGE_BYTES, MODEL, TOKEN, Fault, Hub, tiny_files
from tests.store.test_store_contract import Pieces

pytestmark = pytest.mark.server

SHARD = "model-00001-of-000003.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("hf://owner/name", HubPlace("model", "owner/name", None, "")),
        ("hf://models/owner/name@v1.0", HubPlace("model", "owner/name", "v1.0", "")),
        (
            "hf://datasets/owner/name@main/a/b.jsonl",
            HubPlace("dataset", "owner/name", "main", "a/b.jsonl"),
        ),
        ("hf://datasets/o-1/n.2/a/", HubPlace("dataset", "o-1/n.2", None, "a")),
        (
            "hf://datasets/o/n@refs/convert/parquet/default",
            HubPlace("dataset", "o/n", "refs/convert/parquet", "default"),
        ),
        ("hf://o/n@feature%2Fx", HubPlace("model", "o/n", "feature/x", "")),
        (f"hf://o/n@{COMMIT}", HubPlace("model", "o/n", COMMIT, "")),
    ],
)
def test_place_is_read_and_spelt_again(uri: str, place: HubPlace) -> None:
    assert parse_place(uri) == place
    assert parse_place(place.uri) == place
    assert (place.commit is not None) == (COMMIT in uri)


@pytest.mark.parametrize(
    "uri",
    [
        "hf://",
        "hf://name",
        "hf://owner/",
        "hf://datasets/name",
        "hf://spaces/owner/name",
        "hf://o/n@",
        "s3://o/n",
    ],
)
def test_what_names_no_repository_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="expected hf://owner/name"):
        parse_place(uri)


@pytest.mark.parametrize("path", ["../a", "a//b", "a/../b"])
def test_path_that_climbs_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="expected a path without empty parts"):
        parse_place(f"hf://o/n/{path}")


def test_opening_imports_no_huggingface_hub() -> None:
    code = (
        "import sys; from p48ray.store import open_store; open_store('hf://a/b');"
        " sys.exit('huggingface_hub' in sys.modules or 'httpx2' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPO,
            env=os.environ | {"PYTHONPATH": str(REPO)},
            check=False,
        ).returncode
        == 0
    )


def opened(hub: Hub, **settings: bool) -> HubStore:
    hub.commit(MODEL, tiny_files(), **settings)
    store = open_store("hf://owner/tiny@main")
    assert isinstance(store, HubStore) and isinstance(store, Store)
    return store


def test_reads_like_the_folder_it_is_a_copy_of(hub: Hub) -> None:
    store, local = opened(hub), LocalStore(narrow_model())
    files = tiny_files()
    assert [i.key for i in store.list()] == sorted(files)  # a listing in pages
    assert [i.key for i in store.list("model-")] == [
        n for n in sorted(files) if n.startswith("model-")
    ]
    assert [i.key for i in store.list("original/")] == ["original/model.safetensors"]
    for name in ("config.json", SHARD):
        assert store.get(name) == local.get(name)
        held = store.head(name)
        assert held is not None and held.size_bytes == len(files[name])
        assert store.get_range(name, 100, 50) == local.get_range(name, 100, 50)
        assert b"".join(store.stream(name)) == files[name]
    assert store.get_range(SHARD, 5, 0) == b""
    assert store.head("nowhere") is None and store.head("original") is None
    assert not hub.leaked, "a token reached the server that large files are redirected to"


def test_missing_files_and_ranges_beyond_the_end_are_named(hub: Hub) -> None:
    store = opened(hub)
    with pytest.raises(
        ObjectMissingError, match=r"nowhere: no such file in hf://owner/tiny@[0-9a-f]{40}"
    ):
        store.get("nowhere")
    with pytest.raises(ShardCorruptError, match="asked for 2 bytes from byte 1000000000 on"):
        store.get_range(SHARD, 10**9, 2)


def test_checkpoint_is_opened_by_headers_alone(hub: Hub) -> None:
    store = opened(hub)
    index = open_checkpoint(store)
    local = open_checkpoint(LocalStore(narrow_model()))
    assert (index.fingerprint, index.files, index.sidecars) == (
        local.fingerprint,
        local.files,
        local.sidecars,
    )
    weights = sum(hub.sent[f] for f in index.files)
    assert (
        0 < weights < len(index.files) * EDGE_BYTES < sum(len(tiny_files()[f]) for f in index.files)
    )
    assert not [asked for path, asked in hub.ranges if path in index.files and asked is None], (
        "a weight file was asked for whole"
    )


def test_branch_is_looked_up_once_and_kept_to(hub: Hub) -> None:
    first = hub.commit(MODEL, {"a.txt": b"one"})
    store = HubStore("hf://owner/tiny")
    assert store.commit == first
    second = hub.commit(MODEL, {"a.txt": b"two", "b.txt": b""})
    assert store.get("a.txt") == b"one" and store.head("b.txt") is None
    other = HubStore("hf://owner/tiny@main")
    assert (other.commit, other.get("a.txt"), other.get("b.txt")) == (second, b"two", b"")
    assert HubStore(f"hf://owner/tiny@{first}").get("a.txt") == b"one"


def test_folder_of_a_data_set_is_a_store_of_its_own(hub: Hub) -> None:
    hub.commit("datasets/o/d", {"a/x.jsonl": b"1", "a/b/y.jsonl": b"22", "ab/z.jsonl": b"3"})
    store = HubStore("hf://datasets/o/d/a")
    assert [(i.key, i.size_bytes) for i in store.list()] == [("b/y.jsonl", 2), ("x.jsonl", 1)]
    assert store.get("b/y.jsonl") == b"22"
    assert list(HubStore("hf://datasets/o/d/nowhere").list()) == []


def test_nothing_is_written(hub: Hub) -> None:
    store = opened(hub)
    for write in (
        lambda: store.put("a", b""),
        lambda: store.put_if_absent("a", b""),
        lambda: store.write_once("a", Pieces([b""])),
        lambda: store.compose("a", []),
        lambda: store.delete("a"),
    ):
        with pytest.raises(ConfigError, match="can only be read from"):
            write()
    assert store.sweep(0.0) == 0


def test_pickled_store_is_at_the_commit_and_knows_endpoint_and_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    store = opened(hub, is_private=True)
    commit = store.commit
    data = pickle.dumps(store)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    hub.commit(MODEL, {})
    copy = pickle.loads(data)
    assert copy.place.revision == commit and copy.get("config.json") == tiny_files()["config.json"]
    assert TOKEN not in repr(copy) + copy.uri + repr(store)


@pytest.mark.parametrize(
    ("token", "settings", "words"),
    [
        (None, {"is_private": True}, "no such repository, or one that this token may not read"),
        ("hf_wrong", {}, "the Hub refuses access .*Invalid credentials.*HF_TOKEN"),
        (TOKEN, {"is_gated": True}, "is gated .*accept its terms"),
    ],
)
def test_access_that_is_refused_is_the_users_to_mend(
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    settings: dict[str, bool],
    words: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=words) as caught:
        opened(hub, **settings).get("config.json")
    assert token is None or token not in str(caught.value)
    assert sum(hub.requests.values()) == 1, "no retry mends this"


def test_absent_repository_and_revision_are_named(hub: Hub) -> None:
    opened(hub)
    with pytest.raises(ConfigError, match="hf://owner/other: no such repository"):
        list(HubStore("hf://owner/other").list())
    with pytest.raises(
        ConfigError, match="hf://owner/tiny@v9: the repository has no such branch, tag or commit"
    ):
        list(HubStore("hf://owner/tiny@v9").list())
    with pytest.raises(ConfigError, match="no such branch, tag or commit"):
        list(HubStore(f"hf://owner/tiny@{COMMIT}").list())


def test_offline_setting_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        list(store.list())


def test_passing_faults_are_asked_again(hub: Hub) -> None:
    store = opened(hub)
    hub.faults += [
        Fault("GET /api/models/owner/tiny/revision/main", 503),
        Fault("GET /api/models/owner/tiny/tree/.*", 500),
    ]
    hub.faults += [
        Fault(f"GET .*/{SHARD}", 502),
        Fault(f"OBJECT {SHARD}", 503),
        Fault(f"OBJECT {SHARD}", cut=10),
    ]
    assert store.get_range(SHARD, 0, 100) == tiny_files()[SHARD][:100]
    assert not hub.faults and store.traffic.retries >= 4


def test_rate_limit_is_waited_out_as_long_as_it_says(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, waits = opened(hub), []
    monkeypatch.setattr(retry, "pause", waits.append)
    hub.faults += [
        Fault("GET .*/config.json", 429, {"Retry-After": "7"}),
        Fault("GET .*/config.json", 429, {"RateLimit": '"resolvers";r=0;t=42'}),
    ]
    assert store.get("config.json") == tiny_files()["config.json"]
    assert waits == [7.0, 42.0]


def test_rate_limit_without_end_is_given_up_with_a_hint(hub: Hub) -> None:
    store = opened(hub)
    hub.faults += [Fault("GET .*/config.json", 429, {"Retry-After": "0"})] * retry.HUB.attempts
    with pytest.raises(
        TransientStoreError, match=r"rate limit is reached .*a token \(HF_TOKEN\) has a higher one"
    ):
        store.get("config.json")


def test_broken_stream_is_taken_up_where_it_broke(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the small model's files would be one piece
    monkeypatch.setattr(hub_store, "STREAM_BYTES", 2**16)
    store, data = opened(hub), tiny_files()[SHARD]
    hub.faults += [
        Fault(f"OBJECT {SHARD}", cut=300_000),
        Fault(f"OBJECT {SHARD}", cut=400_000),
        Fault(f"OBJECT {SHARD}", 503),
    ]
    assert b"".join(store.stream(SHARD)) == data
    asked = [
        int(r.removeprefix("bytes=").rstrip("-")) if r else 0
        for path, r in hub.ranges
        if path == SHARD
    ]
    assert asked[0] == 0 < asked[1] < asked[2], "each from further on"
    assert hub.sent[SHARD] < len(data) + 2 * 2**16


def test_changed_bytes_are_found_in_what_is_read_whole(hub: Hub) -> None:
    store = opened(hub)
    hub.faults.append(Fault(f"OBJECT {SHARD}", flip=1000))
    with pytest.raises(
        TransientStoreError,
        match=rf"{SHARD}: expected \d+ bytes with SHA-256 .* as the Hub lists it",
    ):
        list(store.stream(SHARD))
    hub.faults.append(Fault("GET .*/config.json", flip=3))
    assert store.get("config.json") == tiny_files()["config.json"], "a second try is worth it"
    hub.faults += [Fault("GET .*/config.json", flip=3)] * retry.HUB.attempts
    with pytest.raises(TransientStoreError, match="with git's SHA-1"):
        store.get("config.json")


def test_signed_addresses_are_in_no_message(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    store = opened(hub)
    hub.faults += [Fault(f"OBJECT {SHARD}", 403)]
    with pytest.raises(ConfigError) as caught:
        store.get_range(SHARD, 0, 10)
    hub.faults += [Fault(f"OBJECT {SHARD}", 503)] * retry.HUB.attempts
    with pytest.raises(TransientStoreError) as passing:
        store.get_range(SHARD, 0, 10)
    assert "signature" not in f"{caught.value} {passing.value} {caplog.text}"
