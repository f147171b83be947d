"""The contract that every store passes. To add a backend, add a fixture parameter here: nothing
below knows which store it has."""

import hashlib
import pickle
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from p48ray.errors import ObjectMissingError, P48Error, ShardCorruptError
from p48ray.store import ByteRange, LocalStore, MemoryStore, ObjectInfo, S3Store, Store, open_store
from p48ray.store.base import CHUNK_BYTES, Written
from p48ray.store.s3 import multipart
from p48ray.store.s3 import store as s3
from p48ray.store.view import SplitStore, SubStore
from tests.servers.s3 import BUCKET

BAD_KEYS = [
    "",
    "/a",
    "a//b",
    "a/",
    "..",
    "a/../b",
    "../a",
    ".",
    "./a",
    "a/.",
    "a\\b",
    "a\0b",
    "a/.p48tmp-1-2",
]

MIB = 2**20
PART_BYTES = 5 * MIB
ONE_REQUEST_BYTES = 6 * MIB
"""What S3Store sends in parts and in one request in the tests of write_once here: S3's smallest
part, and a little more than it."""
DATA = random.Random(2).randbytes(21 * MIB)

KINDS = ["local", "memory", "view", "split", "seaweedfs", "moto"]


def is_even(key: str) -> bool:
    """Some keys here, some there."""
    return len(key) % 2 == 0


def make_store(kind: str, root: Path, request: pytest.FixtureRequest) -> Store:
    """A fresh, empty store. A view is a folder of a store that holds other things beside it; a
    split one has half of its keys in another store."""
    if kind in ("seaweedfs", "moto"):
        server = request.getfixturevalue("seaweedfs" if kind == "seaweedfs" else "moto_server")
        return S3Store(f"s3://{BUCKET}/{uuid.uuid4().hex}", server.endpoint_url)
    if kind == "view":
        behind = LocalStore(root)
        behind.put("beside", b"another object")
        behind.put("folder-of-another/a", b"another object")
        return SubStore(behind, "folder/")
    if kind == "split":
        return SplitStore(LocalStore(root / "kept"), LocalStore(root / "aside"), is_even)
    return LocalStore(root) if kind == "local" else MemoryStore(uuid.uuid4().hex)


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A fresh, empty store of each kind."""
    return make_store(request.param, tmp_path / "root", request)


@pytest.fixture(params=KINDS)
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A second store, to compose from; of each kind, so that all pairs are tried."""
    return make_store(request.param, tmp_path / "other", request)


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_store_satisfies_the_protocol_and_its_uri_opens_it_again(store: Store) -> None:
    assert isinstance(store, Store)
    store.put("a", b"1")
    assert open_store(store.uri, getattr(store, "endpoint_url", None)).get("a") == b"1"


def test_empty_store_reads_as_empty(store: Store) -> None:
    assert keys(store) == []
    assert store.head("a") is None
    store.delete("a/b")
    with pytest.raises(ObjectMissingError, match="a/b"):
        store.get("a/b")
    with pytest.raises(ObjectMissingError, match="a/b"):
        store.get_range("a/b", 0, 0)


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5000])
def test_put_then_get_gives_the_same_bytes(store: Store, data: bytes) -> None:
    store.put("folder/sub/object.bin", data)
    assert store.get("folder/sub/object.bin") == data
    held = store.head("folder/sub/object.bin")
    assert held is not None
    assert (held.key, held.size_bytes) == ("folder/sub/object.bin", len(data))
    assert held.sha256 in (None, hashlib.sha256(data).hexdigest())
    assert isinstance(store, S3Store) == (held.sha256 is not None)
    assert list(store.list()) == [ObjectInfo("folder/sub/object.bin", len(data))]


def test_put_replaces_and_delete_removes(store: Store) -> None:
    store.put("a", b"long old content")
    store.put("a", b"new")
    assert store.get("a") == b"new"
    store.delete("a")
    store.delete("a")
    assert store.head("a") is None
    assert keys(store) == []


def test_folder_of_objects_is_not_an_object(store: Store) -> None:
    store.put("a/b", b"1")
    assert store.head("a") is None
    with pytest.raises(ObjectMissingError, match="a"):
        store.get("a")
    assert store.head("a/b/c") is None
    with pytest.raises(ObjectMissingError, match="a/b/c"):
        store.get("a/b/c")


