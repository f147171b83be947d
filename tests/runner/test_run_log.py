"""The log in the run root: when it is written, and that a bucket gets one object a driver."""

import logging
from collections.abc import Iterator

import pytest

from p48ray.run import run_root
from p48ray.runner import run_log
from p48ray.runner.run_log import RunLog
from p48ray.store.memory import MemoryStore
from tests.chaos.harness import wait_until


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """As a command configures it."""
    logger = logging.getLogger("p48ray")
    held = logger.level
    logger.setLevel(logging.INFO)
    yield logging.getLogger("p48ray.progress")
    logger.setLevel(held)


def test_nothing_is_written_before_the_run_has_begun(log: logging.Logger) -> None:
    store = MemoryStore("log-never")
    with RunLog(store):
        log.info("found a mistake")
    assert list(store.list()) == []


def test_lines_are_written_while_the_run_goes_on_and_at_its_end(
    log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "WRITE_INTERVAL_S", 0.01)
    store = MemoryStore("log-intervals")
    with RunLog(store) as book:
        log.info("before")
        book.begin()
        log.info("one")
        assert wait_until(lambda: [i.key for i in store.list()] == [book.key], timeout_s=20)
        assert wait_until(lambda: b"one\n" in store.get(book.key), timeout_s=20)
        log.warning("two")
        assert wait_until(lambda: b"two\n" in store.get(book.key), timeout_s=20)
    assert [info.key for info in store.list()] == [book.key]
    assert book.key.startswith(run_root.LOGS)
    said = [line[9:] for line in store.get(book.key).decode().splitlines()]
    assert said == ["before", "one", "WARNING: two"]


def test_run_that_fails_leaves_why(log: logging.Logger) -> None:
    store = MemoryStore("log-failed")
    with pytest.raises(KeyError), RunLog(store) as book:
        book.begin()
        log.info("one")
        raise KeyError("a task")
    assert b"ended by KeyError: 'a task'\n" in store.get(book.key)
    log.info("later")
    assert b"later" not in store.get(book.key)
