"""The bucket as Terraform would make it, read from its files: there is no Terraform here to plan with."""

from pathlib import Path
from typing import Any

import hcl2
import pytest

from tests.builders.installation import INFRA

TERRAFORM = INFRA / "terraform"
Blocks = dict[tuple[str, ...], dict[str, Any]]


def plain(value: Any) -> Any:
    """Without the quotes and marks of newer versions of the parser."""
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items() if not str(key).startswith("__")}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.strip('"') if isinstance(value, str) else value


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    """Resources and data by kind and name."""
    bodies: Blocks = {}
    for path in TERRAFORM.glob("*.tf"):
        with path.open() as file:
            parsed = plain(hcl2.load(file))
        for each in [*parsed.get("resource", []), *parsed.get("data", [])]:
            for kind, blocks_by_name in each.items():
                bodies |= {(kind, name): body for name, body in blocks_by_name.items()}
    return bodies


def only(value: Any) -> dict[str, Any]:
    (item,) = value
    assert isinstance(item, dict)
    return item


def test_the_bucket_is_encrypted_private_and_versioned(blocks: Blocks) -> None:
    encryption = only(blocks["aws_s3_bucket_server_side_encryption_configuration", "darkroom"]["rule"])
    assert "apply_server_side_encryption_by_default" in encryption
    access = blocks["aws_s3_bucket_public_access_block", "darkroom"]
    closed = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert all(access[name] is True for name in closed)
    assert only(blocks["aws_s3_bucket_versioning", "darkroom"]["versioning_configuration"])["status"] == "Enabled"
    rules = {rule["id"]: rule for rule in blocks["aws_s3_bucket_lifecycle_configuration", "darkroom"]["rule"]}
    assert only(rules["abort-incomplete-uploads"]["abort_incomplete_multipart_upload"])["days_after_initiation"] == 7
    assert "noncurrent_days" in only(rules["forget-deleted"]["noncurrent_version_expiration"])
    assert all(rule["status"] == "Enabled" for rule in rules.values())


def test_terraform_uses_the_tested_policy_files() -> None:
    text = (TERRAFORM / "main.tf").read_text()
    assert 'templatefile("${path.module}/../policies/bucket.json", { bucket = var.bucket })' in text
    assert 'templatefile("${path.module}/../policies/${each.key}.json", { bucket = var.bucket })' in text
    for path in (INFRA / "policies").glob("*.json"):
        assert f'"{path.stem}"' in text or path.stem == "bucket"


def test_no_file_names_an_account_or_a_key() -> None:
    for path in [*TERRAFORM.glob("*"), *Path(INFRA / "policies").glob("*")]:
        assert "AKIA" not in path.read_text()
        assert "access_key" not in path.read_text()
