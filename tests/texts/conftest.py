"""Where texts may lie: a Hub, and a bucket."""

from tests.servers.hub import hub
from tests.servers.s3 import aws_identity, moto_server

__all__ = ["aws_identity", "hub", "moto_server"]
