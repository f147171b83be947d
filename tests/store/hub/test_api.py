"""Whoever reads on the Hub and whoever publishes there: the same waits, the same words."""

import logging
from collections.abc import Callable

import httpx2
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from p48ray.errors import (
    ConfigError,
    GaveUpError,
    ObjectMissingError,
    P48Error,
    TransientStoreError,
)
from p48ray.finished.branch import Hub as Publisher
from p48ray.finished.branch import Target
from p48ray.store import HubStore, retry
from p48ray.store.hub import api as hub_api
from tests.servers.hub import MODEL, TOKEN, Fault, Hub, tiny_files

pytestmark = pytest.mark.server


def read(hub: Hub) -> object:
    return HubStore("hf://owner/tiny", hub.url, TOKEN).commit


def look_before_publishing(hub: Hub) -> object:
    return Publisher(Target(hub.url, "owner/tiny", "main"), TOKEN).state([])


def ask_whose_token(hub: Hub) -> object:
    return Publisher(Target(hub.url, "owner/tiny", "main"), TOKEN).check_access()


ASKING = [read, look_before_publishing, ask_whose_token]

Ask = Callable[[Hub], object]


@pytest.fixture
def waits(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    hub.commit(MODEL, tiny_files())
    found: list[float] = []
    monkeypatch.setattr(retry, "pause", found.append)
    return found


@pytest.mark.parametrize("ask", ASKING)
def test_a_rate_limit_is_waited_out_as_it_says_and_given_up_after_eight_tries(
    hub: Hub, waits: list[float], caplog: pytest.LogCaptureFixture, ask: Ask
) -> None:
    hub.faults += [Fault(".*", 429, {"Retry-After": "42"})] * 8
    caplog.set_level(logging.DEBUG, "p48ray")
    with pytest.raises(GaveUpError, match=r"owner/tiny.*rate limit") as caught:
        ask(hub)
    assert waits == [42.0] * 7 and not hub.faults
    assert str(caught.value).endswith("(failed 8 times)")
    assert TOKEN not in caplog.text + repr(caught.value)


@pytest.mark.parametrize("ask", ASKING)
def test_an_answer_after_a_rate_limit_is_taken(hub: Hub, waits: list[float], ask: Ask) -> None:
    hub.faults.append(Fault(".*", 429, {"Retry-After": "42"}))
    hub.faults.append(Fault(".*", 429, {"RateLimit": '"api";r=0;t=7'}))
    hub.faults.append(Fault(".*", 503, {"Retry-After": "9999"}))
    assert ask(hub)
    assert waits == [42.0, 7.0, 330.0]


@pytest.mark.parametrize("ask", ASKING)
def test_a_servers_error_waits_by_the_policy(hub: Hub, waits: list[float], ask: Ask) -> None:
    """The Hub sets RateLimit on every answer; only of a 429 is it the reason."""
    hub.faults.append(Fault(".*", 500, {"RateLimit": '"api";r=499;t=189'}))
    assert ask(hub)
    assert len(waits) == 1 and waits[0] <= retry.HUB.base_s


@pytest.mark.parametrize("ask", ASKING)
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "no such repository|the Hub refuses access .*HF_TOKEN"),
        (403, "the Hub refuses access .*HF_TOKEN"),
        (404, "not found .*check the repository's name"),
    ],
)
def test_what_is_refused_is_the_users_to_mend_and_names_the_repository(
    hub: Hub, waits: list[float], ask: Ask, status: int, words: str
) -> None:
    hub.faults.append(Fault(".*", status, {"X-Request-Id": "r-1"}))
    with pytest.raises(ConfigError, match=rf"owner/tiny.*({words})") as caught:
        ask(hub)
    said = str(caught.value)
    assert f"({status}, " in said and "request r-1)" in said
    assert ask is ask_whose_token or "a fault" in said  # of whoami, huggingface_hub hides it
    assert not waits and TOKEN not in said


def test_bytes_that_are_gone_are_a_missing_object_and_end_nothing_else(
    hub: Hub, waits: list[float]
) -> None:
    """A file that is listed, and whose bytes' server has no reason to give."""
    hub.faults.append(Fault("GET .*/config.json", 404))
    with pytest.raises(ObjectMissingError, match=r"owner/tiny@.*/config.json: no such file .*404"):
        HubStore("hf://owner/tiny", hub.url, TOKEN).get("config.json")
    assert not waits


def test_a_commit_waits_as_long_as_a_rate_limit_says(hub: Hub, waits: list[float]) -> None:
    publisher = Publisher(Target(hub.url, "owner/tiny", "main"), TOKEN)
    hub.faults += [Fault(".*", 429, {"Retry-After": "42"})] * 5
    with pytest.raises(GaveUpError, match=r"owner/tiny: commit: .*rate limit.*failed 5 times"):
        retry.call(retry.HUB_COMMIT, lambda: publisher.commit([], "0" * 40, "plan"))
    assert waits == [42.0] * 4


def test_errors_of_the_library_are_told_apart() -> None:
    assert type(hub_api.translated("x", ValueError("malformed"))) is P48Error
    wrapped = RuntimeError("Error while uploading")
    wrapped.__cause__ = httpx2.ReadTimeout("slow")
    assert isinstance(hub_api.translated("x", wrapped), TransientStoreError)
    assert isinstance(hub_api.translated("x", OfflineModeIsEnabled("no")), ConfigError)


def test_what_a_server_behind_a_signed_address_says_is_not_repeated() -> None:
    """It may be the address, or the signature."""
    request = httpx2.Request("GET", "https://objects/x?Signature=secret")
    text = "<Error><SignatureProvided>secret</SignatureProvided></Error>"
    response = httpx2.Response(403, text=text, request=request)
    with pytest.raises(ConfigError) as caught:
        from huggingface_hub.utils import hf_raise_for_status

        hub_api.once("owner/tiny", lambda: hf_raise_for_status(response))
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None
