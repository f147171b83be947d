"""Policies: how often, after which waits, and what is said at the end. Nobody waits here."""

import logging
import pickle
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from p48ray.errors import ConfigError, GaveUpError, TransientStoreError
from p48ray.store import retry
from p48ray.store.retry import Policy, call

NAMED = {name: value for name, value in vars(retry).items() if isinstance(value, Policy)}


Waits = list[float]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited, in place of waiting."""
    found: list[float] = []
    monkeypatch.setattr(retry, "pause", found.append)
    return found


def failing(times: int, *told: float) -> tuple[Callable[[], str], list[int]]:
    """An attempt that fails so often, and the list that it counts its calls in."""
    calls: list[int] = []

    def attempt() -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise TransientStoreError("bucket b: 503", *told)
        return "done"

    return attempt, calls


def test_there_are_policies_for_buckets_the_hub_and_its_commits() -> None:
    assert set(NAMED) == {"S3", "HUB", "HUB_COMMIT"}


@pytest.mark.parametrize("name", NAMED)
def test_every_policy_ends_in_an_error_that_says_how_often(name: str, waits: Waits) -> None:
    policy = NAMED[name]
    attempt, calls = failing(99)
    with pytest.raises(GaveUpError, match=rf"^bucket b: 503 \(failed {policy.attempts} times\)$"):
        call(policy, attempt)
    assert len(calls) == policy.attempts and len(waits) == policy.attempts - 1
    assert all(0 <= wait <= policy.cap_s for wait in waits)


@pytest.mark.parametrize("name", NAMED)
def test_every_policy_succeeds_with_its_last_attempt(name: str, waits: Waits) -> None:
    policy = NAMED[name]
    attempt, calls = failing(policy.attempts - 1)
    assert call(policy, attempt) == "done" and len(calls) == policy.attempts


@pytest.mark.parametrize("name", NAMED)
def test_a_service_that_says_how_long_is_obeyed_up_to_the_cap(name: str, waits: Waits) -> None:
    policy = NAMED[name]
    call(policy, failing(1, 42.0)[0])
    call(policy, failing(1, 86_400.0)[0])
    if policy.told_cap_s is None:
        assert all(wait <= policy.cap_s for wait in waits)
    else:
        assert waits == [42.0, policy.told_cap_s]


def test_waits_grow_by_the_factor_up_to_the_cap(waits: Waits) -> None:
    policy = Policy(attempts=6, base_s=1.0, cap_s=60.0, factor=4.0, jitter=False)
    call(policy, failing(5)[0])
    assert waits == [1.0, 4.0, 16.0, 60.0, 60.0]
    waits.clear()
    call(replace(policy, factor=2.0, cap_s=5.0), failing(4)[0])
    assert waits == [1.0, 2.0, 4.0, 5.0]


def test_jitter_draws_from_all_of_a_wait(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: drawn.append((low, high)) or 0.25)
    call(Policy(attempts=4, base_s=1.0, cap_s=3.0), failing(3)[0])
    assert drawn == [(0, 1.0), (0, 2.0), (0, 3.0)] and waits == [0.25] * 3


def test_an_error_that_does_not_pass_is_raised_at_once(waits: Waits) -> None:
    def attempt() -> None:
        raise ConfigError("no such bucket")

    with pytest.raises(ConfigError, match="no such bucket"):
        call(retry.S3, attempt)
    assert not waits


def test_what_one_policy_gave_up_another_one_does_not_begin_anew(waits: Waits) -> None:
    attempt, calls = failing(99)
    with pytest.raises(GaveUpError, match=r"failed 8 times\)$"):
        call(retry.HUB_COMMIT, lambda: call(retry.HUB, attempt))
    assert len(calls) == 8


def test_each_wait_is_said_and_counted(waits: Waits, caplog: pytest.LogCaptureFixture) -> None:
    counted: list[int] = []
    with caplog.at_level(logging.WARNING, "p48ray"):
        call(retry.HUB, failing(2, 7.0)[0], lambda: counted.append(1))
    said = [f"bucket b: 503; attempt {n} of 8, the next in 7.0 s" for n in (1, 2)]
    assert [record.getMessage() for record in caplog.records] == said and len(counted) == 2


def test_errors_cross_a_process_with_what_they_say() -> None:
    error = pickle.loads(pickle.dumps(GaveUpError("the Hub answered 429 (failed 8 times)", 42.0)))
    assert isinstance(error, TransientStoreError)
    assert (str(error), error.retry_after_s) == ("the Hub answered 429 (failed 8 times)", 42.0)
    assert TransientStoreError("x").retry_after_s is None
