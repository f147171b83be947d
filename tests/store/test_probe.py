"""What the probe says of real servers, and of broken ones."""

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from p48ray.errors import ConfigError, TransientStoreError
from p48ray.store import Capabilities, LocalStore, MemoryStore, S3Store, probe, retry
from p48ray.store.view import SubStore
from tests.servers.fault_proxy import COPY_MARK, Fault, Rule, fault_proxy
from tests.servers.s3 import BUCKET, Server, plain_client

pytestmark = pytest.mark.server

EVERYTHING = Capabilities(range_copy=True, unequal_parts=True, checksums=True)


def new_uri() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.mark.parametrize("name", ["seaweedfs", "moto_server"])
@pytest.mark.parametrize("is_view", [False, True])
def test_servers_can_do_everything_and_nothing_stays_behind(
    request: pytest.FixtureRequest, name: str, is_view: bool
) -> None:
    server: Server = request.getfixturevalue(name)
    store = S3Store(new_uri(), server.endpoint_url)
    store.put("mine", b"1")
    found = probe(SubStore(store, "view/") if is_view else store)
    assert found == EVERYTHING
    assert found.server_copy
    assert [info.key for info in store.list()] == ["mine"]
    uploads = plain_client(server.endpoint_url).list_multipart_uploads(
        Bucket=BUCKET, Prefix=store.uri.rpartition("/")[2]
    )
    assert uploads.get("Uploads", []) == []


def test_files_and_memory_keep_no_checksums(tmp_path: Path) -> None:
    for store in (LocalStore(tmp_path), MemoryStore("probed")):
        assert probe(store) == Capabilities(range_copy=True, unequal_parts=True, checksums=False)
        assert list(store.list()) == []


def test_server_without_range_copy_is_seen_and_served_by_streaming(seaweedfs: Server) -> None:
    with fault_proxy(
        seaweedfs.endpoint_url, Rule(Fault.NOT_IMPLEMENTED, "PUT", COPY_MARK, times=99)
    ) as proxy:
        found = probe(S3Store(new_uri(), proxy.endpoint_url))
    assert found == Capabilities(range_copy=False, unequal_parts=True, checksums=True)
    assert not found.server_copy


def test_server_that_wants_equal_parts_is_seen(seaweedfs: Server) -> None:
    with fault_proxy(
        seaweedfs.endpoint_url, Rule(Fault.NOT_IMPLEMENTED, "POST", r"/unequal\?uploadId", times=99)
    ) as proxy:
        found = probe(S3Store(new_uri(), proxy.endpoint_url))
    assert (found.range_copy, found.unequal_parts, found.server_copy) == (True, False, False)


class LastWriterWins(MemoryStore):
    """A server that knows no If-None-Match, and ignores it."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


class LooksThenWrites(MemoryStore):
    """A server that checks the condition, but not in one step with the write."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if key.endswith("race"):
            self.put(key, data)
            return True
        return super().put_if_absent(key, data)


def test_store_without_conditional_put_is_refused_with_the_reason(seaweedfs: Server) -> None:
    with pytest.raises(
        ConfigError, match=r"If-None-Match.*let the second writer of a key replace the first"
    ):
        probe(LastWriterWins("last-writer-wins"))
    with pytest.raises(ConfigError, match=r"If-None-Match.*of 8 writers at once 8 were told"):
        probe(LooksThenWrites("looks-then-writes"))
    for name in ("last-writer-wins", "looks-then-writes"):
        assert list(MemoryStore(name).list()) == []
    with (
        fault_proxy(
            seaweedfs.endpoint_url, Rule(Fault.NOT_IMPLEMENTED, "PUT", "/probe/", times=99)
        ) as proxy,
        pytest.raises(ConfigError, match=r"If-None-Match.*refuses it.*NotImplemented"),
    ):
        probe(S3Store(new_uri(), proxy.endpoint_url))


def test_store_out_of_reach_is_no_verdict(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "S3", replace(retry.S3, base_s=0.001))
    with (
        fault_proxy(seaweedfs.endpoint_url, Rule(Fault.BUSY, "PUT", times=99)) as proxy,
        pytest.raises(TransientStoreError, match="SlowDown"),
    ):
        probe(S3Store(new_uri(), proxy.endpoint_url))
    with pytest.raises(ConfigError, match="NoSuchBucket"):
        probe(S3Store("s3://no-such-bucket/x", seaweedfs.endpoint_url))
