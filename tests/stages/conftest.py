"""The stores that the stages' tests reach, and a finished checkpoint in memory."""

import pytest

from tests.servers.s3 import aws_identity, seaweedfs
from tests.stages.damage import Folder
from tests.stages.small_run import SmallRun

__all__ = ["aws_identity", "seaweedfs"]


@pytest.fixture(scope="module")
def clean(finished: SmallRun) -> Folder:
    return Folder.read(finished.checkpoint)
