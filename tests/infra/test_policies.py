"""iam-policy.json and lifecycle.json: the shape that AWS takes, and no right beyond the two
prefixes."""

import ast
import json
import re
from typing import Any

import botocore.session
import pytest
from botocore import xform_name
from botocore.validate import ParamValidator

from p48ray.run import run_root
from tests.conftest import REPO
from tests.infra.conftest import INFRA

# IAM's action -> the operations of S3's API that it allows, for every action that the policy may
# have. (IAM's names are not the API's.)
OPERATIONS = {
    "s3:GetObject": {"GetObject", "HeadObject"},
    "s3:PutObject": {
        "PutObject",
        "CreateMultipartUpload",
        "UploadPart",
        "UploadPartCopy",
        "CompleteMultipartUpload",
        "CopyObject",
    },
    "s3:DeleteObject": {"DeleteObject", "DeleteObjects"},
    "s3:AbortMultipartUpload": {"AbortMultipartUpload"},
    "s3:ListMultipartUploadParts": {"ListParts"},
    "s3:ListBucket": {"ListObjectsV2", "HeadBucket"},
    "s3:ListBucketMultipartUploads": {"ListMultipartUploads"},
}
RUN, SOURCE = "REPLACE-RUN-BUCKET/REPLACE-RUN-PREFIX", "REPLACE-SOURCE-BUCKET/REPLACE-SOURCE-PREFIX"
# that a run may be left alone before it is resumed, with what it had captured
LONGEST_PAUSE_DAYS = 14


@pytest.fixture(scope="module")
def s3() -> Any:
    return botocore.session.get_session().get_service_model("s3")


@pytest.fixture
def statements() -> list[dict[str, Any]]:
    policy = json.loads((INFRA / "iam-policy.json").read_text())
    assert policy.keys() == {"Version", "Statement"} and policy["Version"] == "2012-10-17"
    return policy["Statement"]


@pytest.fixture
def lifecycle() -> dict[str, Any]:
    return json.loads((INFRA / "lifecycle.json").read_text())


def as_set(value: str | list[str]) -> set[str]:
    return {value} if isinstance(value, str) else set(value)


def actions_on(statements: list[dict[str, Any]], resource: str) -> set[str]:
    return {
        action
        for s in statements
        if resource in as_set(s["Resource"])
        for action in as_set(s["Action"])
    }


def test_statements_are_plain_allowances_with_names_of_their_own(
    statements: list[dict[str, Any]],
) -> None:
    for statement in statements:
        assert statement.keys() - {"Condition"} == {"Sid", "Effect", "Action", "Resource"}
        assert statement["Effect"] == "Allow" and re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"])
    assert len({statement["Sid"] for statement in statements}) == len(statements)


def test_every_action_stands_for_operations_that_s3_has(
    statements: list[dict[str, Any]], s3: Any
) -> None:
    actions = {action for statement in statements for action in as_set(statement["Action"])}
    assert actions == OPERATIONS.keys()
    assert {operation for action in actions for operation in OPERATIONS[action]} <= set(
        s3.operation_names
    )


def test_run_root_may_be_written_and_the_source_only_read(statements: list[dict[str, Any]]) -> None:
    object_actions = {
        "s3:GetObject",
        "s3:PutObject",
        "s3:DeleteObject",
        "s3:AbortMultipartUpload",
        "s3:ListMultipartUploadParts",
    }
    assert actions_on(statements, f"arn:aws:s3:::{RUN}/*") == object_actions
    assert actions_on(statements, "arn:aws:s3:::REPLACE-RUN-BUCKET") == {
        "s3:ListBucket",
        "s3:ListBucketMultipartUploads",
    }
    assert actions_on(statements, f"arn:aws:s3:::{SOURCE}/*") == {"s3:GetObject"}
    assert actions_on(statements, "arn:aws:s3:::REPLACE-SOURCE-BUCKET") == {"s3:ListBucket"}


def test_no_resource_lies_outside_the_two_prefixes(statements: list[dict[str, Any]]) -> None:
    resources = {resource for statement in statements for resource in as_set(statement["Resource"])}
    buckets = {f"arn:aws:s3:::{place.split('/')[0]}" for place in (RUN, SOURCE)}
    assert resources == buckets | {f"arn:aws:s3:::{place}/*" for place in (RUN, SOURCE)}


def test_listing_that_names_a_prefix_is_limited_to_it(statements: list[dict[str, Any]]) -> None:
    listings = [
        statement for statement in statements if "s3:ListBucket" in as_set(statement["Action"])
    ]
    assert len(listings) == 2
    for statement in listings:
        # the condition's key is unknown to other actions, which it would deny
        assert as_set(statement["Action"]) == {"s3:ListBucket"}
        prefix = statement["Resource"].removeprefix("arn:aws:s3:::").replace("-BUCKET", "-PREFIX")
        # IfExists: without the right to list, a missing object reads as 403, not 404, and that
        # check may come without a prefix (infra/README.md).
        assert statement["Condition"] == {
            "StringLikeIfExists": {"s3:prefix": [prefix, f"{prefix}/*"]}
        }


def test_policy_allows_every_operation_that_the_s3_store_calls(s3: Any) -> None:
    methods = {xform_name(operation): operation for operation in s3.operation_names}
    allowed = set().union(*OPERATIONS.values())
    called = set()
    for path in (REPO / "p48ray" / "store" / "s3").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in methods:
                called.add(methods[node.attr])
            # get_paginator("list_objects_v2")
            if isinstance(node, ast.Constant) and node.value in methods:
                called.add(methods[node.value])
    assert called and called <= allowed


def test_lifecycle_is_what_s3_takes(lifecycle: dict[str, Any], s3: Any) -> None:
    shape = s3.operation_model("PutBucketLifecycleConfiguration").input_shape
    report = ParamValidator().validate({"Bucket": "b", "LifecycleConfiguration": lifecycle}, shape)
    assert not report.has_errors(), report.generate_report()
    assert all(rule["Status"] == "Enabled" for rule in lifecycle["Rules"])
    assert len({rule["ID"] for rule in lifecycle["Rules"]}) == len(lifecycle["Rules"])
    broken = {"Rules": [{"Status": "Enabled", "Expiration": {"Day": 3}}]}
    assert (
        ParamValidator()
        .validate({"Bucket": "b", "LifecycleConfiguration": broken}, shape)
        .has_errors()
    )


def test_unfinished_uploads_are_aborted_everywhere_in_the_run_root(
    lifecycle: dict[str, Any],
) -> None:
    (rule,) = [rule for rule in lifecycle["Rules"] if "AbortIncompleteMultipartUpload" in rule]
    assert rule["Filter"] == {"Prefix": "REPLACE-RUN-PREFIX/"} and "Expiration" not in rule
    # longer than any job, see activeDeadlineSeconds
    assert 3 <= rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] <= 14


def test_only_what_capture_can_make_again_expires_and_after_any_pause(
    lifecycle: dict[str, Any],
) -> None:
    days = {
        rule["Filter"]["Prefix"]: rule["Expiration"]["Days"]
        for rule in lifecycle["Rules"]
        if "Expiration" in rule
    }
    streams = (
        run_root.ACTIVATIONS,
        run_root.GRADIENTS,
        run_root.RESIDUALS,
        run_root.RESIDUAL_GRADIENTS,
    )
    assert days.keys() == {f"REPLACE-RUN-PREFIX/{prefix}" for prefix in streams}
    # parts of one run that vanish on different days would be a run half there
    assert len(set(days.values())) == 1
    assert set(days.values()).pop() > 2 * LONGEST_PAUSE_DAYS
