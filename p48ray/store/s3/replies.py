"""What replies of an S3 server say, and whether they can be believed."""

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.exceptions import IncompleteReadError

from p48ray.errors import P48Error
from p48ray.store.base import (
    check_key,
)
from p48ray.store.s3.api import body_of


def is_key(key: str) -> bool:
    try:
        check_key(key)
    except P48Error:
        return False
    return True


def full_checksum(reply: Any) -> str | None:
    """The SHA-256 of all bytes, base64, if that is what the server keeps.

    An object of several parts (its ETag ends in their number) has a checksum of the parts'
    checksums, which not all servers mark as such.
    """
    is_of_parts = (
        bool(re.search(r'-\d+"?$', reply.get("ETag", "")))
        or reply.get("ChecksumType") == "COMPOSITE"
    )
    checksum: str | None = None if is_of_parts else reply.get("ChecksumSHA256")
    return checksum if checksum and "-" not in checksum else None


def ranged_body(start: int, reply: Any) -> tuple[bytes, int]:
    """The body of a GET of a range from `start` on, and the size of the whole object: the range
    ends early only where the object does.

    Refuses a server that sends the whole object, before reading it. Raises: IncompleteReadError if
    the body is not what its headers say.
    """
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", reply.get("ContentRange", ""))
    if not found or int(found[1]) != start:
        reply["Body"].close()
        message = (
            f"asked for bytes from {start} on, the server sent"
            f" {reply.get('ContentRange', 'the whole object')}: it does not do ranges"
        )
        raise P48Error(f"{message}, so it cannot hold a run root or a checkpoint")
    data, num_bytes = body_of(reply), int(found[2]) - start + 1
    if len(data) != num_bytes:
        raise IncompleteReadError(actual_bytes=len(data), expected_bytes=num_bytes)
    return data, int(found[3])


def server_time(reply: Any) -> datetime:
    """Of the reply, so that the clock of this machine does not matter."""
    date = reply["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date) if date else datetime.now(UTC)
