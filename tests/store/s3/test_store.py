"""What only S3 has: credentials, checksums, pages, parts that the server copies, uploads that
nobody finished, a server that dies."""

import hashlib
import os
import pickle
import random
import threading
import time
import tracemalloc
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from p48ray.errors import (
    ConfigError,
    ObjectMissingError,
    P48Error,
    ShardCorruptError,
    TransientStoreError,
)
from p48ray.store import ByteRange, MemoryStore, S3Store, open_store, retry
from p48ray.store.s3 import multipart, replies
from p48ray.store.s3 import store as s3
from p48ray.store.view import SubStore
from tests.servers.fault_proxy import COPY_MARK, Fault, Rule, fault_proxy
from tests.servers.s3 import (
    BUCKET,
    READER_ACCESS_KEY,
    READER_SECRET_KEY,
    SeaweedFS,
    Server,
    free_ports,
    plain_client,
)
from tests.store.test_store_contract import Pieces, claim

pytestmark = pytest.mark.server

MIB = 2**20
DATA = random.Random(0).randbytes(24 * MIB)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "S3", replace(retry.S3, base_s=0.005))


@pytest.fixture(params=["seaweedfs", "moto_server"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def store(server: Server) -> S3Store:
    return new_store(server)


def new_store(server: Server, **arguments: bool) -> S3Store:
    return S3Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", server.endpoint_url, **arguments)


def unfinished(store: S3Store) -> list[str]:
    """Keys of unfinished uploads under a store's root, seen by another client."""
    prefix = store.uri.removeprefix(f"s3://{BUCKET}/")
    found = plain_client(store.endpoint_url or "").list_multipart_uploads(
        Bucket=BUCKET, Prefix=prefix
    )
    return [
        upload["Key"] for upload in found.get("Uploads", []) if upload["Key"].startswith(prefix)
    ]


# ---- names and credentials


def test_uri_names_bucket_and_prefix_and_a_slash_at_the_end_changes_nothing() -> None:
    assert S3Store("s3://bucket/a/b/").uri == S3Store("s3://bucket/a/b").uri == "s3://bucket/a/b"
    assert S3Store("s3://bucket").uri == S3Store("s3://bucket/").uri == "s3://bucket"
    with pytest.raises(ConfigError, match="expected a path without empty parts"):
        S3Store("s3://bucket/a/../b")
    with pytest.raises(ConfigError, match="endpoint must be http"):
        S3Store("s3://bucket", "127.0.0.1:9000")


def test_stores_whose_prefixes_begin_alike_do_not_see_each_other(server: Server) -> None:
    one = new_store(server)
    two = S3Store(one.uri + "-2", server.endpoint_url)
    two.put("a", b"2")
    assert list(one.list()) == []
    root = S3Store(f"s3://{BUCKET}", server.endpoint_url)
    assert [info.key for info in root.list(two.uri.removeprefix(f"s3://{BUCKET}/"))] == [
        two.uri.removeprefix(f"s3://{BUCKET}/") + "/a"
    ]


def test_copy_of_a_used_store_works_with_its_settings_and_after_a_fork(server: Server) -> None:
    store = new_store(server, server_copy=False)
    store.put("a", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert (again.uri, again.endpoint_url, again.server_copy) == (
        store.uri,
        store.endpoint_url,
        False,
    )
    opened = open_store(store.uri, store.endpoint_url, server_copy=False)
    assert isinstance(opened, S3Store)
    assert (opened.uri, opened.endpoint_url, opened.server_copy) == (
        store.uri,
        store.endpoint_url,
        False,
    )
    child = os.fork()
    if child == 0:
        os._exit(
            0 if store.get("a") == again.get("a") == b"1" and len(store._api._clients) == 2 else 1
        )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def every_operation(store: S3Store) -> list[tuple[str, object]]:
    piece = ByteRange(store, "source", 0, 6 * MIB)
    return [
        ("get", lambda: store.get("a")), ("get_range", lambda: store.get_range("a", 0, 1)),
        ("list", lambda: store.list()), ("put", lambda: store.put("b", b"1")),
        ("put_if_absent", lambda: store.put_if_absent("c", b"1")),
        ("compose", lambda: store.compose("d", [b"1"])),
        ("compose_parts", lambda: store.compose("e", [bytes(20 * MIB)])),
        ("write_once", lambda: store.write_once("g", Pieces([b"1"]))),
        ("delete", lambda: store.delete("a")), ("sweep", lambda: store.sweep(0)),
        ("copy", lambda: store.compose("f", [piece])),
    ]  # fmt: skip


@pytest.mark.parametrize(("key", "secret"), [("p48ray-writer", "wrong"), ("nobody", "wrong")])
def test_wrong_credentials_are_the_users_error_at_the_first_request(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch, key: str, secret: str
) -> None:
    new_store(seaweedfs).put("warm", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    store = new_store(seaweedfs)
    for name, operation in [*every_operation(store), ("head", lambda: store.head("a"))]:
        before = store.traffic.requests
        with pytest.raises(
            ConfigError, match=rf"bucket {BUCKET} at {seaweedfs.endpoint_url}.*AWS_"
        ):
            operation()  # type: ignore[operator]
        assert store.traffic.requests == before + 1, name
    assert store.traffic.retries == 0


def test_reader_may_read_and_is_told_that_it_may_not_write(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = new_store(seaweedfs)
    writer.put("a", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET_KEY)
    reader = S3Store(writer.uri, writer.endpoint_url)
    assert (reader.get("a"), [info.key for info in reader.list()]) == (b"1", ["a"])
    once = partial(reader.write_once, "b", Pieces([b"1"]))
    for operation in (
        lambda: reader.put("b", b""),
        lambda: reader.put_if_absent("b", b""),
        lambda: reader.delete("a"),
        once,
    ):
        with pytest.raises(ConfigError, match=r"AccessDenied.*write"):
            operation()


def test_missing_credentials_are_the_users_error(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="Unable to locate credentials"):
        new_store(seaweedfs).get("a")


def test_missing_bucket_is_the_users_error(server: Server) -> None:
    store = S3Store("s3://no-such-bucket/a", server.endpoint_url)
    for operation in (
        lambda: store.get("a"),
        lambda: store.put("a", b""),
        lambda: store.put_if_absent("a", b""),
        lambda: list(store.list()),
    ):
        with pytest.raises(ConfigError, match=r"NoSuchBucket.*bucket no-such-bucket.*exists"):
            operation()


def test_unreachable_server_is_a_transient_error_after_a_bounded_number_of_attempts(
    aws_identity: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store("s3://bucket/run", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(
        TransientStoreError,
        match=(
            rf"get_object of s3://bucket/run/a: .*Could not connect.*failed {retry.S3.attempts}"
            r" times"
        ),
    ):
        store.get("a")
    assert (store.traffic.requests, store.traffic.retries) == (
        retry.S3.attempts,
        retry.S3.attempts - 1,
    )


def test_backoff_grows_is_jittered_and_capped(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[float, float]] = []
    monkeypatch.setattr(retry, "S3", replace(retry.S3, base_s=1.0, cap_s=5.0, attempts=6))
    monkeypatch.setattr(random, "uniform", lambda low, high: waits.append((low, high)) or 0.0)
    with (
        fault_proxy(seaweedfs.endpoint_url, Rule(Fault.BUSY, times=99)) as proxy,
        pytest.raises(TransientStoreError, match="SlowDown"),
    ):
        S3Store(f"s3://{BUCKET}", proxy.endpoint_url).get("a")
    assert waits[:5] == [(0.0, 1.0), (0.0, 2.0), (0.0, 4.0), (0.0, 5.0), (0.0, 5.0)]


# ---- reading


def test_head_tells_the_stored_sha256_of_whole_objects_only(store: S3Store) -> None:
    store.put("a", DATA[:1000])
    held = store.head("a")
    assert held is not None
    assert held.sha256 == hashlib.sha256(DATA[:1000]).hexdigest()
    assert store.compose("b", [ByteRange(MemoryStoreOf(DATA), "x", 0, 20 * MIB)]) == 20 * MIB
    held = store.head("b")
    assert held is not None
    assert (held.size_bytes, held.sha256) == (20 * MIB, None)
    assert store.get("b") == DATA[: 20 * MIB]


def test_object_written_without_checksum_reads_as_usual(store: S3Store) -> None:
    plain_client(store.endpoint_url or "").put_object(
        Bucket=BUCKET,
        Key=f"{store.uri.rpartition('/')[2]}/a",
        Body=b"123",
        ChecksumAlgorithm="CRC32",
    )
    held = store.head("a")
    assert held is not None
    assert (held.size_bytes, held.sha256, store.get("a")) == (3, None, b"123")


@pytest.mark.parametrize("fault", [Fault.FLIPPED_BIT, Fault.SHORTENED_BODY])
def test_bytes_that_differ_from_the_stored_checksum_are_never_returned(
    seaweedfs: Server, fault: Fault
) -> None:
    direct = new_store(seaweedfs)
    direct.put("a", DATA[:1000])
    with fault_proxy(seaweedfs.endpoint_url, Rule(fault, "GET")) as proxy:
        assert S3Store(direct.uri, proxy.endpoint_url).get("a") == DATA[:1000]
        assert proxy.requests[0].fault is fault
    with (
        fault_proxy(seaweedfs.endpoint_url, Rule(fault, "GET", times=99)) as proxy,
        pytest.raises(ShardCorruptError, match=r"/a: stored SHA-256 is .*, that of the bytes read"),
    ):
        S3Store(direct.uri, proxy.endpoint_url).get("a")


def test_server_that_ignores_ranges_is_refused_before_its_body_is_read() -> None:
    class Body:
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    body = Body()
    with pytest.raises(P48Error, match="it does not do ranges"):
        replies.ranged_body(0, {"Body": body, "ContentLength": 10**12})
    assert body.is_closed


def test_listing_crosses_pages_in_the_order_of_keys_without_folder_markers(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "LIST_PAGE", 3)
    names = ["a/b", "a-b", "a.b", "a/c/d", "ä", "z", *(f"n/{number:02}" for number in range(9))]
    for name in names:
        store.put(name, b"1")
    plain_client(store.endpoint_url or "").put_object(
        Bucket=BUCKET, Key=f"{store.uri.rpartition('/')[2]}/n/", Body=b""
    )
    before = store.traffic.requests
    assert [info.key for info in store.list()] == sorted(names, key=str.encode)
    assert store.traffic.requests - before >= 5
    assert [info.key for info in store.list("n/0")] == [f"n/{number:02}" for number in range(9)]


# ---- conditional writes


@pytest.mark.parametrize("fault", [Fault.LOST_REPLY, Fault.GARBLED_REPLY])
@pytest.mark.parametrize("is_large", [False, True])
def test_lost_reply_of_put_if_absent_is_true_for_its_author_only(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch, fault: Fault, is_large: bool
) -> None:
    monkeypatch.setattr(s3, "PUT_MAX_BYTES", 6 * MIB)
    data, method = (DATA[: 17 * MIB], "POST") if is_large else (b"the same bytes", "PUT")
    path = r"/m\?uploadId=" if is_large else "/m"
    direct = new_store(seaweedfs)
    with fault_proxy(seaweedfs.endpoint_url, Rule(fault, method, path)) as proxy:
        author = S3Store(direct.uri, proxy.endpoint_url)
        assert author.put_if_absent("m", data) is True
        assert [request.fault for request in proxy.seen(method, path)] == [fault, None]
        proxy.rules[:] = [Rule(fault, method, path), Rule(fault, "HEAD", times=0)]
        assert author.put_if_absent("m", data) is False  # identical bytes, another writer
    assert direct.get("m") == data
    assert unfinished(direct) == []


@pytest.mark.parametrize("fault", [Fault.LOST_REPLY, Fault.GARBLED_REPLY])
@pytest.mark.parametrize("is_large", [False, True])
def test_lost_reply_of_write_once_is_ours_for_its_author_only(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch, fault: Fault, is_large: bool
) -> None:
    """Of PutObject, and of the completion of an upload."""
    monkeypatch.setattr(s3, "ONCE_PUT_MAX_BYTES", 6 * MIB)
    data, method = (DATA[: 17 * MIB], "POST") if is_large else (b"the same bytes", "PUT")
    path = r"/m\?uploadId=" if is_large else "/m"
    direct = new_store(seaweedfs)
    with fault_proxy(seaweedfs.endpoint_url, Rule(fault, method, path)) as proxy:
        author = S3Store(direct.uri, proxy.endpoint_url)
        assert author.write_once("m", Pieces([data])) == claim(data)
        assert [request.fault for request in proxy.seen(method, path)] == [fault, None]
        # another author, who looked before the first was done
        monkeypatch.setattr(S3Store, "_head", lambda *_: None)
        proxy.rules[:] = [Rule(fault, method, path)]
        assert author.write_once("m", Pieces([data])) == claim(data, is_ours=False)
    assert direct.get("m") == data
    assert unfinished(direct) == []


def test_write_once_without_any_answer_to_its_completion_is_transient(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ONCE_PUT_MAX_BYTES", 6 * MIB)
    monkeypatch.setattr(retry, "S3", replace(retry.S3, attempts=3))
    direct = new_store(seaweedfs)
    with (
        fault_proxy(
            seaweedfs.endpoint_url, Rule(Fault.LOST_REPLY, "POST", "uploadId", times=99)
        ) as proxy,
        pytest.raises(TransientStoreError, match="complete_multipart_upload"),
    ):
        S3Store(direct.uri, proxy.endpoint_url).write_once("m", Pieces([DATA[: 17 * MIB]]))
    assert direct.get("m") == DATA[: 17 * MIB]
    assert unfinished(direct) == []


@pytest.mark.parametrize("at", ["partNumber=2", "uploads"])
def test_write_once_whose_part_is_refused_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr(s3, "ONCE_PUT_MAX_BYTES", 6 * MIB)
    monkeypatch.setattr(retry, "S3", replace(retry.S3, attempts=2))
    direct = new_store(server)
    with fault_proxy(server.endpoint_url, Rule(Fault.BUSY, "PUT|POST", at, times=99)) as proxy:
        with pytest.raises(TransientStoreError, match="SlowDown"):
            S3Store(direct.uri, proxy.endpoint_url).write_once("m", Pieces([DATA, DATA]))
        assert not proxy.seen("POST", r"/m\?uploadId")
    assert list(direct.list()) == []
    assert unfinished(direct) == []


def test_parts_of_write_once_are_equal_and_grow_so_that_enough_fit(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ONCE_PUT_MAX_BYTES", 6 * MIB)
    monkeypatch.setattr(multipart, "MAX_PARTS", 3)
    assert multipart.part_size(48 * MIB) == 16 * MIB
    with fault_proxy(server.endpoint_url) as proxy:
        store = S3Store(new_store(server).uri, proxy.endpoint_url)
        assert store.write_once("a", Pieces([DATA, DATA, DATA[:MIB]])) == claim(
            DATA + DATA + DATA[:MIB]
        )
        sizes = sorted(
            (request.num_body_bytes for request in proxy.seen("PUT", "partNumber")), reverse=True
        )
    assert sizes == [-(-49 * MIB // 3)] * 2 + [49 * MIB - 2 * -(-49 * MIB // 3)]
    assert S3Store(store.uri, server.endpoint_url).get("a") == DATA + DATA + DATA[:MIB]


def test_memory_of_write_once_does_not_grow_with_the_object(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ONCE_PUT_MAX_BYTES", 6 * MIB)
    monkeypatch.setattr(multipart, "UPLOAD_PART_BYTES", 5 * MIB)
    store, buffers = new_store(seaweedfs), Pieces([DATA[: 2 * MIB]] * 60)
    store.put("warm", b"1")
    tracemalloc.start()
    try:
        assert store.write_once("out", buffers).size_bytes == 120 * MIB
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 45 * MIB
    assert store.get_range("out", 118 * MIB, 2 * MIB) == DATA[: 2 * MIB]


def test_large_put_if_absent_loses_to_a_writer_who_came_between(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look before the upload finds nothing; the completion must still be conditional."""
    monkeypatch.setattr(s3, "PUT_MAX_BYTES", 6 * MIB)
    store = new_store(server)
    monkeypatch.setattr(S3Store, "_head", lambda *_: None)
    store.put("m", b"first")
    assert store.put_if_absent("m", DATA[: 17 * MIB]) is False
    assert store.get("m") == b"first"
    assert unfinished(store) == []


def test_put_if_absent_without_any_answer_is_transient(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "S3", replace(retry.S3, attempts=3))
    with fault_proxy(seaweedfs.endpoint_url, Rule(Fault.LOST_REPLY, times=99)) as proxy:
        store = S3Store(new_store(seaweedfs).uri, proxy.endpoint_url)
        with pytest.raises(
            TransientStoreError,
            match=r"put_object of s3://.*/m: ConnectionClosedError.*failed 3 times",
        ):
            store.put_if_absent("m", b"1")
        assert len(proxy.requests) == 3


@pytest.mark.parametrize("seed", range(3))
def test_of_twenty_racing_writers_one_wins_though_replies_get_lost(
    seaweedfs: Server, seed: int
) -> None:
    direct = new_store(seaweedfs)
    won: dict[int, bool] = {}
    with fault_proxy(seaweedfs.endpoint_url, random_share=0.4, seed=seed) as proxy:
        store = S3Store(direct.uri, proxy.endpoint_url)

        def race(number: int) -> None:
            won[number] = store.put_if_absent(
                "m", b"the same bytes" if number % 2 else f"attempt {number}".encode()
            )

        threads = [threading.Thread(target=race, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert any(
            request.fault in (Fault.LOST_REPLY, Fault.GARBLED_REPLY) for request in proxy.requests
        )
    winners = [number for number, is_winner in won.items() if is_winner]
    assert (len(won), len(winners)) == (20, 1)
    assert direct.get("m") == (
        b"the same bytes" if winners[0] % 2 else f"attempt {winners[0]}".encode()
    )


# ---- parts


class MemoryStoreOf(MemoryStore):
    """One object "x" of given bytes, and the sizes of what was read of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(uuid.uuid4().hex)
        self.put("x", data)
        self.sizes: list[int] = []

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        self.sizes.append(num_bytes)
        return super().get_range(key, start, num_bytes)


def test_compose_lets_the_server_copy_all_but_the_breaks(server: Server) -> None:
    source, target = new_store(server), new_store(server)
    source.put("a", DATA)
    source.put("b", DATA[: 12 * MIB])
    # neighbours, each too small to be copied alone
    ranges = [ByteRange(source, "a", 1 + number * MIB, MIB) for number in range(22)]
    pieces = [
        b"header" * 1000,
        *ranges,
        b"between",
        ByteRange(SubStore(SubStore(source, "x/"), "y/"), "c", 0, 12 * MIB - 5),
    ]
    source.put("x/y/c", DATA[5 : 12 * MIB])
    expected = b"header" * 1000 + DATA[1 : 1 + 22 * MIB] + b"between" + DATA[5 : 12 * MIB]
    before = source.traffic.bytes_read
    with fault_proxy(server.endpoint_url) as proxy:
        target = S3Store(target.uri, proxy.endpoint_url)
        for store in (source, target):
            store.endpoint_url = proxy.endpoint_url
        assert target.compose("out", iter(pieces)) == len(expected)
        copied = proxy.seen("PUT", COPY_MARK)
    assert len(copied) == 2
    assert source.traffic.bytes_read - before <= 2 * multipart.MIN_PART_BYTES
    assert target.traffic.bytes_written <= 2 * multipart.MIN_PART_BYTES + 10_000
    assert S3Store(target.uri, server.endpoint_url).get("out") == expected


def test_compose_streams_in_equal_parts_where_the_server_does_not_copy(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multipart, "STREAM_PART_BYTES", 5 * MIB)
    with fault_proxy(server.endpoint_url) as proxy:
        store = S3Store(new_store(server).uri, proxy.endpoint_url, server_copy=False)
        store.put("a", DATA)
        assert (
            store.compose("b", [b"head", ByteRange(store, "a", 3, 18 * MIB), b"tail"])
            == 18 * MIB + 8
        )
        sizes = sorted(
            (request.num_body_bytes for request in proxy.seen("PUT", "partNumber")), reverse=True
        )
    assert sizes == [5 * MIB] * 3 + [3 * MIB + 8]
    assert (
        S3Store(store.uri, server.endpoint_url).get("b")
        == b"head" + DATA[3 : 3 + 18 * MIB] + b"tail"
    )


def test_ranges_at_another_endpoint_are_streamed(seaweedfs: Server, moto_server: Server) -> None:
    source, target = new_store(moto_server), new_store(seaweedfs)
    source.put("a", DATA)
    assert target.compose("b", [ByteRange(source, "a", 1, 20 * MIB)]) == 20 * MIB
    assert target.get("b") == DATA[1 : 1 + 20 * MIB]


def test_source_that_changed_since_it_was_looked_at_is_not_copied(seaweedfs: Server) -> None:
    store = new_store(seaweedfs)
    store.put("a", DATA[: 6 * MIB])
    source = store.copy_source("a")
    store.put("a", DATA[1 : 6 * MIB + 1])
    with (
        pytest.raises(ShardCorruptError, match=r"/a changed or went while it was copied"),
        store.upload("b") as upload,
    ):
        upload.add_copy(source, 0, 6 * MIB)
        upload.complete()
    assert store.head("b") is None
    assert unfinished(store) == []


@pytest.mark.parametrize("last", ["missing", "short", "part"])
def test_failed_compose_aborts_its_upload_and_leaves_the_object_as_it_was(
    server: Server, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    direct = new_store(server)
    direct.put("out", b"before")
    direct.put("a", DATA[: 16 * MIB])
    monkeypatch.setattr(retry, "S3", replace(retry.S3, attempts=2))
    rule = Rule(Fault.BUSY, "PUT", "partNumber=2", times=99)
    with fault_proxy(server.endpoint_url, *([rule] if last == "part" else [])) as proxy:
        store = S3Store(direct.uri, proxy.endpoint_url)
        begin = [b"x" * 17 * MIB, ByteRange(store, "a", 0, 16 * MIB)]
        end = {
            "missing": [ByteRange(store, "no", 0, 1)],
            "short": [ByteRange(store, "a", 1, 16 * MIB)],
            "part": [],
        }[last]
        error = {
            "missing": ObjectMissingError,
            "short": ShardCorruptError,
            "part": TransientStoreError,
        }[last]
        with pytest.raises(error):
            store.compose("out", [*begin, *end])
        assert proxy.seen("POST", r"/out\?uploads"), "the upload had begun"
        assert len(proxy.seen("DELETE", "uploadId")) == 1
        assert not proxy.seen("POST", "uploadId"), "nothing was completed"
    assert direct.get("out") == b"before"
    assert unfinished(direct) == []


def test_completion_without_any_answer_is_transient_and_the_object_is_whole(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = new_store(seaweedfs)
    direct.put("out", b"before")
    monkeypatch.setattr(retry, "S3", replace(retry.S3, attempts=3))
    with (
        fault_proxy(
            seaweedfs.endpoint_url, Rule(Fault.LOST_REPLY, "POST", "uploadId", times=99)
        ) as proxy,
        pytest.raises(TransientStoreError, match="complete_multipart_upload"),
    ):
        S3Store(direct.uri, proxy.endpoint_url).compose("out", [DATA[: 17 * MIB]])
    assert direct.get("out") == DATA[: 17 * MIB], (
        "SeaweedFS had made it, and the abort that followed must not have hurt it"
    )
    assert unfinished(direct) == []


def test_composed_object_of_another_size_is_noticed(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(seaweedfs)
    real = multipart.MultipartUpload.add_bytes
    monkeypatch.setattr(
        multipart.MultipartUpload, "add_bytes", lambda upload, data: real(upload, data[:-1])
    )
    with pytest.raises(
        ShardCorruptError, match=rf"composed {17 * MIB} bytes, the server holds {17 * MIB - 2}"
    ):
        store.compose("out", [DATA[: 17 * MIB]])


def test_large_put_travels_in_parts_and_reads_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PUT_MAX_BYTES", 6 * MIB)
    with fault_proxy(server.endpoint_url) as proxy:
        store = S3Store(new_store(server).uri, proxy.endpoint_url)
        store.put("a", DATA)
        store.put("b", DATA[: 6 * MIB])
        assert sorted(request.num_body_bytes for request in proxy.seen("PUT")) == [
            6 * MIB,
            8 * MIB,
            16 * MIB,
        ]
    direct = S3Store(store.uri, server.endpoint_url)
    assert (direct.get("a") == DATA, direct.get("b") == DATA[: 6 * MIB]) == (True, True)


def test_memory_of_compose_does_not_grow_with_the_object(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multipart, "UPLOAD_PART_BYTES", 5 * MIB)
    store, source = new_store(seaweedfs), MemoryStoreOf(DATA[: 20 * MIB])
    store.put("warm", b"1")
    tracemalloc.start()
    try:
        assert (
            store.compose("out", (ByteRange(source, "x", 0, 20 * MIB) for _ in range(6)))
            == 120 * MIB
        )
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(source.sizes) <= 5 * MIB
    assert peak_bytes < 45 * MIB
    assert store.get_range("out", 115 * MIB, 5 * MIB) == DATA[15 * MIB : 20 * MIB]


def test_sweep_removes_old_unfinished_uploads_under_the_root_only(server: Server) -> None:
    client, store = plain_client(server.endpoint_url), new_store(server)
    prefix = store.uri.rpartition("/")[2]
    ids = {}
    for key in (f"{prefix}/a", f"{prefix}/folder/b", f"{prefix}-2/c"):
        ids[key] = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
        client.upload_part(Bucket=BUCKET, Key=key, UploadId=ids[key], PartNumber=1, Body=b"1")
    store.put("object", b"1")
    if isinstance(server, SeaweedFS):  # moto says that every upload began in 2010
        assert store.sweep(3600.0) == 0
        assert len(unfinished(store)) == 3
    time.sleep(2.1)
    assert SubStore(store, "folder/").sweep(1.0) == 1
    assert sorted(unfinished(store)) == [f"{prefix}-2/c", f"{prefix}/a"]
    assert store.sweep(1.0) == 1
    assert unfinished(store) == [f"{prefix}-2/c"]
    assert store.get("object") == b"1"
    client.abort_multipart_upload(Bucket=BUCKET, Key=f"{prefix}-2/c", UploadId=ids[f"{prefix}-2/c"])


def test_operations_outlast_a_server_that_is_killed_and_started_again(
    aws_identity: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "S3", replace(retry.S3, base_s=0.1))
    server = SeaweedFS(tmp_path / "server")
    try:
        server.start()
        store = new_store(server)
        written: list[int] = []
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                store.put(f"k/{len(written)}", DATA[len(written) : len(written) + 1000])
                written.append(len(written))

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.4)
        server.kill()
        time.sleep(0.3)
        server.start()
        time.sleep(0.4)
        stop.set()
        writer.join()
        assert store.traffic.retries > 0
        assert [info.key for info in store.list()] == sorted(f"k/{number}" for number in written)
        assert all(store.get(f"k/{number}") == DATA[number : number + 1000] for number in written)
    finally:
        server.stop()
