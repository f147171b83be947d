"""A Ray for the actors that hold servers."""

from tests.runner.conftest import ray_session

__all__ = ["ray_session"]
