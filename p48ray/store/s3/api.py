"""One S3 bucket through boto3, with one policy for errors: what is retried, what is the user's to
mend, and what is simply missing.

boto3's own retries are off: what is worth another attempt is listed here, how often and after which
wait is retry.S3, and that is the bound. A client is made at first use in each process: clients may
be shared by threads, but neither pickled nor carried across a fork.
"""

import os
import threading
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from typing import Any, NoReturn

import boto3
import botocore.session
import urllib3
from botocore import exceptions as boto
from botocore.config import Config
from botocore.parsers import ResponseParserError

from p48ray.errors import ConfigError, ObjectMissingError, P48Error, TransientStoreError
from p48ray.store import retry
from p48ray.store.base import Traffic
from p48ray.store.retry import CONNECT_TIMEOUT_S

S3_READ_TIMEOUT_S = 120.0
"""Silence on a connection, not the length of a transfer: a copied part of 256 MiB is answered well
within it."""
MAX_CONNECTIONS = 32

RETRIABLE_CODES = frozenset({
    "500", "502", "503", "504", "429", "409", "408", "InternalError", "InternalServerError",
    "ServiceUnavailable", "SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling",
    "ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded",
    "RequestTimeout", "RequestTimeoutException", "ConditionalRequestConflict", "OperationAborted",
    "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
})  # fmt: skip
"""Trouble of the server or the way to it. The last three are a body cut or changed while it was
sent, which the server noticed."""
RETRIABLE_ERRORS = (
    boto.ConnectionError,
    boto.HTTPClientError,  # resets, timeouts and bodies cut while they are read
    boto.IncompleteReadError,
    boto.CredentialRetrievalError,
    # the body of a refusal cut while botocore reads it, which it does not translate
    urllib3.exceptions.HTTPError,
    ResponseParserError,  # an answer cut short is no longer XML
    ConnectionError,
    TimeoutError,
)
USER_CODES = frozenset({
    "401", "403", "301", "400", "NoSuchBucket", "InvalidBucketName", "AccessDenied",
    "AllAccessDisabled", "AccountProblem", "InvalidAccessKeyId", "SignatureDoesNotMatch",
    "InvalidToken", "ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed",
    "AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException",
    "InvalidSecurity", "NotSignedUp", "UnauthorizedAccess",
})  # fmt: skip
"""No retry mends these. A bare 400 is what a HEAD says for an expired token or a wrong region, its
only forms here."""
USER_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
    boto.ConfigNotFound,
    boto.ConfigParseError,
    boto.SSOError,
    boto.TokenRetrievalError,
    boto.InvalidRegionError,
)


class ExpectedError(Exception):
    """An answer that the caller asked to hear about. Never leaves the store."""


