"""A Hub to read from."""

from tests.servers.read_hub import hub

__all__ = ["hub"]
