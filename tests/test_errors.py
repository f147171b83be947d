"""Errors cross process boundaries intact."""

import inspect
import pickle

import pytest

from p48ray import errors
from p48ray.errors import P48Error, UserError

CLASSES = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, P48Error)
]


def test_all_errors_are_found() -> None:
    assert {kind.__name__ for kind in CLASSES} >= {
        "ConfigError",
        "SourceError",
        "TransientStoreError",
        "VerificationError",
    }


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind: type[P48Error]) -> None:
    error = kind("units/L001: expected 3 bytes, found 2")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.args, str(copy)) == (error.args, str(error))


def test_mistakes_of_users_are_told_from_the_rest() -> None:
    users = {kind.__name__ for kind in CLASSES if issubclass(kind, UserError)}
    assert users == {
        "UserError",
        "ConfigError",
        "SourceError",
        "CalibrationError",
        "PlanMismatchError",
    }
