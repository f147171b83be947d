"""Objects made of parts: multipart uploads. `compose` makes them of byte ranges that the server
copies on its side:

    pieces  [header 90 KB][range, 700 MiB, of A          ][2 MiB, of C][range, 900 MiB, of B]
    parts   [1: header + first 5 MiB of A][2..4: rest of A][5: C + first 3 MiB of B][6..9: B]
             uploaded                      copied           uploaded                copied

A part has 5 MiB at least (the last one is free), so what is smaller travels through this process
with as much of its neighbour as makes it a legal part. Neighbouring pieces that are neighbours in
one source object as well become one range first: what crosses the network depends on where the
sources break, not on the number of pieces. Source: Amazon S3 User Guide, "Multipart upload limits"
and "UploadPartCopy".
"""

import base64
import hashlib
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from p48ray.errors import P48Error, ShardCorruptError, TransientStoreError
from p48ray.store.s3.api import Api, ExpectedError, with_member

MIN_PART_BYTES = 5 * 2**20
MAX_PART_BYTES = 5 * 2**30
MAX_PARTS = 10_000
UPLOAD_PART_BYTES = 16 * 2**20
"""Size of a part that is uploaded. PARALLEL_PARTS of them and one being filled are the memory of an
upload."""
STREAM_PART_BYTES = 64 * 2**20
"""The same where all parts must be equal: 10,000 of them must hold the largest shard."""
COPY_PART_BYTES = 256 * 2**20
"""Ranges are copied in parts of about this size, because a server copies several parts at once but
each at its own pace."""
PARALLEL_PARTS = 4
PARTS_PER_DOUBLING = 1000
"""After so many parts the smallest part allowed doubles, so that 10,000 parts hold any object
though its size is not known at the start."""
WRITER = "p48ray-writer"
"""Metadata field with an id that is new in every call that writes: after a lost reply it tells
whether the object there is ours."""

log = logging.getLogger(__name__)
CHANGED_SOURCE = frozenset({"NoSuchKey", "PreconditionFailed", "InvalidRange", "412", "416"})
"""What a copy answers when its source is not what it was when it was looked at."""


@dataclass(frozen=True, slots=True)
class CopySource:
    """A source object that the server can copy from, as it was when first looked at."""

    bucket: str
    key: str
    size_bytes: int
    etag: str


