"""S3Store: objects in a bucket, on AWS or any server that speaks S3.

Every write is one request that the server makes visible at once (PutObject, or the completion of a
multipart upload), so a killed writer leaves at most an unfinished upload, which nobody sees and
`sweep` removes. Uploads carry SHA-256 checksums that the server enforces and keeps. The one race
that matters, first writer wins, is the server's `If-None-Match: *`.
"""

import base64
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from io import BytesIO
from typing import Any

from p48ray.errors import ConfigError, ShardCorruptError, TransientStoreError
from p48ray.store.base import (
    Buffers,
    ByteRange,
    Hashing,
    ObjectInfo,
    Piece,
    Traffic,
    Written,
    check_key,
    check_path,
    check_prefix,
    check_range,
)
from p48ray.store.s3.api import Api, ExpectedError, body_of, with_member
from p48ray.store.s3.compose import Composer, merged_ranges
from p48ray.store.s3.multipart import (
    WRITER,
    CopySource,
    MultipartUpload,
    checksum_fields,
    is_written_by,
    part_size,
    sha256_base64,
)
from p48ray.store.s3.replies import full_checksum, is_key, ranged_body, server_time
from p48ray.store.view import resolved

PUT_MAX_BYTES = 512 * 2**20
"""Larger objects are uploaded in parts: a part that fails is retried alone, and parts travel in
parallel."""
ONCE_PUT_MAX_BYTES = 64 * 2**20
"""The same for `write_once`, whose caller does not hold the bytes: one request wants all of them in
memory."""
LIST_PAGE = 1000
READ_ATTEMPTS = 3
"""How often a whole object is read before stored bytes that differ from the stored checksum are
believed to be so in the store."""
ABSENT = frozenset({"404", "NoSuchKey"})
EXISTS = frozenset({"412", "PreconditionFailed"})


