"""The stores that the stages' tests reach."""

from tests.servers.s3 import aws_identity, seaweedfs

__all__ = ["aws_identity", "seaweedfs"]