def sha256_base64(data: bytes) -> str:
    """As S3 wants a checksum in a header."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def part_size(size_bytes: int) -> int:
    """Bytes of each part but the last of an object whose size is known, so that MAX_PARTS hold it;
    equal, as some servers want them."""
    return max(UPLOAD_PART_BYTES, -(-size_bytes // MAX_PARTS))


def checksum_fields(data: bytes) -> dict[str, Any]:
    """Both are needed: some servers store a checksum only if the algorithm is named beside it."""
    return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": sha256_base64(data)}


def is_written_by(api: Api, key: str, writer: str) -> bool | None:
    """Whether the object at `key` is the one that this writer's id marks. None if there is no
    object."""
    try:
        reply = api.call("head_object", key, expected=frozenset({"404", "NoSuchKey"}))
    except ExpectedError:
        return None
    return bool(reply.get("Metadata", {}).get(WRITER) == writer)


class MultipartUpload:
    """One multipart upload with a few parts in flight. As a context it aborts the upload unless
    `complete` was reached and succeeded."""

    def __init__(self, api: Api, key: str, writer: str) -> None:
        self._api, self._key, self._writer = api, key, writer
        reply = api.call(
            "create_multipart_upload",
            key,
            read=with_member("UploadId"),
            ChecksumAlgorithm="SHA256",
            Metadata={WRITER: writer},
        )
        self._id = reply["UploadId"]
        self._pool = ThreadPoolExecutor(PARALLEL_PARTS, thread_name_prefix="s3-part")
        self._free = threading.Semaphore(PARALLEL_PARTS)
        self._parts: list[Future[dict[str, Any]]] = []
        self._num_checked = 0
        self._is_complete = False

    @property
    def num_parts(self) -> int:
        """Parts added so far."""
        return len(self._parts)

    def __enter__(self) -> "MultipartUpload":
        return self

    def __exit__(self, *_: object) -> None:
        # parts still in flight would be stored after an abort, so they end first
        self._pool.shutdown(wait=True, cancel_futures=True)
        if not self._is_complete:
            self._abort()

    def add_bytes(self, data: bytes | memoryview) -> None:
        """Uploads a part; returns while it is under way, unless PARALLEL_PARTS already are."""

        def upload(number: int) -> dict[str, Any]:
            body = bytes(data)
            checksum = checksum_fields(body)
            reply = self._api.call(
                "upload_part",
                self._key,
                UploadId=self._id,
                PartNumber=number,
                Body=body,
                read=with_member("ETag"),
                **checksum,
            )
            return {
                "PartNumber": number,
                "ETag": reply["ETag"],
                "ChecksumSHA256": checksum["ChecksumSHA256"],
            }

        self._submit(upload)

    def add_chunks(self, chunks: Iterable[memoryview], part_bytes: int) -> None:
        """Uploads bytes that come in chunks, each valid until the next, as parts of `part_bytes`
        each but the last.

        Cost: memory for PARALLEL_PARTS parts and the one being filled. Raises: what `chunks`
            raises.
        """
        part = BytesIO()
        for chunk in chunks:
            rest = chunk
            while rest:
                rest = rest[part.write(rest[: part_bytes - part.tell()]) :]
                if part.tell() == part_bytes:
                    self.add_bytes(part.getvalue())  # the buffer itself, not a copy of it
                    part = BytesIO()
        if part.tell():
            self.add_bytes(part.getvalue())

    def add_copy(self, source: CopySource, start: int, num_bytes: int) -> None:
        """Has the server copy a part from another object; as `add_bytes`. A source that changed
        since it was looked at is refused."""

        def copy(number: int) -> dict[str, Any]:
            try:
                reply = self._api.call(
                    "upload_part_copy",
                    self._key,
                    UploadId=self._id,
                    PartNumber=number,
                    CopySourceIfMatch=source.etag,
                    CopySource={"Bucket": source.bucket, "Key": source.key},
                    CopySourceRange=f"bytes={start}-{start + num_bytes - 1}",
                    expected=CHANGED_SOURCE,
                    read=with_member("CopyPartResult", "ETag"),
                )["CopyPartResult"]
            except ExpectedError as error:
                raise ShardCorruptError(
                    f"s3://{source.bucket}/{source.key} changed or went while it was copied"
                    f" ({error})"
                ) from error
            return {
                "PartNumber": number,
                **{name: reply[name] for name in ("ETag", "ChecksumSHA256") if name in reply},
            }

        self._submit(copy)

    def complete(self, *, is_conditional: bool = False) -> bool:
        """Makes the object. Args: is_conditional: only if there is none yet. Returns: False if
        there was one, from another writer.

        A reply that is lost makes the server answer a retry with "no such upload" or "there is one
        already": the writer's id tells. AWS lets one of several conditional completions pass.
        SeaweedFS (4.48) and moto look first and write then, so that of two at the same moment both
        may pass and the later one's object stays: a look afterwards tells most, not all, earlier
        ones that they lost.
        """
        parts = [part.result() for part in self._parts]
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if is_conditional else {}
        try:
            self._api.call(
                "complete_multipart_upload", self._key, UploadId=self._id,
                MultipartUpload={"Parts": parts},
                expected=frozenset({"NoSuchUpload", "PreconditionFailed", "404", "412"}),
                read=with_member("ETag"), **condition,
            )  # fmt: skip
        except ExpectedError as error:
            is_ours = is_written_by(self._api, self._key, self._writer)
            if is_ours is False and is_conditional:
                return False
            if not is_ours:
                where = f"s3://{self._api.bucket}/{self._key}"
                raise TransientStoreError(
                    f"{where}: its upload went before it was completed ({error}); was it swept?"
                ) from error
        self._is_complete = True
        return not is_conditional or is_written_by(self._api, self._key, self._writer) is not False

    def _submit(self, make: Callable[[int], dict[str, Any]]) -> None:
        number = len(self._parts) + 1
        if number > MAX_PARTS:
            raise P48Error(
                f"s3://{self._api.bucket}/{self._key} would need more than {MAX_PARTS} parts, S3's"
                " limit; write smaller shards"
            )
        self._free.acquire()
        while self._num_checked < len(self._parts) and self._parts[self._num_checked].done():
            self._parts[self._num_checked].result()
            self._num_checked += 1

        def run() -> dict[str, Any]:
            try:
                return make(number)
            finally:
                self._free.release()

        self._parts.append(self._pool.submit(run))

    def _abort(self) -> None:
        """An upload that cannot be aborted either stays for `sweep`; the error that led here
        matters more."""
        try:
            self._api.call(
                "abort_multipart_upload",
                self._key,
                UploadId=self._id,
                expected=frozenset({"NoSuchUpload", "404"}),
            )
        except ExpectedError:
            pass
        except P48Error as error:
            log.warning(
                "s3://%s/%s: upload %s is left behind: %s",
                self._api.bucket,
                self._key,
                self._id,
                error,
            )