class S3Store:
    """Objects under `prefix` in a bucket. Credentials and region come from boto3's standard chain,
    never from here.

    Several processes on many machines may write at once. A bucket of AWS is consistent from write
    to read and to listing; a server that is not cannot hold a run root.
    """

    def __init__(self, uri: str, endpoint_url: str | None = None, server_copy: bool = True) -> None:
        """Nothing is asked before first use.

        Args:
            uri: s3://bucket or s3://bucket/prefix.
            endpoint_url: of a server that is not AWS.
            server_copy: whether it copies byte ranges on its side and takes parts of unequal size
                (`probe` tells); if not, `compose` streams through this process in equal parts.

        Raises: ConfigError for a uri that names no bucket, or whose prefix is no key.
        """
        found = re.fullmatch(
            r"s3://([a-zA-Z0-9][a-zA-Z0-9._-]{1,253}[a-zA-Z0-9])(?:/(.*))?", uri, flags=re.DOTALL
        )
        if not found:
            raise ConfigError(
                f"{uri}: expected s3://BUCKET or s3://BUCKET/PREFIX, found no bucket's name"
            )
        if endpoint_url is not None and not re.match(r"https?://[^/]", endpoint_url):
            raise ConfigError(
                f"{uri}: its endpoint must be http://HOST[:PORT] or https://HOST[:PORT], found"
                f" {endpoint_url!r}"
            )
        self.bucket, prefix = found[1], (found[2] or "").rstrip("/")
        self._prefix = check_path(uri, prefix) + "/" if prefix else ""
        self.uri = f"s3://{self.bucket}/{prefix}".rstrip("/")
        self.endpoint_url, self.server_copy = endpoint_url, server_copy
        self.traffic = Traffic()
        self._api = Api(self.bucket, endpoint_url, self.traffic)

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str, str | None, bool]]:
        """Clients and counters belong to the process."""
        return (S3Store, (self.uri, self.endpoint_url, self.server_copy))

    def __repr__(self) -> str:
        """As it is typed."""
        return f"S3Store({self.uri!r}, {self.endpoint_url!r}, {self.server_copy!r})"

    def get(self, key: str) -> bytes:
        """See Store.get. Raises: ShardCorruptError if the bytes differ from the checksum that the
        server keeps for them."""
        full = self._full(key)
        for _ in range(READ_ATTEMPTS):
            data, checksum = self._api.call(
                "get_object", full, read=lambda reply: (body_of(reply), full_checksum(reply))
            )
            self.traffic.add(bytes_read=len(data))
            found = sha256_base64(data) if checksum else None
            if found == checksum:
                return data
        raise ShardCorruptError(
            f"s3://{self.bucket}/{full}: stored SHA-256 is {checksum}, that of the bytes read"
            f" {found} (base64)"
        )

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """See Store.get_range. One request; two for an empty range and for one that is refused."""
        full = self._full(key)
        if start >= 0 and num_bytes > 0:
            with suppress(ExpectedError):
                data, size_bytes = self._api.call(
                    "get_object",
                    full,
                    Range=f"bytes={start}-{start + num_bytes - 1}",
                    read=partial(ranged_body, start),
                    expected=frozenset({"InvalidRange", "416"}),
                )
                self.traffic.add(bytes_read=len(data))
                check_range(key, start, num_bytes, size_bytes)
                return data
        check_range(key, start, num_bytes, self._existing(full)["ContentLength"])
        if num_bytes:
            raise TransientStoreError(
                f"s3://{self.bucket}/{full} was replaced while {num_bytes} bytes from byte {start}"
                " on were asked for"
            )
        return b""

    def head(self, key: str) -> ObjectInfo | None:
        """See Store.head. A bucket that does not exist reads as None: HEAD answers have no body
        that could tell."""
        reply = self._head(self._full(key))
        if reply is None:
            return None
        checksum = full_checksum(reply)
        return ObjectInfo(
            key, reply["ContentLength"], base64.b64decode(checksum).hex() if checksum else None
        )

    def identity(self, key: str) -> str | None:
        """SHA-256 where the server keeps that of the whole object, else the ETag.

        Raises: ObjectMissingError.
        """
        held = self.head(key)
        return held.sha256 if held and held.sha256 else self.copy_source(key).etag.strip('"')

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store.list. Names that are no keys are left out, such as the folder markers ("a/")
        that bucket browsers make.

        Cost: one request per 1,000 objects, and all of them in memory: some servers list by folder,
            which is another order than by key.
        """
        found: dict[str, ObjectInfo] = {}
        position: dict[str, Any] = {}
        full = self._prefix + check_prefix(prefix)
        while True:
            page = self._api.call(
                "list_objects_v2",
                None,
                Prefix=full,
                MaxKeys=LIST_PAGE,
                read=with_member("IsTruncated"),
                **position,
            )
            for entry in page.get("Contents", []):
                key = entry["Key"].removeprefix(self._prefix)
                if is_key(key):
                    found[key] = ObjectInfo(key, entry["Size"])
            if not page.get("IsTruncated"):
                return iter(sorted(found.values(), key=lambda info: info.key.encode()))
            position = {"ContinuationToken": page["NextContinuationToken"]}

    def put(self, key: str, data: bytes) -> None:
        """See Store.put."""
        self._write(self._full(key), data, is_conditional=False)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See Store.put_if_absent.

        If the reply to the first try is lost, the server answers the next one with "there is one
        already", of our own making. Each call marks its object with an id of its own, so one look
        tells who wrote it. Raises: TransientStoreError if no try was answered; whether the object
        was written is then unknown, and a later call says False though it may be of this caller:
        its contents must tell.
        """
        full = self._full(key)
        if len(data) > PUT_MAX_BYTES and self._head(full) is not None:
            return False
        return self._write(full, data, is_conditional=True)

    def write_once(self, key: str, buffers: Buffers) -> Written:
        """See Store.write_once. Where there is an object already the bytes are hashed and nothing
        is uploaded.

        Up to ONCE_PUT_MAX_BYTES the object is one request, and `head` tells its SHA-256. A larger
        one travels in parts while it is hashed: S3 then keeps SHA-256 of the parts only, so `head`
        says None and the digest returned here is the one to be recorded.
        Cost: memory for the whole object, or for five parts of 16 MiB (more beyond 160 GB, where
            parts grow).
        Raises: TransientStoreError as `put_if_absent` does.
        """
        full, hashing = self._full(key), Hashing(buffers)
        if self._head(full) is not None:
            for _ in hashing:
                pass
            return hashing.written(is_ours=False)
        if buffers.size_bytes <= ONCE_PUT_MAX_BYTES:
            held = BytesIO()
            for chunk in hashing:
                held.write(chunk)
            return hashing.written(is_ours=self._write(full, held.getvalue(), is_conditional=True))
        with MultipartUpload(self._api, full, uuid.uuid4().hex) as upload:
            upload.add_chunks(hashing, part_size(buffers.size_bytes))
            return hashing.written(is_ours=upload.complete(is_conditional=True))

    def compose(self, key: str, pieces: Iterable[Piece]) -> int:
        """See Store.compose. Ranges of stores at the same endpoint are copied by the server
        (`multipart` says which).

        Cost: memory for about eight parts of 16 MiB (of 64 where the server does not copy).
            Traffic: 5 MiB or less per break between sources.
        """
        full, writer = self._full(key), uuid.uuid4().hex
        sources: dict[tuple[str, str], CopySource] = {}

        def copy_source(piece: ByteRange) -> CopySource | None:
            store = piece.store
            if not isinstance(store, S3Store) or store.endpoint_url != self.endpoint_url:
                return None
            name = (store.bucket, store._full(piece.key))
            if name not in sources:
                sources[name] = store.copy_source(piece.key)
            check_range(piece.key, piece.start, piece.num_bytes, sources[name].size_bytes)
            return sources[name]

        with Composer(
            self._api, full, writer, copy_source, is_streaming=not self.server_copy
        ) as composer:
            for piece in merged_ranges(resolved(piece) for piece in pieces):
                composer.add(piece)
            small = composer.finish()
        if small is not None:
            self._write(full, small, is_conditional=False)
            return len(small)
        reply = self._existing(full)
        if (
            reply["ContentLength"] != composer.num_bytes
            and reply.get("Metadata", {}).get(WRITER, writer) == writer
        ):
            raise ShardCorruptError(
                f"s3://{self.bucket}/{full}: composed {composer.num_bytes} bytes, the server holds"
                f" {reply['ContentLength']}"
            )
        return composer.num_bytes

    def upload(self, key: str) -> MultipartUpload:
        """A multipart upload to be filled part by part, as a context. For probing; `put` and
        `compose` choose the parts themselves."""
        return MultipartUpload(self._api, self._full(key), uuid.uuid4().hex)

    def copy_source(self, key: str) -> CopySource:
        """An object as other stores at this endpoint may copy from it. Raises:
        ObjectMissingError."""
        full = self._full(key)
        reply = self._existing(full)
        return CopySource(self.bucket, full, reply["ContentLength"], reply["ETag"])

    def delete(self, key: str) -> None:
        """See Store.delete."""
        with suppress(ExpectedError):
            self._api.call("delete_object", self._full(key), expected=ABSENT)

    def sweep(self, older_than_s: float, prefix: str = "") -> int:
        """See Store.sweep. What is left behind are unfinished multipart uploads, whose parts are
        stored and paid for."""
        full = self._prefix + check_prefix(prefix)
        position: dict[str, Any] = {}
        num_removed = 0
        while True:
            page = self._api.call(
                "list_multipart_uploads",
                None,
                Prefix=full,
                read=with_member("IsTruncated"),
                **position,
            )
            oldest_kept = server_time(page) - timedelta(seconds=older_than_s)
            for upload in page.get("Uploads", []):
                if upload["Key"].startswith(full) and upload["Initiated"] < oldest_kept:
                    with suppress(ExpectedError):
                        expected = frozenset({"NoSuchUpload", "404"})
                        self._api.call(
                            "abort_multipart_upload",
                            upload["Key"],
                            UploadId=upload["UploadId"],
                            expected=expected,
                        )
                        num_removed += 1
            if not page.get("IsTruncated"):
                return num_removed
            position = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page.get("NextUploadIdMarker", ""),
            }

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _head(self, full: str) -> Any:
        try:
            return self._api.call(
                "head_object",
                full,
                expected=ABSENT,
                read=with_member("ContentLength"),
                ChecksumMode="ENABLED",
            )
        except ExpectedError:
            return None

    def _existing(self, full: str) -> Any:
        """The reply to a HEAD. Raises: ObjectMissingError."""
        return self._api.call(
            "head_object", full, read=with_member("ContentLength"), ChecksumMode="ENABLED"
        )

    def _write(self, full: str, data: bytes, *, is_conditional: bool) -> bool:
        """Returns: False if the write is conditional and another writer's object is there."""
        writer = uuid.uuid4().hex
        if len(data) > PUT_MAX_BYTES:
            view, part_bytes = memoryview(data), part_size(len(data))
            with MultipartUpload(self._api, full, writer) as upload:
                for start in range(0, len(data), part_bytes):
                    upload.add_bytes(view[start : start + part_bytes])
                return upload.complete(is_conditional=is_conditional)
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if is_conditional else {}
        try:
            self._api.call(
                "put_object",
                full,
                Body=data,
                Metadata={WRITER: writer},
                expected=EXISTS,
                **checksum_fields(data),
                **condition,
            )
        except ExpectedError as error:
            is_ours = is_written_by(self._api, full, writer)
            if is_ours is None:
                raise TransientStoreError(
                    f"s3://{self.bucket}/{full}: there was an object ({error}), now there is none"
                ) from error
            return is_ours
        return True
