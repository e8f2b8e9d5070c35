"""S3 requests evaluated by IAM policies, as Amazon documents it.

No server that can be had here knows the condition keys ``s3:if-none-match`` and ``s3:ObjectCreationOperation``:
SeaweedFS 4.48 and Ceph 18.2 take them for missing, whatever the request says. So tests evaluate requests with this,
before a real server gets them.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

from tests.builders.s3_proxy import Request

Statement = dict[str, Any]


class Action(NamedTuple):
    """What a request needs to be allowed."""

    name: str
    key: str
    """Empty: it is on the bucket."""
    creates: bool = False
    """Whether an object appears by it."""


def actions_of(request: Request) -> list[Action]:
    """All that ``request`` needs, by the service authorization reference."""
    method, key, query = request.method, request.key, request.query
    if not key:
        if method == "POST" and "delete" in query:
            elements = ElementTree.fromstring(request.body).iter()  # of our own client
            return [Action("s3:DeleteObject", each.text or "") for each in elements if each.tag.endswith("Key")]
        if method == "GET" and "uploads" in query:
            return [Action("s3:ListBucketMultipartUploads", "")]
        assert method in {"GET", "HEAD"}, request
        return [Action("s3:ListBucket", "")]
    if method in {"GET", "HEAD"}:
        return [Action("s3:ListMultipartUploadParts" if "uploadId" in query else "s3:GetObject", key)]
    if method == "DELETE":
        return [Action("s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject", key)]
    source = request.headers.get("x-amz-copy-source", "").lstrip("/").partition("/")[2]
    copied = [Action("s3:GetObject", source)] if source else []
    if method == "PUT":
        return [*copied, Action("s3:PutObject", key, creates="partNumber" not in query)]
    assert method == "POST"
    return [Action("s3:PutObject", key, creates="uploadId" in query)]


def is_allowed(request: Request, bucket: str, policies: Iterable[Sequence[Statement]]) -> bool:
    """Whether one statement of ``policies`` allows each action of ``request`` on ``bucket``, and none denies it."""
    statements = [statement for policy in policies for statement in policy]
    for action in actions_of(request):
        # The proxy is reached without TLS, and stands for a server that is not.
        context = {"aws:SecureTransport": "true"}
        if "If-None-Match" in request.headers:
            context["s3:if-none-match"] = request.headers["If-None-Match"]
        if action.name == "s3:PutObject":
            context["s3:ObjectCreationOperation"] = str(action.creates).lower()
        resource = f"arn:aws:s3:::{bucket}" + (f"/{action.key}" if action.key else "")
        effects = {each["Effect"] for each in statements if _applies(each, action.name, resource, context)}
        if effects != {"Allow"}:
            return False
    return True


def _applies(statement: Statement, action: str, resource: str, context: dict[str, str]) -> bool:
    return (
        any(_matches(pattern, action) for pattern in statement["Action"])
        and any(_matches(pattern, resource) for pattern in statement["Resource"])
        and all(
            _holds(operator, context.get(key), value)
            for operator, pairs in statement.get("Condition", {}).items()
            for key, value in pairs.items()
        )
    )


def _matches(pattern: str, name: str) -> bool:
    parts = (".*" if letter == "*" else "." if letter == "?" else re.escape(letter) for letter in pattern)
    return re.fullmatch("".join(parts), name, re.DOTALL) is not None


def _holds(operator: str, actual: str | None, value: str) -> bool:
    if operator == "Null":
        return (actual is None) == (value == "true")
    assert operator == "Bool", operator
    return actual == value
