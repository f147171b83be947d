"""The rules of multipart uploads, against a bucket in memory that enforces them, with every limit
scaled down so that many cases fit."""

import random
import threading
from typing import Any

import pytest

from p48ray.errors import P48Error
from p48ray.store import ByteRange, MemoryStore
from p48ray.store.base import Piece
from p48ray.store.s3 import multipart
from p48ray.store.s3.compose import Composer, merged_ranges
from p48ray.store.s3.multipart import CopySource

pytestmark = pytest.mark.server

SHIPPED = {
    name: value
    for name, value in vars(multipart).items()
    if name.isupper() and isinstance(value, int)
}
MIN, UPLOAD, COPY, MAX, STREAM = 50, 160, 300, 500, 170


class FakeApi:
    """What MultipartUpload asks of Api, kept in memory. Refuses what S3 would refuse at
    completion."""

    bucket = "bucket"

    def __init__(self, sources: dict[str, bytes], delay_s: float = 0.0) -> None:
        self.sources, self.lock = sources, threading.Lock()
        self.parts: dict[int, bytes] = {}
        self.copied: dict[int, bool] = {}
        self.result: bytes | None = None
        self.num_bytes_in_flight = self.peak_in_flight = 0
        self.busy = threading.Event()

    def call(
        self,
        operation: str,
        key: str,
        *,
        expected: object = None,
        read: object = None,
        **params: Any,
    ) -> Any:
        return getattr(self, operation)(**params)

    def create_multipart_upload(self, **_: Any) -> Any:
        return {"UploadId": "1"}

    def upload_part(self, PartNumber: int, Body: bytes, **_: Any) -> Any:
        with self.lock:
            self.num_bytes_in_flight += len(Body)
            self.peak_in_flight = max(self.peak_in_flight, self.num_bytes_in_flight)
        self.busy.wait(0.001)
        with self.lock:
            self.num_bytes_in_flight -= len(Body)
        self._store(PartNumber, Body, False)
        return {"ETag": str(PartNumber)}

    def upload_part_copy(
        self, PartNumber: int, CopySource: dict[str, str], CopySourceRange: str, **_: Any
    ) -> Any:
        first, last = (int(number) for number in CopySourceRange.removeprefix("bytes=").split("-"))
        data = self.sources[CopySource["Key"]]
        assert len(data) > MIN, "a range is copied from a source over 5 MB only"
        assert last < len(data)
        self._store(PartNumber, data[first : last + 1], True)
        return {"CopyPartResult": {"ETag": str(PartNumber)}}

    def complete_multipart_upload(self, MultipartUpload: Any, **_: Any) -> Any:
        numbers = [part["PartNumber"] for part in MultipartUpload["Parts"]]
        assert numbers == list(range(1, len(self.parts) + 1))
        assert [part["ETag"] for part in MultipartUpload["Parts"]] == [
            str(number) for number in numbers
        ]
        assert all(len(self.parts[number]) >= MIN for number in numbers[:-1]), (
            "a part but the last is too small"
        )
        assert all(0 < len(self.parts[number]) <= MAX for number in numbers)
        self.result = b"".join(self.parts[number] for number in numbers)
        return {"ETag": "all"}

    def abort_multipart_upload(self, **_: Any) -> Any:
        self.parts.clear()

    def _store(self, number: int, data: bytes, is_copied: bool) -> None:
        with self.lock:
            assert number not in self.parts
            self.parts[number], self.copied[number] = data, is_copied


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MIN_PART_BYTES": MIN,
        "UPLOAD_PART_BYTES": UPLOAD,
        "COPY_PART_BYTES": COPY,
        "MAX_PART_BYTES": MAX,
    }.items():
        monkeypatch.setattr(multipart, name, value)
    monkeypatch.setattr(multipart, "STREAM_PART_BYTES", STREAM)


def run(store: MemoryStore, api: FakeApi, pieces: list[Piece], is_streaming: bool = False) -> bytes:
    def copy_source(piece: ByteRange) -> CopySource | None:
        return (
            CopySource("bucket", piece.key, len(api.sources[piece.key]), "etag")
            if piece.key in api.sources
            else None
        )

    with Composer(api, "out", "writer", copy_source, is_streaming) as composer:  # type: ignore[arg-type]
        for piece in merged_ranges(pieces):
            composer.add(piece)
        small = composer.finish()
    made = api.result if small is None else small
    assert made is not None
    assert composer.num_bytes == len(made)
    return made


