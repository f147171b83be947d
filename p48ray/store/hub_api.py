"""Questions to the Hugging Face Hub through huggingface_hub, with one policy for errors: what is asked again, and what is the user's to mend.

huggingface_hub is imported when a question is asked and not before: it takes a third of a second, and most runs never ask.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from p48ray.errors import ConfigError, ObjectMissingError, P48Error, TransientStoreError

MAX_ATTEMPTS = 8
BACKOFF_BASE_S = 0.5
BACKOFF_MAX_S = 60.0
"""Attempt n waits up to base * 2^n seconds, uniformly drawn, unless the Hub says how long to wait."""
RATE_LIMIT_MAX_S = 330.0
"""The Hub counts requests in windows of five minutes; an answer that asks for more patience than this is not believed."""
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
"""Silence on a connection, not the length of a transfer."""

log = logging.getLogger(__name__)

T = TypeVar("T")


def failures() -> tuple[type[Exception], ...]:
    """All that huggingface_hub and its client raise for an answer that they do not like, and what this module makes of it."""
    import httpx2

    return (httpx2.HTTPError, OSError, ValueError, RuntimeError, P48Error)


def ask(what: str, call: Callable[[], T], count_retry: Callable[[], None] = lambda: None) -> T:
    """A call that may be repeated, until the Hub answers.

    Raises: what `translated` makes of the error: TransientStoreError when the attempts are used up.
    """
    kinds = failures()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return call()
        except kinds as error:
            found = error if isinstance(error, P48Error) else translated(what, error)
            if attempt == MAX_ATTEMPTS or not isinstance(found, TransientStoreError):
                raise found from None  # its cause's text may hold a presigned address
            pause(found, error, attempt)
            count_retry()
    raise AssertionError


def pause(found: P48Error, error: BaseException, attempt: int) -> None:
    """Wait before the next attempt: as long as a rate limit says, else longer each time."""
    wait_s = told_wait_s(error)
    if wait_s is None:
        wait_s = random.uniform(0.0, min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2**attempt))
    log.warning("%s; attempt %d of %d, the next in %.1f s", found, attempt, MAX_ATTEMPTS, wait_s)
    time.sleep(wait_s)


def told_wait_s(error: BaseException) -> float | None:
    """Seconds after which a rate-limited question may be asked again, from Retry-After or RateLimit ("resolvers";r=0;t=42)."""
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    told = headers.get("retry-after")
    if told is None:
        told = next((p.strip()[2:] for p in headers.get("ratelimit", "").split(";") if p.strip().startswith("t=")), None)
    try:
        return min(RATE_LIMIT_MAX_S, max(0.0, float(told))) if told is not None else None
    except ValueError:
        return None  # a date, which the Hub does not send


def translated(what: str, error: BaseException) -> P48Error:
    """An error of huggingface_hub as one of ours: the user's, one that a retry may cure, or neither. No address is in it."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConfigError(f"{what}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it, or use a local copy")
    if isinstance(error, errors.HfHubHTTPError):
        return of_status(what, error)
    if isinstance(error, httpx2.TransportError):
        return TransientStoreError(f"{what}: {type(error).__name__}: {error}")
    return P48Error(f"{what}: {type(error).__name__}: {error}")


def of_status(what: str, error: Any) -> P48Error:
    """What an answer with a status of 400 or more means."""
    from huggingface_hub import errors

    status = error.response.status_code
    said = error.response.headers.get("x-error-message", "")
    tail = f"{status}{f', {said}' if said else ''}"
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(
            f"{what}: the repository is gated ({tail}); accept its terms on its page and set HF_TOKEN to that account's token"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return ObjectMissingError(f"{what}: no such file at that revision ({tail})")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{what}: the repository has no such branch, tag or commit ({tail})")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(
            f"{what}: no such repository, or one that this token may not read ({tail}); check its name, and HF_TOKEN if it is private"
        )
    if status in (401, 403):
        return ConfigError(f"{what}: the Hub refuses access ({tail}); check HF_TOKEN, or log in with `hf auth login`")
    if status == 429:
        return TransientStoreError(f"{what}: the Hub's rate limit is reached ({tail}); a token (HF_TOKEN) has a higher one")
    if status == 404:
        return ObjectMissingError(f"{what}: not found ({tail})")
    if status in (408, 409) or status >= 500:
        return TransientStoreError(f"{what}: the Hub answered {tail}")
    return P48Error(f"{what}: the Hub answered {tail}")


@contextmanager
def response(url: str, token: str | None, first: int, last: int | None) -> Iterator[Any]:
    """A GET of the bytes from `first` to `last` (inclusive; None: the end), redirects followed; its body is not read yet.

    Raises: HfHubHTTPError for a status of 400 and above, and whatever the transport raises.
    """
    import httpx2
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    from p48ray import __version__

    headers = build_hf_headers(token=token or False, library_name="p48ray", library_version=__version__)
    headers |= {"Accept-Encoding": "identity"}
    if first or last is not None:
        headers["Range"] = f"bytes={first}-{'' if last is None else last}"
    timeout = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as reply:
        hf_raise_for_status(reply)
        yield reply
