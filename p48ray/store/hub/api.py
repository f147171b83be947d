"""The one way to talk to the Hugging Face Hub, for whoever reads there and whoever publishes.

huggingface_hub's own calls, one translation of its errors, and retry.HUB for what may pass. It is
imported when a question is asked and not before: that takes a third of a second, and most runs
never ask. No message made here holds an address or a token: addresses of large files are signed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from p48ray.errors import ConfigError, ObjectMissingError, P48Error, TransientStoreError
from p48ray.store import retry
from p48ray.store.retry import CONNECT_TIMEOUT_S

HUB_READ_TIMEOUT_S = 60.0
"""Silence on a connection, not the length of a transfer."""
PASSING = frozenset({408, 409, 412, 429})
"""What another attempt may cure, beside 500 and above. 412: another commit came in between."""
WORDS_LIMIT = 500
"""Characters of what the Hub says in an answer."""

T = TypeVar("T")


def api(endpoint: str, token: str | None) -> Any:
    """huggingface_hub's client. Args: token: None for none, not for the one of this process."""
    from huggingface_hub import HfApi

    from p48ray import __version__

    return HfApi(
        endpoint=endpoint,
        token=token or False,
        library_name="p48ray",
        library_version=__version__,
    )


def failures() -> tuple[type[Exception], ...]:
    """All that huggingface_hub and its client raise for an answer that they do not like."""
    import httpx2

    return (httpx2.HTTPError, OSError, ValueError, RuntimeError)


def ask(what: str, call: Callable[[], T], on_retry: Callable[[], None] = retry.nothing) -> T:
    """A call that may be repeated, until the Hub answers. A wait that the Hub asks for is kept to.

    Args:   what: names the repository, for messages.
    Raises: what `translated` makes of the error; GaveUpError when retry.HUB's attempts are used up.
    """
    return retry.call(retry.HUB, lambda: once(what, call), on_retry)


def once(what: str, call: Callable[[], T]) -> T:
    """One attempt. Raises: what `translated` makes of the error; an error of ours as it is."""
    kinds = failures()
    try:
        return call()
    except kinds as error:
        raise translated(what, error) from None  # the text of the cause may hold a signed address


def translated(what: str, error: BaseException) -> P48Error:
    """An error of huggingface_hub as one of ours: the user's, one that may pass, or neither.

    It wraps some errors in others: what decides is the first in the chain of causes that is known.
    """
    import httpx2
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, errors.OfflineModeIsEnabled):
            advice = "unset it, or use a local copy"
            return ConfigError(f"{what}: HF_HUB_OFFLINE is set, so the Hub is not asked; {advice}")
        if isinstance(cause, errors.HfHubHTTPError):
            return of_status(what, cause)
        if isinstance(cause, httpx2.TransportError):
            return TransientStoreError(f"{what}: {type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return P48Error(f"{what}: {type(error).__name__}: {error}")


def of_status(what: str, error: Any) -> P48Error:
    """What an answer with a status of 400 or more means."""
    from huggingface_hub import errors

    status, tail = error.response.status_code, stated(error)
    if isinstance(error, errors.GatedRepoError):
        advice = "accept its terms on its page and set HF_TOKEN to that account's token"
        return ConfigError(f"{what}: the repository is gated ({tail}); {advice}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return ObjectMissingError(f"{what}: no such file at that revision ({tail})")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{what}: the repository has no such branch, tag or commit ({tail})")
    if isinstance(error, errors.RepositoryNotFoundError):
        found = "no such repository, or one that this token may not read"
        advice = "check its name, and HF_TOKEN if it is private"
        return ConfigError(f"{what}: {found} ({tail}); {advice}")
    if status in (401, 403):
        login = "HF_TOKEN, or the login file (`hf auth login`)"
        advice = f"check that {login}, holds a token that may do this"
        return ConfigError(f"{what}: the Hub refuses access ({tail}); {advice}")
    if status == 404:
        advice = "check the repository's name, and HF_ENDPOINT if it is set"
        return ConfigError(f"{what}: not found ({tail}); {advice}")
    if status == 429:
        advice = "a token (HF_TOKEN) has a higher one"
        text = f"{what}: the Hub's rate limit is reached ({tail}); {advice}"
        return TransientStoreError(text, told_wait_s(error))
    if status in PASSING or status >= 500:
        return TransientStoreError(f"{what}: the Hub answered {tail}", told_wait_s(error))
    return P48Error(f"{what}: the Hub answered {tail}")


def stated(error: Any) -> str:
    """Status, the Hub's own words, and the request's number, by which its support finds it.

    What is no JSON comes from behind a signed address, and may repeat the signature: left out.
    """
    headers = error.response.headers
    is_json = "json" in headers.get("content-type", "")
    said = (is_json and error.server_message) or headers.get("x-error-message", "")
    words = " ".join(said.split())[:WORDS_LIMIT]
    number = f"request {error.request_id}" if error.request_id else ""
    return ", ".join(filter(None, (str(error.response.status_code), words, number)))


def told_wait_s(error: Any) -> float | None:
    """Seconds after which the Hub wants to be asked again: Retry-After, or the t of a rate limit.

    A rate limit is told as ("resolvers";r=0;t=42).
    """
    headers: Mapping[str, str] = error.response.headers
    told = headers.get("retry-after")
    if told is None and error.response.status_code == 429:  # other answers just have it too
        parts = map(str.strip, headers.get("ratelimit", "").split(";"))
        told = next((part[2:] for part in parts if part.startswith("t=")), None)
    try:
        return None if told is None else max(0.0, float(told))
    except ValueError:
        return None  # a date, which the Hub does not send


@contextmanager
def response(url: str, token: str | None, first: int, last: int | None) -> Iterator[Any]:
    """A GET of some bytes of a file, redirects followed; its body is not read yet.

    Args:
        url: of the file.
        token: None to ask without one.
        first: byte, from 0 on.
        last: byte, inclusive; None for the end.
    Raises: HfHubHTTPError for a status of 400 and above (of a 404, that there is no such file), and
        whatever the transport raises.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    from p48ray import __version__

    headers = build_hf_headers(
        token=token or False, library_name="p48ray", library_version=__version__
    )
    headers |= {"Accept-Encoding": "identity"}
    if first or last is not None:
        headers["Range"] = f"bytes={first}-{'' if last is None else last}"
    timeout = httpx2.Timeout(HUB_READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with get_session().stream(
        "GET", url, headers=headers, timeout=timeout, follow_redirects=True
    ) as reply:
        try:
            hf_raise_for_status(reply)
        except HfHubHTTPError as error:
            if reply.status_code == 404 and type(error) is HfHubHTTPError:  # no reason is given
                raise RemoteEntryNotFoundError(str(error), response=reply) from None
            raise
        yield reply