def random_case(seed: int) -> tuple[MemoryStore, FakeApi, list[Piece], bytes]:
    """Pieces of all kinds and sizes; sources whose names begin with "far" cannot be copied."""
    source = random.Random(seed)
    store = MemoryStore(f"parts-{seed}")
    contents = {
        name: source.randbytes(source.choice([3, 49, 50, 51, 400, 3000]))
        for name in ("a", "b", "c", "far-d")
    }
    for name, data in contents.items():
        store.put(name, data)
    pieces: list[Piece] = []
    expected = b""
    for _ in range(source.randrange(0, 25)):
        if source.random() < 0.4:
            data = source.randbytes(source.choice([0, 1, 7, 49, 50, 160, 161, 700]))
            pieces.append(data)
        else:
            name = source.choice(list(contents))
            start = source.randrange(len(contents[name]))
            num_bytes = source.choice(
                [0, len(contents[name]) - start, source.randrange(len(contents[name]) - start + 1)]
            )
            data = contents[name][start : start + num_bytes]
            pieces += [
                ByteRange(store, name, start, num_bytes // 2),
                ByteRange(store, name, start + num_bytes // 2, num_bytes - num_bytes // 2),
            ]
        expected += data
    return (
        store,
        FakeApi({name: data for name, data in contents.items() if name[0] != "f"}),
        pieces,
        expected,
    )


@pytest.mark.parametrize("is_streaming", [False, True])
def test_any_pieces_become_legal_parts_with_the_right_bytes(is_streaming: bool) -> None:
    num_copied = 0
    for seed in range(150):
        store, api, pieces, expected = random_case(seed)
        assert run(store, api, pieces, is_streaming) == expected, seed
        num_copied += sum(api.copied.values())
        sizes = [len(api.parts[number]) for number in sorted(api.parts)]
        if is_streaming:
            assert all(size == STREAM for size in sizes[:-1]), seed
        assert api.peak_in_flight <= multipart.PARALLEL_PARTS * (
            STREAM if is_streaming else UPLOAD
        ), seed
    assert (num_copied == 0) == is_streaming
    assert is_streaming or num_copied > 100


def test_range_is_copied_in_even_parts_below_the_limit() -> None:
    store = MemoryStore("even-parts")
    data = bytes(range(250)) * 5
    store.put("a", data)
    api = FakeApi({"a": data})
    assert run(store, api, [ByteRange(store, "a", 3, 1001)]) == data[3:1004]
    assert sorted(len(part) for part in api.parts.values()) == [250, 250, 250, 251]
    assert store.traffic.bytes_read == 0


def test_smallest_part_grows_so_that_ten_thousand_hold_any_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scaled: 40 parts, doubling every 4. Without growth parts of 160 would end at 6,400 bytes."""
    monkeypatch.setattr(multipart, "MAX_PARTS", 40)
    monkeypatch.setattr(multipart, "PARTS_PER_DOUBLING", 4)
    monkeypatch.setattr("tests.store.s3.test_multipart.MAX", 10**6)
    api = FakeApi({})
    assert run(MemoryStore("grows"), api, [bytes(50_000)]) == bytes(50_000)
    assert len(api.parts) < 40


def test_more_parts_than_s3_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "MAX_PARTS", 3)
    api = FakeApi({})
    with pytest.raises(P48Error, match="more than 3 parts"):
        run(MemoryStore("too-many"), api, [bytes(UPLOAD * 4)])
    assert (api.result, api.parts) == (None, {})


def test_real_limits_hold_what_s3_holds() -> None:
    """5 TB and more in 10,000 parts that are legal, by the doubling rule of the module as
    shipped."""
    sizes = [
        SHIPPED["MIN_PART_BYTES"] * 2 ** (number // SHIPPED["PARTS_PER_DOUBLING"])
        for number in range(SHIPPED["MAX_PARTS"])
    ]
    assert sum(sizes) >= 5 * 10**12
    assert sizes[-1] <= SHIPPED["MAX_PART_BYTES"] == 5 * 2**30
    assert (sizes[0], SHIPPED["MAX_PARTS"]) == (5 * 2**20, 10_000)
    assert SHIPPED["COPY_PART_BYTES"] >= 2 * sizes[0]


def test_neighbouring_ranges_of_one_object_become_one() -> None:
    one, other = MemoryStore("merge-1"), MemoryStore("merge-2")
    pieces = [
        ByteRange(one, "a", 0, 3),
        ByteRange(MemoryStore("merge-1"), "a", 3, 2),
        ByteRange(one, "a", 6, 1),
        ByteRange(one, "b", 7, 1),
    ]
    assert list(merged_ranges(iter(pieces))) == [ByteRange(one, "a", 0, 5), *pieces[2:]]
    apart: list[Piece] = [
        ByteRange(one, "a", 0, 3),
        ByteRange(other, "a", 3, 2),
        b"x",
        ByteRange(other, "a", 5, 1),
        b"y",
        b"z",
    ]
    assert list(merged_ranges(apart)) == apart
