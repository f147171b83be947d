"""The servers, for every test of this folder."""

from tests.servers.s3 import aws_identity, moto_server, seaweedfs

__all__ = ["aws_identity", "moto_server", "seaweedfs"]