def test_list_is_recursive_sorted_by_key_and_filters_by_text_prefix(store: Store) -> None:
    for key in [
        "b/z",
        "a/c/d",
        "a-b",
        "a/b",
        "a.b",
        "units/L01/x",
        "units/L02/x",
        "units/L1",
        "ä",
        "z",
    ]:
        store.put(key, key.encode())
    assert keys(store) == [
        "a-b",
        "a.b",
        "a/b",
        "a/c/d",
        "b/z",
        "units/L01/x",
        "units/L02/x",
        "units/L1",
        "z",
        "ä",
    ]
    assert keys(store, "units/L0") == ["units/L01/x", "units/L02/x"]
    assert keys(store, "a") == ["a-b", "a.b", "a/b", "a/c/d"]
    assert keys(store, "a/") == ["a/b", "a/c/d"]
    assert keys(store, "a/c/d") == ["a/c/d"]
    assert keys(store, "nothing/here") == []


@pytest.mark.parametrize(("start", "num_bytes"), [(0, 10), (0, 0), (10, 0), (3, 4), (9, 1)])
def test_get_range_gives_exactly_the_range(store: Store, start: int, num_bytes: int) -> None:
    store.put("a", b"0123456789")
    assert store.get_range("a", start, num_bytes) == b"0123456789"[start : start + num_bytes]


@pytest.mark.parametrize(("start", "num_bytes"), [(0, 11), (10, 1), (9, 2), (11, 0), (500, 7)])
def test_get_range_beyond_the_end_names_key_asked_and_found(
    store: Store, start: int, num_bytes: int
) -> None:
    store.put("some/key", b"0123456789")
    with pytest.raises(
        ShardCorruptError, match=rf"some/key.*{num_bytes} bytes from byte {start}.*found 10 bytes"
    ):
        store.get_range("some/key", start, num_bytes)


@pytest.mark.parametrize(("start", "num_bytes"), [(-1, 1), (0, -1)])
def test_get_range_refuses_negative_numbers(store: Store, start: int, num_bytes: int) -> None:
    store.put("a", b"0123456789")
    with pytest.raises(P48Error, match="negative"):
        store.get_range("a", start, num_bytes)


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys_are_refused_by_every_operation(store: Store, key: str) -> None:
    operations = [
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 0),
        lambda: store.head(key),
        lambda: store.put(key, b""),
        lambda: store.put_if_absent(key, b""),
        lambda: store.write_once(key, Pieces([b""])),
        lambda: store.compose(key, []),
        lambda: store.delete(key),
    ]
    for operation in operations:
        with pytest.raises(P48Error, match="bad object key") as caught:
            operation()
        assert repr(key) in str(caught.value)
    assert keys(store) == []


@pytest.mark.parametrize("prefix", ["..", "../", "/", "a/../", "a//"])
def test_list_refuses_prefixes_that_leave_the_root(store: Store, prefix: str) -> None:
    with pytest.raises(P48Error, match="bad object key"):
        list(store.list(prefix))


def test_put_if_absent_writes_once_and_keeps_the_first(store: Store) -> None:
    assert store.put_if_absent("units/u/manifest.json", b"first") is True
    assert store.put_if_absent("units/u/manifest.json", b"second") is False
    assert store.get("units/u/manifest.json") == b"first"
    store.delete("units/u/manifest.json")
    assert store.put_if_absent("units/u/manifest.json", b"third") is True


