"""How often an outside service is asked again, after which waits: one helper, every policy by name.

    attempt 1 ─▶ wait up to base ─▶ attempt 2 ─▶ wait up to 2 base ─▶ ... attempt n ─▶ GaveUpError
                 (or as long as the service itself says, where the policy takes its word)

An attempt says by its error whether another one is worth it: TransientStoreError, and nothing else.
Only GaveUpError is not tried again, though it is one: its attempts are used up, and no policy
around it begins anew. Loops that wait for a condition (a server that starts, a process that ends)
and the runners' attempts at a task are another thing, and not here.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_exponential, wait_random_exponential

from p48ray.errors import GaveUpError, TransientStoreError

log = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
"""Of every outside service; how long an answer may take is each client's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """After attempt n the wait is base * factor^(n - 1) seconds, at most cap.

    attempts: in all, the first one included.
    jitter: the wait is drawn evenly from 0 up to that: many clients do not come back at once.
    told_cap_s: a service that says how long to wait (Retry-After) is obeyed, up to so many seconds;
    None: never.
    """

    attempts: int
    base_s: float
    cap_s: float
    factor: float = 2.0
    jitter: bool = True
    told_cap_s: float | None = None

    def wait_s(self, state: RetryCallState) -> float:
        """Seconds before the next attempt, after the one that `state` is of."""
        told_s = transient_error(state).retry_after_s
        if told_s is not None and self.told_cap_s is not None:
            return min(self.told_cap_s, max(0.0, told_s))
        kind = wait_random_exponential if self.jitter else wait_exponential
        return kind(multiplier=self.base_s, max=self.cap_s, exp_base=self.factor)(state)


S3 = Policy(attempts=10, base_s=0.2, cap_s=20.0)
"""A request to a bucket. An outage of half a minute is survived on average."""
HUB = Policy(attempts=8, base_s=1.0, cap_s=60.0, told_cap_s=330.0)
"""A question to the Hub. It counts requests in windows of five minutes: more is not believed."""
HUB_COMMIT = Policy(attempts=5, base_s=1.0, cap_s=60.0, factor=4.0, jitter=False, told_cap_s=330.0)
"""A commit on the Hub. A gateway gives up on one that may yet be made: it gets time, then one
looks."""


def nothing() -> None:
    """No account of retries is kept."""


def call(policy: Policy, attempt: Callable[[], T], on_retry: Callable[[], None] = nothing) -> T:
    """What `attempt` returns, once it does.

    Args:   attempt: may be called again. on_retry: called once for each attempt but the first.
    Raises: GaveUpError, a TransientStoreError that says how often it was tried; any other error of
            `attempt` at once.
    """

    def before_wait(state: RetryCallState) -> None:
        number, wait_s = state.attempt_number, state.upcoming_sleep
        said = "%s; attempt %d of %d, the next in %.1f s"
        log.warning(said, transient_error(state), number, policy.attempts, wait_s)
        on_retry()

    def give_up(state: RetryCallState) -> NoReturn:
        last = transient_error(state)
        text = f"{last} (failed {policy.attempts} times)"
        raise GaveUpError(text, last.retry_after_s) from last.__cause__

    retrying = Retrying(
        stop=stop_after_attempt(policy.attempts),
        wait=policy.wait_s,
        retry=retry_if_exception(may_pass),
        before_sleep=before_wait,
        sleep=pause,
        retry_error_callback=give_up,
    )
    return retrying(attempt)


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may cure it."""
    return isinstance(error, TransientStoreError) and not isinstance(error, GaveUpError)


def transient_error(state: RetryCallState) -> TransientStoreError:
    """The error of an attempt that is worth another one."""
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, TransientStoreError), error
    return error


def pause(seconds: float) -> None:
    """Every wait of every policy passes here."""
    time.sleep(seconds)
