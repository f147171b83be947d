"""Garbage is not collected inside, and is again after."""

import gc

import pytest

from p48ray.collection import nothing_collected


def test_collector_is_off_inside_and_as_it_was_after() -> None:
    assert gc.isenabled()
    with nothing_collected():
        assert not gc.isenabled()
        with nothing_collected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_error_leaves_the_collector_on() -> None:
    with pytest.raises(KeyError), nothing_collected():
        raise KeyError
    assert gc.isenabled()