@pytest.mark.parametrize("round_number", range(5))
def test_of_twenty_racing_writers_exactly_one_wins_and_its_bytes_stay(
    store: Store, round_number: int
) -> None:
    barrier = threading.Barrier(20)
    won: dict[int, bool] = {}

    def race(number: int) -> None:
        barrier.wait()
        won[number] = store.put_if_absent(
            "units/u/manifest.json", f"attempt {number}".encode() * 1000
        )

    threads = [threading.Thread(target=race, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, is_winner in won.items() if is_winner]
    assert len(won) == 20
    assert len(winners) == 1
    assert store.get("units/u/manifest.json") == f"attempt {winners[0]}".encode() * 1000
    assert keys(store) == ["units/u/manifest.json"]


class Pieces:
    """Buffers of given pieces. Each is handed out in the same memory, as a caller that fills one
    buffer again and again would."""

    def __init__(
        self,
        pieces: Iterable[Any],
        announced: int | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self.pieces = [memoryview(piece) for piece in pieces]
        self.size_bytes = (
            sum(piece.nbytes for piece in self.pieces) if announced is None else announced
        )
        self.then, self.num_passes = then, 0

    def __iter__(self) -> Iterator[memoryview]:
        self.num_passes += 1
        held = bytearray(max((piece.nbytes for piece in self.pieces), default=0))
        for piece in self.pieces:
            with memoryview(held)[: piece.nbytes] as view:
                view[:] = piece.cast("B") if piece.nbytes else b""
                yield view.cast(piece.format) if piece.nbytes else view
            held[:] = bytes(len(held))
        self.then()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "ONCE_PUT_MAX_BYTES", ONE_REQUEST_BYTES)
    monkeypatch.setattr(multipart, "UPLOAD_PART_BYTES", PART_BYTES)


def assert_nothing_is_left(store: Store) -> None:
    """No object and nothing unfinished (but the other objects of a view's test stay)."""
    assert keys(store) == []
    assert store.sweep(-3600.0) == 0


def claim(data: bytes, is_ours: bool = True) -> Written:
    return Written(len(data), hashlib.sha256(data).hexdigest(), is_ours)


THRESHOLDS = [
    0,
    1,
    PART_BYTES,
    ONE_REQUEST_BYTES,
    CHUNK_BYTES,
    2 * PART_BYTES,
    2 * CHUNK_BYTES,
    3 * PART_BYTES,
]


@pytest.mark.usefixtures("small_parts")
def test_write_once_of_any_size_gives_the_joined_bytes_and_their_digest(store: Store) -> None:
    sizes = sorted({max(0, size + more) for size in THRESHOLDS for more in (-1, 0, 1)})
    for size in sizes:
        data, first = DATA[:size], size // 3
        buffers = Pieces([data[:first], b"", data[first:]])
        assert store.write_once(f"folder/{size}", buffers) == claim(data), size
        assert store.get(f"folder/{size}") == data, size
        assert buffers.num_passes == 1
        held = store.head(f"folder/{size}")
        assert held is not None
        has_digest = isinstance(store, S3Store) and size <= ONE_REQUEST_BYTES
        assert held.sha256 == (claim(data).sha256 if has_digest else None), size


@pytest.mark.usefixtures("small_parts")
def test_write_once_of_many_tiny_buffers_of_nothing_and_of_numbers(store: Store) -> None:
    tiny = [DATA[start : start + 1000] for start in range(0, 7 * MIB, 1000)]
    assert store.write_once("tiny", Pieces(tiny)) == claim(b"".join(tiny))
    assert store.get("tiny") == b"".join(tiny)
    assert store.write_once("nothing", Pieces([])) == claim(b"")
    assert store.get("nothing") == b""
    numbers = torch.arange(3 * MIB, dtype=torch.int16).numpy()
    values = torch.linspace(0, 1, MIB).numpy()
    expected = numbers.tobytes() + values.tobytes() + b"end"
    assert store.write_once("numbers", Pieces([numbers.data, values.data, b"end"])) == claim(
        expected
    )
    assert store.get("numbers") == expected


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [1000, 17 * MIB])
def test_second_write_once_keeps_the_first_and_tells_the_callers_own_digest(
    store: Store, size: int
) -> None:
    first, second = DATA[:size], DATA[1 : size + 5]
    assert store.write_once("a", Pieces([first])) == claim(first)
    before = store.traffic.bytes_written
    assert store.write_once("a", Pieces([second])) == claim(second, is_ours=False)
    assert store.write_once("a", Pieces([first])) == claim(first, is_ours=False)
    assert store.get("a") == first
    assert store.traffic.bytes_written == before
    assert store.put_if_absent("a", b"third") is False
    store.delete("a")
    assert store.write_once("a", Pieces([second])) == claim(second)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("size", "announced"),
    [
        (10, 9),
        (10, 11),
        (0, 1),
        (17 * MIB, 17 * MIB - 1),
        (17 * MIB, 18 * MIB),
        (10, 17 * MIB),
        (17 * MIB, 10),
    ],
)
def test_write_once_of_more_or_less_than_announced_leaves_nothing(
    store: Store, size: int, announced: int
) -> None:
    with pytest.raises(
        ShardCorruptError, match=f"expected {announced} bytes to write, found {size}"
    ):
        store.write_once("folder/a", Pieces([DATA[:size]], announced))
    assert_nothing_is_left(store)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [10, 17 * MIB])
