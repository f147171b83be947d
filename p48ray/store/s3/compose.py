"""Composing an object from byte ranges: the server copies on its side what makes a legal part, the
rest passes through this process. The picture in `multipart` shows how."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

from p48ray.store.base import ByteRange, Piece, Store
from p48ray.store.s3 import multipart
from p48ray.store.s3.api import Api
from p48ray.store.s3.multipart import CopySource, MultipartUpload


class Composer:
    """Turns pieces into the parts of one upload; the picture in `multipart` shows how. The
    upload begins with the first full part."""

    def __init__(
        self,
        api: Api,
        key: str,
        writer: str,
        copy_source: Callable[[ByteRange], CopySource | None],
        is_streaming: bool,
    ) -> None:
        """Nothing is begun before the first full part.

        Args:
            api: of the bucket.
            key: of the object, with the store's prefix.
            writer: an id of this writing alone, by which its object is known again.
            copy_source: the object to copy a range from, checked to hold it; None where it must be
                streamed through this process.
            is_streaming: all parts are uploaded, and equal.
        """
        self._api, self._key, self._writer = api, key, writer
        self._copy_source, self._is_streaming = copy_source, is_streaming
        self._upload: MultipartUpload | None = None
        self._pending = bytearray()
        self.num_bytes = 0

    def __enter__(self) -> "Composer":
        return self

    def __exit__(self, *error: object) -> None:
        if self._upload is not None:
            self._upload.__exit__(*error)

    def add(self, piece: Piece) -> None:
        """Appends a piece. Raises: what its store raises if it is not all there."""
        source = None
        if isinstance(piece, bytes):
            for data in _slices(memoryview(piece), self._room):
                self._append(data)
        else:
            source = (
                None
                if self._is_streaming or piece.num_bytes <= self._min_part_bytes()
                else self._copy_source(piece)
            )
            self._add_copied(piece, source) if source else self._stream(piece)

    def finish(self) -> bytes | None:
        """Completes the upload. Returns: the whole object instead, if it was too small to begin
        one."""
        if self._upload is None:
            return bytes(self._pending)
        if self._pending:
            self._flush()
        self._upload.complete()
        return None

    def _add_copied(self, piece: ByteRange, source: CopySource) -> None:
        lead_bytes = max(0, self._min_part_bytes() - len(self._pending)) if self._pending else 0
        if piece.num_bytes - lead_bytes <= self._min_part_bytes():
            self._stream(piece)
            return
        if self._pending:
            self._stream(replace(piece, num_bytes=lead_bytes))
            if self._pending:  # not if topping up filled a whole part
                self._flush()
        start, end = piece.start + lead_bytes, piece.start + piece.num_bytes
        part_bytes = min(
            multipart.MAX_PART_BYTES, max(multipart.COPY_PART_BYTES, 2 * self._min_part_bytes())
        )
        num_parts = -(-(end - start) // part_bytes)
        bounds = [start + (end - start) * number // num_parts for number in range(num_parts + 1)]
        for first, last in pairwise(bounds):
            self._begun().add_copy(source, first, last - first)
        self.num_bytes += end - start

    def _stream(self, piece: ByteRange) -> None:
        """Appends a range through memory, one part at most at a time. An empty one is asked for as
        well: it must be there."""
        done, is_done = 0, False
        while not is_done:
            num_bytes = min(piece.num_bytes - done, self._room())
            self._append(
                memoryview(piece.store.get_range(piece.key, piece.start + done, num_bytes))
            )
            done += num_bytes
            is_done = done >= piece.num_bytes

    def _append(self, data: memoryview) -> None:
        self._pending += data
        self.num_bytes += len(data)
        if self._room() <= 0:
            self._flush()

    def _room(self) -> int:
        """Bytes that the part being filled still takes."""
        part_bytes = (
            multipart.STREAM_PART_BYTES
            if self._is_streaming
            else max(multipart.UPLOAD_PART_BYTES, self._min_part_bytes())
        )
        return part_bytes - len(self._pending)

    def _min_part_bytes(self) -> int:
        num_parts = self._upload.num_parts if self._upload else 0
        doublings: int = 2 ** (num_parts // multipart.PARTS_PER_DOUBLING)
        return multipart.MIN_PART_BYTES * doublings

    def _flush(self) -> None:
        data, self._pending = bytes(self._pending), bytearray()
        self._begun().add_bytes(data)

    def _begun(self) -> MultipartUpload:
        if self._upload is None:
            self._upload = MultipartUpload(self._api, self._key, self._writer)
        return self._upload


def merged_ranges(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same bytes in fewer pieces: ranges that follow one another in one object are joined."""
    held: ByteRange | None = None
    for piece in pieces:
        is_next = (
            isinstance(piece, ByteRange)
            and held is not None
            and (piece.key, piece.start) == (held.key, held.start + held.num_bytes)
            and _is_same_store(piece.store, held.store)
        )
        if is_next and held is not None and isinstance(piece, ByteRange):
            held = replace(held, num_bytes=held.num_bytes + piece.num_bytes)
            continue
        if held is not None:
            yield held
        held = piece if isinstance(piece, ByteRange) else None
        if held is None:
            yield piece
    if held is not None:
        yield held


def _is_same_store(one: Store, other: Store) -> bool:
    names = [
        (type(store), store.uri, getattr(store, "endpoint_url", None)) for store in (one, other)
    ]
    return one is other or names[0] == names[1]


def _slices(data: memoryview, room: Callable[[], int]) -> Iterator[memoryview]:
    """Cuts data into pieces, each as long as there is room at that moment."""
    while data:
        num_bytes = room()
        yield data[:num_bytes]
        data = data[num_bytes:]
