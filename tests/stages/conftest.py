"""The stores that the stages' tests reach."""

from tests.store.servers import aws_identity, seaweedfs

__all__ = ["aws_identity", "seaweedfs"]
