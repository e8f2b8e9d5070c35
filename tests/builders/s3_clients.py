"""Stock S3 clients."""

import boto3


def stock(variables: dict[str, str]):
    """A client as any other user of the bucket would make it."""
    return boto3.session.Session().client("s3", endpoint_url=variables["AWS_ENDPOINT_URL_S3"])
