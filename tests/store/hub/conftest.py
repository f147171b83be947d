"""A Hub to read from."""

from tests.servers.hub import hub

__all__ = ["hub"]