class Api:
    """Calls on one bucket. Holds what is needed to make a client, and the clients, one per
    process."""

    def __init__(self, bucket: str, endpoint_url: str | None, traffic: Traffic) -> None:
        self.bucket, self.endpoint_url, self.traffic = bucket, endpoint_url, traffic
        self._clients: dict[int, Any] = {}

    def call(
        self,
        operation: str,
        key: str | None,
        *,
        expected: frozenset[str] = frozenset(),
        read: Callable[[Any], Any] | None = None,
        **params: Any,
    ) -> Any:
        """One S3 operation, tried again as retry.S3 says.

        Args:
            operation: its name in boto3.
            key: None for operations on the bucket.
            expected: codes that are answers to this caller.
            read: turns the reply into the result inside the retried part, for bodies that may be
                cut.
            params: as boto3 takes them.
        Raises: ExpectedError; ObjectMissingError; ConfigError for what the user must mend;
            TransientStoreError when the attempts are used up.
        """
        what = f"{operation} of s3://{self.bucket}/{key or params.get('Prefix', '')}"
        named = params if key is None else params | {"Key": key}

        def attempt() -> Any:
            self.traffic.add(requests=1, bytes_written=len(params.get("Body", b"")))
            try:
                reply = getattr(self._client(), operation)(Bucket=self.bucket, **named)
                return reply if read is None else read(reply)
            except boto.ClientError as error:
                self._raise_refusal(error, what, expected)
            except USER_ERRORS as error:
                raise ConfigError(f"{what}: {error}; {self._advice()}") from error
            except RETRIABLE_ERRORS as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise ConfigError(
                        f"{what}: {error}; check the endpoint and the certificates that"
                        " AWS_CA_BUNDLE names"
                    ) from error
                raise TransientStoreError(f"{what}: {type(error).__name__}: {error}") from error
            # botocore raises ValueError for an endpoint that is no url
            except (boto.BotoCoreError, ValueError) as error:
                raise P48Error(f"{what}: {type(error).__name__}: {error}") from error

        return retry.call(retry.S3, attempt, partial(self.traffic.add, retries=1))

    def _raise_refusal(self, error: Any, what: str, expected: frozenset[str]) -> NoReturn:
        """Sorts an answer of the server by its code, or by its status where the body named none
        (HEAD has no body)."""
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        code = str(error.response.get("Error", {}).get("Code", "")) or status
        if code in expected:
            raise ExpectedError(code) from error
        if code in RETRIABLE_CODES or (status in RETRIABLE_CODES and code not in USER_CODES):
            raise TransientStoreError(f"{what}: {type(error).__name__}: {error}") from error
        if code == "NoSuchKey" or (
            code == "404" and what.startswith(("get_object", "head_object"))
        ):
            raise ObjectMissingError(f"{what.partition(' of ')[2]}: no such object") from error
        if code in USER_CODES:
            raise ConfigError(
                f"{what} was refused: {code}, {error.response['Error'].get('Message', '')};"
                f" {self._advice()}"
            ) from error
        raise P48Error(f"{what}: {error}") from error

    def _advice(self) -> str:
        where = (
            f" at {self.endpoint_url}"
            if self.endpoint_url
            else " at AWS, as no endpoint url was given,"
        )
        return (
            f"check that bucket {self.bucket}{where} exists, that boto3's usual sources (AWS_*"
            " variables, profile, instance role) hold credentials and a region that are valid for"
            " it, and that they may read, list, write and delete there"
        )

    def _client(self) -> Any:
        """This process's client."""
        client = self._clients.get(os.getpid())
        if client is None:
            with _MAKING_CLIENT:
                client = self._clients.get(os.getpid())
                if client is None:
                    client = self._clients[os.getpid()] = _make_client(self.endpoint_url)
        return client


_MAKING_CLIENT = threading.Lock()
"""Making a client takes a tenth of a second of one core: twenty threads that need the first one
should make it once."""


def _renew_lock() -> None:
    """A child that was forked while the lock was held would wait for a thread that it does not
    have."""
    global _MAKING_CLIENT
    _MAKING_CLIENT = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _make_client(endpoint_url: str | None) -> Any:
    """A client from boto3's standard credential chain. Servers that are not AWS rarely answer to
    bucket.host names, so paths are used there."""
    core = botocore.session.Session()
    core.register_component("data_loader", _description_of_s3())
    client = boto3.session.Session(botocore_session=core).client(
        "s3",
        endpoint_url=endpoint_url,
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=S3_READ_TIMEOUT_S,
            max_pool_connections=MAX_CONNECTIONS,
            retries={"total_max_attempts": 1, "mode": "standard"},
            s3={"addressing_style": "path" if endpoint_url else "auto"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    client.meta.events.register("before-call.s3.GetObject", _ask_for_checksum)
    return client


@cache
def _description_of_s3() -> Any:
    """boto3's description of the service, read once a process: reading it again is four fifths of
    the time that a new client takes.

    The session itself is not shared, because it would keep the credentials that it found first.
    """
    return botocore.session.Session().get_component("data_loader")


def _ask_for_checksum(params: dict[str, Any], **_: Any) -> None:
    """Checked by S3Store itself: botocore's own check takes some servers' checksum of checksums for
    one of the bytes."""
    params["headers"]["x-amz-checksum-mode"] = "ENABLED"


def with_member(*path: str) -> Callable[[Any], Any]:
    """A check that a reply is not empty where it must not be: botocore reads no body as a body that
    says nothing."""

    def check(reply: Any) -> Any:
        found = reply
        for name in path:
            if name not in found:
                raise ResponseParserError(f"a reply without {'.'.join(path)}")
            found = found[name]
        return reply

    return check


def body_of(reply: Any) -> bytes:
    """The whole body of a GET. Raises: IncompleteReadError or HTTPClientError, both retriable, if
    it is cut."""
    with closing(reply["Body"]) as body:
        data: bytes = body.read()
    if len(data) != reply["ContentLength"]:
        raise boto.IncompleteReadError(
            actual_bytes=len(data), expected_bytes=reply["ContentLength"]
        )
    return data
