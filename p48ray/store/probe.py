"""What a store can do, tried out rather than believed: servers that speak S3 differ in just the
operations that a run rests on."""

import hashlib
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from p48ray.errors import ConfigError, P48Error, TransientStoreError, UserError
from p48ray.store.base import Store
from p48ray.store.s3.multipart import MIN_PART_BYTES
from p48ray.store.s3.store import S3Store
from p48ray.store.view import SubStore, located

PROBE_FOLDER = "probe"
NUM_RACERS = 8
NUM_BYTES = 2 * MIN_PART_BYTES + 2**20
"""Of the scratch object: a range is copied from an object over 5 MB only, and parts but the last
have 5 MiB."""
NEEDED = (
    "a run needs writes that succeed only if the key is free (PutObject with If-None-Match: *),"
    " because the first manifest must win"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a store was seen to do. A conditional put is not among them: without it there is no
    run."""

    range_copy: bool
    """Byte ranges of objects are copied on the store's side."""
    unequal_parts: bool
    """An object may be made of parts of different sizes."""
    checksums: bool
    """SHA-256 of an object is kept and told by `head`."""

    @property
    def server_copy(self) -> bool:
        """What S3Store's argument of this name should be."""
        return self.range_copy and self.unequal_parts


def probe(store: Store) -> Capabilities:
    """Tries the store out under `probe/<random>/`, and cleans up.

    Cost: about 35 requests, 22 MiB written and 16 MiB read for S3, nothing to speak of elsewhere.
    Raises: ConfigError if the store cannot be written, or lets a second writer replace the first;
        what the store raises when out of reach.
    """
    scratch = SubStore(store, f"{PROBE_FOLDER}/{uuid.uuid4().hex}/")
    try:
        _check_conditional_put(scratch)
        held = scratch.head("manifest")
        checksums = held is not None and held.sha256 == hashlib.sha256(b"first").hexdigest()
        behind, source = located(scratch, "source")
        folder = source.removesuffix("source")
        if not isinstance(behind, S3Store):
            return Capabilities(range_copy=True, unequal_parts=True, checksums=checksums)
        data = b"0123456789abcdef" * (NUM_BYTES // 16)
        behind.put(f"{folder}source", data)
        return Capabilities(
            range_copy=_joins(behind, f"{folder}copied", data, is_copied=True),
            unequal_parts=_joins(behind, f"{folder}unequal", data, is_copied=False),
            checksums=checksums,
        )
    finally:
        for info in list(scratch.list()):
            scratch.delete(info.key)


def _check_conditional_put(scratch: SubStore) -> None:
    """One writer after another, then several at once: some servers look first and write later."""
    try:
        is_first = scratch.put_if_absent("manifest", b"first")
        is_second = scratch.put_if_absent("manifest", b"second")
        with ThreadPoolExecutor(NUM_RACERS) as racers:
            won = list(
                racers.map(
                    lambda number: scratch.put_if_absent("race", b"%d" % number), range(NUM_RACERS)
                )
            )
    except (UserError, TransientStoreError):
        raise
    except P48Error as error:
        raise ConfigError(f"{scratch.uri}: {NEEDED}; this store refuses it: {error}") from error
    if (is_first, is_second, scratch.get("manifest")) != (True, False, b"first"):
        raise ConfigError(
            f"{scratch.uri}: {NEEDED}; this store let the second writer of a key replace the first"
        )
    if sum(won) != 1:
        raise ConfigError(
            f"{scratch.uri}: {NEEDED}; of {NUM_RACERS} writers at once {sum(won)} were told that"
            " they were first"
        )


def _joins(store: S3Store, key: str, data: bytes, *, is_copied: bool) -> bool:
    """Whether an upload of the parts that are asked for is accepted and reads as it should."""
    try:
        with store.upload(key) as upload:
            if is_copied:
                upload.add_copy(
                    store.copy_source(key.rpartition("/")[0] + "/source"), 1, MIN_PART_BYTES + 1
                )
                expected = data[1 : MIN_PART_BYTES + 2]
            else:
                upload.add_bytes(data[: MIN_PART_BYTES + 1])
                upload.add_bytes(data[MIN_PART_BYTES + 1 : -1])
                expected = data[:-1]
            upload.add_bytes(b"end")
            upload.complete()
        return store.get(key) == expected + b"end"
    except (UserError, TransientStoreError):
        raise
    except P48Error as error:
        log.info(
            "%s: %s is not possible: %s",
            store.uri,
            "copying ranges" if is_copied else "joining unequal parts",
            error,
        )
        return False
