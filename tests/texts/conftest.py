"""Where texts may lie."""

from tests.servers.read_hub import hub

__all__ = ["hub"]