def test_write_once_of_buffers_that_raise_leaves_nothing_and_the_error_comes_through(
    store: Store, size: int
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in the middle of the bytes")

    with pytest.raises(ZeroDivisionError, match="in the middle"):
        store.write_once("folder/a", Pieces([DATA[:size]], size + 1, then=fail))
    assert_nothing_is_left(store)
    assert store.write_once("folder/a", Pieces([DATA[:size]])) == claim(DATA[:size])


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [5000, 7 * MIB])
def test_of_twenty_racing_write_once_one_wins_and_its_bytes_stay(store: Store, size: int) -> None:
    """Exactly one, where completing an upload is atomic: the servers here look first and write
    then, so that two may believe they won (MultipartUpload.complete)."""
    barrier = threading.Barrier(20)
    found: dict[int, Written] = {}

    def race(number: int) -> None:
        barrier.wait()
        found[number] = store.write_once(
            "units/u/part.arrow", Pieces([bytes([number]), DATA[:size]])
        )

    threads = [threading.Thread(target=race, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = {number for number, written in found.items() if written.is_ours}
    held = store.get("units/u/part.arrow")
    assert len(found) == 20
    assert len(winners) == 1 or (
        len(winners) < 5 and isinstance(store, S3Store) and size > ONE_REQUEST_BYTES
    )
    assert held[0] in winners
    assert held[1:] == DATA[:size]
    assert all(
        written == claim(bytes([number]) + DATA[:size], number in winners)
        for number, written in found.items()
    )
    assert keys(store) == ["units/u/part.arrow"]
    assert store.sweep(-3600.0) == 0


def test_readers_see_one_version_or_the_other_while_an_object_is_replaced(store: Store) -> None:
    versions = [bytes([number]) * 300_000 for number in range(2)]
    store.put("a", versions[0])
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for version in versions:
                store.put("a", version)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        seen = [store.get("a") for _ in range(60)]
    finally:
        stop.set()
        writer.join()
    assert all(data in versions for data in seen)


def test_compose_joins_bytes_and_ranges_of_both_stores(store: Store, other: Store) -> None:
    store.put("mine", b"0123456789")
    other.put("theirs", bytes(range(256)) * 1000)
    pieces = [
        b"head",
        ByteRange(other, "theirs", 100, 200_000),
        b"",
        ByteRange(store, "mine", 2, 3),
        ByteRange(store, "mine", 5, 0),
        b"!",
    ]
    expected = b"head" + (bytes(range(256)) * 1000)[100:200_100] + b"234" + b"!"
    assert store.compose("joined/out", iter(pieces)) == len(expected)
    assert store.get("joined/out") == expected
    assert keys(store) == ["joined/out", "mine"]


def test_compose_may_replace_its_own_source(store: Store) -> None:
    store.put("a", b"0123456789")
    assert store.compose("a", [ByteRange(store, "a", 5, 5), ByteRange(store, "a", 0, 5)]) == 10
    assert store.get("a") == b"5678901234"


def test_compose_of_nothing_is_an_empty_object(store: Store) -> None:
    assert store.compose("a", []) == 0
    assert store.get("a") == b""


def test_failed_compose_leaves_everything_as_it_was(store: Store, other: Store) -> None:
    store.put("a", b"before")
    other.put("short", b"123")
    with pytest.raises(ShardCorruptError, match="short"):
        store.compose("a", [b"new", ByteRange(other, "short", 1, 3)])
    with pytest.raises(ObjectMissingError, match="missing"):
        store.compose("a", [b"new", ByteRange(other, "missing", 0, 1)])
    with pytest.raises(ShardCorruptError, match="short"):
        store.compose("b", [ByteRange(other, "short", 1, 3)])
    assert store.get("a") == b"before"
    assert keys(store) == ["a"]


def test_pickled_store_is_the_same_store(store: Store) -> None:
    store.put("a", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again.get("a") == b"1"
    assert again.uri == store.uri


def test_traffic_counts_the_bytes_that_passed_through_and_starts_at_zero_in_a_copy(
    store: Store,
) -> None:
    before = (store.traffic.bytes_written, store.traffic.bytes_read, store.traffic.requests)
    store.put("a", b"0123456789")
    store.put_if_absent("b", b"01234")
    store.get("a")
    store.get_range("a", 2, 3)
    counted = store.traffic
    assert (counted.bytes_written - before[0], counted.bytes_read - before[1], counted.retries) == (
        15,
        13,
        0,
    )
    assert counted.requests - before[2] == 4
    assert pickle.loads(pickle.dumps(store)).traffic.bytes_written == 0


def test_sweep_of_a_clean_store_removes_nothing(store: Store) -> None:
    store.put("a/b", b"1")
    assert store.sweep(0.0) == 0
    assert store.get("a/b") == b"1"
