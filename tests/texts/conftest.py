"""Where texts may lie."""

from tests.servers.read_hub import hub
from tests.servers.s3 import aws_identity, moto_server, seaweedfs

__all__ = ["aws_identity", "hub", "moto_server", "seaweedfs"]
